"""Euler and Heun as in EDM (Karras et al. 2022, arXiv 2206.00364): the probability-flow ODE in x / alpha.

With y = x / alpha and s = sigma / alpha, every model obeys dy/ds = eps (Song et al. 2021, arXiv 2010.02502, equation
14), whatever its schedule: a straight-line solver in s has no stiff part left to integrate. The model is shown
x = alpha * y at the time whose noise level is s.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from ldm_lab.config import Share, register
from ldm_lab.interfaces import Prediction
from ldm_lab.samplers.base import GridSampler, Run, Step
from ldm_lab.schedules import NoiseLevel, Spacing, Steps

MOST_CHURN = 2**0.5 - 1  # share by which the noise is lifted at churn 1: the most that the paper allows


class ProbabilityFlow(GridSampler):
    """What Euler and Heun share: y in place of x, and churn. The last step goes to s = 0, to the clean estimate."""

    order: ClassVar[int]

    def __init__(
        self,
        *,
        steps: Steps = 30,
        spacing: Spacing = "karras",
        sigma_max: NoiseLevel | None = None,
        churn: Share = 0.0,
    ) -> None:
        """Set the grid and the fresh noise.

        Args:
            steps: of one model call each (euler), or two each but for the last one (heun).
            spacing: how the steps are spread over the noise levels (`ldm_lab.schedules`).
            sigma_max: noise level (sigma / alpha) of the first step (default: 50 for 8x8 latents, for larger ones more
                in proportion to their side, and at most where the model's noise schedule begins).
            churn: fresh noise that is mixed in at each step, 0 (deterministic) to 1 (the most that the paper allows).
        """
        super().__init__(steps, spacing, sigma_max)
        self.churn = churn

    def step(self, run: Run, i: int, y: Tensor) -> Step:
        """Return a step of Karras et al. 2022, algorithm 2, without its bounds on where there is churn."""
        s, s_next = (run.sigma[j] / run.alpha[j] for j in (i, i + 1))
        if self.churn and i:  # the first level is pure noise already
            lifted = min(s * (1 + self.churn * MOST_CHURN), run.sigma[0] / run.alpha[0])
            y = y + (lifted**2 - s**2) ** 0.5 * run.noise(y)  # [B, C, h, w]
            s = lifted
        prediction = model(run, y, s)
        if s_next == 0:
            return Step(prediction.x0, prediction.x0)
        y_next = y + (s_next - s) * prediction.eps  # [B, C, h, w]
        if self.order == 2:
            slope = (prediction.eps + model(run, y_next, s_next).eps) / 2  # [B, C, h, w]
            y_next = y + (s_next - s) * slope  # [B, C, h, w]
        return Step(y_next, prediction.x0)

    def to_state(self, run: Run, x: Tensor) -> Tensor:
        """Return y [B, C, h, w] of x at the first time."""
        y: Tensor = x / run.alpha[0]  # [B, C, h, w]
        return y

    def to_x(self, run: Run, i: int, y: Tensor) -> Tensor:
        """Return x [B, C, h, w] at time i."""
        return to_model_input(y, run.sigma[i] / run.alpha[i], math.hypot(run.alpha[i], run.sigma[i]))


def model(run: Run, y: Tensor, s: float) -> Prediction:
    """Return the prediction for y [B, C, h, w] at the noise level s."""
    t = run.schedule.t_of_sigma_over_alpha(torch.tensor(s, dtype=torch.float64))  # []
    alpha, sigma = run.schedule.alpha_sigma(t)  # [], []
    return run.model(to_model_input(y, s, math.hypot(alpha.item(), sigma.item())), t.float())


def to_model_input(y: Tensor, s: float, scale: float) -> Tensor:
    """Return x = alpha * y, [B, C, h, w], at the noise level s.

    alpha is scale / sqrt(1 + s^2) with the scale sqrt(alpha^2 + sigma^2), which is 1 where variance is preserved.
    """
    x: Tensor = y / (1 + s**2) ** 0.5 * scale  # [B, C, h, w]
    return x


@register("sampler", "euler")
class Euler(ProbabilityFlow):
    """Euler's method on the probability-flow ODE, order 1: DDIM with a choice of steps (Karras et al. 2022).

    What churn mixes in a step of order 1 takes out with an error of its own, however many steps there are: samples lose
    some of their spread. heun, of order 2, keeps it.
    """

    order = 1


@register("sampler", "heun")
class Heun(ProbabilityFlow):
    """Heun's method on the probability-flow ODE, order 2 (Karras et al. 2022, algorithms 1 and 2)."""

    order = 2
