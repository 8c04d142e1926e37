"""Thresholding: clean estimates kept where clean samples are, such as pixels within [-1, 1]."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_lab.guidance.base import Wrapper
from ldm_lab.interfaces import Predict, Prediction, Schedule


@dataclass(frozen=True)
class Thresholding(Wrapper):
    """x0 brought into [-limit, limit], and the eps that x holds besides.

    What an eps model says of x0 at high noise is divided by a tiny alpha, and guidance exaggerates it.

    Attributes:
        limit: the largest magnitude that clean samples have.
    """

    order = 10

    limit: float = 1.0

    def bounded(self, x0: Tensor) -> Tensor:
        """Return clean estimates [B, C, h, w] within the limit."""
        raise NotImplementedError

    def wrap(self, predict: Predict, schedule: Schedule) -> Predict:
        """Return `predict` with its x0 and eps changed; see `Wrapper.wrap`."""

        def with_bounds(x: Tensor, t: Tensor) -> Prediction:
            prediction = predict(x, t)
            alpha, sigma = (level[:, None, None, None] for level in schedule.alpha_sigma(t))  # [B, 1, 1, 1]
            x0 = self.bounded(prediction.x0)  # [B, C, h, w]
            eps = torch.where(sigma > 0, (x - alpha * x0) / sigma, prediction.eps)  # [B, C, h, w]
            return prediction._replace(x0=x0, eps=eps)

        return with_bounds


@dataclass(frozen=True)
class StaticThresholding(Thresholding):
    """x0 clamped to [-limit, limit]: "clip_denoised" in guided-diffusion."""

    def bounded(self, x0: Tensor) -> Tensor:
        """Return clean estimates [B, C, h, w] within the limit."""
        return x0.clamp(-self.limit, self.limit)  # [B, C, h, w]


@dataclass(frozen=True)
class DynamicThresholding(Thresholding):
    """Each image's x0 clamped at a percentile of its magnitudes, and divided by that.

    Guidance pushes whole regions beyond the limit, where a clamp makes them flat; with this they keep their shades. An
    image whose percentile is below the limit is clamped alone (Saharia et al. 2022, arXiv 2205.11487, section 2.3).

    Attributes:
        percentile: share of the magnitudes that are not clamped, 0 to 1.
        most: largest divisor, in limits, as DeepFloyd IF has it, against pale pictures.
    """

    percentile: float = 0.995
    most: float = math.inf

    def bounded(self, x0: Tensor) -> Tensor:
        """Return clean estimates [B, C, h, w] within the limit."""
        threshold = quantile(x0.abs().flatten(1), self.percentile)  # [B]
        threshold = threshold.clamp(self.limit, self.limit * self.most)  # [B]
        threshold = threshold[:, None, None, None]  # [B, 1, 1, 1]
        return x0.clamp(-threshold, threshold) * (self.limit / threshold)  # [B, C, h, w]


def quantile(rows: Tensor, share: float) -> Tensor:
    """Return the quantile of each row of [B, n], interpolated linearly, [B]; torch's own takes 2**24 numbers at most.

    Only the largest numbers of a row are sorted.
    """
    place = share * (rows.shape[1] - 1)
    below = math.floor(place)
    largest = rows.topk(rows.shape[1] - below, dim=1).values  # [B, n - below], falling
    low, high = largest[:, -1], largest[:, max(largest.shape[1] - 2, 0)]  # [B] each: the numbers below and above
    return torch.lerp(low, high, place - below)  # [B]
