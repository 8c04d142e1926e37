"""A good state of training in main memory, to go back to."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ldm_lab.sharded import local
from ldm_lab.training.task import Task


class Snapshot:
    """A copy of all that optimizer steps change: weights, averages, the optimizer's state, the scale of fp16.

    Counters, the course of the learning rate and the position in the data are not part of it: time goes on.

    Attributes:
        step: optimizer steps done when it was taken.
    """

    def __init__(self) -> None:
        self.step = -1
        self._tensors: list[Tensor] = []
        self._states: dict[nn.Parameter, dict[str, Tensor | float]] = {}  # of the optimizer
        self._scaler: dict[str, float] = {}

    @torch.no_grad()
    def take(self, task: Task) -> None:
        """Copy the state as it is now."""
        self.step = task.trainer.global_step
        if not self._tensors:
            self._tensors = [torch.empty_like(tensor, device="cpu") for tensor in changing_tensors(task)]
        for kept, tensor in zip(self._tensors, changing_tensors(task), strict=True):
            kept.copy_(tensor)
        for parameter, state in task.trainer.optimizers[0].state.items():
            kept_state = self._states.setdefault(parameter, {})
            for key, value in ((key, here(value)) for key, value in state.items()):
                before = kept_state.get(key)
                if isinstance(value, Tensor) and isinstance(before, Tensor):
                    before.copy_(value)
                else:
                    kept_state[key] = value.to("cpu", copy=True) if isinstance(value, Tensor) else value
        self._scaler = {} if task.scaler is None else task.scaler.state_dict()

    @torch.no_grad()
    def put_back(self, task: Task) -> None:
        """Go back to the state that was copied."""
        for kept, tensor in zip(self._tensors, changing_tensors(task), strict=True):
            tensor.copy_(kept)
        optimizer = task.trainer.optimizers[0]
        for parameter in [p for p in optimizer.state if p not in self._states]:  # it had not been trained yet
            del optimizer.state[parameter]
        for parameter, kept_state in self._states.items():
            state = optimizer.state[parameter]
            for key, value in kept_state.items():
                if isinstance(value, Tensor):
                    here(state[key]).copy_(value)
                else:
                    state[key] = value
        if task.scaler is not None:
            task.scaler.load_state_dict(self._scaler)


def changing_tensors(task: Task) -> Iterator[Tensor]:
    """Yield the tensors that optimizer steps change, this process's share of each, apart from the optimizer's own."""
    yield from map(local, task.state_dict().values())
    yield from map(local, task.followers)


def here(value: Tensor | float) -> Tensor | float:
    """Return this process's share of a tensor; numbers as they are."""
    return local(value) if isinstance(value, Tensor) else value
