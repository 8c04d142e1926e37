"""Ancestral sampling: each step draws from the model's reverse process, whose variance may have been learned."""

from typing import Literal

from torch import Tensor

from ldm_lab.config import register
from ldm_lab.interfaces import Prediction
from ldm_lab.samplers.base import GridSampler, Run, Step
from ldm_lab.schedules import Posterior, Steps


@register("sampler", "ddpm")
class DDPM(GridSampler):
    """DDPM ancestral sampling (Ho et al. 2020, arXiv 2006.11239, algorithm 2), with fresh noise in every step."""

    uses_gradient = True

    def __init__(self, *, steps: Steps = 50, variance: Literal["learned", "posterior", "beta"] = "learned") -> None:
        """Set the grid and the steps' variance.

        Args:
            steps: model calls.
            variance: of a step: "learned" by the model (Nichol & Dhariwal 2021, arXiv 2102.09672), or the posterior's
                if it has learned none; "posterior" and "beta" are the two fixed choices of Ho et al., the first of
                which is DDIM with eta 1.
        """
        super().__init__(steps)
        self.variance = variance

    def step(self, run: Run, i: int, x: Tensor) -> Step:
        """Return a draw from the reverse process; of the last step its mean, which is x0 where t = 0 is clean."""
        prediction = run.model(x, run.times[i])
        posterior = run.posterior.at(i)
        x = posterior.mean(prediction.x0, x)  # [B, C, h, w]
        log_variance = self.log_variance(posterior, prediction)  # [] or [B, C, h, w]
        if prediction.gradient is not None:  # Dhariwal & Nichol 2021 (arXiv 2105.05233), algorithm 1
            x = x + log_variance.exp() * prediction.gradient  # [B, C, h, w]
        if i + 1 < len(run):
            x = x + (log_variance / 2).exp() * run.noise(x)  # [B, C, h, w]
        return Step(x, prediction.x0)

    def log_variance(self, posterior: Posterior, prediction: Prediction) -> Tensor:
        """Return the log variance of a step, [] or [B, C, h, w]."""
        if self.variance == "beta":
            return posterior.log_beta  # []
        if self.variance == "posterior" or prediction.variance_fraction is None:
            return posterior.log_variance  # []
        return posterior.learned(prediction.variance_fraction)  # [B, C, h, w]
