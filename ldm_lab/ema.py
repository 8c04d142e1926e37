"""Moving averages of a model's weights: exponential ones with a decay that tightens in stages, and power-function ones.

A power-function average (Karras et al. 2024, arXiv 2312.02696, section 3.1) weighs the weights after update u of t by
(u / t)^exponent: it forgets the beginning however long training goes on, and its width, the standard deviation of that
profile as a share of t, stays the same. From snapshots of two of them one of any other width is put together later.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ldm_lab.config import NonNegativeInt, ShareBelowOne, register
from ldm_lab.sharded import local


@register("ema")
class EMASchedule:
    """Decay of the moving average by optimizer steps done: decay[i] holds from step from_step[i] on."""

    def __init__(
        self,
        *,
        from_step: list[NonNegativeInt] = (0, 20_000, 200_000),
        decay: list[ShareBelowOne] = (0.99, 0.999, 0.9999),
    ) -> None:
        """Set the stages; the defaults are cloob-latent-diffusion's.

        Args:
            from_step: optimizer steps at which the stages begin, the first one at 0; fine-tunes of n steps want them
                scaled to n.
            decay: of each stage: the share of the average that stays in a step.
        """
        self.from_step, self.decay = list(from_step), list(decay)

    @staticmethod
    def check(*, from_step: Sequence[int], decay: Sequence[float]) -> list[str]:
        """Return what is wrong across the options."""
        if len(from_step) != len(decay):
            return [f"decay: {len(decay)} values for {len(from_step)} values of from_step"]
        if list(from_step) != sorted(from_step) or list(from_step[:1]) != [0]:
            return [f"from_step: rising step counts that begin with 0 are needed, not {list(from_step)}"]
        return []

    def at(self, step: int) -> float:
        """Return the decay after `step` completed optimizer steps."""
        return [d for start, d in zip(self.from_step, self.decay) if step >= start][-1]


def averaged_copy(model: nn.Module, share_frozen: bool = False) -> nn.Module:
    """Return a frozen copy of a model, to be kept as its average.

    Args:
        model: the model.
        share_frozen: let the copy have the model's own frozen parameters, which take no memory a second time.
    """
    shared = {id(p): p for p in model.parameters() if share_frozen and not p.requires_grad}
    return copy.deepcopy(model, shared).eval().requires_grad_(False)


FLAG_KERNEL = "cuda"  # where `move_at_once` is worth it


def goes_at_once(mine: torch.Tensor, its: torch.Tensor) -> bool:
    """Return whether the one kernel that takes a flag can move a tensor toward another one.

    It walks through the memory of both: they have to lie alike, without gaps, in one dtype on one device. Those of a
    model do not lie as its average's after `model.to(memory_format=torch.channels_last)`, say.
    """
    lie_alike = mine.stride() == its.stride() and torch.ops.aten.is_non_overlapping_and_dense(mine)
    return mine.device.type == FLAG_KERNEL and mine.device == its.device and mine.dtype == its.dtype and lie_alike


@dataclass(frozen=True)
class Alike:
    """Tensors of an average and those of its model that are moved by one call.

    Attributes:
        moved: of the average, of one dtype on one device.
        toward: of the model, of one dtype.
        at_once: whether `move_at_once` can.
    """

    moved: list[torch.Tensor]
    toward: list[torch.Tensor]
    at_once: bool

    def toward_as_moved(self) -> list[torch.Tensor]:
        """Return the model's in the average's dtype, on its device."""
        mine, its = self.moved[0], self.toward[0]
        if (mine.dtype, mine.device) == (its.dtype, its.device):
            return self.toward
        return [each.to(mine.device, mine.dtype, non_blocking=True) for each in self.toward]


class Pairs:
    """The tensors of an average beside those of its model, listed once instead of in every step."""

    def __init__(self, average: nn.Module, model: nn.Module) -> None:
        """List them, once the parameters are those that are trained: not before a strategy has replaced any.

        Args:
            average: a copy of the model (`averaged_copy`).
            model: the network.
        """
        self.average, self.model = average, model
        pairs = list(zip(average.parameters(), model.parameters(), strict=True))
        # Of what several processes share, each one's own.
        trained = [(local(mine), local(its.detach())) for mine, its in pairs if its.requires_grad]
        kinds: dict[tuple[torch.device, torch.dtype, torch.dtype, bool], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for mine, its in trained:
            kinds.setdefault((mine.device, mine.dtype, its.dtype, goes_at_once(mine, its)), []).append((mine, its))
        self.kinds = [
            Alike([mine for mine, _ in alike], [its for _, its in alike], at_once)
            for (*_, at_once), alike in kinds.items()
        ]
        apart = [(mine, its) for mine, its in pairs if not its.requires_grad and mine is not its]
        self.copied = [(local(mine), local(its.detach())) for mine, its in apart]

    @torch.no_grad()
    def update(self, decay: float, left_out: torch.Tensor | None = None) -> None:
        """Move the average toward the model in one pass: average * decay + model * (1 - decay).

        Buffers and frozen parameters are copied: what does not move must not change by rounding either.

        Args:
            decay: share of the average that stays.
            left_out: 1 if the model's step was left out, and the average does not move either, else 0: float [].
        """
        for alike in self.kinds:
            toward = alike.toward_as_moved()
            if left_out is None:
                torch._foreach_lerp_(alike.moved, toward, 1 - decay)
            else:
                move = move_at_once if alike.at_once else move_one_by_one
                move(alike.moved, toward, 1 - decay, left_out)
        for mine, its in (*self.copied, *zip(self.average.buffers(), self.model.buffers(), strict=True)):
            mine.copy_(its)


def move_one_by_one(
    moved: list[torch.Tensor], toward: list[torch.Tensor], share: float, left_out: torch.Tensor
) -> None:
    """Move tensors of one dtype by a share of the way toward others, unless the flag, float [], is 1.

    Bit for bit as without a flag; on CUDA it would launch a kernel for each tensor.
    """
    weight = (1 - left_out.to(moved[0].dtype)) * share  # []
    torch._foreach_lerp_(moved, toward, [weight] * len(moved))


def move_at_once(moved: list[torch.Tensor], toward: list[torch.Tensor], share: float, left_out: torch.Tensor) -> None:
    """Move tensors of one dtype by a share of the way toward others, unless the flag, float [], is 1.

    The host need not know the flag. It is read by the one kernel of torch that takes one for many tensors, that of
    fused SGD: with the weights w toward which x moves as its gradient, and a weight decay of 1,
    x - share * (x - w), which differs from `move_one_by_one` by rounding. On MPS it takes no flag.
    """
    torch._fused_sgd_(
        moved, toward, [], weight_decay=1.0, momentum=0.0, lr=share, dampening=0.0, nesterov=False, maximize=True,
        is_first_step=False, found_inf=left_out.float(),
    )  # fmt: skip


def update(average: nn.Module, model: nn.Module, decay: float, left_out: torch.Tensor | None = None) -> None:
    """Move `average` toward `model` once; whoever does it every step keeps the `Pairs`."""
    Pairs(average, model).update(decay, left_out)


WIDEST = 0.28  # width of a power-function average; with exponent 0, the plain mean, it is 0.289


@dataclass(frozen=True)
class PowerAverage:
    """Which average a snapshot holds.

    Attributes:
        width: the standard deviation of its profile, as a share of the time since the beginning.
        updates: optimizer steps that it has seen.
    """

    width: float
    updates: int

    @property
    def exponent(self) -> float:
        """The exponent of the profile (arXiv 2312.02696, appendix C.2)."""
        inverse = self.width**-2
        return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())

    def decay(self) -> float:
        """Return the share of the average that stays in update number `updates`, 0 in the first (section 3.1)."""
        return (1 - 1 / self.updates) ** (self.exponent + 1)

    def overlap(self, other: "PowerAverage") -> float:
        """Return the inner product of two profiles (arXiv 2312.02696, appendix C.3)."""
        early, late = (self, other) if self.updates < other.updates else (other, self)
        shrunk = (early.updates / late.updates) ** late.exponent
        return (early.exponent + 1) * (late.exponent + 1) * shrunk / (early.exponent + late.exponent + 1) / late.updates


def combination(snapshots: Sequence[PowerAverage], wanted: PowerAverage) -> tuple[list[float], float]:
    """Return by what to multiply snapshots so that they add up to another average, and what is missing.

    Returns:
        A factor for each snapshot (least squares over the profiles, arXiv 2312.02696, section 3.2), and the distance of
        the sum from the wanted profile as a share of the wanted one, 0 to 1.
    """
    between = np.array([[one.overlap(other) for other in snapshots] for one in snapshots])  # [n, n]
    toward = np.array([one.overlap(wanted) for one in snapshots])  # [n]
    factors = np.linalg.lstsq(between, toward, rcond=1e-14)[0]  # [n]
    whole = wanted.overlap(wanted)
    left = whole - 2 * factors @ toward + factors @ between @ factors
    return factors.tolist(), float(np.sqrt(max(left, 0.0) / whole))
