"""Classifier-free guidance: any number of weighted prompts, and where, how strongly and against what they guide.

The guided prediction is sum_i w_i * prediction(x, t, cond_i), where cond_0 is the null condition and
w_0 = 1 - (w_1 + ... + w_k): classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598). With one prompt of weight
w that is null + w * (conditioned - null): 0 ignores the prompt, 1 is the plain conditional model, above 1 exaggerates,
below 0 steers away from it. The original mixes v; since the weights add up to one and x0 and eps are linear in v at
fixed x and t, mixing x0 and eps serves every objective alike. A negative prompt is one more condition, of weight w_0:
nothing is left for the null condition then.

Every image has conditions and weights of its own; one with fewer than k prompts has weight 0 in the places left over.
All evaluations of a step are one call of `predict`, ordered by condition, the null condition first; a condition whose
weight is exactly 0 is not evaluated. A learned variance is not mixed: an image's is that of its first prompt that has a
weight.

A variant that combines the predictions otherwise, such as APG (Sadat et al. 2024, arXiv 2410.02416) or CFG++ (Chung et
al. 2024, arXiv 2406.08070), is a function of the type `Combine`, handed to `guided` in place of `weighted_sum`: there
alone the prediction of each condition is to be seen, the wrappers around it see what came of them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm_lab.conditions import Conditions
from ldm_lab.interfaces import Predict, Prediction, Schedule

ConditionalPredict = Callable[[Tensor, Tensor, Conditions], Prediction]  # x [M, C, h, w], t [M], conditions of [M, ...]
# x0 and eps of all conditions [1 + k, B, C, h, w], their weights [1 + k, B] -> x0 and eps [B, C, h, w]
Combine = Callable[[Prediction, Tensor], Prediction]


def null_condition_weight(weights: Tensor) -> Tensor:
    """Return w_0 = 1 - sum of the weights [B, k], float64 [B]; exactly 0 where only rounding keeps it from 0."""
    w0 = 1 - weights.double().sum(1)  # [B]
    return torch.where(w0.abs() < 1e-6, 0.0, w0)  # [B]


def proportional_weights(weights: Tensor) -> Tensor:
    """Return the weights without guidance of the null condition and the prompts, float64 [1 + k, B], of those with it.

    The prompts of weights above 0, in proportion; the null condition where all are 0 or below.
    """
    toward = weights.double().clamp(min=0).T  # [k, B]
    total = toward.sum(0)  # [B]
    share = torch.where(total > 0, toward / total.clamp(min=1e-30), 0.0)  # [k, B]
    return torch.cat([(total == 0).double()[None], share])  # [1 + k, B]


def weighted_sum(predictions: Prediction, weights: Tensor) -> Prediction:
    """Return x0 and eps [B, C, h, w] summed with weights [1 + k, B]: classifier-free guidance as it was published.

    Args:
        predictions: x0 and eps of each condition and image, [1 + k, B, C, h, w], the null condition's first; zeros
            where the weight is 0.
        weights: w_0, ..., w_k of each image, float32 [1 + k, B], 1 in sum, on the device of the predictions.
    """

    def summed(values: Tensor) -> Tensor:
        weighted = values * weights.to(values)[..., None, None, None]  # [1 + k, B, C, h, w]
        # Added in order: torch's sum may regroup with the shape, and an image would depend on its batch.
        total, *others = weighted.unbind()  # [B, C, h, w] each
        for value in others:
            total = total + value  # [B, C, h, w]
        return total

    return Prediction(x0=summed(predictions.x0), eps=summed(predictions.eps))


def guided(
    predict: ConditionalPredict,
    conditions: Conditions,
    null_conditions: Conditions,
    weights: Tensor,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
    guide_model: ConditionalPredict | None = None,
    schedule: Schedule | None = None,
    combine: Combine = weighted_sum,
) -> Predict:
    """Return `predict(x [B, C, h, w], t [B]) -> Prediction`, guided by k weighted conditions per image.

    Args:
        predict: the denoiser's reading of M rows.
        conditions: of the prompts, tensors of [B, k, ...].
        null_conditions: the null condition of every image, tensors of [B, ...].
        weights: [B, k], on the CPU, finite. k = 0 samples without a condition.
        interval: first and last t, in [0, 1], between which there is guidance; outside the prompts count with
            `proportional_weights`, which also saves evaluations (Kynkäänniemi et al. 2024, arXiv 2404.07724). One t
            is of all images.
        rescale: 0 to 1, how far each image's guided v is brought back to the spread of the unguided one; against
            burnt colors at large weights (Lin et al. 2023, arXiv 2305.08891, equations 15 and 16).
        guide_model: autoguidance: a worse model's `predict`, such as an earlier checkpoint's, evaluated with the
            prompts, takes the place of the null condition (Karras et al. 2024, arXiv 2406.02507).
        schedule: of the model; needed for `rescale`.
        combine: how guidance combines the predictions; another one than `weighted_sum` sees those of all conditions,
            also where the weight is 0, and goes without `guide_model`.
    """
    if rescale and schedule is None:
        raise ValueError("rescale needs the schedule")
    if guide_model is not None and combine is not weighted_sum:
        raise ValueError("a guide model needs weighted_sum")
    guided_weights = torch.cat([null_condition_weight(weights)[:, None], weights.double()], dim=1).T  # [1 + k, B]
    unguided_weights = proportional_weights(weights)  # [1 + k, B]
    null_weight = guided_weights[0]  # [B], of the null condition or the guide model
    if guide_model is not None:
        guided_weights = torch.cat([torch.zeros_like(guided_weights[:1]), guided_weights[1:]])  # [1 + k, B]
    needed = [guided_weights, unguided_weights] if rescale else [guided_weights]
    if combine is not weighted_sum:
        needed.append(torch.ones_like(guided_weights))  # [1 + k, B]
    guided_rows = EvaluatedRows(conditions, null_conditions, *needed)
    unguided_rows = EvaluatedRows(conditions, null_conditions, unguided_weights)
    tables = OnDevices(guided_weights, unguided_weights, null_weight[:, None, None, None])

    def guided_predict(x: Tensor, t: Tensor) -> Prediction:
        guided_table, unguided_table, w0 = tables.on(x.device)  # [1 + k, B] twice, [B, 1, 1, 1]
        if interval != (0.0, 1.0) and not interval[0] <= t[0].item() <= interval[1]:
            return unguided_rows(predict, x, t).mix(unguided_table)
        rows = guided_rows(predict, x, t)
        prediction = rows.mix(guided_table, combine)
        if guide_model is not None:
            guide = unguided_rows(guide_model, x, t).mix(unguided_table)
            prediction = prediction._replace(x0=prediction.x0 + w0 * guide.x0, eps=prediction.eps + w0 * guide.eps)
        if rescale and schedule is not None:
            return _rescaled(prediction, rows.mix(unguided_table), x, t, schedule, rescale)
        return prediction

    return guided_predict


class OnDevices:
    """Tables of weights in float32, copied to a device once and not for every call of the model."""

    def __init__(self, *tables: Tensor) -> None:
        self.tables = tables
        self.copies: dict[torch.device, list[Tensor]] = {}

    def on(self, device: torch.device) -> list[Tensor]:
        if device not in self.copies:
            self.copies[device] = [table.float().to(device) for table in self.tables]
        return self.copies[device]


class EvaluatedRows:
    """Which conditions are evaluated for which images: the M pairs that have a weight in one of some tables."""

    def __init__(self, conditions: Conditions, null_conditions: Conditions, *tables: Tensor) -> None:
        self.used = torch.stack([table != 0 for table in tables]).any(0)  # [1 + k, B]
        self.row = self.used.nonzero(as_tuple=True)  # [M] the condition and [M] the image of every row
        self._on: dict[torch.device, tuple[Tensor, ...]] = {}  # the same on the devices that they were needed on
        self.conditions = {
            name: torch.cat([null[None], conditions[name].transpose(0, 1)])[self.row]  # [M, ...]
            for name, null in null_conditions.items()
        }

    def __call__(self, predict: ConditionalPredict, x: Tensor, t: Tensor) -> "EvaluatedPredictions":
        if x.device not in self._on:
            self._on[x.device] = tuple(index.to(x.device) for index in self.row)
        row = self._on[x.device]
        return EvaluatedPredictions(predict(x[row[1]], t[row[1]], self.conditions), self.used.shape, row)


class EvaluatedPredictions:
    """The predictions of some rows, laid out by condition and image."""

    def __init__(self, rows: Prediction, shape: torch.Size, row: tuple[Tensor, ...]) -> None:
        self.rows, self.shape, self.row = rows, shape, row

    def table(self, values: Tensor) -> Tensor:
        table = values.new_zeros(*self.shape, *values.shape[1:])  # [1 + k, B, C, h, w]
        table[self.row] = values
        return table

    def mix(self, weights: Tensor, combine: Combine = weighted_sum) -> Prediction:
        """Return the Prediction that is combined with these weights, [1 + k, B]."""
        mixed = combine(Prediction(self.table(self.rows.x0), self.table(self.rows.eps)), weights)
        fraction = self.rows.variance_fraction
        if fraction is not None:
            # The first prompt that has a weight; the null condition, moved to the end here, only where all are 0.
            leading = ((weights != 0).roll(-1, dims=0).int().argmax(0) + 1) % len(weights)  # [B]
            images = torch.arange(len(leading), device=leading.device)  # [B]
            fraction = self.table(fraction)[leading, images]  # [B, C, h, w]
        return mixed._replace(variance_fraction=fraction)


def _rescaled(
    guided: Prediction, unguided: Prediction, x: Tensor, t: Tensor, schedule: Schedule, share: float
) -> Prediction:
    """Return the guided Prediction with its v brought `share` of the way to the unguided one's spread in each image.

    v = alpha * eps - sigma * x0 is what a prediction says beyond x = alpha * x0 + sigma * eps. The two equations are
    solved for x0 and eps; alpha^2 + sigma^2 is their determinant, 1 where variance is preserved.
    """
    alpha, sigma = (level[:, None, None, None] for level in schedule.alpha_sigma(t))  # [B, 1, 1, 1]
    v, v_unguided = (alpha * p.eps - sigma * p.x0 for p in (guided, unguided))  # [B, C, h, w] each
    spread, wanted = (value.flatten(1).std(1)[:, None, None, None] for value in (v, v_unguided))  # [B, 1, 1, 1]
    v = v * (share * wanted / spread.clamp(min=1e-12) + 1 - share)  # [B, C, h, w]
    x0, eps = alpha * x - sigma * v, sigma * x + alpha * v  # [B, C, h, w] each
    if not schedule.variance_preserving:
        determinant = alpha**2 + sigma**2  # [B, 1, 1, 1]
        x0, eps = x0 / determinant, eps / determinant  # [B, C, h, w] each
    return guided._replace(x0=x0, eps=eps)
