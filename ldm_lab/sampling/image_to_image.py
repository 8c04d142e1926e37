"""Sampling that begins with an image: img2img and inpainting, by any sampler and any objective.

Img2img (SDEdit: Meng et al. 2022, arXiv 2108.01073, algorithm 1): the init image's latent is noised to a later time of
the sampler's grid, and sampling goes on from there. Inpainting: outside the mask the model's prediction is replaced
with the known one (`ldm_lab.guidance.inpaint`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ldm_lab.errors import UserError
from ldm_lab.interfaces import Schedule
from ldm_lab.io.images import Resize, fit, open_image, to_tensor
from ldm_lab.io.masks import blur_mask, fit_mask, hole_of, latent_mask, lost_share, read_mask
from ldm_lab.sampling.model import Model
from ldm_lab.sampling.options import ImageFile, SamplingOptions

STRENGTH, MASKED_STRENGTH = 0.7, 1.0  # where none is given
TOLD = 0.01  # share of a mask whose loss is told


class EncodedImage(NamedTuple):
    """Latents of an image to begin with.

    Attributes:
        known: of the image, the posterior's mean, [1, C, h, w].
        mask: where it is painted anew, bool [1, 1, h, w]; None: everywhere.
        visible: what a model that was trained for inpainting is told where the mask is false, [1, C, h, w]. Latents
            are of the image with all that is painted anew in grey, as in training: none of it is in them.
    """

    known: Tensor
    mask: Tensor | None
    visible: Tensor


@dataclass(frozen=True, eq=False)
class InitImage:
    """An image to begin with.

    Attributes:
        image: of any mode and size.
        strength: share of the sampler's steps that it goes through, 0 to 1: 0 returns the image as the autoencoder
            gives it back, 1 keeps hardly anything of it.
        mask: of the image's size, float32 [H, W] in [0, 1]: 1 where something new is to be painted, 0 where all stays.
            None: everywhere.
        resize: how it comes to the size that is sampled (`ldm_lab.io.images.fit`).
        mask_blur: standard deviation of the mask's soft edges, pixels of that size.
        is_hole: the mask is what is transparent in the image.

    Raises:
        UserError: a mask of another size.
    """

    image: Image.Image
    strength: float
    mask: Tensor | None
    resize: Resize
    mask_blur: float
    is_hole: bool

    def __post_init__(self) -> None:
        if self.mask is not None and self.mask.shape != (self.image.height, self.image.width):
            (h, w), (width, height) = self.mask.shape, self.image.size
            raise UserError(f"mask: it is {w}x{h} pixels, the image {width}x{height}; both have to be of one size")

    @classmethod
    def from_options(cls, options: SamplingOptions) -> "InitImage | None":
        """Return the init image of some options, read from its file.

        The transparent part of an image is its mask, where no other is given.

        Raises:
            UserError: missing or unreadable files, a mask in color or of another size, or one that paints nothing.
        """
        if options.init_image is None:
            return None
        image = _opened(options.init_image)
        mask = hole_of(image) if options.mask is None else read_mask(_opened(options.mask), bool(options.invert_mask))
        strength = (STRENGTH if mask is None else MASKED_STRENGTH) if options.strength is None else options.strength
        return cls(image, strength, mask, options.resize or "crop", options.mask_blur or 0.0, options.mask is None)

    def num_steps(self, steps: int) -> int:
        """Return how many of a sampler's steps the image goes through."""
        return round(self.strength * steps)

    def remarks(self, height: int, width: int) -> list[str]:
        """Return what a user should know of the mask at a size in pixels, a line each.

        Raises:
            UserError: nothing of it is left.
        """
        if self.mask is None:
            return []
        self.fitted_mask(height, width)
        remarks = []
        if self.is_hole:
            remarks.append(f"init_image: its transparent part is painted anew ({self.mask.mean().item():.1%} of it)")
        lost = lost_share(self.mask, height, width, self.resize)
        if lost > TOLD:
            remarks.append(
                f"mask: {lost:.0%} of what is white in it lies outside of the {width}x{height} pixels that are cut out "
                "of the image; --resize pad or stretch keeps all of it"
            )
        return remarks

    def fitted(self, height: int, width: int) -> Image.Image:
        """Return the image at a size, RGB."""
        return fit(self.image, height, width, self.resize)

    def fitted_mask(self, height: int, width: int) -> Tensor | None:
        """Return the mask at a size, float32 [height, width] in [0, 1]; None without. Raises UserError if it is 0."""
        if self.mask is None:
            return None
        return blur_mask(fit_mask(self.mask, height, width, self.resize), self.mask_blur)  # [height, width]

    def encode(self, model: Model, latent_size: tuple[int, int]) -> EncodedImage:
        """Return the image's latents. The mask's true elements are those with any pixel that is not black."""
        autoencoder = model.autoencoder
        height, width = (side * autoencoder.downscale for side in latent_size)
        pixels = to_tensor(self.fitted(height, width))[None].to(model.device)  # [1, 3, H, W]
        mask = self.fitted_mask(height, width)
        with model.on_device(autoencoder):
            known = autoencoder.encode(pixels).float()  # [1, C, h, w]
            if mask is None:
                return EncodedImage(known, None, known)
            visible = known
            if "inpaint_image" in model.denoiser.spec and autoencoder.pixel_range is None:
                visible = autoencoder.encode(pixels * (mask == 0).to(pixels)).float()  # [1, C, h, w]; grey is 0
        return EncodedImage(known, (latent_mask(mask, autoencoder.downscale) > 0).to(model.device), visible)

    def restore(self, painted: Image.Image) -> Image.Image:
        """Return the image with the painted one where the mask is white, and a blend of both where it is grey.

        Every pixel under black is the image's own.
        """
        mask = self.fitted_mask(painted.height, painted.width)
        if mask is None:
            return painted
        levels = Image.fromarray((mask * 255).round().to(torch.uint8).numpy())
        return Image.composite(painted, self.fitted(painted.height, painted.width), levels)


def _opened(image: ImageFile) -> Image.Image:
    return open_image(str(image)) if isinstance(image, str | Path) else image


class TruncatedSchedule(Schedule):
    """A noise schedule whose grids leave out their first steps."""

    def __init__(self, schedule: Schedule, skip: int) -> None:
        self.schedule, self.skip = schedule, skip
        self.variance_preserving, self.timesteps = schedule.variance_preserving, schedule.timesteps
        self.sigma_max = schedule.sigma_max

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the whole schedule's alpha and sigma, each of t's shape."""
        return self.schedule.alpha_sigma(t)

    def log_snr(self, t: Tensor) -> Tensor:
        """Return the whole schedule's log SNR, of t's shape."""
        return self.schedule.log_snr(t)

    def t_of_sigma_over_alpha(self, ratio: Tensor) -> Tensor:
        """Return the whole schedule's t, of ratio's shape."""
        return self.schedule.t_of_sigma_over_alpha(ratio)

    def grid(self, steps: int | str, spacing: str | None = None, sigma_max: float | None = None) -> Tensor:
        """Return the times that are left, float32 [steps - skip]."""
        return self.schedule.grid(steps, spacing, sigma_max)[self.skip :]
