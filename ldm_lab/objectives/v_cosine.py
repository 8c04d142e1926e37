"""v-prediction on the cosine noise schedule: the objective of cloob-latent-diffusion."""

from torch import Tensor

from ldm_lab.conditions import Conditions
from ldm_lab.config import PositiveFloat, register
from ldm_lab.interfaces import Denoiser, Objective, Prediction, TimestepSampler
from ldm_lab.objectives.weighting import Weighting, loss_weight
from ldm_lab.schedules import Cosine


@register("objective", "v_cosine")
class VCosine(Objective):
    """Mean squared error of v = alpha * eps - sigma * x0 (Salimans & Ho 2022, arXiv 2202.00512, appendix D)."""

    def __init__(
        self,
        *,
        weighting: Weighting = "uniform",
        gamma: PositiveFloat | None = None,
        timestep_sampler: TimestepSampler = "sobol",
    ) -> None:
        """Choose what counts, and how t is drawn.

        Args:
            weighting: what noise levels count (`ldm_lab.objectives.weighting`).
            gamma: of the weighting: the SNR above which a level counts no more, 5 by default; of p2 the exponent, 0.5.
            timestep_sampler: how training draws t (`training/timesteps.py`): evenly spread Sobol points, or
                independently.
        """
        self.schedule = Cosine()
        self.weighting, self.gamma, self.timestep_sampler = weighting, gamma, timestep_sampler

    @staticmethod
    def unused(*, weighting: str) -> dict[str, str]:
        """Return which options have no effect, and why."""
        return {"gamma": "objective.weighting is uniform"} if weighting == "uniform" else {}

    def loss_terms(
        self, denoiser: Denoiser, x0: Tensor, conditions: Conditions, t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """Return {"loss": [B]}, with a weighting "mse" [B], too, for x0 [B, C, h, w], t [B] and noise [B, C, h, w]."""
        alpha, sigma = (level[:, None, None, None] for level in self.schedule.alpha_sigma(t))  # [B, 1, 1, 1]
        x = alpha * x0 + sigma * noise  # [B, C, h, w]
        target = alpha * noise - sigma * x0  # [B, C, h, w]
        v = denoiser(x, self.schedule.time(t, denoiser.time_input), **conditions)  # [B, C, h, w]
        mse = (v.float() - target).square().flatten(1).mean(1)  # [B]
        if self.weighting == "uniform":
            return {"loss": mse}
        weight = loss_weight(self.weighting, self.gamma, self.schedule.log_snr(t), "v")  # [B]
        return {"loss": weight * mse, "mse": mse}

    def predict(self, denoiser: Denoiser, x: Tensor, t: Tensor, conditions: Conditions) -> Prediction:
        """Return clean sample and noise, [B, C, h, w] each, for x at times t [B]."""
        alpha, sigma = (level[:, None, None, None] for level in self.schedule.alpha_sigma(t))  # [B, 1, 1, 1]
        v = denoiser(x, self.schedule.time(t, denoiser.time_input), **conditions).float()  # [B, C, h, w]
        return Prediction(x0=alpha * x - sigma * v, eps=sigma * x + alpha * v)
