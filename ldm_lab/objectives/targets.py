"""eps, x0 and v: what a network may predict, made of one another at x = alpha * x0 + sigma * eps.

v = alpha * eps - sigma * x0 (Salimans & Ho 2022, arXiv 2202.00512, appendix D); alpha^2 + sigma^2 = 1 is taken for
granted.
"""

from typing import Literal

from torch import Tensor

from ldm_lab.interfaces import Prediction
from ldm_lab.predictions import LEAST

Predicted = Literal["eps", "x0", "v"]


def target(predicted: Predicted, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return what the network should say, [B, C, h, w], of x0 and eps [B, C, h, w]; alpha and sigma broadcast."""
    if predicted == "eps":
        return eps
    return x0 if predicted == "x0" else alpha * eps - sigma * x0  # [B, C, h, w]


def as_prediction(predicted: Predicted, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
    """Return the clean sample and the noise, [B, C, h, w] each, that an output for x [B, C, h, w] means."""
    if predicted == "v":
        return Prediction(x0=alpha * x - sigma * output, eps=sigma * x + alpha * output)
    if predicted == "eps":
        return Prediction(x0=(x - sigma * output) / alpha.clamp(min=LEAST), eps=output)
    return Prediction(x0=output, eps=(x - alpha * output) / sigma.clamp(min=LEAST))
