"""What an inpainting model is told: the known part of an image, and where it is known."""

from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor
from torch.nn import functional as F

from ldm_lab.condition_sources.random_masks import random_kinds, rectangles, strokes
from ldm_lab.config import NonNegativeFloat, PositiveInt, register
from ldm_lab.interfaces import (
    Autoencoder,
    Batch,
    ConditionRequest,
    Conditions,
    ConditionSource,
    ConditionSpec,
    ImageCondition,
)

ShareAboveZero = Annotated[float, Interval(gt=0, le=1)]


@register("condition_source", "inpaint")
class Inpaint(ConditionSource):
    """The known part of an image in z, [B, C, h, w], 0 elsewhere, and 1 where it is known, 0 elsewhere, [B, 1, h, w].

    In training a random region of each image is erased (Nichol et al. 2022, arXiv 2112.10741, section on inpainting).
    A model of latents is told the latents of the image with that region in grey, as far as none of it is in them.
    """

    shares: Tensor

    def __init__(
        self,
        *,
        channels: PositiveInt = 3,
        rectangle: NonNegativeFloat = 0.4,
        strokes: NonNegativeFloat = 0.3,
        whole: NonNegativeFloat = 0.2,
        outside: NonNegativeFloat = 0.1,
        smallest: ShareAboveZero = 0.25,
        largest: ShareAboveZero = 1.0,
        thinnest: ShareAboveZero = 0.05,
        thickest: ShareAboveZero = 0.3,
        most_strokes: PositiveInt = 4,
    ) -> None:
        """Set what training erases. The first four after `channels` are shares of the images, taken in proportion.

        Args:
            channels: C of the latents; 3 for models of pixels.
            rectangle: of which a rectangle is erased.
            strokes: of which is erased what strokes of a brush cover.
            whole: of which all is erased, so that the model still makes whole pictures.
            outside: of which all is erased but for a rectangle.
            smallest: side of a rectangle, at least, as a share of the image's.
            largest: likewise, at most.
            thinnest: width of a stroke, at least, as a share of the image's shorter side.
            thickest: likewise, at most.
            most_strokes: in an image; each gets one to this many.
        """
        super().__init__()
        self.channels, self.most_strokes = channels, most_strokes
        shares = torch.tensor([whole, rectangle, strokes, outside])  # [4], in the order of random_masks.KINDS
        self.register_buffer("shares", shares, persistent=False)
        self.sides, self.widths = (smallest, largest), (thinnest, thickest)
        # The autoencoder, and whether its latents are pixels: asked once, as that waits for numbers of the device.
        self._asked: tuple[Autoencoder, bool] | None = None

    @staticmethod
    def unused(*, rectangle: float, strokes: float, outside: float) -> dict[str, str]:
        """Return which options have no effect, and why."""
        found = {} if strokes else dict.fromkeys(("thinnest", "thickest", "most_strokes"), "no strokes are drawn")
        if not (rectangle or outside):
            found |= dict.fromkeys(("smallest", "largest"), "no rectangles are drawn")
        return found

    @staticmethod
    def check(
        *, rectangle: float, strokes: float, whole: float, outside: float,
        smallest: float, largest: float, thinnest: float, thickest: float) -> list[str]:  # fmt: skip
        """Return what is wrong across the options."""
        problems = []
        if not (rectangle or strokes or whole or outside):
            problems.append("whole: at least one of whole, rectangle, strokes and outside has to be above 0")
        if smallest > largest:
            problems.append(f"smallest: {smallest} is above largest, {largest}")
        if thinnest > thickest:
            problems.append(f"thinnest: {thinnest} is above thickest, {thickest}")
        return problems

    @property
    def spec(self) -> ConditionSpec:
        return {"inpaint_image": ImageCondition(self.channels), "inpaint_mask": ImageCondition(1)}

    def from_batch(
        self, batch: Batch, x0: Tensor, autoencoder: Autoencoder, generator: torch.Generator | None
    ) -> Conditions:
        """Return image and mask of a batch, with a random region of each image erased."""
        if self._asked is None or self._asked[0] is not autoencoder:
            self._asked = autoencoder, autoencoder.pixel_range is not None
        if self._asked[1]:
            return known_part(x0, self.erased(x0, generator))
        image = batch.require_image("train an inpainting model of latents")  # [B, 3, H, W]
        erased = self.erased(image, generator)  # [B, 1, H, W]
        visible = autoencoder.encode(image * ~erased)  # [B, C, h, w]; grey is 0
        return known_part(visible, F.max_pool2d(erased.float(), autoencoder.downscale) > 0)

    def from_request(self, request: ConditionRequest) -> Conditions:
        """Return image and mask of what is to be kept; nothing is known where nothing is given."""
        x = request.x
        if request.known is None or request.mask is None:
            return {"inpaint_image": torch.zeros_like(x), "inpaint_mask": torch.zeros_like(x[:, :1])}
        return known_part(request.known.expand_as(x), request.mask.expand(len(x), -1, -1, -1))

    def erased(self, image: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return where training erases images [B, ., H, W], bool [B, 1, H, W], on their device."""
        count, _, height, width = image.shape
        device = image.device
        kinds = random_kinds(count, self.shares.to(device), generator)  # [B]
        kinds = kinds[:, None, None]  # [B, 1, 1]
        boxes = rectangles(count, height, width, self.sides, device, generator)  # [B, H, W]
        brushed = strokes(count, height, width, self.most_strokes, self.widths, device, generator)  # [B, H, W]
        region = torch.where(kinds == 1, boxes, torch.where(kinds == 2, brushed, ~boxes))  # [B, H, W]
        return (region | (kinds == 0))[:, None]  # [B, 1, H, W]


def known_part(image: Tensor, erased: Tensor) -> Conditions:
    """Return the conditions of latents [B, C, h, w] of which a part, bool [B, 1, h, w], is not known."""
    mask = (~erased).to(image)  # [B, 1, h, w]
    return {"inpaint_image": image * mask, "inpaint_mask": mask}
