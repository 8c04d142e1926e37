"""What the error at a noise level counts in the loss: functions of the log SNR and of what the network predicts.

Errors of x0, eps, v and the velocity are the same error in other units: squared, the target's is `per_x0` times that of
x0. A weighting is therefore said for x0, and means the same for every target; `uniform` and `p2` are the exceptions.
"""

from typing import Literal

import torch
from torch import Tensor

# uniform        the target's own squared error, unweighted
# min_snr        min(SNR, gamma) for x0 (Hang et al. 2023, arXiv 2303.09556, section 3.4, where gamma is 5)
# soft_min_snr   SNR * gamma / (SNR + gamma): the same without the corner (Crowson et al. 2024, arXiv 2401.11605)
# snr            SNR for x0: the squared error of eps, whatever the network predicts
# p2             the target's own squared error times (1 + SNR)^-gamma (Choi et al. 2022, arXiv 2204.00227, equation 8,
#                where gamma is 1 or 0.5); imagen-pytorch took it for eps and x0 alike until its 1.23
Weighting = Literal["uniform", "min_snr", "soft_min_snr", "snr", "p2"]
Target = Literal["x0", "eps", "v", "velocity"]
DEFAULT_GAMMA, DEFAULT_P2_GAMMA = 5.0, 0.5


def loss_weight(weighting: Weighting, gamma: float | None, log_snr: Tensor, target: Target) -> Tensor:
    """Return what the squared error of a target counts at noise levels, of the shape of `log_snr`.

    Args:
        weighting: one of the above; with `uniform` all levels count 1.
        gamma: above 0: the SNR above which a level counts no more for x0; of p2 the exponent. None: 5, of p2 0.5.
        log_snr: log(alpha^2 / sigma^2), of any shape.
        target: what the network predicts.
    """
    if gamma is None:
        gamma = DEFAULT_P2_GAMMA if weighting == "p2" else DEFAULT_GAMMA
    if weighting == "uniform":
        return torch.ones_like(log_snr)
    snr = log_snr.exp()
    if weighting == "p2":
        return (1 + snr) ** -gamma
    if weighting == "snr":  # snr / per_x0, written so that it is finite at every noise level, but for x0 itself
        shares = {"x0": snr, "eps": torch.ones_like(snr), "v": log_snr.sigmoid()}
        return shares.get(target, (log_snr / 2).sigmoid().square())
    if target == "eps":  # likewise
        over = (snr / gamma).clamp(min=1) if weighting == "min_snr" else snr / gamma + 1
        return 1 / over
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
