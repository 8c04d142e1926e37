"""Flow matching along straight paths: the network predicts the velocity from data to noise (rectified flow)."""

from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from ldm_lab.conditions import Conditions
from ldm_lab.config import PositiveFloat, register
from ldm_lab.interfaces import Denoiser, Objective, Prediction, TimestepSampler
from ldm_lab.objectives.weighting import Weighting, loss_weight
from ldm_lab.schedules import Linear


@register("objective", "flow_matching")
class FlowMatching(Objective):
    """Mean squared error of the velocity eps - x0 of x = (1 - t) x0 + t eps.

    Liu et al. 2022 (arXiv 2209.03003, equation 1), Lipman et al. 2022 (arXiv 2210.02747); t is drawn as in Stable
    Diffusion 3 (Esser et al. 2024, arXiv 2403.03206, section 3.1).
    """

    schedule: Linear

    def __init__(
        self,
        *,
        logit_mean: float = 0.0,
        logit_std: Annotated[float, Gt(0)] | None = 1.0,
        weighting: Weighting = "uniform",
        gamma: PositiveFloat | None = None,
        timestep_sampler: TimestepSampler = "sobol",
    ) -> None:
        """Set which times are trained.

        Args:
            logit_mean: of the normal distribution of log(t / (1 - t)); above 0 there is more noise.
            logit_std: its standard deviation; null draws t evenly from [0, 1).
            weighting: what noise levels count (`ldm_lab.objectives.weighting`).
            gamma: of the weighting: the SNR above which a level counts no more, 5 by default; of p2 the exponent, 0.5.
            timestep_sampler: how the even draws behind t are made (`training/timesteps.py`): evenly spread Sobol
                points, or independently.
        """
        self.schedule = Linear()
        self.logit_mean, self.logit_std = logit_mean, logit_std
        self.weighting, self.gamma, self.timestep_sampler = weighting, gamma, timestep_sampler

    @staticmethod
    def unused(*, weighting: str, logit_std: float | None) -> dict[str, str]:
        """Return which options have no effect, and why."""
        found = {"gamma": "objective.weighting is uniform"} if weighting == "uniform" else {}
        return found if logit_std is not None else {**found, "logit_mean": "objective.logit_std is null"}

    def times(self, u: Tensor) -> Tensor:
        """Return the t, [B] in [0, 1), of even draws u [B] from [0, 1): logit-normal ones."""
        if self.logit_std is None:
            return u
        return torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(u.double())).to(u)  # [B]

    def loss_terms(
        self, denoiser: Denoiser, x0: Tensor, conditions: Conditions, t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """Return {"loss": [B]}, with a weighting "mse" [B], too, for x0 [B, C, h, w], t [B] and noise [B, C, h, w]."""
        alpha, sigma = (level[:, None, None, None] for level in self.schedule.alpha_sigma(t))  # [B, 1, 1, 1]
        x = alpha * x0 + sigma * noise  # [B, C, h, w]
        velocity = denoiser(x, self.schedule.time(t, denoiser.time_input), **conditions)  # [B, C, h, w]
        mse = (velocity.float() - (noise - x0)).square().flatten(1).mean(1)  # [B]
        if self.weighting == "uniform":
            return {"loss": mse}
        weight = loss_weight(self.weighting, self.gamma, self.schedule.log_snr(t), "velocity")  # [B]
        return {"loss": weight * mse, "mse": mse}

    def predict(self, denoiser: Denoiser, x: Tensor, t: Tensor, conditions: Conditions) -> Prediction:
        """Return clean sample and noise, [B, C, h, w] each, for x at times t [B]."""
        alpha, sigma = (level[:, None, None, None] for level in self.schedule.alpha_sigma(t))  # [B, 1, 1, 1]
        velocity = denoiser(x, self.schedule.time(t, denoiser.time_input), **conditions).float()  # [B, C, h, w]
        return Prediction(x0=x - sigma * velocity, eps=x + alpha * velocity)
