"""How a sampler's steps are spread over the noise levels."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from ldm_lab.errors import UserError

# How a sampler's steps are spread; None in place of a name is the schedule's own grid, that of the original programs.
#   spliced   the cosine schedule's own grid
#   respaced  the own grid of a table of betas: whole timesteps, evenly spread
#   log_snr   evenly in log(alpha^2 / sigma^2) (Lu et al. 2022, arXiv 2206.00927, section 3.4)
#   karras    evenly in (sigma / alpha)^(1/7) (Karras et al. 2022, arXiv 2206.00364, equation 5)
#   uniform   evenly in t
Spacing = Literal["spliced", "respaced", "log_snr", "karras", "uniform"]
NoiseLevel = Annotated[float, Interval(ge=1, le=1000)]  # sigma / alpha of a grid's first time
RHO = 7  # of the karras grid
LAST_RATIO = 0.02  # sigma / alpha of the last step of log_snr and karras; what is left is below an 8-bit level or so

SIGMA_MAX = 50.0  # sigma / alpha where sampling of 8x8 latents begins by default: found by benchmarks/first_level.py
SIGMA_MAX_SIDE = 8


def default_sigma_max(size: Sequence[int] | None, sigma_max: float) -> float:
    """Return the sigma / alpha at which sampling begins unless another is asked for.

    What stands out of the noise first is the mean of a whole picture: of n elements it is a root of n times clearer
    than one of them. A level that hides it in small latents shows it in large ones, whose light and dark would then be
    drawn together to grey. So the level grows with the root of their number, up to the schedule's own.

    Args:
        size: height and width of latents; None: of large ones.
        sigma_max: the schedule's own.
    """
    if size is None:
        return sigma_max
    side = math.sqrt(math.prod(size))
    return min(SIGMA_MAX * max(side / SIGMA_MAX_SIDE, 1.0), sigma_max)


def ratios(first: float, last: float, steps: int, spacing: str) -> Tensor:
    """Return sigma / alpha of the steps of a grid, float64 [steps], falling from `first` to `last`.

    Raises:
        UserError: a spacing that the noise levels alone do not decide.
    """
    share = torch.linspace(0, 1, steps, dtype=torch.float64)  # [steps]
    if spacing == "log_snr":
        falling: Tensor = first * (last / first) ** share  # [steps]
    elif spacing == "karras":
        falling = (first ** (1 / RHO) + share * (last ** (1 / RHO) - first ** (1 / RHO))) ** RHO  # [steps]
    else:
        raise UserError(f"spacing: log_snr, karras or uniform is needed here, not {spacing}")
    return falling
