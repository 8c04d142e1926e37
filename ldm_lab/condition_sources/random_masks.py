"""Random masks that inpainting models are trained with: what is erased of an image, vectorized over a batch."""

import math

import torch
from torch import Tensor

KINDS = ("whole", "rectangle", "strokes", "outside")
SEGMENTS = 4  # straight pieces of a stroke
LENGTHS = (0.1, 0.4)  # of a piece, as shares of the shorter side
BEND = math.pi / 2  # a piece turns by up to this from the one before, radians


def random_kinds(count: int, shares: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return for each of `count` images which of the KINDS it gets, int64 [count]; `shares` [4] are proportions."""
    draws = torch.rand(count, device=shares.device, generator=generator) * shares.sum()  # [B]
    return torch.searchsorted(shares.cumsum(0), draws, right=True).clamp(max=len(KINDS) - 1)  # [B]


def rectangles(
    count: int,
    height: int,
    width: int,
    sides: tuple[float, float],
    device: torch.device,
    generator: torch.Generator | None,
) -> Tensor:
    """Return rectangles anywhere in an image, bool [count, height, width], true within.

    Args:
        count: of images.
        height, width: of them, pixels.
        sides: a rectangle's sides are drawn between these shares of the image's.
        device: of the result, and of the generator.
        generator: of the random numbers; None is torch's global one.
    """
    draws = torch.rand(2, 2, count, device=device, generator=generator)  # [size or place, axis, B]
    within = []
    for axis, full in enumerate((height, width)):
        shares = sides[0] + (sides[1] - sides[0]) * draws[0, axis]  # [B]
        lengths = (shares * full).round().clamp(1, full)  # [B]
        begin = (draws[1, axis] * (full - lengths + 1)).floor()  # [B]
        place = torch.arange(full, device=device)  # [full]
        within.append((place >= begin[:, None]) & (place < (begin + lengths)[:, None]))  # [B, full]
    return within[0][:, :, None] & within[1][:, None]  # [B, height, width]


def strokes(
    count: int,
    height: int,
    width: int,
    most: int,
    widths: tuple[float, float],
    device: torch.device,
    generator: torch.Generator | None,
) -> Tensor:
    """Return strokes of a brush, bool [count, height, width], true under one; arguments as for `rectangles`.

    Args:
        most: strokes in an image; each gets 1 to this many.
        widths: a stroke's width is drawn between these shares of the shorter side.
    """
    draws = torch.rand(2 * SEGMENTS + 4, most, count, device=device, generator=generator)  # [., S, B]
    drawn = torch.arange(most, device=device)[:, None] < 1 + (draws[0, 0] * most).floor()  # [S, B]
    radius = (widths[0] + (widths[1] - widths[0]) * draws[1]) / 2 * min(height, width)  # [S, B]
    radius = torch.where(drawn, radius.clamp(min=math.sqrt(0.5)), -1.0)  # [S, B]; a pixel at least, or none
    turns = torch.cat([draws[2:3] * 2 * math.pi, (2 * draws[3 : 2 + SEGMENTS] - 1) * BEND])  # [P, S, B]
    lengths = (LENGTHS[0] + (LENGTHS[1] - LENGTHS[0]) * draws[2 + SEGMENTS : -2]) * min(height, width)  # [P, S, B]
    angles = turns.cumsum(0)  # [P, S, B]
    rows, columns = torch.arange(height, device=device) + 0.5, torch.arange(width, device=device) + 0.5  # [h], [w]
    y, x = draws[-2] * height, draws[-1] * width  # [S, B] each
    under = torch.zeros(count, height, width, dtype=torch.bool, device=device)  # [B, h, w]
    for angle, length in zip(angles, lengths, strict=True):
        end_y = (y + length * angle.sin()).clamp(0, height)  # [S, B]
        end_x = (x + length * angle.cos()).clamp(0, width)  # [S, B]
        down, across = rows - y[..., None], columns - x[..., None]  # [S, B, h], [S, B, w]
        dy, dx = (end_y - y)[..., None, None], (end_x - x)[..., None, None]  # [S, B, 1, 1] each
        along = down[..., :, None] * dy + across[..., None, :] * dx  # [S, B, h, w]
        along = (along / (dy**2 + dx**2).clamp(min=1e-6)).clamp(0, 1)  # [S, B, h, w]; the segment's nearest point
        apart = (down[..., :, None] - along * dy) ** 2 + (across[..., None, :] - along * dx) ** 2  # [S, B, h, w]
        near = (apart <= radius[..., None, None] ** 2) & drawn[..., None, None]  # [S, B, h, w]
        under |= near.any(0)  # [B, h, w]
        y, x = end_y, end_x
    return under
