"""The wrappers around a guided prediction: what each of them promises."""

from typing import ClassVar

from ldm_lab.interfaces import Predict, Schedule


class Wrapper:
    """A change to what the denoiser says about x, for any sampler and any objective.

    Attributes:
        order: its place in the stack, rising outwards; `ldm_lab.guidance.stack` sorts by it.
        adds_gradient: whether its predictions have a `gradient`, which samplers follow or `ConditionScore` works in.
    """

    order: ClassVar[int]
    adds_gradient: ClassVar[bool] = False

    def wrap(self, predict: Predict, schedule: Schedule) -> Predict:
        """Return the changed `predict`, for one run of a sampler.

        Args:
            predict: x [B, C, h, w], t [B] -> Prediction.
            schedule: of the model.
        """
        raise NotImplementedError
