"""Exponential moving average of a model's weights, with a decay that tightens in stages."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from ldm_lab.config import NonNegativeInt, ShareBelowOne, register


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


def averaged_copy(model: nn.Module) -> nn.Module:
    """Return a frozen copy of a model, to be kept as its average."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def update(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move `average` toward `model`: average * decay + model * (1 - decay).

    Buffers and frozen parameters are copied: what does not move must not change by rounding either.
    """
    pairs = list(zip(average.parameters(), model.parameters()))
    ours: Sequence[torch.Tensor] = [mine for mine, its in pairs if its.requires_grad]
    theirs = [its.detach().to(mine.dtype) for mine, its in pairs if its.requires_grad]
    for mine, its in pairs:
        if not its.requires_grad:
            mine.copy_(its)
    torch._foreach_mul_(ours, decay)
    torch._foreach_add_(ours, theirs, alpha=1 - decay)
    for mine, its in zip(average.buffers(), model.buffers()):
        mine.copy_(its)
