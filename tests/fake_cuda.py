"""Tensors of a GPU that is not there: they have shapes and a device, and no numbers.

What is done with them alone, or with them and a CPU's, is checked as on a GPU: tensors of two devices in one operation
are refused, and so is what would have to wait for a GPU's numbers. A CPU's own tensors stay real.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda")
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)


class FakeCuda(FakeTensorMode):
    """The mode in which there is such a GPU.

    Attributes:
        waits: what has made the host wait for it, by name: copies between the two, and indices on the CPU.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        on_gpu = [leaf for leaf in leaves if isinstance(leaf, FakeTensor)]
        if not on_gpu and not any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves):
            return func(*args, **kwargs)
        on_cpu = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type == "cpu"]
        to_cpu = kwargs.get("device") == torch.device("cpu")
        if func in COPIES and (to_cpu or (on_cpu and not kwargs.get("non_blocking") and True not in args[2:])):
            self.waits.append(f"{func}: a copy from the {'GPU' if to_cpu else 'CPU'} of {list(leaves[0].shape)}")
        if func in INDEXED and on_cpu:
            self.waits.append(f"{func}: indices on the CPU")
        if func is torch.ops.aten._fused_sgd_.default:  # in place, and torch has no way of its own without numbers
            assert len(on_gpu) == len([leaf for leaf in leaves if isinstance(leaf, Tensor)]), "tensors of two devices"
            return None
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Have the GPU for a while."""
    with FakeCuda() as mode:
        yield mode


def to_gpu(module: nn.Module) -> nn.Module:
    """Have a module's parameters and buffers on the GPU, and return it."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                moved = nn.Parameter(torch.empty_like(value, device=CUDA), value.requires_grad)
                part._parameters[name] = moved
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = torch.empty_like(value, device=CUDA)
    return module
