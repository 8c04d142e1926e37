"""DDIM and its kin: first-order steps, deterministic or with fresh noise in each of them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ldm_lab.config import Share, register
from ldm_lab.interfaces import Callback, Predict
from ldm_lab.samplers import Walk, check_steps
from ldm_lab.schedules import Steps


@register("sampler", "ddim")
class DDIM(Walk):
    """DDIM (Song et al. 2021, arXiv 2010.02502): one model call a step; eta 0 is deterministic, eta 1 is DDPM.

    The result is the clean estimate at the last time of the grid; there is no step to t = 0.

    Args:
        steps: model calls.
        eta: how much of the noise is fresh in each step, from 0 (none) to 1 (as much as the DDPM posterior has).
    """

    def __init__(self, *, steps: Steps = 50, eta: Share = 0.0) -> None:
        super().__init__(steps)
        self.eta = eta

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
        """Return x0 [B, C, h, w]; `noise` is called `steps - 1` times if eta is not 0. See the package's contract."""
        assert self.eta == 0 or noise is not None, "eta > 0 needs a source of noise"
        times = self.times(schedule)  # [steps]
        alpha, sigma = (level.tolist() for level in schedule.alpha_sigma(times.double()))  # steps numbers each
        before = None  # the noise of the step before, [B, C, h, w]
        for i, t in enumerate(times):
            prediction = predict(x, t.to(x.device).expand(len(x)))  # x0 and eps [B, C, h, w]
            if callback:
                callback(i, x, prediction.x0)
            if i + 1 < len(times):
                # Song et al. 2021, equations 12 and 16, in variance-preserving alpha and sigma.
                fresh = self.eta * sigma[i + 1] / sigma[i] * (1 - alpha[i] ** 2 / alpha[i + 1] ** 2) ** 0.5
                kept = (sigma[i + 1] ** 2 - fresh**2) ** 0.5
                x = alpha[i + 1] * prediction.x0 + kept * self.slope(prediction.eps, before)  # [B, C, h, w]
                if self.eta:
                    x = x + fresh * noise(x)  # [B, C, h, w]
            before = prediction.eps
        return prediction.x0

    def slope(self, eps: Tensor, before: Tensor | None) -> Tensor:
        """Return the noise that is put in again, [B, C, h, w], of this step's and the last one's (None at first)."""
        return eps


@register("sampler", "ddim_extrapolated")
class ExtrapolatedDDIM(DDIM):
    """DDIM whose noise, not its clean estimate, is extrapolated from the step before: "dpm++" of glide-finetune.

    It is none of the DPM-Solver++ family (`dpmpp_2m` is), and with any number of steps it does not converge to what
    the model says: samples come out too smooth. It is here for those who know its pictures.

    Args:
        steps: model calls.
    """

    check = staticmethod(check_steps)

    def __init__(self, *, steps: Steps = 30) -> None:
        super().__init__(steps=steps)

    def slope(self, eps: Tensor, before: Tensor | None) -> Tensor:
        """Return the noise at the middle of the step, [B, C, h, w]."""
        return eps if before is None else 1.5 * eps - 0.5 * before  # [B, C, h, w]
