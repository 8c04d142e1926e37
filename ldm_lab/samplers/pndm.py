"""Pseudo numerical methods for diffusion (PNDM: Liu et al. 2022, arXiv 2202.09778) and their second-order kin.

All are classical solvers of differential equations whose step x -> x + (t2 - t1) * slope is replaced by the `transfer`
of DDIM, in which the noise eps takes the place of the slope. All are deterministic and end at t = 0. Whatever the order
of the classical method, the pseudo method converges with order 2 (`tests/test_samplers.py` measures it); more terms
make the error smaller by a factor.

Where sigma / alpha is very large, as at the first timestep of many tables of betas, no slope can be relied on: what
they say of x0 is divided by alpha. A run that begins there takes its first step as DDIM does.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from ldm_lab.config import register
from ldm_lab.interfaces import Noise, Predict, Schedule
from ldm_lab.samplers.base import GridSampler, Run, Step
from ldm_lab.schedules import RespacedSchedule, Steps, num_steps

# Adams-Bashforth weights of the present and the past slopes, newest first, by order.
ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}

MAX_SIGMA_OVER_ALPHA = 150  # sigma / alpha above which the first step is DDIM's


class Slope(NamedTuple):
    """What carries x through a step, [B, C, h, w] each.

    Attributes:
        eps: the noise by which `transfer` moves x.
        x0: the clean estimate.
        own: the slope of the step by itself, which later steps extrapolate from.
    """

    eps: Tensor
    x0: Tensor
    own: Tensor


class PseudoNumerical(GridSampler):
    """What the methods share; each says in `slope` which eps carries x from t1 to t2."""

    history = 3

    def __init__(self, *, steps: Steps = 50) -> None:
        """Set the grid.

        Args:
            steps: how many; each costs one model call (iplms), two (pie), or one but for the first, two (plms2).
        """
        super().__init__(steps)

    def step(self, run: Run, i: int, x: Tensor) -> Step:
        """Return a transfer by the method's slope; the last one leads to t = 0."""
        t1, t2 = run.times[i], run.times[i + 1]  # [], []
        ddim_steps = int(run.sigma[0] > MAX_SIGMA_OVER_ALPHA * run.alpha[0])
        if i < ddim_steps:
            prediction = run.model(x, t1)
            return Step(put(run.levels(t2), prediction.x0, prediction.eps), prediction.x0)
        past = [step.eps for step in run.past[: i - ddim_steps] if step.eps is not None]  # [B, C, h, w] each
        slope = self.slope(run, past, x, t1, t2)
        return Step(put(run.levels(t2), clean(run, x, slope.eps, t1), slope.eps), slope.x0, slope.own)

    def slope(self, run: Run, past: list[Tensor], x: Tensor, t1: Tensor, t2: Tensor) -> Slope:
        """Return what carries x [B, C, h, w] from t1 to t2; `past` are the slopes of up to 3 steps, newest first."""
        raise NotImplementedError


def clean(run: Run, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Return the x0 [B, C, h, w] for which eps is the noise in x at time t []."""
    alpha, sigma = run.schedule.alpha_sigma(t)  # [], []
    return (x - sigma * eps) / alpha  # [B, C, h, w]


def transfer(run: Run, x: Tensor, eps: Tensor, t1: Tensor, t2: Tensor) -> Tensor:
    """Return x [B, C, h, w] moved from time t1 to t2: the "transfer part" of Liu et al. 2022, a DDIM step."""
    return put(run.schedule.alpha_sigma(t2), clean(run, x, eps, t1), eps)  # [B, C, h, w]


def put(levels: tuple[Tensor, Tensor], x0: Tensor, eps: Tensor) -> Tensor:
    """Return x [B, C, h, w] of x0 and eps [B, C, h, w] at alpha and sigma, [] each."""
    alpha, sigma = levels
    return alpha * x0 + sigma * eps  # [B, C, h, w]


def runge_kutta(run: Run, x: Tensor, t1: Tensor, t2: Tensor) -> Slope:
    """Return the slope of the classical fourth-order method between t1 and t2; four calls."""
    mid = (t1 + t2) / 2  # []
    eps1 = run.model(x, t1).eps  # [B, C, h, w], as are the next ones
    eps2 = run.model(transfer(run, x, eps1, t1, mid), mid).eps
    eps3 = run.model(transfer(run, x, eps2, t1, mid), mid).eps
    eps4 = run.model(transfer(run, x, eps3, t1, t2), t2).eps
    eps = (eps1 + 2 * eps2 + 2 * eps3 + eps4) / 6
    return Slope(eps, clean(run, x, eps, t1), eps)


def improved_euler(run: Run, x: Tensor, t1: Tensor, t2: Tensor) -> Slope:
    """Return the mean of the slopes at t1 and t2; two calls."""
    eps1 = run.model(x, t1).eps  # [B, C, h, w], as are the next ones
    eps2 = run.model(transfer(run, x, eps1, t1, t2), t2).eps
    eps = (eps1 + eps2) / 2
    return Slope(eps, clean(run, x, eps, t1), eps)


def multistep(run: Run, past: list[Tensor], x: Tensor, t1: Tensor, order: int) -> Slope:
    """Return the slope extrapolated from this call and up to order - 1 earlier slopes, and the x0 of this call."""
    prediction = run.model(x, t1)
    slopes = [prediction.eps, *past][:order]  # [B, C, h, w] each
    first, *others = (weight * slope for weight, slope in zip(ADAMS_BASHFORTH[len(slopes)], slopes, strict=True))
    return Slope(sum(others, start=first), prediction.x0, prediction.eps)


class GlideVariant(PseudoNumerical):
    """What PRK and PLMS have in common: a variant that repeats what GLIDE's users had."""

    def __init__(self, *, steps: Steps = 50, variant: Literal["pndm", "glide"] = "pndm") -> None:
        """Set the grid and the variant.

        Args:
            steps: how many; each costs four model calls (prk), or one but for the first three, four each (plms).
            variant: "glide" goes as the programs around GLIDE do: neither the grid's first time nor the step to t = 0
                is taken, so that a little noise stays, and between two times the schedule is interpolated
                (`ldm_lab.schedules.RespacedSchedule`).
        """
        super().__init__(steps=steps)
        self.variant = variant
        if variant == "glide":
            self.steps -= 2

    @staticmethod
    def check(*, steps: Steps = 50, variant: str | None = None) -> list[str]:
        """Return what is wrong across the options."""
        problems = PseudoNumerical.check(steps=steps)
        if not problems and variant == "glide" and num_steps(steps) < 3:
            problems.append(f"steps: variant glide leaves out two of them, so at least 3 are needed, not {steps}")
        return problems

    def times(self, schedule: Schedule, size: Sequence[int] | None = None) -> Tensor:
        """Return the times at which the steps begin, falling, float32 [steps]."""
        times = super().times(schedule, size)  # [steps or steps + 2]
        return times[1:-1] if self.variant == "glide" else times

    def begin(self, predict: Predict, schedule: Schedule, size: Sequence[int], noise: Noise | None) -> Run:
        """Return a new run; in the variant, between the grid's second and last time."""
        if self.variant != "glide":
            return super().begin(predict, schedule, size, noise)
        times = super().times(schedule, size)  # [steps + 2]
        return Run(predict, RespacedSchedule(schedule, times), times[1:], noise)


@register("sampler", "prk")
class PRK(GlideVariant):
    """Pseudo Runge-Kutta with the classical four stages: four model calls a step."""

    def slope(self, run: Run, past: list[Tensor], x: Tensor, t1: Tensor, t2: Tensor) -> Slope:
        """Return the Runge-Kutta slope."""
        return runge_kutta(run, x, t1, t2)


@register("sampler", "plms")
class PLMS(GlideVariant):
    """Pseudo linear multistep over four slopes: a model call a step after three Runge-Kutta steps (steps + 9 calls)."""

    def slope(self, run: Run, past: list[Tensor], x: Tensor, t1: Tensor, t2: Tensor) -> Slope:
        """Return the Runge-Kutta slope in the first three steps, then the extrapolated one."""
        return runge_kutta(run, x, t1, t2) if len(past) < 3 else multistep(run, past, x, t1, order=4)


@register("sampler", "pie")
class PIE(PseudoNumerical):
    """Pseudo improved Euler: two model calls a step."""

    def slope(self, run: Run, past: list[Tensor], x: Tensor, t1: Tensor, t2: Tensor) -> Slope:
        """Return the mean of the slopes at both ends."""
        return improved_euler(run, x, t1, t2)


@register("sampler", "plms2")
class PLMS2(PseudoNumerical):
    """Pseudo linear multistep over two slopes: a model call a step after an improved Euler step (steps + 1 calls)."""

    def slope(self, run: Run, past: list[Tensor], x: Tensor, t1: Tensor, t2: Tensor) -> Slope:
        """Return the improved Euler slope in the first step, then the extrapolated one."""
        return multistep(run, past, x, t1, order=2) if past else improved_euler(run, x, t1, t2)


@register("sampler", "iplms")
class IPLMS(PseudoNumerical):
    """Improved PLMS (iPNDM: Zhang & Chen 2022, arXiv 2204.13902): one model call a step from the first one on."""

    def slope(self, run: Run, past: list[Tensor], x: Tensor, t1: Tensor, t2: Tensor) -> Slope:
        """Return the slope extrapolated from as many calls as there are, four at most."""
        return multistep(run, past, x, t1, order=4)
