"""Exponential integrators with few steps: DPM-Solver++ and UniPC.

All of them solve, from a time s to a time t, the same equation for the clean estimate x0 (Lu et al. 2022, arXiv
2211.01095, proposition 4.1), with lambda = log(alpha / sigma) in place of time and h = lambda_t - lambda_s:

    x_t = (sigma_t / sigma_s) x_s + sigma_t * integral of exp(lambda) x0(lambda) over [lambda_s, lambda_t]

The linear part is exact; only x0, which varies slowly, is extrapolated from earlier steps. Nothing but the schedule's
alpha and sigma enters, so every objective is served alike. The last step goes to sigma = 0 and is the clean estimate.
"""

import math
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from ldm_lab.config import Share, register
from ldm_lab.samplers.base import GridSampler, Run, Step
from ldm_lab.schedules import NoiseLevel, Spacing, Steps


@register("sampler", "dpmpp_2m_sde")
class DPMSolverSDE(GridSampler):
    """SDE-DPM-Solver++(2M): the multistep solver of the diffusion SDE, one model call a step (Lu et al. 2022)."""

    history = 1

    def __init__(
        self,
        *,
        steps: Steps = 25,
        eta: Share = 1.0,
        spacing: Spacing = "log_snr",
        sigma_max: NoiseLevel | None = None,
    ) -> None:
        """Set the grid and the fresh noise.

        Args:
            steps: model calls.
            eta: how much of the noise is fresh, from 0 (none: DPM-Solver++(2M)) to 1 (the diffusion SDE).
            spacing: how the steps are spread over the noise levels (`ldm_lab.schedules`).
            sigma_max: noise level (sigma / alpha) of the first step (default: 50 for 8x8 latents, for larger ones more
                in proportion to their side, and at most where the model's noise schedule begins).
        """
        super().__init__(steps, spacing, sigma_max)
        self.eta = eta

    def step(self, run: Run, i: int, x: Tensor) -> Step:
        """Return a step by x0 extrapolated to its middle; the last step is the clean estimate."""
        x0 = run.model(x, run.times[i]).x0  # [B, C, h, w]
        if i + 1 == len(run):
            return Step(x0, x0)
        h = run.lambdas[i + 1] - run.lambdas[i]
        # Lu et al. 2022, algorithm 2, line 9.
        middle = x0
        if run.past:
            ratio = (run.lambdas[i] - run.lambdas[i - 1]) / h
            middle = x0 + (x0 - run.past[0].x0) / (2 * ratio)  # [B, C, h, w]
        # Their equation 19 for eta = 1; eta shares the step out between the ODE and the SDE.
        decay = math.exp(-self.eta * h)
        x = (
            run.sigma[i + 1] / run.sigma[i] * decay * x - run.alpha[i + 1] * math.expm1(-(1 + self.eta) * h) * middle
        )  # [B, C, h, w]
        if self.eta:
            x = x + run.sigma[i + 1] * math.sqrt(-math.expm1(-2 * self.eta * h)) * run.noise(x)  # [B, C, h, w]
        return Step(x, x0)


@register("sampler", "dpmpp_2m")
class DPMSolver(DPMSolverSDE):
    """DPM-Solver++(2M): second-order multistep, deterministic, one model call a step (Lu et al. 2022, algorithm 2)."""

    def __init__(self, *, steps: Steps = 20, spacing: Spacing = "log_snr", sigma_max: NoiseLevel | None = None) -> None:
        """Set the grid.

        Args:
            steps: model calls.
            spacing: how the steps are spread over the noise levels (`ldm_lab.schedules`).
            sigma_max: noise level (sigma / alpha) of the first step (default: 50 for 8x8 latents, for larger ones more
                in proportion to their side, and at most where the model's noise schedule begins).
        """
        super().__init__(steps=steps, eta=0.0, spacing=spacing, sigma_max=sigma_max)


@register("sampler", "unipc")
class UniPC(GridSampler):
    """UniPC: each step is corrected by the model call of the next one, so order p costs one call a step.

    Zhao et al. 2023 (arXiv 2302.04867), UniPC-p with B(h) = exp(h) - 1 on the clean estimate.
    """

    def __init__(
        self,
        *,
        steps: Steps = 20,
        order: Annotated[int, Interval(ge=1, le=4)] = 2,
        spacing: Spacing = "log_snr",
        sigma_max: NoiseLevel | None = None,
    ) -> None:
        """Set the grid and the order.

        Args:
            steps: model calls.
            order: p, of predictor and corrector, 1 to 4; with few steps and guidance 2 is best (docs/measured.md).
            spacing: how the steps are spread over the noise levels (`ldm_lab.schedules`).
            sigma_max: noise level (sigma / alpha) of the first step (default: 50 for 8x8 latents, for larger ones more
                in proportion to their side, and at most where the model's noise schedule begins).
        """
        super().__init__(steps, spacing, sigma_max)
        self.order = self.history = order

    def step(self, run: Run, i: int, x: Tensor) -> Step:
        """Return the step before once more (UniC), and the predictor's step from there (UniP)."""
        x0 = run.model(x, run.times[i]).x0  # [B, C, h, w]
        if i + 1 == len(run):
            return Step(x0, x0)
        past = [(run.lambdas[i - 1 - k], step.x0) for k, step in enumerate(run.past)]
        now = (run.lambdas[i], x0)
        if run.past and run.past[0].start is not None:  # UniC: x0 at the end of the step that led here is known now
            x = _step(run, i - 1, run.past[0].start, [now, *past[: self.order]], base=1)  # [B, C, h, w]
        # UniP. Near the end the order falls: an extrapolation over a long last step would run away.
        order = min(self.order, i + 1, len(run) - i)
        return Step(_step(run, i, x, [now, *past][:order], base=0), x0, start=x)


def _step(run: Run, i: int, x: Tensor, points: list[tuple[float, Tensor]], base: int) -> Tensor:
    """Return x [B, C, h, w] moved from time i to i + 1 with x0 interpolated through some points.

    Args:
        run: its grid.
        i: where the step begins.
        x: at time i, [B, C, h, w].
        points: (lambda, clean estimate); one of them is that of time i.
        base: its place among them.
    """
    h = run.lambdas[i + 1] - run.lambdas[i]
    b = math.expm1(-h)  # Zhao et al. 2023, section 3.3: B2 for predictions of x0, in which h changes its sign
    _, x0 = points[base]
    moved: Tensor = run.sigma[i + 1] / run.sigma[i] * x - run.alpha[i + 1] * b * x0  # [B, C, h, w]
    others = [point for place, point in enumerate(points) if place != base]
    if not others:
        return moved
    offsets = [(level - run.lambdas[i]) / h for level, _ in others]  # r_m: 1 at the step's end, below 0 before
    slopes = torch.zeros_like(x0)  # [B, C, h, w]
    for weight, offset, (_, value) in zip(_weights(offsets, -h), offsets, others):
        slopes = slopes + weight * (value - x0) / offset  # [B, C, h, w]
    moved = moved - run.alpha[i + 1] * b * slopes  # [B, C, h, w]
    return moved


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
    weights: list[float] = torch.linalg.solve(powers, torch.tensor(right, dtype=torch.float64)).tolist()
    return weights
