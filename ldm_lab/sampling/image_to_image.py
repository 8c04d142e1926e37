"""Sampling that begins with an image: img2img and inpainting, by any sampler and any objective.

Img2img (SDEdit: Meng et al. 2022, arXiv 2108.01073, algorithm 1): the init image's latent is noised to a later time of
the sampler's grid, and sampling goes on from there. Inpainting: outside the mask the model's prediction is replaced
with the known one (`ldm_lab.guidance.inpaint`).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm_lab.errors import UserError
from ldm_lab.interfaces import Schedule
from ldm_lab.io.images import center_crop_to, open_image, to_tensor
from ldm_lab.sampling.model import Model
from ldm_lab.sampling.options import ImageFile, SamplingOptions


@dataclass(frozen=True)
class InitImage:
    """An image to begin with.

    Attributes:
        image: of any mode and size; it is resized to cover the size that is sampled, and its middle is taken.
        strength: share of the sampler's steps that it goes through, 0 to 1: 0 returns the image as the autoencoder
            gives it back, 1 keeps hardly anything of it.
        mask: of the image's size, white where something new is to be painted; the rest stays as it is. None: all.

    Raises:
        UserError: a mask of another size, or one that is black all over.
    """

    image: Image.Image
    strength: float
    mask: Image.Image | None

    def __post_init__(self) -> None:
        if self.mask is None:
            return
        if self.mask.size != self.image.size:
            (w, h), (width, height) = self.mask.size, self.image.size
            raise UserError(f"mask: it is {w}x{h} pixels, the image {width}x{height}; both have to be of one size")
        if not to_mask(self.mask, self.mask.height, self.mask.width).any():
            raise UserError("mask: nothing in it is white, so that nothing would be painted")

    @classmethod
    def from_options(cls, options: SamplingOptions) -> "InitImage | None":
        """Return the init image of resolved options, read from its file. Raises UserError."""
        if options.init_image is None or options.strength is None:
            return None
        mask = None if options.mask is None else _opened(options.mask)
        return cls(_opened(options.init_image), options.strength, mask)

    def num_steps(self, steps: int) -> int:
        """Return how many of a sampler's steps the image goes through."""
        return round(self.strength * steps)

    def encode(self, model: Model, latent_size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Return the image's latent, the posterior's mean, [1, C, h, w], and its mask.

        The mask is bool [1, 1, h, w], true in the elements with any white pixel: they are painted anew.
        """
        downscale = model.autoencoder.downscale
        height, width = (side * downscale for side in latent_size)
        pixels = to_tensor(center_crop_to(self.image, height, width))[None].to(model.device)  # [1, 3, H, W]
        with model.on_device(model.autoencoder):
            known = model.autoencoder.encode(pixels).float()  # [1, C, h, w]
        if self.mask is None:
            return known, None
        white = torch.from_numpy(to_mask(self.mask, height, width))[None, None].float()  # [1, 1, H, W]
        return known, (F.max_pool2d(white, downscale) > 0).to(model.device)  # [1, 1, h, w]

    def restore(self, painted: Image.Image) -> Image.Image:
        """Return the image with the painted one where the mask is white: every other pixel is the image's own."""
        if self.mask is None:
            return painted
        white = Image.fromarray(to_mask(self.mask, painted.height, painted.width))
        return Image.composite(painted, center_crop_to(self.image, painted.height, painted.width), white)


def to_mask(mask: Image.Image, height: int, width: int) -> np.ndarray:
    """Return where a mask is white, bool [height, width], cropped like the image that it belongs to."""
    levels = center_crop_to(mask, height, width, Image.Resampling.NEAREST).convert("L")
    return np.asarray(levels) > 127  # [height, width]


def _opened(image: ImageFile) -> Image.Image:
    return open_image(str(image)) if isinstance(image, str | Path) else image


class TruncatedSchedule(Schedule):
    """A noise schedule whose grids leave out their first steps."""

    def __init__(self, schedule: Schedule, skip: int) -> None:
        self.schedule, self.skip = schedule, skip
        self.variance_preserving, self.timesteps = schedule.variance_preserving, schedule.timesteps

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the whole schedule's alpha and sigma, each of t's shape."""
        return self.schedule.alpha_sigma(t)

    def log_snr(self, t: Tensor) -> Tensor:
        """Return the whole schedule's log SNR, of t's shape."""
        return self.schedule.log_snr(t)

    def t_of_sigma_over_alpha(self, ratio: Tensor) -> Tensor:
        """Return the whole schedule's t, of ratio's shape."""
        return self.schedule.t_of_sigma_over_alpha(ratio)

    def grid(self, steps: int | str, spacing: str | None = None) -> Tensor:
        """Return the times that are left, float32 [steps - skip]."""
        return self.schedule.grid(steps, spacing)[self.skip :]
