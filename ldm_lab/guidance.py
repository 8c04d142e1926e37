"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) for any number of weighted prompts.

The guided prediction is sum_i w_i * prediction(x, t, cond_i), where cond_0 is the null condition and
w_0 = 1 - (w_1 + ... + w_k). With one prompt of weight w that is null + w * (conditioned - null): 0 ignores the prompt,
1 is the plain conditional model, above 1 exaggerates, below 0 leads away from it. The original mixes v; since the
weights add up to one and x0 and eps are linear in v at fixed x and t, mixing x0 and eps serves every objective alike.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def null_weight(weights: Tensor) -> Tensor:
    """Return w_0 = 1 - sum of the weights [B, k], float64 [B]; exactly 0 where only rounding keeps it from 0."""
    w0 = 1 - weights.double().sum(1)  # [B]
    return torch.where(w0.abs() < 1e-6, 0.0, w0)  # [B]


def guided(
    predict: Callable[[Tensor, Tensor, dict[str, Tensor]], Any],
    cond: dict[str, Tensor],
    null_cond: dict[str, Tensor],
    weights: Tensor,
) -> Callable[[Tensor, Tensor], Any]:
    """Return `predict(x [B, C, h, w], t [B]) -> Prediction`, guided by k weighted conditions per image.

    Every image has conditions and weights of its own; one with fewer than k prompts has weight 0 in the places left
    over. All evaluations of a step are one call of `predict`, ordered by condition, the null condition first; a
    condition whose weight is exactly 0 is not evaluated. A learned `log_variance` is not mixed: an image's is that of
    its first prompt that has a weight.

    Args:
        predict: the denoiser's reading of M rows: x [M, C, h, w], t [M], cond of [M, ...] -> Prediction
            (`ldm_lab.objectives`).
        cond: the conditions, tensors of [B, k, ...].
        null_cond: the null condition of every image, tensors of [B, ...].
        weights: [B, k], on the CPU, finite. k = 0 samples without a condition.
    """
    mixed = torch.cat([null_weight(weights)[:, None], weights.double()], dim=1).T  # [1 + k, B]
    used = mixed != 0  # [1 + k, B]
    row = used.nonzero(as_tuple=True)  # [M] the condition and [M] the image of every row that is evaluated
    # The first prompt that has a weight; the null condition, moved to the end here, only if there is none.
    leading = (used.roll(-1, dims=0).int().argmax(0) + 1) % len(used)  # [B]
    row_cond = {
        name: torch.cat([null[None], cond[name].transpose(0, 1)])[row]  # [M, ...]
        for name, null in null_cond.items()
    }

    def by_condition(values: Tensor) -> Tensor:
        table = values.new_zeros(*used.shape, *values.shape[1:])  # [1 + k, B, C, h, w]
        table[row] = values
        return table

    def mix(values: Tensor) -> Tensor:
        weighted = by_condition(values) * mixed.float().to(values)[..., None, None, None]  # [1 + k, B, C, h, w]
        # Python's sum adds in order; torch's may regroup with the shape, and an image would depend on its batch.
        return sum(weighted.unbind())  # [B, C, h, w]

    def guided_predict(x: Tensor, t: Tensor) -> Any:
        rows = predict(x[row[1]], t[row[1]], row_cond)  # fields [M, C, h, w]
        log_variance = rows.log_variance
        if log_variance is not None:
            log_variance = by_condition(log_variance)[leading, torch.arange(len(x))]  # [B, C, h, w]
        return rows._replace(x0=mix(rows.x0), eps=mix(rows.eps), log_variance=log_variance)

    return guided_predict
