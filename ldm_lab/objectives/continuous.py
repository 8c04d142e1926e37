"""Diffusion in continuous time, with a network that predicts eps, x0 or v: the objective of Imagen."""

from typing import Annotated, Literal

from annotated_types import Interval
from torch import Tensor
from torch.nn import functional as F

from ldm_lab.conditions import Conditions
from ldm_lab.config import PositiveFloat, register
from ldm_lab.interfaces import Denoiser, Objective, Prediction, TimestepSampler
from ldm_lab.objectives.targets import Predicted, as_prediction, target
from ldm_lab.objectives.weighting import Weighting, loss_weight
from ldm_lab.schedules import LogSNR, LogSNRCurve

ERRORS = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}


@register("objective", "continuous")
class Continuous(Objective):
    """Error of eps, x0 or v at times of a log SNR curve (Saharia et al. 2022, arXiv 2205.11487; imagen-pytorch).

    Imagen's base and second stage have the cosine curve, its third the linear one.
    """

    schedule: LogSNR

    def __init__(
        self,
        *,
        curve: LogSNRCurve = "cosine",
        prediction: Predicted = "v",
        error: Literal["l2", "l1", "huber"] = "l2",
        weighting: Weighting = "uniform",
        gamma: PositiveFloat | None = None,
        last_time: Annotated[float, Interval(gt=0, le=1)] = 0.999,
        timestep_sampler: TimestepSampler = "sobol",
    ) -> None:
        """Set what is trained.

        Args:
            curve: of the log SNR (`ldm_lab.schedules.LogSNR`).
            prediction: what the network says: eps, as Imagen's; x0; or v, which is no worse anywhere and says something
                of x0 at pure noise, too.
            error: squared (l2), absolute (l1), or squared up to 1 and then absolute (huber).
            weighting: what noise levels count (`ldm_lab.objectives.weighting`); it multiplies whichever error.
            gamma: of the weighting: the SNR above which a level counts no more, 5 by default; of p2 the exponent, 0.5.
            last_time: the noisiest time that is trained, and where sampling begins; 1 is imagen-pytorch's, where
                alpha is 4e-8 on the cosine curve, so that what an eps model says of x0 there is its error alone.
            timestep_sampler: how training draws t (`training/timesteps.py`): evenly spread Sobol points, or
                independently.
        """
        self.schedule = LogSNR(curve, last_time)
        self.predicted, self.error, self.last_time = prediction, error, last_time
        self.weighting, self.gamma, self.timestep_sampler = weighting, gamma, timestep_sampler

    @staticmethod
    def unused(*, weighting: str) -> dict[str, str]:
        """Return which options have no effect, and why."""
        return {"gamma": "objective.weighting is uniform"} if weighting == "uniform" else {}

    def times(self, u: Tensor) -> Tensor:
        """Return the t, [B] in [0, last_time), of even draws u [B] from [0, 1)."""
        return u * self.last_time  # [B]

    def loss_terms(
        self, denoiser: Denoiser, x0: Tensor, conditions: Conditions, t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """Return {"loss": [B]}, with a weighting the error as it is, too, for x0 [B, C, h, w], t [B] and noise."""
        alpha, sigma = (level[:, None, None, None] for level in self.schedule.alpha_sigma(t))  # [B, 1, 1, 1]
        x = alpha * x0 + sigma * noise  # [B, C, h, w]
        output = denoiser(x, self.schedule.time(t, denoiser.time_input), **conditions).float()  # [B, C, h, w]
        wanted = target(self.predicted, x0, noise, alpha, sigma)  # [B, C, h, w]
        error = ERRORS[self.error](output, wanted, reduction="none").flatten(1).mean(1)  # [B]
        if self.weighting == "uniform":
            return {"loss": error}
        weight = loss_weight(self.weighting, self.gamma, self.schedule.log_snr(t), self.predicted)  # [B]
        return {"loss": weight * error, "mse" if self.error == "l2" else self.error: error}

    def predict(self, denoiser: Denoiser, x: Tensor, t: Tensor, conditions: Conditions) -> Prediction:
        """Return clean sample and noise, [B, C, h, w] each, for x at times t [B]."""
        alpha, sigma = (level[:, None, None, None] for level in self.schedule.alpha_sigma(t))  # [B, 1, 1, 1]
        output = denoiser(x, self.schedule.time(t, denoiser.time_input), **conditions).float()  # [B, C, h, w]
        return as_prediction(self.predicted, output, x, alpha, sigma)
