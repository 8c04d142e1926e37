"""How training timesteps are drawn: t in [0, 1), one per sample."""

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from ldm_lab.interfaces import TimestepSampler


class SobolTimesteps:
    """Scrambled one-dimensional Sobol points: over any stretch of samples t covers [0, 1) evenly.

    One sequence for the whole run: each sample that is trained on takes the next point, rank r of n the r-th slice of
    each global batch. The position follows from the number of samples, whatever the batch size and the number of ranks
    were, and is found at once. (cloob-latent-diffusion draws from one unsaved engine per process.)
    """

    BITS = 30
    PERIOD = 2**BITS  # points before the sequence repeats; a new scramble follows

    def __init__(self, seed: int, rank: int, world_size: int) -> None:
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.block = -1
        self.shift = self.directions = torch.zeros(self.BITS, dtype=torch.int64)

    def __call__(self, samples: int, batch_size: int) -> Tensor:
        """Return this rank's timesteps of the batch behind so many samples of the run, float32 [batch_size]."""
        first = samples + self.rank * batch_size
        block, inside = divmod(first, self.PERIOD)
        fit = min(batch_size, self.PERIOD - inside)
        points = [self.points(block, inside, fit)]
        if fit < batch_size:
            points.append(self.points(block + 1, 0, batch_size - fit))
        return torch.cat(points)  # [batch_size]

    def points(self, block: int, first: int, count: int) -> Tensor:
        """Return consecutive points of one scramble, below 1, float32 [count]."""
        if block != self.block:
            engine = SobolEngine(1, scramble=True, seed=self.seed + block)  # type: ignore[no-untyped-call]
            self.block, self.shift, self.directions = block, engine.shift, engine.sobolstate[0]  # [1], [BITS]
        number = torch.arange(first, first + count)[:, None]  # [count, 1]
        digits = (number ^ number >> 1) >> torch.arange(self.BITS) & 1  # [count, BITS], of the Gray code
        terms = digits * self.directions  # [count, BITS]
        point = self.shift.expand(count)  # [count]
        for term in terms.unbind(1):
            point = point ^ term
        return (point.float() / self.PERIOD).clamp(max=1 - 2**-24)  # rounding makes 1 of the largest ones


class UniformTimesteps:
    """Independent uniform draws from torch's global generator."""

    def __init__(self, seed: int, rank: int, world_size: int) -> None:
        """The arguments are those of every way of drawing; the seed is that of the global generator."""

    def __call__(self, samples: int, batch_size: int) -> Tensor:
        """Return float32 [batch_size] in [0, 1)."""
        return torch.rand(batch_size)  # [batch_size]


TIMESTEP_SAMPLERS: dict[TimestepSampler, type[SobolTimesteps] | type[UniformTimesteps]] = {
    "sobol": SobolTimesteps,
    "uniform": UniformTimesteps,
}
