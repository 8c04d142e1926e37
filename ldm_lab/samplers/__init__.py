"""Samplers: from noise to a clean sample along a falling grid of times.

A sampler is a part of role "sampler"; its options (`steps`, `eta`, ...) are its keyword-only constructor arguments, so
that a YAML says `sampler: {name: plms, steps: 50}`. Called, it is a function:

    sampler(predict, x, *, schedule, noise=None, callback=None) -> x0 [B, C, h, w]

    predict(x [B, C, h, w], t [B]) -> Prediction   what the guided denoiser says about x at time t
                                                   (`ldm_lab.objectives.Prediction`)
    x [B, C, h, w]                                 standard normal noise, float32
    schedule                                       has `alpha_sigma(t)` and `grid(steps)` (`ldm_lab.schedules`)
    noise(x) -> [B, C, h, w]                       fresh standard normal noise; only stochastic samplers call it
    callback(step, x, x0)                          called once in every step 0 .. steps - 1, with x as it was before
                                                   the step and the clean estimate in that step, [B, C, h, w] each

It uses nothing but the prediction, so that any objective and any way of guidance works with it; it knows no U-Net. It
has the attribute `steps` and the method `times(schedule)`, which returns the times of the steps; `Walk` brings both.
All arithmetic outside `predict` is float32. What it does to one row of x does not depend on the other rows. A new
sampler is one file in this folder with one `@register("sampler", "name")`.
"""

from typing import Any, ClassVar

from torch import Tensor

from ldm_lab.errors import UserError
from ldm_lab.schedules import SPACING, Steps, count


class Walk:
    """What samplers share: how many steps there are, and at which times they begin.

    Attributes:
        steps: how many.
        kept: what the schedule's grid is asked for: a number, or a respacing (`ldm_lab.schedules.respacing`).
        spacing: of the grid; None is the schedule's own.
        shifts_mean: whether the sampler itself follows the prediction's `gradient`. The others are handed predictions
            that have been shifted by it (`ldm_lab.guidance.classifier_free.shifted`).
    """

    spacing: SPACING | None = None
    shifts_mean: ClassVar[bool] = False

    def __init__(self, steps: Steps) -> None:
        self.kept, self.steps = steps, count(steps)

    def times(self, schedule: Any) -> Tensor:
        """Return the times at which the steps begin, falling, float32 [steps]."""
        return schedule.grid(self.kept, self.spacing)


def check_steps(section: dict[str, Any]) -> list[str]:
    """Return what is wrong with a section's `steps`: the `check` of samplers that have no other option."""
    try:
        count(section.get("steps", 1))
    except UserError as error:
        return [str(error)]
    return []
