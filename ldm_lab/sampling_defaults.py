"""What kinds of networks are sampled with unless it is said otherwise. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

Thresholding = Literal["static", "dynamic"]


@dataclass(frozen=True)
class SamplingDefaults:
    """Defaults of a kind of network, those of the program that it is from.

    Attributes:
        guidance: weight of prompts without one.
        upsampler_guidance: the same of an upsampler, where its prompts and its training allow any.
        upsampler_temperature: factor of the noise that an upsampler starts from; GLIDE's own.
        thresholding: how clean estimates of pixels are kept within their range.
        percentile: of dynamic thresholding.
        most, upsampler_most: largest divisor of dynamic thresholding, in limits, of a base model and of an upsampler;
            None is any.
    """

    guidance: float = 3.0
    upsampler_guidance: float = 1.0
    upsampler_temperature: float = 0.997
    thresholding: Thresholding = "static"
    percentile: float = 0.995
    most: float | None = None
    upsampler_most: float | None = None
