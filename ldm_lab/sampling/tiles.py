"""Overlapping tiles of a picture, and a denoiser that sees one of them at a time, for the memory of one.

Predictions of the tiles are blended in every step (MultiDiffusion: Bar-Tal et al. 2023, arXiv 2302.08113, equation 5,
with weights that fall toward a tile's edges). The noise is the whole picture's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm
from typing import NamedTuple

import torch
from torch import Tensor

from ldm_lab.conditions import Conditions, ConditionSpec, ImageCondition
from ldm_lab.errors import UserError
from ldm_lab.guidance.classifier_free import ConditionalPredict
from ldm_lab.interfaces import Prediction


class Tile(NamedTuple):
    """A part of a picture: rows and columns, in elements of the latents."""

    rows: slice
    columns: slice

    def of(self, image: Tensor, whole: Tensor) -> Tensor:
        """Return the part of an image [B, c, h / k, w / k] for whole latents [B, C, h, w].

        Raises:
            UserError: k is no whole number, or does not divide where the tile begins and ends.
        """
        down, across = (size // other for size, other in zip(whole.shape[2:], image.shape[2:], strict=True))
        bounds = (self.rows.start, self.rows.stop, self.columns.start, self.columns.stop)
        fits = image.shape[2] * down == whole.shape[2] and image.shape[3] * across == whole.shape[3]
        if not fits or any(bound % down for bound in bounds[:2]) or any(bound % across for bound in bounds[2:]):
            sizes = ["x".join(map(str, value.shape[:1:-1])) for value in (image, whole)]
            raise UserError(f"tile_denoiser: an image of {sizes[0]} cannot be cut like one of {sizes[1]}")
        top, bottom, left, right = (bound // k for bound, k in zip(bounds, (down, down, across, across), strict=True))
        return image[:, :, top:bottom, left:right]  # [B, c, ., .]


@dataclass(frozen=True)
class Tiles:
    """How latents are cut.

    Attributes:
        side: of a tile, in elements.
        overlap: elements that neighboring tiles share at least, fewer than `side`.
    """

    side: int
    overlap: int

    def places(self, height: int, width: int) -> Iterator[Tile]:
        """Yield the tiles, of which the last ones end with the latents."""
        for top in starts(height, self.side, self.overlap):
            for left in starts(width, self.side, self.overlap):
                yield Tile(slice(top, min(top + self.side, height)), slice(left, min(left + self.side, width)))

    def count(self, height: int, width: int) -> int:
        """Return how many tiles there are."""
        return len(starts(height, self.side, self.overlap)) * len(starts(width, self.side, self.overlap))


def starts(size: int, tile: int, overlap: int) -> list[int]:
    """Return where tiles begin along a side, so that the last one ends with it."""
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def ramp(size: int, overlap: int) -> Tensor:
    """Return weights that rise over the overlap, stay 1, and fall again, [size], none of them 0."""
    place = torch.arange(size) + 0.5  # [size]
    return (torch.minimum(place, size - place) / max(overlap, 1)).clamp(max=1.0)


def window(height: int, width: int, overlap: int) -> Tensor:
    """Return what a tile's elements count, [height, width]: the product of both sides' ramps."""
    return ramp(height, overlap)[:, None] * ramp(width, overlap)


def unit_of(spec: ConditionSpec, multiple_of: int) -> int:
    """Return what sides and overlaps of a denoiser's tiles have to be multiples of, in elements of the latents."""
    images = [kind for kind in spec.values() if isinstance(kind, ImageCondition) and not kind.enlarged]
    return lcm(multiple_of, *(kind.scale_factor for kind in images))


def in_tiles(predict: ConditionalPredict, tiles: Tiles, spec: ConditionSpec) -> ConditionalPredict:
    """Return `predict` that looks at one tile after the other and blends what it says of them.

    What fits into one tile is predicted as it is. Every tile is told the same, but of images its own part.

    Args:
        predict: rows of x [R, C, h, w], t [R], conditions -> Prediction.
        tiles: how x is cut.
        spec: of the conditions.
    """

    def tiled(x: Tensor, t: Tensor, conditions: Conditions) -> Prediction:
        places = list(tiles.places(*x.shape[2:]))
        if len(places) == 1:
            return predict(x, t, conditions)
        weight = x.new_zeros(x.shape[2:])  # [h, w]
        sums: dict[str, Tensor] = {}
        for tile in places:
            part = x[:, :, tile.rows, tile.columns]  # [R, C, s, s]
            said = predict(part, t, {name: _cut(name, value, tile, x, spec) for name, value in conditions.items()})
            share = window(part.shape[2], part.shape[3], tiles.overlap).to(weight)  # [s, s]
            weight[tile.rows, tile.columns] += share
            for name, value in said._asdict().items():
                if value is not None:
                    whole = sums.setdefault(name, value.new_zeros(*value.shape[:2], *x.shape[2:]))  # [R, C, h, w]
                    whole[:, :, tile.rows, tile.columns] += value * share
        return Prediction(**{name: value / weight for name, value in sums.items()})

    return tiled


def _cut(name: str, value: Tensor, tile: Tile, x: Tensor, spec: ConditionSpec) -> Tensor:
    """Return what a tile is told by a condition [R, ...]: of an image its part, of all else the whole."""
    return tile.of(value, x) if isinstance(spec.get(name), ImageCondition) else value
