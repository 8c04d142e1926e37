"""What images have to look like for the towers of CLIP and CLOOB, tensors and Pillow images."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ldm_lab.io.images import center_crop_to, flatten_alpha, to_tensor

if TYPE_CHECKING:
    from open_clip.transform import PreprocessCfg

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of images in [0, 1]; CLIP's
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def normalize_pixels(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return images in [0, 1], [B, 3, H, W], with the mean [3] taken off and the deviation [3] divided out."""
    return (images - mean[:, None, None]) / std[:, None, None]  # [B, 3, H, W]


def cropped(side: int, image: Image.Image) -> Tensor:
    """Return a Pillow image as [3, side, side] in [-1, 1] (`images.center_crop_to`)."""
    return to_tensor(center_crop_to(image, side, side))  # [3, S, S]


def transformed(transform: Callable[[Image.Image], Tensor], image: Image.Image) -> Tensor:
    """Return a Pillow image as open_clip's own transform makes it, [3, S, S]; transparent ones are laid over white."""
    return transform(flatten_alpha(image))  # [3, S, S]


class CLIPPreprocessing:
    """How one of open_clip's models wants its images; of a strip longer than 8 times its width only the middle is seen.

    Attributes:
        size: height and width in pixels that the image tower sees.
        mean, std: of images in [0, 1], [3] each.
    """

    def __init__(self, config: "PreprocessCfg") -> None:
        """Take what open_clip says of the model."""
        self.config = config
        self.size = (config.size, config.size) if isinstance(config.size, int) else tuple(config.size)
        self.mean, self.std = (torch.tensor(its, dtype=torch.float32) for its in (config.mean, config.std))  # [3] each

    def resize(self, images: Tensor) -> Tensor:
        """Return images in [0, 1] of any size, [B, 3, H, W], as the tower's [B, 3, S, S], as the model was trained.

        What open_clip does to Pillow images, done to tensors: antialiased, clamped and rounded to 8 bits. The two
        differ, where a value lies between two levels of 255, by one level, bilinear by two (`tests/test_clip.py`).
        """
        from open_clip.transform import center_crop_or_pad

        mode, (height, width) = self.config.resize_mode, self.size
        ratios = images.shape[-2] / height, images.shape[-1] / width
        if mode == "squash":
            sides = [height, width]
        elif mode == "shortest" and height == width:  # torchvision cuts fractions off, open_clip rounds them
            sides = [int(height * side / min(images.shape[-2:])) for side in images.shape[-2:]]
        else:
            ratio = min(ratios) if mode == "shortest" else max(ratios)
            sides = [max(1, round(side / ratio)) for side in images.shape[-2:]]
        bilinear = self.config.interpolation == "bilinear"
        for step in ([images.shape[-2], sides[1]], sides):  # as Pillow: rows, then columns, both rounded to 8 bits
            images = F.interpolate(images, step, mode="bilinear" if bilinear else "bicubic", antialias=True)
            images = (images * 255).round().clamp(0, 255) / 255  # [B, 3, ...]
        fill = self.config.fill_color / 255
        return center_crop_or_pad(images, [height, width], fill=fill)  # [B, 3, S, S]

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """Return open_clip's transform of a Pillow image to normalized pixels, [3, S, S]."""
        from open_clip.transform import image_transform_v2

        return image_transform_v2(self.config, is_train=False)
