"""DDIM and DDPM: first-order steps, deterministic or with fresh noise in each of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldm_lab.config import register
from ldm_lab.samplers import Callback, Predict, check_steps


@register("sampler", "ddim")
class DDIM:
    """DDIM (Song et al. 2021, arXiv 2010.02502): one model call a step; eta 0 is deterministic, eta 1 is DDPM.

    The result is the clean estimate at the last time of the grid; there is no step to t = 0.

    Args:
        steps: model calls.
        eta: how much of the noise is fresh in each step, from 0 (none) to 1 (as much as the DDPM posterior has).
    """

    def __init__(self, *, steps: int = 50, eta: float = 0.0) -> None:
        self.steps, self.eta = steps, eta

    @staticmethod
    def check(section: dict[str, Any]) -> list[str]:
        """Return the problems of a config section."""
        eta = section.get("eta", 0.0)
        # Above 1 the root of equation 12 gets a negative argument; nan fails the comparison, too.
        return check_steps(section) + ([] if 0 <= eta <= 1 else [f"eta: a number from 0 to 1 is needed, not {eta}"])

    def __call__(
        self,
        predict: Predict,
        x: Tensor,
        *,
        schedule: Any,
        noise: Callable[[Tensor], Tensor] | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Return x0 [B, C, h, w]; `noise` is called `steps - 1` times if eta is not 0. See the package's contract."""
        assert self.eta == 0 or noise is not None, "eta > 0 needs a source of noise"
        times = schedule.grid(self.steps)  # [steps]
        alpha, sigma = schedule.alpha_sigma(times)  # [steps], [steps]
        for i, t in enumerate(times):
            prediction = predict(x, t.to(x.device).expand(len(x)))  # x0 and eps [B, C, h, w]
            if callback:
                callback(i, x, prediction.x0)
            if i + 1 < len(times):
                # Song et al. 2021, equations 12 and 16, in variance-preserving alpha and sigma.
                fresh = self.eta * sigma[i + 1] / sigma[i] * torch.sqrt(1 - alpha[i] ** 2 / alpha[i + 1] ** 2)  # []
                kept = torch.sqrt(sigma[i + 1] ** 2 - fresh**2)  # []
                x = alpha[i + 1] * prediction.x0 + kept * prediction.eps  # [B, C, h, w]
                if self.eta:
                    x = x + fresh * noise(x)  # [B, C, h, w]
        return prediction.x0


@register("sampler", "ddpm")
class DDPM(DDIM):
    """DDPM ancestral sampling (Ho et al. 2020, arXiv 2006.11239): DDIM with eta 1, fresh noise in every step.

    Args:
        steps: model calls.
    """

    def __init__(self, *, steps: int = 50) -> None:
        super().__init__(steps=steps, eta=1.0)
