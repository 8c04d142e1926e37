"""Euler and Heun as in EDM (Karras et al. 2022, arXiv 2206.00364): the probability-flow ODE in x / alpha.

With y = x / alpha and s = sigma / alpha, every variance-preserving model obeys dy/ds = eps (Song et al. 2021, arXiv
2010.02502, equation 14), whatever its schedule: a straight-line solver in s has no stiff part left to integrate.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ldm_lab.config import Share, register
from ldm_lab.interfaces import Callback, Predict
from ldm_lab.samplers import Walk, check_steps
from ldm_lab.schedules import SPACING, Steps


class _Straight(Walk):
    """The loop that Euler and Heun share; the last step goes to s = 0, that is to the clean estimate."""

    ORDER: int

    def __init__(self, *, steps: Steps = 30, spacing: SPACING = "karras", churn: Share = 0.0) -> None:
        super().__init__(steps)
        self.spacing, self.churn = spacing, churn

    @staticmethod
    def check(section: dict[str, Any]) -> list[str]:
        """Return what is wrong with `steps`."""
        return check_steps(section)

    def __call__(
        self,
        predict: Predict,
        x: Tensor,
        *,
        schedule: Any,
        noise: Callable[[Tensor], Tensor] | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Return x0 [B, C, h, w]; `noise` is called in every step if churn is not 0. See the package's contract."""
        assert self.churn == 0 or noise is not None, "churn > 0 needs a source of noise"
        times = self.times(schedule)  # [steps]
        alpha, sigma = schedule.alpha_sigma(times.double())  # [steps], [steps]
        levels = torch.cat([sigma / alpha, torch.zeros(1)]).tolist()  # [steps + 1]
        y = x / alpha[0].item()  # [B, C, h, w]

        def model(y: Tensor, s: float) -> Any:
            t = schedule.time(torch.tensor(s, dtype=torch.float64)).float()  # []
            return predict(y / (1 + s**2) ** 0.5, t.to(x.device).expand(len(y)))

        # Karras et al. 2022, algorithm 2: lift the noise by a share, then solve from there. At churn 1 it is lifted by
        # sqrt(2) - 1 of itself, the most that the paper allows.
        lift = self.churn * (2**0.5 - 1)
        for i, (s, s_next) in enumerate(pairwise(levels)):
            if lift and i:  # the first level is pure noise already
                raised = min(s * (1 + lift), levels[0])
                y = y + (raised**2 - s**2) ** 0.5 * noise(y)  # [B, C, h, w]
                s = raised
            prediction = model(y, s)
            if callback:
                callback(i, y / (1 + s**2) ** 0.5, prediction.x0)
            if s_next == 0:
                return prediction.x0
            ahead = y + (s_next - s) * prediction.eps  # [B, C, h, w]
            if self.ORDER == 2:
                slope = (prediction.eps + model(ahead, s_next).eps) / 2  # [B, C, h, w]
                ahead = y + (s_next - s) * slope  # [B, C, h, w]
            y = ahead
        raise AssertionError("a grid ends with 0")


@register("sampler", "euler")
class Euler(_Straight):
    """Euler's method on the probability-flow ODE, order 1: DDIM with a choice of steps (Karras et al. 2022).

    Args:
        steps: model calls.
        spacing: how the steps are spread over the noise levels (`ldm_lab.schedules`).
        churn: fresh noise that is mixed in at each step, 0 (deterministic) to 1 (the most that the paper allows).
    """

    ORDER = 1


@register("sampler", "heun")
class Heun(_Straight):
    """Heun's method on the probability-flow ODE, order 2 (Karras et al. 2022, algorithms 1 and 2).

    Args:
        steps: steps of two model calls each, but for the last one.
        spacing: how the steps are spread over the noise levels (`ldm_lab.schedules`).
        churn: fresh noise that is mixed in at each step, 0 (deterministic) to 1 (the most that the paper allows).
    """

    ORDER = 2
