"""Objectives: what the denoiser's output means, how it is trained, how clean data is read off it.

An objective has

    schedule                                                             the noise schedule (`ldm_lab.schedules`)
    timesteps                                                            "sobol" or "uniform": how training draws t
    loss(denoiser, x0 [B,C,h,w], cond, t [B], noise [B,C,h,w]) -> [B]    per sample; t in [0, 1), standard normal noise
    predict(denoiser, x [B,C,h,w], t [B], cond) -> Prediction            for the samplers

Both are pure: the random numbers are handed in, so that a resumed run repeats them and a test can fix them. A new
objective is one file with one `@register("objective", "name")`.
"""

from typing import NamedTuple

from torch import Tensor


class Prediction(NamedTuple):
    """What a denoiser says about x at time t.

    Attributes:
        x0: the clean sample, [B, C, h, w].
        eps: the noise in x, [B, C, h, w]; x = alpha * x0 + sigma * eps.
        log_variance: the learned log variance of the ancestral step, [B, C, h, w], or None.
    """

    x0: Tensor
    eps: Tensor
    log_variance: Tensor | None = None
