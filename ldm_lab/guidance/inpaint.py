"""Inpainting by any sampler: outside the mask the prediction is replaced with the known one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_lab.guidance.base import Wrapper
from ldm_lab.interfaces import Predict, Prediction, Schedule


@dataclass(frozen=True, eq=False)
class Inpaint(Wrapper):
    """The known latent in place of x0, and in place of eps what x holds besides, where nothing is painted.

    Samplers, whose steps are linear in x0 and eps, carry that part along unharmed.

    Attributes:
        known: latent of the picture, [1 or B, C, h, w].
        mask: true where something new is painted, bool, of known's height and width.
    """

    order = 40

    known: Tensor
    mask: Tensor

    def wrap(self, predict: Predict, schedule: Schedule) -> Predict:
        """Return `predict` with the known part in its x0 and eps; see `Wrapper.wrap`.

        Solvers that look at t = 0, where x holds no noise any more, are given the noise of the call before.
        """
        known, mask = self.known, self.mask
        noise = torch.zeros_like(known)  # [1 or B, C, h, w]

        def inpaint(x: Tensor, t: Tensor) -> Prediction:
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

        return inpaint
