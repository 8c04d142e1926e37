"""What a denoiser says of x at a time, and the noise schedule that the time belongs to.

t runs from 1 (noise) to 0 (data). x = alpha(t) * x0 + sigma(t) * eps; v = alpha * eps - sigma * x0.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

from ldm_lab.errors import UserError

TimeInput = Literal["t", "timestep", "log_snr"]
LEAST = 1e-8  # alpha or sigma below this counts as this: at t = 1 there is no data left, at t = 0 hardly any noise


class Prediction(NamedTuple):
    """What a denoiser says about x at time t.

    Attributes:
        x0: the clean sample, [B, C, h, w].
        eps: the noise in x, [B, C, h, w]; x = alpha * x0 + sigma * eps.
        variance_fraction: the learned variance of an ancestral step, [B, C, h, w], or None: 0 is the posterior's, 1 is
            beta's, with logarithms in between (Nichol & Dhariwal 2021, arXiv 2102.09672, equation 15). Which variances
            these are depends on how far the step goes, so only the sampler knows.
        gradient: the condition score, [B, C, h, w]: of a further log likelihood by x, such as that of CLIP guidance;
            None without. x0 and eps do not contain it.
    """

    x0: Tensor
    eps: Tensor
    variance_fraction: Tensor | None = None
    gradient: Tensor | None = None


Predict = Callable[[Tensor, Tensor], Prediction]  # x [B, C, h, w], t [B] -> what the (guided) denoiser says
Callback = Callable[[int, Tensor, Tensor], None]  # step, x before it, x0 in it
Noise = Callable[[Tensor], Tensor]  # x -> standard normal noise of its shape


class Schedule:
    """A noise schedule: t -> (alpha, sigma).

    Attributes:
        variance_preserving: whether alpha^2 + sigma^2 is exactly 1, which no sampler takes for granted.
        sigma_max: sigma / alpha where the grids begin that only the noise levels decide; there is more noise than data
            can be told from, and divisions by alpha stay finite.
        timesteps: T of a table of betas; None for a continuous schedule.
    """

    variance_preserving: bool = False
    sigma_max: float
    timesteps: int | None = None

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma, each of t's shape and dtype, for t in [0, 1]."""
        raise NotImplementedError

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log(alpha^2 / sigma^2), of t's shape and dtype: finite at both ends, 36.8 at most in magnitude."""
        alpha, sigma = (level.clamp(min=LEAST) for level in self.alpha_sigma(t))  # t's shape each
        return 2 * (alpha / sigma).log()

    def t_of_sigma_over_alpha(self, ratio: Tensor) -> Tensor:
        """Return the t, of any shape, at which sigma / alpha is `ratio` (k-diffusion's sigma_to_t)."""
        raise NotImplementedError

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """Return the t, of any shape, at which log(alpha^2 / sigma^2) is `log_snr`."""
        return self.t_of_sigma_over_alpha((-log_snr / 2).exp())

    def time(self, t: Tensor, time_input: TimeInput) -> Tensor:
        """Return what a denoiser's time embedding reads at t: t itself, the timestep 0 .. T - 1, or the log SNR.

        Raises:
            UserError: timesteps are asked of a schedule without any.
        """
        if time_input == "t":
            return t
        if time_input == "log_snr":
            return self.log_snr(t)
        if self.timesteps is None:
            raise UserError("objective.name: this denoiser reads timesteps, and the objective's schedule is continuous")
        return t * self.timesteps - 1

    def grid(self, steps: int | str, spacing: str | None = None, sigma_max: float | None = None) -> Tensor:
        """Return the times that a sampler visits, float32 [steps], falling; the final 0 is not among them.

        Args:
            steps: how many, or a respacing (`ldm_lab.schedules.respacing`).
            spacing: how they are spread (`ldm_lab.schedules.spacing`); None is the schedule's own way.
            sigma_max: sigma / alpha of the first one, in grids that only the noise levels decide; None and what is
                above the schedule's own `sigma_max` stand for that.

        Raises:
            UserError: steps or a spacing that this schedule does not have.
        """
        raise NotImplementedError
