"""Ancestral sampling: each step draws from the model's reverse process, whose variance may have been learned."""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from ldm_lab.config import register
from ldm_lab.interfaces import Callback, Predict, Prediction
from ldm_lab.samplers import Walk, check_steps
from ldm_lab.schedules import Posterior, Steps


@register("sampler", "ddpm")
class DDPM(Walk):
    """DDPM ancestral sampling (Ho et al. 2020, arXiv 2006.11239, algorithm 2), with fresh noise in every step.

    Args:
        steps: model calls.
        variance: of a step: "learned" by the model (Nichol & Dhariwal 2021, arXiv 2102.09672), or the posterior's if it
            has learned none; "posterior" and "beta" are the two fixed choices of Ho et al., the first of which is DDIM
            with eta 1.
    """

    shifts_mean = True

    def __init__(self, *, steps: Steps = 50, variance: Literal["learned", "posterior", "beta"] = "learned") -> None:
        super().__init__(steps)
        self.variance = variance

    check = staticmethod(check_steps)

    def __call__(
        self,
        predict: Predict,
        x: Tensor,
        *,
        schedule: Any,
        noise: Callable[[Tensor], Tensor] | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Return x0 [B, C, h, w]; `noise` is called `steps - 1` times. See the package's contract."""
        assert noise is not None, "ancestral sampling needs a source of noise"
        times = self.times(schedule)  # [steps]
        steps = Posterior.between(schedule, times)
        for i, t in enumerate(times):
            prediction = predict(x, t.to(x.device).expand(len(x)))  # x0 and eps [B, C, h, w]
            if callback:
                callback(i, x, prediction.x0)
            step = steps.at(i)
            x = step.mean(prediction.x0, x)  # [B, C, h, w]; in the last step it is x0
            log_variance = self.log_variance(step, prediction)  # [] or [B, C, h, w]
            if prediction.gradient is not None:  # Dhariwal & Nichol 2021 (arXiv 2105.05233), algorithm 1
                x = x + log_variance.exp() * prediction.gradient  # [B, C, h, w]
            if i + 1 < len(times):
                x = x + (log_variance / 2).exp() * noise(x)  # [B, C, h, w]
        return x

    def log_variance(self, step: Posterior, prediction: Prediction) -> Tensor:
        """Return the log variance of a step, [] or [B, C, h, w]."""
        if self.variance == "beta":
            return step.log_beta  # []
        if self.variance == "posterior" or prediction.variance_fraction is None:
            return step.log_variance  # []
        return step.learned(prediction.variance_fraction)  # [B, C, h, w]
