"""The straight path from data to noise of rectified flow and flow matching; it does not preserve variance."""

import torch
from torch import Tensor

from ldm_lab.errors import UserError
from ldm_lab.interfaces import Schedule
from ldm_lab.schedules.spacing import LAST_RATIO, ratios

FIRST_TIME = 0.999  # where the grids begin: at 1 there is no data left, and what is said of x0 is divided by alpha


class Linear(Schedule):
    """alpha = 1 - t, sigma = t (Liu et al. 2022, arXiv 2209.03003, section 2; Lipman et al. 2022, arXiv 2210.02747)."""

    variance_preserving = False
    sigma_max = FIRST_TIME / (1 - FIRST_TIME)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma, each of t's shape, for t in [0, 1]."""
        return 1 - t, t.clone()

    def t_of_sigma_over_alpha(self, ratio: Tensor) -> Tensor:
        """Return the t, of any shape, at which sigma / alpha is `ratio`, 0 or above."""
        return ratio / (1 + ratio)

    def grid(self, steps: int | str, spacing: str | None = None, sigma_max: float | None = None) -> Tensor:
        """Return the times to visit, float32 [steps], falling from 0.999 or `sigma_max`; the final 0 is not among them.

        By default evenly spread in t, from 0.999.

        Raises:
            UserError: steps or a spacing that other schedules have.
        """
        if isinstance(steps, str) or spacing in ("spliced", "respaced"):
            raise UserError(
                f"{f'steps {steps!r}' if isinstance(steps, str) else f'spacing {spacing}'}: this model's noise "
                "schedule is linear; give a number of steps, and spacing uniform, log_snr or karras"
            )
        if spacing is None or sigma_max is None:
            sigma_max = self.sigma_max
        first = min(sigma_max, self.sigma_max)
        if spacing in (None, "uniform"):
            return torch.linspace(1, 0, steps + 1)[:-1] * (first / (1 + first))  # [steps]
        visited = ratios(first, LAST_RATIO, steps, spacing)  # [steps]
        return self.t_of_sigma_over_alpha(visited).float()  # [steps]
