"""Sampling that begins with a picture: image to image, and inpainting, by any sampler and any objective.

Image to image (SDEdit: Meng et al. 2022, arXiv 2108.01073, algorithm 1): the picture's latent is noised to a later time
of the sampler's grid, and the walk goes on from there. Inpainting: outside the mask the model's prediction is replaced
with the known one. There x0 is the picture's latent and eps is what x holds besides, so that every sampler, whose steps
are linear in x0 and eps, carries that part along unharmed.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm_lab.errors import UserError
from ldm_lab.io.images import center_crop_to, to_tensor


@dataclass(frozen=True)
class Start:
    """A picture to begin with.

    Attributes:
        image: of any mode and size; it is resized to cover the size that is sampled, and its middle is taken.
        strength: share of the sampler's steps that are walked, 0 to 1: 0 returns the picture as the autoencoder gives
            it back, 1 keeps hardly anything of it.
        mask: of the image's size, white where something new is to be painted; the rest stays as it is. None: all.

    Raises:
        UserError: strength outside 0 to 1, a mask of another size, or one that is black all over.
    """

    image: Image.Image
    strength: float = 1.0
    mask: Image.Image | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise UserError(f"strength: a share from 0 to 1 is needed, not {self.strength}")
        if self.mask is None:
            return
        if self.mask.size != self.image.size:
            (w, h), (width, height) = self.mask.size, self.image.size
            raise UserError(f"mask: it is {w}x{h} pixels, the image {width}x{height}; both have to be of one size")
        if not to_mask(self.mask, self.mask.height, self.mask.width).any():
            raise UserError("mask: nothing in it is white, so that nothing would be painted")

    def latents(self, autoencoder: Any, height: int, width: int, device: torch.device) -> Tensor:
        """Return the picture's latent, the posterior's mean, [1, C, h, w], at a size in pixels."""
        pixels = to_tensor(center_crop_to(self.image, height, width))[None].to(device)  # [1, 3, H, W]
        return autoencoder.encode(pixels).float()  # [1, C, h, w]

    def latent_mask(self, downscale: int, height: int, width: int, device: torch.device) -> Tensor | None:
        """Return which latent elements are painted anew, bool [1, 1, h, w]: those with any white pixel in them."""
        if self.mask is None:
            return None
        pixels = torch.from_numpy(to_mask(self.mask, height, width))[None, None].float()  # [1, 1, H, W]
        return (F.max_pool2d(pixels, downscale) > 0).to(device)  # [1, 1, h, w]

    def restore(self, painted: Image.Image) -> Image.Image:
        """Return the picture with the painted one where the mask is white: every other pixel is the picture's own."""
        if self.mask is None:
            return painted
        white = Image.fromarray(to_mask(self.mask, painted.height, painted.width))
        return Image.composite(painted, center_crop_to(self.image, painted.height, painted.width), white)


def to_mask(mask: Image.Image, height: int, width: int) -> np.ndarray:
    """Return where a mask is white, bool [height, width], cut like the picture it belongs to."""
    return (
        np.asarray(center_crop_to(mask, height, width, Image.Resampling.NEAREST).convert("L")) > 127
    )  # [height, width]


class Later:
    """A noise schedule whose grids leave out their first steps."""

    def __init__(self, schedule: Any, skip: int) -> None:
        self.schedule, self.skip = schedule, skip

    def __getattr__(self, name: str) -> Any:
        return getattr(self.schedule, name)

    def grid(self, *which: Any) -> Tensor:
        """Return the times that are left, [steps - skip]."""
        return self.schedule.grid(*which)[self.skip :]


def first_time(walk: Any, schedule: Any) -> Tensor:
    """Return the time at which a sampler begins on a schedule, []."""
    return walk.times(schedule)[0]
