"""Inpainting by any sampler: outside the mask the prediction is replaced with the known one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldm_lab.interfaces import Prediction


def keep_known(
    predict: Callable[[Tensor, Tensor], Prediction], known: Tensor, mask: Tensor, schedule: Any
) -> Callable[[Tensor, Tensor], Prediction]:
    """Return `predict` with the known latent [1 or B, C, h, w] in place of its own where the mask, bool, is False.

    For one walk: solvers that look at t = 0, where x holds no noise any more, are given the noise of the call before.
    """
    noise = torch.zeros_like(known)  # [1 or B, C, h, w]

    def predict_unknown(x: Tensor, t: Tensor) -> Prediction:
        nonlocal noise
        prediction = predict(x, t)
        alpha, sigma = (level[:, None, None, None] for level in schedule.alpha_sigma(t))  # [B, 1, 1, 1]
        noise = torch.where(sigma > 0, (x - alpha * known) / sigma, noise)  # [B, C, h, w]
        gradient = prediction.gradient
        return prediction._replace(
            x0=torch.where(mask, prediction.x0, known),
            eps=torch.where(mask, prediction.eps, noise),
            gradient=None if gradient is None else torch.where(mask, gradient, 0.0),
        )

    return predict_unknown
