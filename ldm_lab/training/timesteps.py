"""How training timesteps are drawn: t in [0, 1), one per sample."""

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from ldm_lab.interfaces import TimestepSampler


class SobolTimesteps:
    """Scrambled one-dimensional Sobol points: over any stretch of samples t covers [0, 1) evenly.

    One sequence for the whole run: rank r of n takes the r-th slice of each global batch, so that the even cover is
    that of the global batch. The position follows from the number of batches drawn, so there is no state to save.
    (cloob-latent-diffusion draws from one unsaved engine per process.)
    """

    PERIOD = 2**30  # points that SobolEngine can draw before it repeats; a new scramble follows

    def __init__(self, seed: int, rank: int, world_size: int) -> None:
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.engine: SobolEngine | None = None
        self.block = -1

    def __call__(self, batch: int, batch_size: int) -> Tensor:
        """Return the timesteps of batch number `batch` of the run, this rank's share, float32 [batch_size]."""
        share = batch_size * self.world_size
        per_block = self.PERIOD // share
        block, inside = divmod(batch, per_block)
        if self.engine is None or block != self.block or self.engine.num_generated > inside * share:
            self.engine = SobolEngine(1, scramble=True, seed=self.seed + block)  # type: ignore[no-untyped-call]
            self.block = block
        if self.engine.num_generated < inside * share:
            self.engine.fast_forward(inside * share - self.engine.num_generated)  # type: ignore[no-untyped-call]
        points = self.engine.draw(share)[:, 0]  # [share]
        return points.view(self.world_size, batch_size)[self.rank]  # [batch_size]


class UniformTimesteps:
    """Independent uniform draws from torch's global generator."""

    def __init__(self, seed: int, rank: int, world_size: int) -> None:
        """The arguments are those of every way of drawing; the seed is that of the global generator."""

    def __call__(self, batch: int, batch_size: int) -> Tensor:
        """Return float32 [batch_size] in [0, 1)."""
        return torch.rand(batch_size)  # [batch_size]


TIMESTEP_SAMPLERS: dict[TimestepSampler, type[SobolTimesteps] | type[UniformTimesteps]] = {
    "sobol": SobolTimesteps,
    "uniform": UniformTimesteps,
}
