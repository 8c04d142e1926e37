"""What an upsampler is told: the image itself, made small."""

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn import functional as F

from ldm_lab.conditions import UPSAMPLER_ALONE
from ldm_lab.config import NonNegativeFloat, register
from ldm_lab.errors import UserError
from ldm_lab.interfaces import (
    Autoencoder,
    Batch,
    ConditionRequest,
    Conditions,
    ConditionSource,
    ConditionSpec,
    ImageCondition,
)

RGB = 3


@register("condition_source", "low_res")
class LowRes(ConditionSource):
    """The low-resolution condition of an upsampler: RGB in [-1, 1] at 1 / scale_factor of the image's size."""

    def __init__(
        self, *, scale_factor: Annotated[int, Ge(2)] = 4, noise: NonNegativeFloat = 0.0, blur: NonNegativeFloat = 0.0
    ) -> None:
        """Set how it is made of training images.

        Args:
            scale_factor: how many times the upsampler enlarges.
            noise: standard deviation of the noise that is added, at most; each image draws its own from 0 to this. A
                little makes up for base models' pictures not being as clean as photographs; GLIDE has none.
            blur: standard deviation of a Gaussian blur in small pixels, at most, drawn likewise; GLIDE has none.
        """
        super().__init__()
        self.scale_factor, self.noise, self.blur = scale_factor, noise, blur

    @property
    def spec(self) -> ConditionSpec:
        return {"low_res": ImageCondition(RGB, self.scale_factor)}

    def from_batch(
        self, batch: Batch, x0: Tensor, autoencoder: Autoencoder, generator: torch.Generator | None
    ) -> Conditions:
        """Return {"low_res": [B, 3, H / scale_factor, W / scale_factor]} of a batch's images."""
        return {"low_res": self.reduce(batch.require_image("train an upsampler"), generator)}

    def from_request(self, request: ConditionRequest) -> Conditions:
        """Return {"low_res": [B, 3, h, w]}, what is to be enlarged."""
        if request.low_res is None:
            raise UserError(UPSAMPLER_ALONE)
        return {"low_res": request.low_res.to(request.x)}

    def reduce(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return images made small, blurred and noised, [B, 3, h, w], for images [B, 3, H, W] in [-1, 1]."""
        low = shrink(image, self.scale_factor)  # [B, 3, h, w]
        if self.blur:
            spreads = [float(_uniform((), generator)) * self.blur for _ in low]
            low = torch.stack([gaussian_blur(one, spread) for one, spread in zip(low, spreads)])  # [B, 3, h, w]
        if self.noise:
            spread = _uniform((len(low), 1, 1, 1), generator, low.device) * self.noise  # [B, 1, 1, 1]
            low = low + spread * torch.empty_like(low).normal_(generator=generator)  # [B, 3, h, w]
        return low


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device | None = None) -> Tensor:
    """Return random numbers in [0, 1) of a shape; without a device on that of the generator."""
    device = device or (None if generator is None else generator.device)
    return torch.rand(shape, generator=generator, device=device)


def shrink(image: Tensor, scale_factor: int) -> Tensor:
    """Return images made small as glide-finetune does it with Pillow: bicubic, antialiased, in 8-bit levels.

    Args:
        image: [B, 3, H, W] in [-1, 1], H and W multiples of the factor.
        scale_factor: how many times.

    Returns:
        [B, 3, H / scale_factor, W / scale_factor] in [-1, 1], multiples of 1/127.5.
    """
    height, width = image.shape[2:]
    small = height // scale_factor, width // scale_factor
    levels = (image.float() + 1) / 2  # [B, 3, H, W]
    for size in ((height, small[1]), small):  # Pillow rounds after the rows, too
        levels = F.interpolate(levels, size, mode="bicubic", antialias=True)  # [B, 3, ...]
        levels = (levels * 255).round().clamp(0, 255) / 255  # [B, 3, ...]
    return levels * 2 - 1  # [B, 3, h, w]


def gaussian_blur(image: Tensor, std: float) -> Tensor:
    """Return an image [3, h, w] blurred with this standard deviation, pixels."""
    from torchvision.transforms.v2.functional import gaussian_blur as blurred

    size = 2 * min(round(3 * std), min(image.shape[1:]) - 1) + 1
    return image if size < 3 else blurred(image, [size, size], [std, std])  # [3, h, w]
