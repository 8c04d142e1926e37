"""From one prompt to another: conditions on the way between, with the noise held fixed."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ldm_lab.io.atomic import atomic_write


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Return what lies `share` of the way from a to b, [..., D], along the great circle (Shoemake 1985).

    Lengths are interpolated evenly; opposite or zero vectors, which have no great circle, are interpolated straight.
    """
    lengths = [v.norm(dim=-1, keepdim=True) for v in (a, b)]  # [..., 1] each
    unit_a, unit_b = (v / length.clamp(min=1e-12) for v, length in zip((a, b), lengths))  # [..., D] each
    angle = (unit_a * unit_b).sum(-1, keepdim=True).clamp(-1, 1).acos()  # [..., 1]
    sine = angle.sin()  # [..., 1]
    round_way = ((1 - share) * angle).sin() / sine * unit_a + (share * angle).sin() / sine * unit_b  # [..., D]
    direction = torch.where(sine > 1e-4, round_way, torch.lerp(unit_a, unit_b, share))  # [..., D]
    return direction * torch.lerp(*lengths, share)  # [..., D]


def between(conds: dict[str, Tensor], frames: int) -> dict[str, Tensor]:
    """Return the conditions of a film that goes through all given ones in turn.

    Args:
        conds: of the stations, tensors of [S, ...] with S >= 2.
        frames: in all, at least S >= 2; they are spread evenly over the S - 1 ways.

    Returns:
        Tensors of [frames, ...], the first and the last frame those of the first and the last station.
    """
    ways = len(next(iter(conds.values()))) - 1
    film = {name: [] for name in conds}
    for frame in range(frames):
        place = frame * ways / (frames - 1)
        way = min(math.floor(place), ways - 1)
        for name, value in conds.items():
            film[name].append(slerp(value[way].float(), value[way + 1].float(), place - way))
    return {name: torch.stack(values) for name, values in film.items()}


def save_gif(path: str | Path, images: Sequence[Image.Image], seconds: float = 3.0) -> None:
    """Write a film of equally large images that runs there and back, `seconds` one way, for ever.

    Raises:
        UserError: the folder cannot be written to, or is full.
    """
    frames = [*images, *images[-2:0:-1]]
    step = max(20, round(1000 * seconds / len(images)))  # milliseconds; viewers slow down anything below 20
    with atomic_write(path) as file:
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=step, loop=0)
