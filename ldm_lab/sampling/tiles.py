"""Decoding in overlapping tiles: the memory of one tile, whatever the size of the picture."""

from typing import Any

import torch
from torch import Tensor


def decode_in_tiles(autoencoder: Any, latents: Tensor, tile: int, overlap: int) -> Tensor:
    """Return the images [B, 3, H, W], on the CPU, of latents [B, C, h, w], decoded tile by tile.

    A decoder's norms and attention see the whole of what they are given, so a tile's colours differ a little from the
    whole picture's; tiles overlap, and are blended across the overlap.

    Args:
        autoencoder: has `decode` and `downscale`.
        latents: of any size; not larger than a tile, they are decoded at once.
        tile: side of a tile in latent elements, above `overlap`.
        overlap: latent elements that neighbouring tiles share.
    """
    height, width = latents.shape[2:]
    if height <= tile and width <= tile:
        return autoencoder.decode(latents).float().cpu()  # [B, 3, H, W]
    scale = autoencoder.downscale
    total = torch.zeros(len(latents), 3, height * scale, width * scale)  # [B, 3, H, W]
    weight = torch.zeros(1, 1, height * scale, width * scale)  # [1, 1, H, W]
    for top in _starts(height, tile, overlap):
        for left in _starts(width, tile, overlap):
            part = latents[:, :, top : top + tile, left : left + tile]  # [B, C, <= tile, <= tile]
            image = autoencoder.decode(part).float().cpu()  # [B, 3, ...]
            share = _ramp(part.shape[2] * scale, overlap * scale)[:, None] * _ramp(
                part.shape[3] * scale, overlap * scale
            )  # [tile's H, tile's W]
            window = (
                ...,
                slice(top * scale, top * scale + image.shape[2]),
                slice(left * scale, left * scale + image.shape[3]),
            )
            total[window] += image * share
            weight[window] += share
    return total / weight


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """Return where tiles begin along a side, so that the last one ends with it."""
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def _ramp(size: int, overlap: int) -> Tensor:
    """Return weights that rise over the overlap, stay 1, and fall again, [size], none of them 0."""
    place = torch.arange(size) + 0.5  # [size]
    return (torch.minimum(place, size - place) / max(overlap, 1)).clamp(max=1.0)
