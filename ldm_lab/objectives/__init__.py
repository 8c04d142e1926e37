"""Objectives: what the denoiser's output means, how it is trained, how clean data is read off it.

An objective is an `Objective` with

    schedule                                                             the noise schedule (`ldm_lab.schedules`)
    draw                                                                 "sobol" or "uniform": how training draws t
    loss(denoiser, x0 [B,C,h,w], cond, t [B], noise [B,C,h,w]) -> [B]    per sample; t in [0, 1], standard normal noise
    terms(...) -> {"loss": [B], ...}                                     the loss with what is to be logged beside it
    predict(denoiser, x [B,C,h,w], t [B], cond) -> Prediction            for the samplers

All are pure: the random numbers are handed in, so that a resumed run repeats them and a test can fix them. A new
objective is one file with one `@register("objective", "name")`.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ldm_lab.errors import UserError
from ldm_lab.interfaces import Prediction


class Objective:
    """What objectives share."""

    schedule: Any
    draw: str

    def denoiser_time(self, denoiser: Callable, t: Tensor) -> Tensor:
        """Return what a denoiser's time embedding reads at t [B]."""
        if getattr(denoiser, "time_input", "t") == "t":
            return t
        return t.float() * self.schedule.timesteps - 1  # [B]

    def check_denoiser(self, denoiser: Callable) -> None:
        """Raise UserError if a denoiser reads timesteps, and the schedule has none."""
        if getattr(denoiser, "time_input", "t") == "timestep" and getattr(self.schedule, "timesteps", None) is None:
            raise UserError("objective.name: this denoiser reads timesteps, and the objective's schedule is continuous")

    def loss(self, denoiser: Callable, x0: Tensor, cond: dict[str, Tensor], t: Tensor, noise: Tensor) -> Tensor:
        """Return the loss per sample, [B]."""
        raise NotImplementedError

    def terms(
        self, denoiser: Callable, x0: Tensor, cond: dict[str, Tensor], t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """Return the loss per sample as "loss", [B], and parts of it that are worth logging by themselves, [B] each."""
        return {"loss": self.loss(denoiser, x0, cond, t, noise)}

    def predict(self, denoiser: Callable, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Prediction:
        """Return what the denoiser says about x [B, C, h, w] at times t [B]."""
        raise NotImplementedError
