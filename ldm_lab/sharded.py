"""Tensors of which each process of a run holds a share (torch's DTensor): that share, and the whole of them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """Return this process's share of a tensor, perhaps an empty one, in the same memory; of an ordinary one all."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor | None:
    """Return all of a tensor: on the first process on the CPU, elsewhere None; an ordinary one as it is.

    All processes have to call it, for the same tensors in the same order.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    gathered = tensor.full_tensor()
    return gathered.cpu() if torch.distributed.get_rank() == 0 else None


def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all of each tensor, by name; what is shared out is there on the first process alone, as in `whole`."""
    gathered = {name: whole(tensor) for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in gathered.items() if tensor is not None}


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state dict with all of each tensor; all processes have to call it, as `whole`."""
    return whole_tensors(module.state_dict())


def is_sharded(module: nn.Module) -> bool:
    """Return whether the processes share a network, so that it runs only where all of them run it."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def shared_like(value: Tensor, tensor: Tensor) -> Tensor:
    """Return a value that every process has all of, shared out as `tensor` is; as it is where `tensor` is ordinary."""
    if not isinstance(tensor, DTensor) or isinstance(value, DTensor):
        return value
    shares = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return shares.clone()  # the share alone, which else would keep all of the value in memory


def load_shares(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict of whole tensors into a module, of which this process may hold shares."""
    own = module.state_dict()
    module.load_state_dict({n: shared_like(value, own[n]) if n in own else value for n, value in state.items()})
