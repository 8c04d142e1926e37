"""The stack of guidance: every wrapper in its place."""

from collections.abc import Sequence

from ldm_lab.guidance.base import Wrapper
from ldm_lab.guidance.condition_score import ConditionScore
from ldm_lab.guidance.thresholding import Thresholding
from ldm_lab.interfaces import Predict, Schedule


def stack(predict: Predict, wrappers: Sequence[Wrapper], *, schedule: Schedule, uses_gradient: bool) -> Predict:
    """Return `predict` with wrappers around it, sorted by their `order`, in whatever order they are given.

    Args:
        predict: x [B, C, h, w], t [B] -> Prediction, such as that of `ldm_lab.guidance.classifier_free.guided`.
        wrappers: the ones in use. `ConditionScore` is added where it is needed and not among them.
        schedule: of the model.
        uses_gradient: whether the sampler follows `Prediction.gradient` itself (`Sampler.uses_gradient`); for the
            others it is worked into x0 and eps.
    """
    wrappers = list(wrappers)
    is_worked_in = uses_gradient or any(isinstance(wrapper, ConditionScore) for wrapper in wrappers)
    if not is_worked_in and any(wrapper.adds_gradient for wrapper in wrappers):
        thresholds = [wrapper for wrapper in wrappers if isinstance(wrapper, Thresholding)]
        wrappers.append(ConditionScore(thresholds[0] if thresholds else None))
    for wrapper in sorted(wrappers, key=lambda wrapper: wrapper.order):
        predict = wrapper.wrap(predict, schedule)
    return predict
