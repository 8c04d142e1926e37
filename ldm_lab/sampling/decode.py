"""From latents to pictures, at once or in overlapping tiles: the memory of one tile, whatever the picture's size."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from PIL import Image
from torch import Tensor

from ldm_lab.errors import NotFiniteError
from ldm_lab.interfaces import Autoencoder
from ldm_lab.io.images import to_images, to_tensor
from ldm_lab.sampling.image_to_image import InitImage
from ldm_lab.sampling.model import Model
from ldm_lab.sampling.tiles import starts, window

log = logging.getLogger(__name__)

CURE = "another sampler, a guidance nearer to 1, or precision 32-true in place of 16-mixed may help"
DECODE_BATCH = 8  # pictures; the autoencoder's full-size feature maps need far more memory than the denoiser's
SEEN = 1.0  # of 255 levels: a difference in color between tiles that is told


@dataclass(frozen=True)
class Sample:
    """A picture that was made.

    Attributes:
        image: 8-bit RGB; `image.info` has its seed.
        pixels: the same before it was rounded, [3, H, W]; about [-1, 1], not clamped.
        seed: of its noise.
        similarity: if it was chosen among several: how like its prompts it is, -1 to 1.
        batch: its place in the batch that it was made in, and how many were in that: others round otherwise.
    """

    image: Image.Image
    pixels: Tensor
    seed: int
    similarity: float | None = None
    batch: tuple[int, int] = (0, 1)

    def restored(self, init_image: InitImage) -> "Sample":
        """Return the picture with what the init image's mask keeps as it was."""
        if init_image.mask is None:
            return self
        image = init_image.restore(self.image)
        image.info = dict(self.image.info)  # nothing that the init image's file says of itself
        return replace(self, image=image, pixels=to_tensor(image))


@torch.no_grad()
def decode(model: Model, latents: Tensor, seeds: Sequence[int], tile: int | None) -> list[Sample]:
    """Return the pictures of latents [B, C, h, w]; if they are larger than a tile of latent elements, in tiles.

    Raises:
        NotFiniteError: NaN or infinity in a picture.
    """
    autoencoder = model.autoencoder
    samples: list[Sample] = []
    rounded = model.pixel_bound is not None  # models of pixels were trained on whole levels
    with model.on_device(autoencoder):
        for first in range(0, len(latents), DECODE_BATCH):
            part = latents[first : first + DECODE_BATCH]  # [n, C, h, w]
            if tile is None:
                pixels = autoencoder.decode(part)  # [n, 3, H, W]
            else:
                pixels = decode_in_tiles(autoencoder, part, tile, overlap=tile // 4)  # [n, 3, H, W]
            for seed, fine in zip(seeds[first:], torch.isfinite(pixels).flatten(1).all(1).tolist()):
                if not fine:
                    raise NotFiniteError(f"the picture of seed {seed} is not finite: {CURE}")
            samples += map(Sample, to_images(pixels, rounded), pixels.float().cpu(), seeds[first:])
    for sample in samples:
        sample.image.info["seed"] = sample.seed
    return [replace(sample, batch=(place, len(samples))) for place, sample in enumerate(samples)]


def decode_in_tiles(autoencoder: Autoencoder, latents: Tensor, tile: int, overlap: int) -> Tensor:
    """Return the images [B, 3, H, W], on the CPU, of latents [B, C, h, w], decoded tile by tile.

    They are those of the whole, where the autoencoder knows a way (`Autoencoder.tiled_decode`). Otherwise norms and
    attention see a tile in place of the whole, so that colors differ from tile to tile, which is said; tiles overlap,
    and are blended across the overlap.

    Args:
        autoencoder: has `decode`, `tiled_decode` and `downscale`.
        latents: of any size; not larger than a tile, they are decoded at once.
        tile: side of a tile in latent elements, above `overlap`.
        overlap: latent elements that neighboring tiles share.
    """
    height, width = latents.shape[2:]
    if height <= tile and width <= tile:
        return autoencoder.decode(latents).float().cpu()  # [B, 3, H, W]
    if (images := autoencoder.tiled_decode(latents, tile)) is not None:
        return images.float().cpu()  # [B, 3, H, W]
    scale = autoencoder.downscale
    total = torch.zeros(len(latents), 3, height * scale, width * scale)  # [B, 3, H, W]
    weight = torch.zeros(1, 1, height * scale, width * scale)  # [1, 1, H, W]
    apart = 0.0  # in color, of neighboring tiles
    for top in starts(height, tile, overlap):
        for left in starts(width, tile, overlap):
            part = latents[:, :, top : top + tile, left : left + tile]  # [B, C, <= tile, <= tile]
            image = autoencoder.decode(part).float().cpu()  # [B, 3, ...]
            share = window(part.shape[2] * scale, part.shape[3] * scale, overlap * scale)  # [tile's H, tile's W]
            place = (
                ...,
                slice(top * scale, top * scale + image.shape[2]),
                slice(left * scale, left * scale + image.shape[3]),
            )
            if (shared := weight[place] > 0).any():
                gap = (image - total[place] / weight[place].clamp(min=1e-9)) * shared  # [B, 3, ...]
                apart = max(apart, (gap.sum((2, 3)) / shared.sum()).abs().max().item())
            total[place] += image * share
            weight[place] += share
    if (levels := apart * 127.5) > SEEN:
        _tell_once(
            f"tile: colors of neighboring tiles differ by up to {levels:.0f} of 255 levels; larger tiles less so"
        )
    return total / weight


@cache
def _tell_once(line: str) -> None:
    log.warning("%s", line)
