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

It uses nothing but the prediction's `x0` and `eps`, so that any objective and any way of guidance works with it; it
knows no U-Net. It has the attribute `steps`. All arithmetic outside `predict` is float32. What it does to one row of x
does not depend on the other rows. A new sampler is one file in this folder with one `@register("sampler", "name")`.
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor


class Prediction(Protocol):
    """What samplers read of `ldm_lab.objectives.Prediction`: x = alpha * x0 + sigma * eps, [B, C, h, w] each."""

    x0: Tensor
    eps: Tensor


Predict = Callable[[Tensor, Tensor], Prediction]
Callback = Callable[[int, Tensor, Tensor], None]


def check_steps(section: dict[str, Any]) -> list[str]:
    """Return what is wrong with a section's `steps`: the `check` of samplers that have no other option."""
    steps = section.get("steps", 1)
    return [] if steps >= 1 else [f"steps: at least 1 is needed, not {steps}"]
