"""Exponential integrators with few steps: DPM-Solver++ and UniPC.

All of them solve, from a time s to a time t, the same equation for the clean estimate x0 (Lu et al. 2022, arXiv
2211.01095, proposition 4.1), with lambda = log(alpha / sigma) in place of time and h = lambda_t - lambda_s:

    x_t = (sigma_t / sigma_s) x_s + sigma_t * integral of exp(lambda) x0(lambda) over [lambda_s, lambda_t]

The linear part is exact; only x0, which varies slowly, is extrapolated from earlier steps. Nothing but the schedule's
alpha and sigma enters, so every objective is served alike. The last step goes to sigma = 0 and is the clean estimate.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any

import torch
from annotated_types import Interval
from torch import Tensor

from ldm_lab.config import Share, register
from ldm_lab.interfaces import Callback, Predict
from ldm_lab.samplers import Walk, check_steps
from ldm_lab.schedules import SPACING, Steps


class _Grid:
    """Times, alphas, sigmas and lambdas of a walk, as numbers."""

    def __init__(self, schedule: Any, times: Tensor) -> None:
        self.times = times  # [steps]
        alpha, sigma = schedule.alpha_sigma(self.times.double())  # [steps], [steps]
        self.alpha, self.sigma = alpha.tolist(), sigma.tolist()
        self.log_ratio = (alpha / sigma).log().tolist()  # lambda

    def __len__(self) -> int:
        return len(self.times)


@register("sampler", "dpmpp_2m_sde")
class DPMSolverSDE(Walk):
    """SDE-DPM-Solver++(2M): the multistep solver of the diffusion SDE, one model call a step (Lu et al. 2022).

    Args:
        steps: model calls.
        eta: how much of the noise is fresh, from 0 (none: DPM-Solver++(2M)) to 1 (the diffusion SDE).
        spacing: how the steps are spread over the noise levels (`ldm_lab.schedules`).
    """

    def __init__(self, *, steps: Steps = 25, eta: Share = 1.0, spacing: SPACING = "log_snr") -> None:
        super().__init__(steps)
        self.eta, self.spacing = eta, spacing

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
        """Return x0 [B, C, h, w]; `noise` is called between steps if eta is not 0. See the package's contract."""
        assert self.eta == 0 or noise is not None, "eta > 0 needs a source of noise"
        grid = _Grid(schedule, self.times(schedule))
        before = None  # the clean estimate of the step before, [B, C, h, w]
        for i, t in enumerate(grid.times):
            x0 = predict(x, t.to(x.device).expand(len(x))).x0  # [B, C, h, w]
            if callback:
                callback(i, x, x0)
            if i + 1 == len(grid):
                return x0
            h = grid.log_ratio[i + 1] - grid.log_ratio[i]
            # Lu et al. 2022, algorithm 2, line 9: x0 extrapolated to the middle of the step.
            middle = x0
            if before is not None:
                ratio = (grid.log_ratio[i] - grid.log_ratio[i - 1]) / h
                middle = x0 + (x0 - before) / (2 * ratio)  # [B, C, h, w]
            # Their equation 19 for eta = 1; eta shares the step out between the ODE and the SDE.
            decay = math.exp(-self.eta * h)
            x = (
                grid.sigma[i + 1] / grid.sigma[i] * decay * x
                - grid.alpha[i + 1] * math.expm1(-(1 + self.eta) * h) * middle
            )  # [B, C, h, w]
            if self.eta:
                x = x + grid.sigma[i + 1] * math.sqrt(-math.expm1(-2 * self.eta * h)) * noise(x)  # [B, C, h, w]
            before = x0
        raise AssertionError("a grid has a last time")


@register("sampler", "dpmpp_2m")
class DPMSolver(DPMSolverSDE):
    """DPM-Solver++(2M): second-order multistep, deterministic, one model call a step (Lu et al. 2022, algorithm 2).

    Args:
        steps: model calls.
        spacing: how the steps are spread over the noise levels (`ldm_lab.schedules`).
    """

    def __init__(self, *, steps: Steps = 20, spacing: SPACING = "log_snr") -> None:
        super().__init__(steps=steps, eta=0.0, spacing=spacing)


@register("sampler", "unipc")
class UniPC(Walk):
    """UniPC: each step is corrected by the model call of the next one, so order p costs one call a step.

    Zhao et al. 2023 (arXiv 2302.04867), UniPC-p with B(h) = exp(h) - 1 on the clean estimate.

    Args:
        steps: model calls.
        order: p, of predictor and corrector, 1 to 4; with few steps and guidance 2 is best (docs/measured.md).
        spacing: how the steps are spread over the noise levels (`ldm_lab.schedules`).
    """

    def __init__(
        self, *, steps: Steps = 20, order: Annotated[int, Interval(ge=1, le=4)] = 2, spacing: SPACING = "log_snr"
    ) -> None:
        super().__init__(steps)
        self.order, self.spacing = order, spacing

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
        """Return x0 [B, C, h, w]; nothing is random, so `noise` is not called. See the package's contract."""
        grid = _Grid(schedule, self.times(schedule))
        known: list[tuple[float, Tensor]] = []  # (lambda, clean estimate [B, C, h, w]), newest first
        before = x  # [B, C, h, w], where the last step began
        for i, t in enumerate(grid.times):
            x0 = predict(x, t.to(x.device).expand(len(x))).x0  # [B, C, h, w]
            if callback:
                callback(i, x, x0)
            if i + 1 == len(grid):
                return x0
            if i:  # UniC: the step that led here once more, now that x0 at its end is known
                points = [(grid.log_ratio[i], x0), *known[: min(self.order, i)]]
                x = _step(before, grid, i - 1, points, base=1)  # [B, C, h, w]
            known = [(grid.log_ratio[i], x0), *known[: self.order - 1]]
            before = x
            # UniP. Near the end the order falls: an extrapolation over a long last step would run away.
            order = min(self.order, i + 1, len(grid) - i)
            x = _step(x, grid, i, known[:order], base=0)  # [B, C, h, w]
        raise AssertionError("a grid has a last time")


def _step(x: Tensor, grid: _Grid, i: int, points: list[tuple[float, Tensor]], base: int) -> Tensor:
    """Return x [B, C, h, w] moved from time i to i + 1 with x0 interpolated through some points.

    Args:
        x: at time i, [B, C, h, w].
        grid: of the walk.
        i: where the step begins.
        points: (lambda, clean estimate); one of them is that of time i.
        base: its place among them.
    """
    h = grid.log_ratio[i + 1] - grid.log_ratio[i]
    b = math.expm1(-h)  # Zhao et al. 2023, section 3.3: B2 for predictions of x0, in which h changes its sign
    _, x0 = points[base]
    moved = grid.sigma[i + 1] / grid.sigma[i] * x - grid.alpha[i + 1] * b * x0  # [B, C, h, w]
    others = [point for place, point in enumerate(points) if place != base]
    if not others:
        return moved
    offsets = [(level - grid.log_ratio[i]) / h for level, _ in others]  # r_m: 1 at the step's end, below 0 before
    weights = _weights(offsets, -h)
    slopes = sum(w * (value - x0) / r for w, r, (_, value) in zip(weights, offsets, others))  # [B, C, h, w]
    return moved - grid.alpha[i + 1] * b * slopes


def _weights(offsets: list[float], h: float) -> list[float]:
    """Return the weights a_m with sum_m a_m r_m^(k-1) = k! phi_{k+1}(h) h / B(h): Zhao et al. 2023, theorem 3.1.

    phi_1(h) = (e^h - 1) / h, phi_{k+1}(h) = (phi_k(h) - 1 / k!) / h. For a single offset the paper takes 1/2, which is
    exact up to higher order (its appendix F).
    """
    if len(offsets) == 1:
        return [0.5]
    b, phi, factorial, right = math.expm1(h), math.expm1(h) / h, 1, []
    for k in range(1, len(offsets) + 1):
        factorial *= k
        phi = (phi - 1 / factorial) / h
        right.append(phi * factorial * h / b)
    powers = torch.tensor([[r ** (k - 1) for r in offsets] for k in range(1, len(offsets) + 1)], dtype=torch.float64)
    return torch.linalg.solve(powers, torch.tensor(right, dtype=torch.float64)).tolist()
