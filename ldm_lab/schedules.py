"""Noise schedules: t -> (alpha, sigma), and the time grids that samplers walk. t runs from 1 (noise) to 0 (data).

A noised sample is x = alpha * x0 + sigma * eps, with alpha^2 + sigma^2 = 1 (variance preserving).
"""

import math
from typing import Literal

import torch
from torch import Tensor

# Where the DDPM schedule's log-SNR curve is spliced onto the cosine schedule: both have the same slope there
# (v-diffusion-pytorch, `get_spliced_ddpm_cosine_schedule`).
DDPM_CROSSOVER = 0.48536712
COSINE_CROSSOVER = 0.80074257


# How a sampler's steps are spread over the noise levels.
#   spliced   the schedule's own grid: that of the original programs
#   log_snr   evenly in log(alpha^2 / sigma^2) (Lu et al. 2022, arXiv 2206.00927, section 3.4)
#   karras    evenly in (sigma / alpha)^(1/7) (Karras et al. 2022, arXiv 2206.00364, equation 5)
#   uniform   evenly in t
SPACING = Literal["spliced", "log_snr", "karras", "uniform"]
RHO = 7  # of the karras grid
LAST_LEVEL = 0.02  # sigma / alpha of the last step of log_snr and karras; what is left is below an 8-bit level or so


class Cosine:
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2) (Salimans & Ho 2022, arXiv 2202.00512, section 2)."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma, each of t's shape, for t in [0, 1]."""
        return torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)

    def time(self, level: Tensor) -> Tensor:
        """Return the t at which sigma / alpha is `level`, of any shape, 0 or above."""
        return torch.atan(level) / (math.pi / 2)

    def grid(self, steps: int, spacing: SPACING = "spliced") -> Tensor:
        """Return the times to visit, float32 [steps], falling from 0.995711; the final 0 is not among them.

        The spliced DDPM/cosine grid of the original: equal steps of the cosine schedule at low noise, of the DDPM
        schedule's log SNR at high noise. It starts below 1, where alpha is 0.0067 and divisions by it stay finite; so
        do all the other grids.
        """
        u = torch.linspace(1, 0, steps + 1)[:-1]  # [steps]
        stretched = u * (COSINE_CROSSOVER + 1 - DDPM_CROSSOVER)  # [steps]
        shifted = stretched - (COSINE_CROSSOVER - DDPM_CROSSOVER)  # [steps]
        spliced = torch.where(stretched < COSINE_CROSSOVER, stretched, _ddpm_time(shifted))  # [steps]
        if spacing == "spliced":
            return spliced
        if spacing == "uniform":
            return u * spliced[0]  # [steps]
        alpha, sigma = self.alpha_sigma(spliced[0].double())  # [], []
        first, last = sigma / alpha, torch.tensor(LAST_LEVEL, dtype=torch.float64)  # [], []
        share = torch.linspace(0, 1, steps, dtype=torch.float64)  # [steps]
        if spacing == "log_snr":
            levels = first * (last / first) ** share  # [steps]
        else:
            levels = (first ** (1 / RHO) + share * (last ** (1 / RHO) - first ** (1 / RHO))) ** RHO  # [steps]
        return self.time(levels).float()  # [steps]


def _ddpm_time(s: Tensor) -> Tensor:
    """Return the cosine-schedule time that has the continuous DDPM schedule's SNR at s (Ho et al. 2020, betas
    1e-4 to 0.02 in the limit of many steps)."""
    log_snr = -torch.special.expm1(1e-4 + 10 * s**2).log()
    alpha, sigma = log_snr.sigmoid().sqrt(), log_snr.neg().sigmoid().sqrt()
    return torch.atan2(sigma, alpha) / math.pi * 2
