"""The variational bound on the log likelihood, one timestep of it: what trains a learned variance.

Ho et al. 2020 (arXiv 2006.11239, equation 5), as Nichol & Dhariwal 2021 (arXiv 2102.09672, section 3.1) use it: the
divergence of the model's ancestral step from the true posterior, and in the last step the likelihood of 8-bit levels.
"""

import math

import torch
from torch import Tensor

from ldm_lab.schedules import Posterior

HALF_LEVEL = 1 / 255  # of the 255 steps between -1 and 1
LEAST = 1e-12  # probabilities below this count as this


def variational_bound(
    step: Posterior, x0: Tensor, x: Tensor, predicted: Tensor, fraction: Tensor, last: Tensor
) -> Tensor:
    """Return a step's term of the bound per sample, in bits per element, [B].

    Args:
        step: the ancestral step of every row (`Posterior.at`).
        x0: clean samples, [B, C, h, w]; where the step is the last one, 8-bit levels in [-1, 1] are taken for granted.
        x: noised samples, [B, C, h, w].
        predicted: what the model takes for x0, [B, C, h, w], not clamped.
        fraction: the learned variance (`Prediction.variance_fraction`), [B, C, h, w].
        last: whether the step is the one to t = 0, bool [B].
    """
    mean, log_variance = step.mean(predicted, x), step.learned(fraction)  # [B, C, h, w] each
    divergence = normal_kl(step.mean(x0, x), step.log_variance, mean, log_variance)  # [B, C, h, w]
    surprise = -level_log_likelihood(x0, mean, log_variance / 2)  # [B, C, h, w]
    nats = torch.where(last[:, None, None, None], surprise, divergence)  # [B, C, h, w]
    return nats.flatten(1).mean(1) / math.log(2)  # [B]


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Return the divergence KL(N1 || N2) of normal distributions in nats, elementwise, of their common shape."""
    return 0.5 * (
        log_variance2
        - log_variance1
        - 1
        + (log_variance1 - log_variance2).exp()
        + (mean1 - mean2) ** 2 * (-log_variance2).exp()
    )


def level_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return the log probability in nats, of x's shape, of the 8-bit levels x in [-1, 1] under normal distributions.

    A level is an interval of 2/255 around it; the first and the last one reach to infinity (Ho et al. 2020, equation
    13). The normal distribution function is approximated as in guided-diffusion.
    """
    precision = (-log_std).exp()  # x's shape
    above = _normal_cdf(precision * (x - mean + HALF_LEVEL))  # x's shape
    below = _normal_cdf(precision * (x - mean - HALF_LEVEL))  # x's shape
    share = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))  # x's shape
    return share.clamp(min=LEAST).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """Return the standard normal distribution function, with tanh (Page 1977; the error is below 2e-4)."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
