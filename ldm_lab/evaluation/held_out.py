"""The loss on samples that training never sees, at fixed noise and times: what two checkpoints can be compared by."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm_lab.conditions import Conditions
from ldm_lab.interfaces import Denoiser, Objective

QUARTERS = 4  # of [0, 1), by which losses are told apart
GOLDEN = (5**0.5 - 1) / 2  # its multiples, modulo 1, lie evenly wherever one stops


@dataclass(frozen=True)
class HeldOutBatch:
    """Encoded samples, and what their noise and times follow from.

    Attributes:
        x0: clean samples, [B, C, h, w].
        conditions: of the rows.
        first: number of the first sample among all held-out ones; row i is sample first + i.
        count: rows that count; those behind them only keep several processes in step.
        numbers: of the rows, where they do not count on from `first`, int64 [B].
    """

    x0: Tensor
    conditions: Conditions
    first: int
    count: int
    numbers: Tensor | None = None

    def to(self, device: torch.device) -> "HeldOutBatch":
        """Return the batch on a device."""
        conditions = {name: value.to(device) for name, value in self.conditions.items()}
        return replace(self, x0=self.x0.to(device), conditions=conditions)


@torch.no_grad()
def loss_sums(
    denoiser: Denoiser, objective: Objective, batches: Iterable[HeldOutBatch], levels: int, seed: int
) -> Tensor:
    """Return sums of losses and how many went into them by quarter of t, float64 [2, 4], on the batches' device.

    Every sample is looked at `levels` times, at times that together cover [0, 1) evenly, as the objective trains them.
    Noise and times follow from the seed and the sample's number, whatever the batches are.

    Args:
        denoiser: in evaluation mode.
        objective: whose loss is measured.
        batches: where the denoiser is.
        levels: times per sample.
        seed: of the noise.
    """
    sums = None
    for batch in batches:
        if sums is None:
            sums = torch.zeros(2, QUARTERS, dtype=torch.float64).to(batch.x0.device)
        numbers = torch.arange(batch.first, batch.first + len(batch.x0))  # [B]
        numbers = (numbers if batch.numbers is None else batch.numbers).double()  # [B]
        for level in range(levels):
            u = (level + (numbers * GOLDEN) % 1) / levels  # [B]
            t = objective.times(u.float()).to(batch.x0)  # [B]
            noise = torch.stack([noise_of(batch.x0[0], seed, int(number), level) for number in numbers]).to(batch.x0)
            losses = objective.loss_terms(denoiser, batch.x0, batch.conditions, t, noise)["loss"].double()  # [B]
            counts = (torch.arange(len(t)) < batch.count).to(losses)  # [B]
            quarter = (t * QUARTERS).long().clamp(max=QUARTERS - 1)  # [B]
            sums[0].index_add_(0, quarter, losses * counts)
            sums[1].index_add_(0, quarter, counts)
    return torch.zeros(2, QUARTERS, dtype=torch.float64) if sums is None else sums


def noise_of(like: Tensor, seed: int, number: int, level: int) -> Tensor:
    """Return the noise of a sample at one of its times, float32 of the shape of `like`, on the CPU."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number) * 1_009 + level)
    return torch.randn(like.shape, generator=generator)
