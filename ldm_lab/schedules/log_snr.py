"""Continuous-time schedules that are said by their log SNR: those of Imagen and of variational diffusion models."""

import math
from typing import Literal

import torch
from torch import Tensor

from ldm_lab.schedules.continuous import ContinuousSchedule

# cosine   the cosine of Nichol & Dhariwal 2021 (arXiv 2102.09672, equation 17) in continuous time
# linear   the linear betas of Ho et al. 2020, 1e-4 to 0.02, in the limit of many steps
LogSNRCurve = Literal["cosine", "linear"]
OFFSET = 0.008  # of the cosine: how far its beginning is from no noise at all
LEAST_TAN2 = 1e-5
LAST_FINITE = 0.999  # where the grids begin that only the noise levels decide: alpha is 0.0016 or 0.0067 there


def cosine_log_snr(t: Tensor) -> Tensor:
    """Return log(alpha^2 / sigma^2) of the cosine curve, of t's shape and dtype."""
    angle = (t + OFFSET) / (1 + OFFSET) * (math.pi / 2)  # t's shape
    tan2: Tensor = angle.tan().square().clamp(min=LEAST_TAN2)  # t's shape
    return -tan2.log()


def linear_log_snr(t: Tensor) -> Tensor:
    """Return log(alpha^2 / sigma^2) of the linear curve, of t's shape and dtype."""
    ratio: Tensor = torch.special.expm1(1e-4 + 10 * t**2)  # t's shape, sigma^2 / alpha^2
    return -ratio.log()


LOG_SNR = {"cosine": cosine_log_snr, "linear": linear_log_snr}  # by the curve's name


class LogSNR(ContinuousSchedule):
    """alpha^2 = sigmoid(log SNR), sigma^2 = sigmoid(-log SNR) (Kingma et al. 2021, arXiv 2107.00630, section 3.1).

    At t = 0 a little noise is left: sigma is 0.012 (cosine) or 0.01 (linear). Samplers end at the clean sample all the
    same, but for `ddpm`, whose last step is that to t = 0, as Imagen's is.

    Attributes:
        curve: of the log SNR.
    """

    variance_preserving = True

    def __init__(self, curve: LogSNRCurve = "cosine", first_time: float = 1.0) -> None:
        """Choose the curve, and where sampling begins: at 1 alpha is 4e-8 (cosine) or 0.0067 (linear)."""
        self.curve, self.name, self.first_time = curve, f"continuous ({curve})", first_time
        last = min(first_time, LAST_FINITE)
        with torch.device("cpu"):  # whatever torch's default is: networks are built without memory on "meta"
            self.sigma_max = (-self.log_snr(torch.tensor(last, dtype=torch.float64)) / 2).exp().item()

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log(alpha^2 / sigma^2), of t's shape and dtype."""
        return LOG_SNR[self.curve](t)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma, each of t's shape and dtype, for t in [0, 1]."""
        log_snr = self.log_snr(t)  # t's shape
        return log_snr.sigmoid().sqrt(), log_snr.neg().sigmoid().sqrt()

    def t_of_sigma_over_alpha(self, ratio: Tensor) -> Tensor:
        """Return the t, of any shape, at which sigma / alpha is `ratio`; 0 where there is less noise than at 0."""
        if self.curve == "cosine":
            return (ratio.atan() * (1 + OFFSET) / (math.pi / 2) - OFFSET).clamp(min=0)
        return ((ratio.square().log1p() - 1e-4).clamp(min=0) / 10).sqrt()
