"""What a super-resolution stage of Imagen is told: the small image, enlarged and noised, and how noised it is."""

from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn import functional as F

from ldm_lab.condition_sources.low_res import RGB, shrink
from ldm_lab.conditions import UPSAMPLER_ALONE
from ldm_lab.config import Share, register
from ldm_lab.errors import UserError
from ldm_lab.interfaces import (
    Autoencoder,
    Batch,
    ConditionRequest,
    Conditions,
    ConditionSource,
    ConditionSpec,
    ImageCondition,
    Level,
)
from ldm_lab.schedules import LogSNR, LogSNRCurve

Resizing = Literal["antialiased", "bilinear", "nearest"]


@register("condition_source", "noised_low_res")
class NoisedLowRes(ConditionSource):
    """Noise conditioning augmentation: a small image, enlarged and noised, and the level of the noise.

    Ho et al. 2021 (arXiv 2106.15282, section 4.2), Saharia et al. 2022 (arXiv 2205.11487, section 2.4).
    The noise hides what a base model's picture has otherwise than a photograph made small, and the network is told how
    much there is: little keeps to the small picture, much leaves more to the network.
    """

    def __init__(
        self,
        *,
        scale_factor: Annotated[int, Ge(2)] = 4,
        resize: Resizing = "antialiased",
        curve: LogSNRCurve = "linear",
        most: Share = 1.0,
        level: Share = 0.2,
    ) -> None:
        """Set how it is made of training images, and the level of sampling.

        Args:
            scale_factor: how many times the stage enlarges.
            resize: how training images come to the small size and both to the large one: antialiased (bicubic in
                8-bit levels down, as pictures are made small; bilinear up), or bilinear or nearest both ways, without
                antialiasing, as in imagen-pytorch, whose default is nearest.
            curve: of the noise's log SNR (`ldm_lab.schedules.LogSNR`).
            most: the level of the noise in training: each image's is drawn evenly from 0 to this.
            level: in sampling, unless it is asked for otherwise (`low_res_level`); 0.2 on the linear curve is a
                standard deviation of 0.57 beside 0.82 of the image.
        """
        super().__init__()
        self.scale_factor, self.resize, self.most, self.level = scale_factor, resize, most, level
        self.curve, self.schedule = curve, LogSNR(curve)

    @property
    def spec(self) -> ConditionSpec:
        image = ImageCondition(RGB, self.scale_factor, enlarged=True)
        return {"low_res": image, "low_res_level": Level(self.curve)}

    def from_batch(
        self, batch: Batch, x0: Tensor, autoencoder: Autoencoder, generator: torch.Generator | None
    ) -> Conditions:
        """Return the small image of a batch's, each at a level of its own; see `noised`."""
        image = batch.require_image("train a super-resolution stage")  # [B, 3, H, W]
        if image.shape[2:] != x0.shape[2:]:
            raise UserError("condition_sources.noised_low_res: is for models of pixels (autoencoder.name: identity)")
        level = torch.rand(len(image), generator=generator, device=image.device) * self.most  # [B]
        enlarged = self.enlarge(self.reduce(image), image.shape[2:])  # [B, 3, H, W]
        return self.noised(enlarged, level, torch.empty_like(enlarged).normal_(generator=generator))

    def from_request(self, request: ConditionRequest) -> Conditions:
        """Return what is to be enlarged at the level that is asked for, with noise of each image's own seed."""
        if request.low_res is None:
            raise UserError(UPSAMPLER_ALONE)
        size = request.low_res.shape[2] * self.scale_factor, request.low_res.shape[3] * self.scale_factor
        enlarged = self.enlarge(request.low_res.to(request.x), size)  # [B, 3, H, W]
        level = self.level if request.low_res_level is None else request.low_res_level
        noise = request.noise(enlarged)  # [B, 3, H, W]
        return self.noised(enlarged, torch.full((len(enlarged),), level, device=enlarged.device), noise)

    def reduce(self, image: Tensor) -> Tensor:
        """Return images made small, [B, 3, h, w], for images [B, 3, H, W] in [-1, 1]."""
        if self.resize == "antialiased":
            return shrink(image, self.scale_factor)  # [B, 3, h, w]
        height, width = image.shape[2:]
        return self._resized(image, (height // self.scale_factor, width // self.scale_factor))  # [B, 3, h, w]

    def enlarge(self, image: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return images [B, 3, h, w] in [-1, 1] at another height and width, [B, 3, H, W]."""
        return self._resized(image, size).clamp(-1, 1)  # [B, 3, H, W]

    def _resized(self, image: Tensor, size: tuple[int, ...]) -> Tensor:
        if self.resize == "nearest":
            return F.interpolate(image, size, mode="nearest")  # [B, 3, *size]
        return F.interpolate(image, size, mode="bilinear", align_corners=False)  # [B, 3, *size]

    def noised(self, image: Tensor, level: Tensor, noise: Tensor) -> Conditions:
        """Return {"low_res": [B, 3, H, W], "low_res_level": [B]} of enlarged images, levels [B] and noise."""
        alpha, sigma = (part[:, None, None, None] for part in self.schedule.alpha_sigma(level))  # [B, 1, 1, 1]
        return {"low_res": alpha * image + sigma * noise, "low_res_level": level}
