"""Keeping the clean estimate where clean samples are: pixels within [-1, 1]."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldm_lab.interfaces import Prediction


def clamped(
    predict: Callable[[Tensor, Tensor], Prediction], schedule: Any, limit: float = 1.0
) -> Callable[[Tensor, Tensor], Prediction]:
    """Return `predict` with its x0 clamped to [-limit, limit], and the eps that x holds besides.

    Static thresholding, "clip_denoised" in guided-diffusion: what an eps model says of x0 at high noise is divided by a
    tiny alpha, and guidance exaggerates it.
    """

    def predict_clamped(x: Tensor, t: Tensor) -> Prediction:
        prediction = predict(x, t)
        alpha, sigma = (level[:, None, None, None] for level in schedule.alpha_sigma(t))  # [B, 1, 1, 1]
        x0 = prediction.x0.clamp(-limit, limit)  # [B, C, h, w]
        eps = torch.where(sigma > 0, (x - alpha * x0) / sigma, prediction.eps)  # [B, C, h, w]
        return prediction._replace(x0=x0, eps=eps)

    return predict_clamped
