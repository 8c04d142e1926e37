"""Thresholding: clean estimates kept where clean samples are, such as pixels within [-1, 1]."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_lab.guidance.base import Wrapper
from ldm_lab.interfaces import Predict, Prediction, Schedule


@dataclass(frozen=True)
class StaticThresholding(Wrapper):
    """x0 clamped to [-limit, limit], and the eps that x holds besides: "clip_denoised" in guided-diffusion.

    What an eps model says of x0 at high noise is divided by a tiny alpha, and guidance exaggerates it.

    Attributes:
        limit: the largest magnitude that clean samples have.
    """

    order = 10

    limit: float = 1.0

    def wrap(self, predict: Predict, schedule: Schedule) -> Predict:
        """Return `predict` with its x0 and eps changed; see `Wrapper.wrap`."""

        def clip_denoised(x: Tensor, t: Tensor) -> Prediction:
            prediction = predict(x, t)
            alpha, sigma = (level[:, None, None, None] for level in schedule.alpha_sigma(t))  # [B, 1, 1, 1]
            x0 = prediction.x0.clamp(-self.limit, self.limit)  # [B, C, h, w]
            eps = torch.where(sigma > 0, (x - alpha * x0) / sigma, prediction.eps)  # [B, C, h, w]
            return prediction._replace(x0=x0, eps=eps)

        return clip_denoised
