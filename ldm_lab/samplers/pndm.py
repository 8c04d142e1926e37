"""Pseudo numerical methods for diffusion (PNDM: Liu et al. 2022, arXiv 2202.09778) and their second-order kin.

All are classical solvers of differential equations whose step x -> x + (t2 - t1) * slope is replaced by the `transfer`
of DDIM, in which the noise eps takes the place of the slope. All are deterministic and end at t = 0. Whatever the order
of the classical method, the pseudo method converges with order 2 (`tests/test_samplers.py` measures it); more terms
make the error smaller by a factor.

Where sigma / alpha is very large, as at the first timestep of many tables of betas, no slope can be relied on: what
they say of x0 is divided by alpha. A walk that begins there takes its first step as DDIM does.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from ldm_lab.config import register
from ldm_lab.interfaces import Callback, Predict, Prediction
from ldm_lab.samplers import Walk, check_steps
from ldm_lab.schedules import Between, Steps, count

# Adams-Bashforth weights of the present and the past slopes, newest first, by order.
ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}

STEEP = 150  # sigma / alpha above which the first step is DDIM's


class _Run:
    """One run of a pseudo numerical method: the model, the schedule and the slopes met so far."""

    def __init__(self, predict: Predict, schedule: Any) -> None:
        self.predict, self.schedule = predict, schedule
        self.slopes: list[Tensor] = []  # newest first

    def model(self, x: Tensor, t: Tensor) -> Prediction:
        return self.predict(x, t.to(x.device).expand(len(x)))

    def clean(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return the x0 [B, C, h, w] for which eps is the noise in x at time t []."""
        alpha, sigma = self.schedule.alpha_sigma(t)  # [], []
        return (x - sigma * eps) / alpha  # [B, C, h, w]

    def transfer(self, x: Tensor, eps: Tensor, t1: Tensor, t2: Tensor) -> Tensor:
        """Return x [B, C, h, w] moved from time t1 to t2: the "transfer part" of Liu et al. 2022, a DDIM step."""
        alpha, sigma = self.schedule.alpha_sigma(t2)  # [], []
        return alpha * self.clean(x, eps, t1) + sigma * eps  # [B, C, h, w]

    def runge_kutta(self, x: Tensor, t1: Tensor, t2: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slope of the classical fourth-order method between t1 and t2, and its x0; four calls."""
        mid = (t1 + t2) / 2  # []
        eps1 = self.model(x, t1).eps  # [B, C, h, w], as are the next ones
        eps2 = self.model(self.transfer(x, eps1, t1, mid), mid).eps
        eps3 = self.model(self.transfer(x, eps2, t1, mid), mid).eps
        eps4 = self.model(self.transfer(x, eps3, t1, t2), t2).eps
        eps = (eps1 + 2 * eps2 + 2 * eps3 + eps4) / 6
        return self._remember(eps), self.clean(x, eps, t1)

    def improved_euler(self, x: Tensor, t1: Tensor, t2: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean of the slopes at t1 and t2, and its x0; two calls."""
        eps1 = self.model(x, t1).eps  # [B, C, h, w], as are the next ones
        eps2 = self.model(self.transfer(x, eps1, t1, t2), t2).eps
        eps = (eps1 + eps2) / 2
        return self._remember(eps), self.clean(x, eps, t1)

    def multistep(self, x: Tensor, t1: Tensor, order: int) -> tuple[Tensor, Tensor]:
        """Return the slope extrapolated from this call and up to order - 1 earlier slopes, and the x0 of this call."""
        prediction = self.model(x, t1)
        self._remember(prediction.eps)
        weights = ADAMS_BASHFORTH[min(order, len(self.slopes))]
        return sum(w * eps for w, eps in zip(weights, self.slopes, strict=False)), prediction.x0

    def _remember(self, eps: Tensor) -> Tensor:
        self.slopes = [eps, *self.slopes[:3]]
        return eps


class _Pseudo(Walk):
    """The loop that the methods share; each says in `slope` which eps carries x from t1 to t2."""

    def __init__(self, *, steps: Steps = 50) -> None:
        super().__init__(steps)

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
        """Return x0 [B, C, h, w]; nothing is random, so `noise` is not called. See the package's contract."""
        times = self.stations(schedule)  # [steps + 1]
        run = self.run(predict, schedule)
        alpha, sigma = schedule.alpha_sigma(times[0].double())  # [], []
        steep = int(sigma > STEEP * alpha)
        for i, (t1, t2) in enumerate(pairwise(times)):
            if i < steep:
                prediction = run.model(x, t1)  # x0 and eps [B, C, h, w]
                x0 = prediction.x0  # [B, C, h, w]
                alpha, sigma = schedule.alpha_sigma(t2)  # [], []
                after = alpha * x0 + sigma * prediction.eps  # [B, C, h, w]
            else:
                eps, x0 = self.slope(run, i - steep, x, t1, t2)  # [B, C, h, w] each
                after = run.transfer(x, eps, t1, t2)  # [B, C, h, w]
            if callback:
                callback(i, x, x0)
            x = after
        return x

    def stations(self, schedule: Any) -> Tensor:
        """Return the times between which the steps are, [steps + 1]."""
        return torch.cat([self.times(schedule), torch.zeros(1)])  # [steps + 1]

    def run(self, predict: Predict, schedule: Any) -> _Run:
        """Return a new run, with the schedule that its transfers use."""
        return _Run(predict, schedule)

    def slope(self, run: _Run, i: int, x: Tensor, t1: Tensor, t2: Tensor) -> tuple[Tensor, Tensor]:
        """Return the eps that carries x through a step, and the step's clean estimate, [B, C, h, w] each.

        i counts the steps from the first one that asks for a slope.
        """
        raise NotImplementedError


class _Historic(_Pseudo):
    """What PRK and PLMS have in common: a variant that repeats what GLIDE's users had."""

    def __init__(self, *, steps: Steps = 50, variant: Literal["pndm", "glide"] = "pndm") -> None:
        super().__init__(steps=steps)
        self.variant = variant
        if variant == "glide":
            self.steps -= 2

    @staticmethod
    def check(section: dict[str, Any]) -> list[str]:
        """Return the problems of a config section."""
        problems = check_steps(section)
        if not problems and section.get("variant") == "glide" and count(section.get("steps", 50)) < 3:
            problems.append(
                f"steps: variant glide leaves out two of them, so at least 3 are needed, not {section['steps']}"
            )
        return problems

    def times(self, schedule: Any) -> Tensor:
        """Return the times at which the steps begin, falling, float32 [steps]."""
        times = super().times(schedule)  # [steps or steps + 2]
        return times[1:-1] if self.variant == "glide" else times

    def stations(self, schedule: Any) -> Tensor:
        """Return the times between which the steps are, [steps + 1]."""
        return super().times(schedule)[1:] if self.variant == "glide" else super().stations(schedule)

    def run(self, predict: Predict, schedule: Any) -> _Run:
        """Return a new run, with the schedule that its transfers use."""
        return _Run(predict, Between(schedule, super().times(schedule)) if self.variant == "glide" else schedule)


@register("sampler", "prk")
class PRK(_Historic):
    """Pseudo Runge-Kutta with the classical four stages: four model calls a step.

    Args:
        steps: steps of four model calls each.
        variant: "glide" walks as the programs around GLIDE do: neither the grid's first time nor the step to t = 0 is
            taken, so that a little noise stays, and between two times alpha^2 is interpolated.
    """

    def slope(self, run: _Run, i: int, x: Tensor, t1: Tensor, t2: Tensor) -> tuple[Tensor, Tensor]:
        """Return the Runge-Kutta slope."""
        return run.runge_kutta(x, t1, t2)


@register("sampler", "plms")
class PLMS(_Historic):
    """Pseudo linear multistep over four slopes: one model call a step after three Runge-Kutta steps (steps + 9 calls).

    Args:
        steps: steps; the first three cost four model calls each.
        variant: as for prk.
    """

    def slope(self, run: _Run, i: int, x: Tensor, t1: Tensor, t2: Tensor) -> tuple[Tensor, Tensor]:
        """Return the Runge-Kutta slope in the first three steps, then the extrapolated one."""
        return run.runge_kutta(x, t1, t2) if i < 3 else run.multistep(x, t1, order=4)


@register("sampler", "pie")
class PIE(_Pseudo):
    """Pseudo improved Euler: two model calls a step.

    Args:
        steps: steps of two model calls each.
    """

    def slope(self, run: _Run, i: int, x: Tensor, t1: Tensor, t2: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean of the slopes at both ends."""
        return run.improved_euler(x, t1, t2)


@register("sampler", "plms2")
class PLMS2(_Pseudo):
    """Pseudo linear multistep over two slopes: one model call a step after one improved Euler step (steps + 1 calls).

    Args:
        steps: steps; the first one costs two model calls.
    """

    def slope(self, run: _Run, i: int, x: Tensor, t1: Tensor, t2: Tensor) -> tuple[Tensor, Tensor]:
        """Return the improved Euler slope in the first step, then the extrapolated one."""
        return run.improved_euler(x, t1, t2) if i < 1 else run.multistep(x, t1, order=2)


@register("sampler", "iplms")
class IPLMS(_Pseudo):
    """Improved PLMS (iPNDM: Zhang & Chen 2022, arXiv 2204.13902): one model call a step from the first one on.

    Args:
        steps: model calls.
    """

    def slope(self, run: _Run, i: int, x: Tensor, t1: Tensor, t2: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slope extrapolated from as many calls as there are, four at most."""
        return run.multistep(x, t1, order=4)
