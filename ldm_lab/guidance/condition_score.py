"""The gradient of predictions worked into their x0 and eps, for samplers that do not follow it themselves."""

from dataclasses import dataclass

from torch import Tensor

from ldm_lab.guidance.base import Wrapper
from ldm_lab.guidance.thresholding import Thresholding
from ldm_lab.interfaces import Predict, Prediction, Schedule


@dataclass(frozen=True)
class ConditionScore(Wrapper):
    """The score of the guided distribution, the model's plus the gradient: eps - sigma * gradient.

    Dhariwal & Nichol 2021 (arXiv 2105.05233), algorithm 2; guided-diffusion's `condition_score`.

    Attributes:
        thresholding: of x0 once more, which guided-diffusion's DDIM does without: at high noise the gradient's part of
            x0 is divided by a tiny alpha.
    """

    order = 30

    thresholding: Thresholding | None = None

    def wrap(self, predict: Predict, schedule: Schedule) -> Predict:
        """Return `predict` with the gradient, if there is one, in its x0 and eps; see `Wrapper.wrap`."""

        def with_condition_score(x: Tensor, t: Tensor) -> Prediction:
            prediction = predict(x, t)
            if prediction.gradient is None:
                return prediction
            alpha, sigma = (level[:, None, None, None] for level in schedule.alpha_sigma(t))  # [B, 1, 1, 1]
            eps = prediction.eps - sigma * prediction.gradient  # [B, C, h, w]
            x0 = prediction.x0 + sigma**2 / alpha * prediction.gradient  # [B, C, h, w]
            return prediction._replace(x0=x0, eps=eps, gradient=None)

        return self.thresholding.wrap(with_condition_score, schedule) if self.thresholding else with_condition_score
