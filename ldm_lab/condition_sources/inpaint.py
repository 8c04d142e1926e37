"""What an inpainting model is told: the known part of an image, and where it is known."""

import torch
from torch import Tensor

from ldm_lab.config import PositiveInt, Share, register
from ldm_lab.interfaces import Batch, ConditionRequest, Conditions, ConditionSource, ConditionSpec, ImageCondition


@register("condition_source", "inpaint")
class Inpaint(ConditionSource):
    """The known part of an image in z, [B, C, h, w], and 1 where it is known, 0 elsewhere, [B, 1, h, w]."""

    def __init__(self, *, channels: PositiveInt = 3, known_share: Share = 0.0) -> None:
        """Set what training shows of an image.

        Args:
            channels: C of the latents; 3 for models of pixels.
            known_share: share of the training images of which a part is known, a rectangle of any size; of the others
                nothing is, as when such a model draws a whole picture.
        """
        super().__init__()
        self.channels, self.known_share = channels, known_share

    @property
    def spec(self) -> ConditionSpec:
        return {"inpaint_image": ImageCondition(self.channels), "inpaint_mask": ImageCondition(1)}

    def from_batch(self, batch: Batch, x0: Tensor, generator: torch.Generator | None) -> Conditions:
        """Return image and mask of a batch: nothing known, or a random rectangle."""
        mask = torch.zeros_like(x0[:, :1])  # [B, 1, h, w]
        if self.known_share:
            mask = self.random_mask(x0, generator)  # [B, 1, h, w]
        return {"inpaint_image": x0 * mask, "inpaint_mask": mask}

    def from_request(self, request: ConditionRequest) -> Conditions:
        """Return image and mask of what is to be kept; nothing is known where nothing is given."""
        x = request.x
        if request.known is None or request.mask is None:
            return {"inpaint_image": torch.zeros_like(x), "inpaint_mask": torch.zeros_like(x[:, :1])}
        known_mask = (~request.mask).to(x).expand(len(x), -1, -1, -1)  # [B, 1, h, w]
        return {"inpaint_image": request.known.expand_as(x), "inpaint_mask": known_mask}

    def random_mask(self, x0: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return masks [B, 1, h, w]: 1 in a random rectangle of `known_share` of the images, else 0."""
        draws = torch.rand(5, len(x0), device=x0.device, generator=generator)  # [5, B]
        rows, columns = (torch.arange(side, device=x0.device) for side in x0.shape[2:])  # [h], [w]
        top, bottom = (draws[:2] * (len(rows) + 1)).long().sort(dim=0).values  # [B] each
        left, right = (draws[2:4] * (len(columns) + 1)).long().sort(dim=0).values  # [B] each
        down = (rows >= top[:, None]) & (rows < bottom[:, None])  # [B, h]
        across = (columns >= left[:, None]) & (columns < right[:, None])  # [B, w]
        known: Tensor = down[:, :, None] & across[:, None] & (draws[4] < self.known_share)[:, None, None]  # [B, h, w]
        return known[:, None].to(x0)  # [B, 1, h, w]
