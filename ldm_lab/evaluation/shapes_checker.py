"""Reads color, shape and background off an image of the built-in shapes: the judge of the quickstart.

No learning: the background is the color of the frame, the shape's color that of the pixels farthest from it, and the
shape is the drawn one, in any angle, that covers the same pixels best. So it also reads blurred and noisy images.
"""

import functools
from typing import NamedTuple

import numpy as np
from PIL import Image

from ldm_lab.data.shapes import ANGLE, COLORS, SHAPES, Attributes, render

GRID = 32  # pixels; masks are compared at this size
PAD = 4  # pixels of background around the shape in that comparison
STEP = 3  # degrees between the templates of a shape
SMALL = 32  # pixels; below, soft edges are most of a shape, and the image is enlarged first
ENLARGED = 4  # times


class Reading(NamedTuple):
    """What the checker saw: names out of COLORS, SHAPES and COLORS."""

    color: str
    shape: str
    background: str


def check(image: Image.Image | np.ndarray) -> Reading:
    """Return what an image shows: `Reading(color, shape, background)`.

    Args:
        image: a Pillow image of any mode, or RGB levels 0 to 255, [H, W, 3]. Square, at least 16 pixels.

    An image without a shape gets the nearest reading, too; there is no "nothing".
    """
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))  # [H, W, 3]
    if min(image.shape[:2]) < SMALL:
        sides = image.shape[1] * ENLARGED, image.shape[0] * ENLARGED
        image = np.asarray(Image.fromarray(image.astype(np.uint8)).resize(sides, Image.Resampling.BICUBIC))  # [H, W, 3]
    pixels = image.astype(np.float64)  # [H, W, 3]
    width = max(1, round(min(pixels.shape[:2]) / 32))  # the frame that no shape reaches (shapes.MARGIN)
    frame = np.ones(pixels.shape[:2], bool)  # [H, W]
    frame[width:-width, width:-width] = False
    background = np.median(pixels[frame], axis=0)  # [3]

    distance = np.linalg.norm(pixels - background, axis=-1)  # [H, W]
    # The tenth percent is inside every shape, yet beyond single outliers; edges are nearer to the background.
    inside = distance >= 0.8 * np.quantile(distance, 0.95)  # [H, W]
    color = np.median(pixels[inside], axis=0)  # [3]

    # How far a pixel is on the way from the background's color to the shape's: 0 to 1, soft at edges.
    way = color - background  # [3]
    mask = np.clip((pixels - background) @ way / max(way @ way, 1e-6), 0, 1)  # [H, W]
    names, templates = _templates()
    cut = _cut_out(mask)  # [GRID, GRID]
    error = ((templates - cut) ** 2).mean((1, 2))  # [templates]
    background_name = _nearest(background)
    return Reading(_nearest(color, other_than=background_name), names[int(error.argmin())], background_name)


def _nearest(color: np.ndarray, other_than: str | None = None) -> str:
    """Return the palette's nearest color, never the background's: one color on itself would show no shape."""
    names = [name for name in COLORS if name != other_than]
    return min(names, key=lambda name: np.linalg.norm(color - np.array(COLORS[name])))


def _cut_out(mask: np.ndarray) -> np.ndarray:
    """Return the shape scaled so that its bounding box's longer side fills the grid but for PAD, [GRID, GRID]."""
    rows, columns = (np.flatnonzero((mask > 0.5).sum(axis) >= 2) for axis in (1, 0))  # a lone pixel is noise
    if not len(rows) or not len(columns):
        return np.zeros((GRID, GRID))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    side = max(bottom - top, right - left) * GRID / (GRID - 2 * PAD)
    x, y = (left + right - side) / 2, (top + bottom - side) / 2
    picture = Image.fromarray(mask.astype(np.float32))
    box = (x, y, x + side, y + side)
    return np.asarray(picture.transform((GRID, GRID), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR))


@functools.cache
def _templates() -> tuple[list[str], np.ndarray]:
    """Return the names and masks [N, GRID, GRID] of all shapes in all angles, cut out like an image's."""
    names, masks = [], []
    for shape in SHAPES:
        for angle in range(-ANGLE, ANGLE + 1, STEP):
            drawn = Attributes("white", shape, "black", 0.65, 0.5, 0.5, angle)
            image = render(drawn, 64, (255, 255, 255), (0, 0, 0)).convert("L")
            names.append(shape)
            masks.append(_cut_out(np.asarray(image) / 255))
    return names, np.stack(masks)  # [N, GRID, GRID]
