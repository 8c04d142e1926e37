"""What a super-resolution stage of DeepFloyd IF is told: the small image, enlarged and noised, and how noised it is."""

from typing import Annotated, Literal

from annotated_types import Ge
from torch import Tensor
from torch.nn import functional as F

from ldm_lab.condition_sources.low_res import RGB
from ldm_lab.condition_sources.noised_low_res import NoisedLowRes
from ldm_lab.config import Share, register
from ldm_lab.interfaces import Conditions, ConditionSpec, ImageCondition, Level
from ldm_lab.schedules import Betas, Discrete
from ldm_lab.schedules.discrete import step_of_level

BETAS: Betas = "squaredcos_cap_v2"
STEPS = 1000


@register("condition_source", "if_low_res")
class IFLowRes(NoisedLowRes):
    """Noise conditioning augmentation as in IF: levels are the 1000 steps of GLIDE's cosine schedule.

    The original draws the noise of the small image anew in every step of sampling; here, as in diffusers, it is drawn
    once, of the image's own seed.
    """

    def __init__(
        self,
        *,
        scale_factor: Annotated[int, Ge(2)] = 4,
        enlarge: Literal["bilinear", "nearest"] = "bilinear",
        most: Share = 1.0,
        level: Share = 0.25,
    ) -> None:
        """Set how it is made of training images, and the level of sampling.

        Args:
            scale_factor: how many times the stage enlarges.
            enlarge: how the small image comes to the large size: bilinear between the corners, or nearest.
            most: the level of the noise in training: each image's is drawn evenly from 0 to this.
            level: in sampling, unless it is asked for otherwise (`low_res_level`); IF's stage II takes 0.25, III 0.
        """
        super().__init__(scale_factor=scale_factor, most=most, level=level)
        self.mode, self.table = enlarge, Discrete(BETAS, STEPS)

    @property
    def spec(self) -> ConditionSpec:
        return {"low_res": ImageCondition(RGB, self.scale_factor, enlarged=True), "low_res_level": Level(BETAS)}

    def enlarge(self, image: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return images [B, 3, h, w] at another height and width, [B, 3, H, W]."""
        corners = True if self.mode == "bilinear" else None
        return F.interpolate(image, size, mode=self.mode, align_corners=corners)  # [B, 3, H, W]

    def noised(self, image: Tensor, level: Tensor, noise: Tensor) -> Conditions:
        """Return {"low_res": [B, 3, H, W], "low_res_level": [B]} of enlarged images, levels [B] and noise."""
        t = self.table.at(step_of_level(level, STEPS))  # [B]
        alpha, sigma = (part[:, None, None, None] for part in self.table.alpha_sigma(t))  # [B, 1, 1, 1]
        return {"low_res": alpha * image + sigma * noise, "low_res_level": level}
