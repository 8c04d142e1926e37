"""v-prediction on the cosine noise schedule: the objective of cloob-latent-diffusion."""

from torch import Tensor

from ldm_lab.conditions import Conditions
from ldm_lab.config import register
from ldm_lab.interfaces import Denoiser, Objective, Prediction, TimestepSampler
from ldm_lab.schedules import Cosine


@register("objective", "v_cosine")
class VCosine(Objective):
    """Mean squared error of v = alpha * eps - sigma * x0 (Salimans & Ho 2022, arXiv 2202.00512, appendix D)."""

    def __init__(self, *, timestep_sampler: TimestepSampler = "sobol") -> None:
        """Choose how t is drawn.

        Args:
            timestep_sampler: how training draws t (`training/timesteps.py`): evenly spread Sobol points, or
                independently.
        """
        self.schedule = Cosine()
        self.timestep_sampler = timestep_sampler

    def loss_terms(
        self, denoiser: Denoiser, x0: Tensor, conditions: Conditions, t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """Return {"loss": [B]} for clean x0 [B, C, h, w], t [B] in [0, 1) and standard normal noise [B, C, h, w]."""
        alpha, sigma = (level[:, None, None, None] for level in self.schedule.alpha_sigma(t))  # [B, 1, 1, 1]
        x = alpha * x0 + sigma * noise  # [B, C, h, w]
        target = alpha * noise - sigma * x0  # [B, C, h, w]
        v = denoiser(x, self.schedule.time(t, denoiser.time_input), **conditions)  # [B, C, h, w]
        return {"loss": (v.float() - target).square().flatten(1).mean(1)}

    def predict(self, denoiser: Denoiser, x: Tensor, t: Tensor, conditions: Conditions) -> Prediction:
        """Return clean sample and noise, [B, C, h, w] each, for x at times t [B]."""
        alpha, sigma = (level[:, None, None, None] for level in self.schedule.alpha_sigma(t))  # [B, 1, 1, 1]
        v = denoiser(x, self.schedule.time(t, denoiser.time_input), **conditions).float()  # [B, C, h, w]
        return Prediction(x0=alpha * x - sigma * v, eps=sigma * x + alpha * v)
