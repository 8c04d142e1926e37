"""The network compiled by torch: a few fused kernels in place of many small ones.

It is done in place, so that names of weights, averages, exports and checkpoints know nothing of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from ldm_lab.errors import UserError, first_line
from ldm_lab.interfaces import Denoiser

# none    torch's kernels one by one
# blocks  each of the network's blocks by itself (`Denoiser.block_types`): compiled once for each kind and shape
# model   the network as a whole: the fewest kernels, and the longest wait before the first step
Compile = Literal["none", "blocks", "model"]


def compile_network(network: Denoiser, what: Compile, checkpoints: bool = False, backend: str = "inductor") -> str:
    """Have a network compiled when it first runs; return what is, in words.

    Args:
        network: whose weights and names stay as they are.
        what: see above, not "none"; a network that names no blocks is taken as a whole.
        checkpoints: it recomputes blocks in the backward pass (`gradient_checkpointing`).
        backend: of torch.compile.
    """
    from torch._dynamo import config  # takes a second

    blocks = network.block_modules() if what == "blocks" else []
    modules = blocks or [network]
    # Blocks of a kind share their code, which torch compiles for 8 shapes and then gives up on without an error.
    config.recompile_limit = max(config.recompile_limit, 4 * len(modules))
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 16 * len(modules))
    if checkpoints and not blocks:
        config.optimize_ddp = (
            False  # it would split the graph for DDP's buckets, which it cannot do inside a checkpoint
        )
    for module in modules:
        module.compile(backend=backend, dynamic=False)
    return f"trainer.compile: {f'{len(blocks)} blocks' if blocks else 'the network as a whole'}, when they first run"


@contextmanager
def compiler_told_in_one_line(what: Compile) -> Iterator[None]:
    """Turn the pages of a compiler that fails, or is not there, into a UserError."""
    if what == "none":
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        told = next((line for line in str(error).splitlines() if ": " in line), first_line(error))
        raise UserError(
            f"trainer.compile={what}: torch could not compile the network: {told[:300]}; trainer.compile=none trains "
            "without"
        ) from error
