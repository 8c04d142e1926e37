"""The continuous cosine schedule, and the spliced DDPM/cosine grid of v-diffusion."""

import math

import torch
from torch import Tensor

from ldm_lab.errors import UserError
from ldm_lab.interfaces import Schedule
from ldm_lab.schedules.log_snr import linear_log_snr
from ldm_lab.schedules.respacing import Steps
from ldm_lab.schedules.spacing import LAST_RATIO, ratios

# Where the DDPM schedule's log-SNR curve is spliced onto the cosine schedule: both have the same slope there
# (v-diffusion-pytorch, `get_spliced_ddpm_cosine_schedule`).
DDPM_CROSSOVER = 0.48536712
COSINE_CROSSOVER = 0.80074257
FIRST_RATIO = 148.4172  # sigma / alpha where the spliced grid begins


class Cosine(Schedule):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2) (Salimans & Ho 2022, arXiv 2202.00512, section 2)."""

    variance_preserving = True
    sigma_max = FIRST_RATIO

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma, each of t's shape, for t in [0, 1]."""
        return torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)

    def t_of_sigma_over_alpha(self, ratio: Tensor) -> Tensor:
        """Return the t, of any shape, at which sigma / alpha is `ratio`, 0 or above."""
        return torch.atan(ratio) / (math.pi / 2)

    def grid(self, steps: Steps, spacing: str | None = None, sigma_max: float | None = None) -> Tensor:
        """Return the times to visit, float32 [steps], falling; the final 0 is not among them.

        By default the spliced DDPM/cosine grid of the original: equal steps of the cosine schedule at low noise, of the
        DDPM schedule's log SNR at high noise. It starts at 0.995711, where alpha is 0.0067 and divisions by it stay
        finite; so do the other grids, or later, at `sigma_max`.

        Raises:
            UserError: steps or a spacing that only a table of betas has.
        """
        if isinstance(steps, str) or spacing == "respaced":
            raise UserError(
                f"{f'steps {steps!r}' if isinstance(steps, str) else 'spacing respaced'}: this model's noise schedule "
                "is continuous, there are no timesteps to choose from; give a number of steps"
            )
        u = torch.linspace(1, 0, steps + 1)[:-1]  # [steps]
        stretched = u * (COSINE_CROSSOVER + 1 - DDPM_CROSSOVER)  # [steps]
        shifted = stretched - (COSINE_CROSSOVER - DDPM_CROSSOVER)  # [steps]
        spliced = torch.where(stretched < COSINE_CROSSOVER, stretched, _ddpm_time(shifted))  # [steps]
        if spacing in (None, "spliced"):
            return spliced
        alpha, sigma = self.alpha_sigma(spliced[0].double())  # [], []
        first = sigma / alpha  # []
        if sigma_max is not None:
            first = first.clamp(max=sigma_max)  # []
        if spacing == "uniform":
            return (u * self.t_of_sigma_over_alpha(first)).float()  # [steps]
        visited = ratios(first.item(), LAST_RATIO, steps, spacing)  # [steps]
        return self.t_of_sigma_over_alpha(visited).float()  # [steps]


def _ddpm_time(s: Tensor) -> Tensor:
    """Return the cosine-schedule time that has the continuous DDPM schedule's SNR at s (Ho et al. 2020, betas
    1e-4 to 0.02 in the limit of many steps)."""
    log_snr = linear_log_snr(s)
    alpha, sigma = log_snr.sigmoid().sqrt(), log_snr.neg().sigmoid().sqrt()
    return torch.atan2(sigma, alpha) / math.pi * 2
