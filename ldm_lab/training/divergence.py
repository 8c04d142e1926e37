"""Steps that must not be learned from, found on the device: no decision waits for the host."""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

NORMAL_MAD = 1.4826  # standard deviation of a normal distribution over its median absolute deviation
LEAST_SPREAD = 1e-3  # of the median: losses that hardly vary are no reason to call the next one a spike


class Verdict(NamedTuple):
    """What was found of an optimizer step, on the device and, but for `losses`, equal on all ranks.

    Attributes:
        losses: of this rank's batches, [] each.
        loss: mean over batches and ranks, [].
        norm: of the gradient, before it was clipped, [].
        limit: above which the loss is a spike, []; infinite where none is looked for.
        event: 1 if the guard has to do something, else 0, float [].
        left_out: 1 if the step is left out, for this reason, an earlier one, or a scale of fp16 that was too large, [].
    """

    losses: tuple[Tensor, ...]
    loss: Tensor
    norm: Tensor
    limit: Tensor
    event: Tensor
    left_out: Tensor


class SpikesState(TypedDict):
    """What a checkpoint keeps of the statistic: the losses, float32 [window], and how many there have been."""

    losses: Tensor
    seen: int


class Spikes:
    """The losses of the last steps that were learned from: their median, and how far they lie from it."""

    def __init__(self, factor: float, window: int) -> None:
        """Set what a spike is.

        Args:
            factor: how many times the spread of the losses (1.48 times the median absolute deviation, the standard
                deviation of normal ones) a spike is above the median.
            window: steps that are looked back at; before there are as many, nothing is a spike.
        """
        self.factor, self.window = factor, window
        self.seen = 0
        self.losses = torch.full((window,), torch.inf)  # [window]; infinite ones sort last and do no harm

    def limit(self, device: torch.device) -> Tensor:
        """Return the loss, [], above which one is a spike."""
        self.losses = self.losses.to(device)
        if self.seen < self.window:
            return self.losses.new_full((), torch.inf)  # []
        median = self.losses.median()  # []
        spread = (self.losses - median).abs().median() * NORMAL_MAD  # []
        return median + self.factor * torch.maximum(spread, median.abs() * LEAST_SPREAD)  # []

    def add(self, loss: Tensor, left_out: Tensor) -> None:
        """Take a loss, [], in the place of the oldest, unless its step is left out (1 and not 0, [])."""
        oldest = self.losses[self.seen % self.window]  # []
        oldest.copy_(torch.where(left_out > 0, oldest, loss))
        self.seen += 1

    def state_dict(self) -> SpikesState:
        """Return the statistic for a checkpoint."""
        return {"losses": self.losses.cpu(), "seen": self.seen}

    def load_state_dict(self, state: SpikesState) -> None:
        """Go on with a checkpoint's; one over another number of steps is begun anew."""
        if len(state["losses"]) == self.window:
            self.losses, self.seen = state["losses"].clone(), state["seen"]


class Detector:
    """Looks at the loss and the gradient of each optimizer step before it reaches the weights.

    Attributes:
        spikes: what a spike of the loss is; None looks for none.
        last: of the step that was looked at last.
    """

    def __init__(self, holds: bool = True, holds_spikes: bool = True) -> None:
        """Set what comes after an event.

        Args:
            holds: after a loss or gradient that is not finite all further steps are left out until the host has heard
                of it (`release`); False leaves out the one step.
            holds_spikes: the same for a spike.
        """
        self.holds, self.holds_spikes = holds, holds_spikes
        self.spikes: Spikes | None = None
        self.last: Verdict | None = None
        self._losses: list[Tensor] = []
        self._held: Tensor | None = None

    def add(self, loss: Tensor) -> None:
        """Take the loss of a batch, [], as a share of its step's: those of all batches of the step add up to it."""
        self._losses.append(loss.detach())

    def judge(self, norm: Tensor, scaled: bool) -> Tensor:
        """Return whether the step is to be left out, as 1 or 0, float32 [].

        Args:
            norm: of its gradient, [].
            scaled: a scaler of fp16 lowers its factor where the gradient is not finite, which is no event.
        """
        losses, self._losses = tuple(self._losses), []
        loss = torch.stack(losses).float().sum()  # [], also of batches that are not finite
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(loss)  # so that all ranks decide alike
            loss = loss / torch.distributed.get_world_size()  # []
        overflow = ~torch.isfinite(norm)  # []
        nonfinite = ~torch.isfinite(loss)  # []
        nonfinite = (nonfinite if scaled else nonfinite | overflow).float()  # []
        limit, spike = self._spike(loss)
        event = torch.maximum(nonfinite, spike)  # []
        left_out = torch.maximum(event, overflow.float())  # []
        if self.holds or self.holds_spikes:
            lasting = event if self.holds and self.holds_spikes else nonfinite if self.holds else spike  # []
            self._held = lasting if self._held is None else torch.maximum(self._held, lasting)
            left_out = torch.maximum(left_out, self._held)
        if self.spikes is not None:
            self.spikes.add(loss, left_out)
        self.last = Verdict(losses, loss, norm, limit, event, left_out)
        return left_out

    def _spike(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Return above which loss one is a spike, and whether this one is, as 1 or 0, [] each."""
        if self.spikes is None:
            return torch.full_like(loss, torch.inf), torch.zeros_like(loss)
        limit = self.spikes.limit(loss.device)  # []
        return limit, ((loss > limit) & torch.isfinite(loss)).float()

    def release(self) -> None:
        """Learn from further steps again."""
        self._held = None


def total_norm(norms: Sequence[Tensor]) -> Tensor:
    """Return the norm, [], of gradients with these norms, [] each."""
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack([*norms]))
