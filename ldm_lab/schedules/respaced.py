"""A schedule that is known at the times of a grid alone, as a respaced process is in the programs around GLIDE."""

import torch
from torch import Tensor

from ldm_lab.errors import UserError
from ldm_lab.interfaces import Schedule


class RespacedSchedule(Schedule):
    """alpha and sigma of a schedule at the times of a grid, interpolated linearly in between.

    Where variance is preserved their squares are interpolated, as in GLIDE's programs, so that it stays preserved;
    otherwise they are themselves.
    """

    def __init__(self, schedule: Schedule, times: Tensor) -> None:
        """Take the values at falling times [S], S >= 2."""
        self.variance_preserving, self.timesteps = schedule.variance_preserving, schedule.timesteps
        self.times = times.double().flip(0)  # [S], rising
        self.power = 2 if schedule.variance_preserving else 1
        self.values = torch.stack(schedule.alpha_sigma(self.times)) ** self.power  # [2, S]
        alpha, sigma = schedule.alpha_sigma(self.times[-1])  # [], []
        self.sigma_max = (sigma / alpha).item()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma, each of t's shape and dtype and where t is, for t between the grid's ends."""
        times = t.cpu().double()  # t's shape
        above = torch.searchsorted(self.times, times).clamp(1, len(self.times) - 1)  # t's shape
        share = (times - self.times[above - 1]) / (self.times[above] - self.times[above - 1])  # t's shape
        values = torch.lerp(self.values[:, above - 1], self.values[:, above], share)  # [2, *t's shape]
        alpha, sigma = values.sqrt() if self.power == 2 else values  # t's shape each
        return alpha.to(t), sigma.to(t)

    def t_of_sigma_over_alpha(self, ratio: Tensor) -> Tensor:
        """Return the t, of any shape, at which sigma / alpha is `ratio`; at most the grid's first time."""
        alpha, sigma = self.values  # [S], [S]
        wanted = ratio.double() ** self.power  # ratio's shape
        above = torch.searchsorted(sigma / alpha, wanted).clamp(1, len(self.times) - 1)  # ratio's shape
        # sigma - wanted * alpha, or that of the squares, is linear between two times, and 0 at the one looked for.
        low, high = (sigma[i] - wanted * alpha[i] for i in (above - 1, above))  # ratio's shape each
        share = (low / (low - high)).clamp(0, 1)  # ratio's shape
        return torch.lerp(self.times[above - 1], self.times[above], share).to(ratio.dtype)

    def grid(self, steps: int | str, spacing: str | None = None, sigma_max: float | None = None) -> Tensor:
        """Return the grid's own times but the last, float32 [S - 1], falling.

        Raises:
            UserError: another number of steps, or a spacing.
        """
        if steps != len(self.times) - 1 or spacing is not None:
            raise UserError(f"steps {steps}: this schedule is known at the {len(self.times)} times of a grid alone")
        return self.times.flip(0)[:-1].float()  # [S - 1]
