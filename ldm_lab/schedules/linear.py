"""The straight path from data to noise of rectified flow and flow matching; it does not preserve variance."""

from torch import Tensor

from ldm_lab.schedules.continuous import ContinuousSchedule

FIRST_TIME = 0.999  # where the grids begin: at 1 there is no data left, and what is said of x0 is divided by alpha


class Linear(ContinuousSchedule):
    """alpha = 1 - t, sigma = t (Liu et al. 2022, arXiv 2209.03003, section 2; Lipman et al. 2022, arXiv 2210.02747)."""

    name = "linear"
    first_time = FIRST_TIME
    variance_preserving = False
    sigma_max = FIRST_TIME / (1 - FIRST_TIME)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma, each of t's shape, for t in [0, 1]."""
        return 1 - t, t.clone()

    def t_of_sigma_over_alpha(self, ratio: Tensor) -> Tensor:
        """Return the t, of any shape, at which sigma / alpha is `ratio`, 0 or above."""
        return ratio / (1 + ratio)
