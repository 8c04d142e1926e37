"""Networks whose weights come from a file: drawing others first takes longer than reading those."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# What fills a tensor with random numbers; torch's other ways of initializing are made of these.
DRAWS = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)


class _NoDraws(TorchFunctionMode):
    def __torch_function__(
        self,
        function: Callable[..., Tensor],
        types: Sequence[type],
        args: tuple[Tensor, ...] = (),
        options: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        if function in DRAWS:
            return args[0] if args else (options or {})["tensor"]
        return function(*args, **(options or {}))


@contextmanager
def no_initial_weights(follow: bool = True) -> Iterator[None]:
    """Leave the random weights of networks that are built here undrawn: whatever lies in memory is there.

    What is set to a number, or computed from the options, is as always; so are a few small parameters that are drawn in
    other ways. Torch's random numbers are not where they would be afterwards: nothing else may be drawn of them.

    Args:
        follow: whether all of these networks' weights are read behind this; if not, they are drawn as always.
    """
    with _NoDraws() if follow else nullcontext():
        yield


Module = TypeVar("Module", bound=nn.Module)


def built(make: Callable[[], Module], weights_follow: bool) -> tuple[Module, Callable[[], dict[str, Tensor]] | None]:
    """Return a module and, if its weights follow and are not drawn, what draws those that it would have.

    Args:
        make: returns it, as an initialized one.
        weights_follow: whether they are read behind this.
    """
    before = torch.get_rng_state()
    with no_initial_weights(weights_follow):
        module = make()

    def drawn() -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(before)
            return make().state_dict()

    return module, drawn if weights_follow else None
