"""What an upsampler is trained on beside the image: the same image, made small."""

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn import functional as F

from ldm_lab.config import NonNegativeFloat, register


@register("low_res")
class LowRes:
    """The low-resolution condition of an upsampler: the training image itself at 1 / factor of its size."""

    def __init__(
        self, *, factor: Annotated[int, Ge(2)] = 4, noise: NonNegativeFloat = 0.0, blur: NonNegativeFloat = 0.0
    ) -> None:
        """Set how it is made.

        Args:
            factor: how many times the upsampler enlarges.
            noise: standard deviation of the noise that is added, at most; each image draws its own from 0 to this. A
                little makes up for base models' pictures not being as clean as photographs; GLIDE has none.
            blur: standard deviation of a Gaussian blur in small pixels, at most, drawn likewise; GLIDE has none.
        """
        self.factor, self.noise, self.blur = factor, noise, blur

    def __call__(self, image: Tensor) -> Tensor:
        """Return the condition, [B, 3, H / factor, W / factor], for images [B, 3, H, W] in [-1, 1]."""
        low = shrink(image, self.factor)  # [B, 3, h, w]
        if self.blur:
            low = torch.stack([gaussian_blur(one, float(torch.rand(())) * self.blur) for one in low])  # [B, 3, h, w]
        if self.noise:
            spread = torch.rand(len(low), 1, 1, 1, device=low.device) * self.noise  # [B, 1, 1, 1]
            low = low + spread * torch.randn_like(low)  # [B, 3, h, w]
        return low


def shrink(image: Tensor, factor: int) -> Tensor:
    """Return images made small as glide-finetune does it with Pillow: bicubic, antialiased, in 8-bit levels.

    Args:
        image: [B, 3, H, W] in [-1, 1], H and W multiples of the factor.
        factor: how many times.

    Returns:
        [B, 3, H / factor, W / factor] in [-1, 1], multiples of 1/127.5.
    """
    height, width = image.shape[2:]
    levels = (image.float() + 1) / 2  # [B, 3, H, W]
    for size in ((height, width // factor), (height // factor, width // factor)):  # Pillow rounds after the rows, too
        levels = F.interpolate(levels, size, mode="bicubic", antialias=True)  # [B, 3, ...]
        levels = (levels * 255).round().clamp(0, 255) / 255  # [B, 3, ...]
    return levels * 2 - 1  # [B, 3, h, w]


def gaussian_blur(image: Tensor, deviation: float) -> Tensor:
    """Return an image [3, h, w] blurred with this standard deviation, pixels."""
    from torchvision.transforms.v2.functional import gaussian_blur as blurred

    size = 2 * min(round(3 * deviation), min(image.shape[1:]) - 1) + 1
    return image if size < 3 else blurred(image, [size, size], [deviation, deviation])  # [3, h, w]
