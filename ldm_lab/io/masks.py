"""Masks of inpainting: which part of a picture is painted anew, in [0, 1] per pixel; 1 is painted, 0 stays."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from ldm_lab.errors import UserError
from ldm_lab.io.color import lay_over, to_srgb
from ldm_lab.io.images import Resize, inner_box

COLORED = 32  # levels between the channels of a pixel; lossy compression tints grey by less
# Levels that near to black or white count as these: compression and scans make some of both.
NEARLY = 1 / 16


def read_mask(image: Image.Image, invert: bool = False) -> Tensor:
    """Return a mask, float32 [H, W] in [0, 1], of a picture of any mode: white is painted, grey blends, black stays.

    What is transparent stays, so that a stroke on a transparent layer is just the stroke.

    Args:
        image: as `open_image` gives it, or any other.
        invert: black is painted and white stays.

    Raises:
        UserError: a colored picture, or one in which nothing would be painted.
    """
    pixels = np.asarray(lay_over(to_srgb(image), "black"))  # [H, W, 3]
    if (np.ptp(pixels, axis=2) > COLORED).any():
        raise UserError("mask: it is a picture in color; a mask is white where to paint, black where not, grey between")
    brightest = int(pixels.max())
    mask = _stretched(torch.from_numpy(pixels[..., 1] / 255).float())  # [H, W]
    mask = 1 - mask if invert else mask
    if not mask.any():
        what = "black, and inverted" if invert else f"white (its brightest level is {brightest} of 255)"
        raise UserError(f"mask: nothing in it is {what}, so that nothing would be painted")
    return mask


def hole_of(image: Image.Image) -> Tensor | None:
    """Return the transparent part of a picture as a mask, float32 [H, W] in [0, 1]; None if there is none."""
    image = to_srgb(image)
    if not image.has_transparency_data:
        return None
    alpha = np.asarray(image.convert("RGBA").getchannel("A"))  # [H, W]
    hole = _stretched(torch.from_numpy(1 - alpha / 255).float())  # [H, W]
    return hole if hole.any() else None


def _stretched(mask: Tensor) -> Tensor:
    return ((mask - NEARLY) / (1 - 2 * NEARLY)).clamp(0, 1)  # [H, W]


def fit_mask(mask: Tensor, height: int, width: int, resize: Resize = "crop") -> Tensor:
    """Return a mask [H, W] at another size, [height, width], as `images.fit` brings the picture there.

    A pixel takes the largest of the values that fall into it: no stroke is too thin. Around a padded picture nothing
    is painted.

    Raises:
        UserError: all that would be painted lies outside of the crop.
    """
    left, top, inner_width, inner_height = inner_box((mask.shape[1], mask.shape[0]), height, width, resize)
    inner = mask if mask.shape == (inner_height, inner_width) else _largest(mask, inner_height, inner_width)
    right, bottom = width - inner_width - left, height - inner_height - top
    fitted = F.pad(inner, (left, right, top, bottom))  # [height, width]; negative padding crops
    if not fitted.any():
        raise UserError(
            f"mask: all that is white in it lies outside of the {width}x{height} pixels that are cut out of the "
            "picture; --resize pad or stretch keeps all of it"
        )
    return fitted


def lost_share(mask: Tensor, height: int, width: int, resize: Resize = "crop") -> float:
    """Return the share of what is to be painted that `fit_mask` cuts off, 0 to 1."""
    left, top, inner_width, inner_height = inner_box((mask.shape[1], mask.shape[0]), height, width, resize)
    inner = _largest(mask, inner_height, inner_width)  # [inner_height, inner_width]
    kept = inner[max(0, -top) :, max(0, -left) :][:height, :width]
    return 1 - (kept.sum() / inner.sum()).item()


def _largest(mask: Tensor, height: int, width: int) -> Tensor:
    """Return a mask of another size, [height, width]: the largest of the pixels that each new one overlaps."""
    return F.adaptive_max_pool2d(mask[None, None], (height, width))[0, 0]  # [height, width]


def blur_mask(mask: Tensor, radius: float) -> Tensor:
    """Return a mask with soft edges, [H, W]: a Gaussian of a standard deviation in pixels; 0 leaves it as it is."""
    if not radius:
        return mask
    levels = Image.fromarray((mask * 255).round().to(torch.uint8).numpy())
    blurred = np.array(levels.filter(ImageFilter.GaussianBlur(radius)))  # [H, W]
    return torch.from_numpy(blurred).float() / 255  # [H, W]


def latent_mask(mask: Tensor, downscale: int) -> Tensor:
    """Return a mask [H, W] for latents, [1, 1, h, w]: an element is painted as much as its most painted pixel."""
    return F.max_pool2d(mask[None, None], downscale)  # [1, 1, h, w]
