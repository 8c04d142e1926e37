"""v-prediction on the cosine noise schedule: the objective of cloob-latent-diffusion."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from ldm_lab.config import register
from ldm_lab.interfaces import Prediction
from ldm_lab.objectives import Objective
from ldm_lab.schedules import Cosine


@register("objective", "v_cosine")
class VCosine(Objective):
    """Mean squared error of v = alpha * eps - sigma * x0 (Salimans & Ho 2022, arXiv 2202.00512, appendix D)."""

    def __init__(self, *, timesteps: Literal["sobol", "uniform"] = "sobol") -> None:
        """Choose how training draws t (`training/timesteps.py`): evenly spread Sobol points, or independently."""
        self.schedule = Cosine()
        self.draw = timesteps

    def loss(self, denoiser: Callable, x0: Tensor, cond: dict[str, Tensor], t: Tensor, noise: Tensor) -> Tensor:
        """Return the loss per sample, [B], for clean x0 [B, C, h, w], t [B] in [0, 1) and standard normal noise."""
        alpha, sigma = (level[:, None, None, None] for level in self.schedule.alpha_sigma(t))  # [B, 1, 1, 1]
        x = alpha * x0 + sigma * noise  # [B, C, h, w]
        target = alpha * noise - sigma * x0  # [B, C, h, w]
        v = denoiser(x, self.denoiser_time(denoiser, t), **cond)  # [B, C, h, w]
        return (v.float() - target).square().flatten(1).mean(1)  # [B]

    def predict(self, denoiser: Callable, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Prediction:
        """Return clean sample and noise, [B, C, h, w] each, for x at times t [B]."""
        alpha, sigma = (level[:, None, None, None] for level in self.schedule.alpha_sigma(t))  # [B, 1, 1, 1]
        v = denoiser(x, self.denoiser_time(denoiser, t), **cond).float()  # [B, C, h, w]
        return Prediction(x0=alpha * x - sigma * v, eps=sigma * x + alpha * v)
