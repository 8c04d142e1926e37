"""A gradient in the predictions turned into their x0 and eps, for samplers that do not follow it themselves."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def shifted(predict: Callable[[Tensor, Tensor], Any], schedule: Any) -> Callable[[Tensor, Tensor], Any]:
    """Return `predict` with the gradient of its predictions, if they have one, in their x0 and eps.

    The score of the guided distribution is the model's plus the gradient: eps - sigma * gradient (Dhariwal & Nichol
    2021, arXiv 2105.05233, algorithm 2). For samplers that do not follow the gradient themselves.
    """

    def predict_shifted(x: Tensor, t: Tensor) -> Any:
        prediction = predict(x, t)
        if prediction.gradient is None:
            return prediction
        alpha, sigma = (level[:, None, None, None] for level in schedule.alpha_sigma(t))  # [B, 1, 1, 1]
        eps = prediction.eps - sigma * prediction.gradient  # [B, C, h, w]
        x0 = prediction.x0 + sigma**2 / alpha * prediction.gradient  # [B, C, h, w]
        return prediction._replace(x0=x0, eps=eps, gradient=None)

    return predict_shifted
