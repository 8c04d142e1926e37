"""What the error at a noise level counts in the loss: functions of the log SNR and of what the network predicts.

Errors of x0, eps, v and the velocity are the same error in other units: squared, the target's is `per_x0` times that of
x0. A weighting is therefore said for x0, and means the same for every target.
"""

from typing import Literal

import torch
from torch import Tensor

# uniform        the target's own squared error, unweighted
# min_snr        min(SNR, gamma) for x0 (Hang et al. 2023, arXiv 2303.09556, section 3.4, where gamma is 5)
# soft_min_snr   SNR * gamma / (SNR + gamma): the same without the corner (Crowson et al. 2024, arXiv 2401.11605)
Weighting = Literal["uniform", "min_snr", "soft_min_snr"]
Target = Literal["x0", "eps", "v", "velocity"]


def loss_weight(weighting: Weighting, gamma: float, log_snr: Tensor, target: Target) -> Tensor:
    """Return what the squared error of a target counts at noise levels, of the shape of `log_snr`.

    Args:
        weighting: one of the above; with `uniform` all levels count 1.
        gamma: the SNR above which a level counts no more for x0, above 0.
        log_snr: log(alpha^2 / sigma^2), of any shape.
        target: what the network predicts.
    """
    if weighting == "uniform":
        return torch.ones_like(log_snr)
    if target == "eps":  # written so that it is finite at every noise level
        over = (log_snr.exp() / gamma).clamp(min=1) if weighting == "min_snr" else log_snr.exp() / gamma + 1
        return 1 / over
    snr = log_snr.exp()
    wanted = snr.clamp(max=gamma) if weighting == "min_snr" else gamma / (1 + gamma * (-log_snr).exp())
    return wanted / per_x0(log_snr, target)


def per_x0(log_snr: Tensor, target: Target) -> Tensor:
    """Return how many times x0's squared error the target's is, of the shape of `log_snr`.

    With x given: eps = (x - alpha x0) / sigma. v is that of schedules with alpha^2 + sigma^2 = 1, the velocity eps - x0
    that of alpha + sigma = 1.
    """
    if target == "x0":
        return torch.ones_like(log_snr)
    if target == "eps":
        return log_snr.exp()
    return 1 + log_snr.exp() if target == "v" else (1 + (log_snr / 2).exp()).square()
