"""A schedule that is known at the times of a grid alone, as a respaced process is in the programs around GLIDE."""

from typing import Any

import torch
from torch import Tensor


class Between:
    """alpha and sigma of a schedule at the times of a grid; alpha^2 interpolated linearly in between."""

    def __init__(self, schedule: Any, times: Tensor) -> None:
        """Take the values at falling times [S], S >= 2."""
        self.times = times.double().flip(0)  # [S], rising
        alpha, sigma = schedule.alpha_sigma(self.times)  # [S], [S]
        self.squares = torch.stack([alpha**2, sigma**2])  # [2, S]

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma, each of t's shape and dtype and where t is, for t between the grid's ends."""
        times = t.cpu().double()  # t's shape
        above = torch.searchsorted(self.times, times).clamp(1, len(self.times) - 1)  # t's shape
        share = (times - self.times[above - 1]) / (self.times[above] - self.times[above - 1])  # t's shape
        alpha2, sigma2 = torch.lerp(self.squares[:, above - 1], self.squares[:, above], share)  # t's shape each
        return alpha2.sqrt().to(t), sigma2.sqrt().to(t)
