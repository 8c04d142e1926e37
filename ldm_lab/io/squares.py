"""The square of an image that a model is trained on: read, resized by its short side, cropped.

There are two roads. `exact` is Pillow's, pixel for pixel that of the programs that are reproduced. `fast` takes plain
JPEGs through torchvision's decoder and torch's resampling, which differs from Pillow's by a level in a few pixels, by
two at most; all other files go the exact road, so that whatever is odd about a file comes out the same.
"""

import math
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ldm_lab.io.decoding import decode_image
from ldm_lab.io.images import LONGEST, to_rgb
from ldm_lab.io.jpeg import plain_jpeg

Road = Literal["fast", "exact"]
LANCZOS = Image.Resampling.LANCZOS
LOBES = 3  # of that filter: how many pixels of the smaller picture it reaches to either side
PROBES = ((17, 12, 7), (12, 17, 7), (12, 41, 9), (9, 23, 14))  # width, height and the square's size


def read_square(
    data: bytes,
    size: int,
    across: float = 0.5,
    down: float = 0.5,
    road: Road = "exact",
    min_size: int = 1,
    max_pixels: int | None = None,
    cut_from: int | None = None,
) -> Tensor:
    """Return the square of an encoded image of any format, uint8 [3, size, size]; transparent ones are laid over white.

    Args:
        data: of the file.
        size: side of the square, pixels.
        across, down: where the crop lies, see `resize_and_crop`.
        road: by which it is read and resized.
        min_size, max_pixels: of the image, see `decode_image`.
        cut_from: short side of the image that the square is cut from, see `Place.of`; an image that is smaller than
            the square is "too small" for that.

    Raises:
        BadImage: what is wrong with it; the same on both roads.
    """
    min_size = min_size if cut_from is None else max(min_size, size)
    pixels = plain_jpeg(data, min_size, max_pixels) if road == "fast" and torch_has_lanczos() else None  # [3, H, W]
    if pixels is not None and size > 1:  # torch 2.15 fails at one pixel
        height, width = pixels.shape[1:]
        place = Place.of((width, height), size, across, down, cut_from)
        if not place.is_strip:
            return _by_torch(pixels, place)  # [3, S, S]
    image = to_rgb(decode_image(data, min_size, max_pixels))
    square = np.array(resize_and_crop(image, size, across, down, cut_from))  # [S, S, 3]
    return torch.from_numpy(square).permute(2, 0, 1)  # [3, S, S]


@cache
def torch_has_lanczos() -> bool:
    """Return whether this torch resamples bytes by the Lanczos filter, as 2.12 and later ones do."""
    try:
        F.interpolate(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), (2, 2), mode="lanczos", antialias=True)
    except (NotImplementedError, ValueError, RuntimeError):
        return False
    return True


def resize_and_crop(
    image: Image.Image, size: int, across: float = 0.5, down: float = 0.5, cut_from: int | None = None
) -> Image.Image:
    """Return a square of `size` pixels: the short side resized to it (Lanczos), the long side cropped.

    The sizes and the center crop are those of torchvision's Resize and CenterCrop on Pillow images, and so is every
    pixel, although what is cropped away is hardly resized.

    Args:
        image: an RGB image.
        size: side of the square, pixels.
        across, down: where the crop lies in the room that the image leaves: 0 left/top, 0.5 center, 1 right/bottom.
        cut_from: short side of the image that the square is cut from, see `Place.of`.
    """
    place = Place.of(image.size, size, across, down, cut_from)
    if place.is_strip:
        x, y = image.width / place.width, image.height / place.height
        left, top, right, bottom = place.box
        return image.resize((size, size), LANCZOS, box=(left * x, top * y, right * x, bottom * y))
    if _order_is_known():
        return _by_pillow(image, place)
    return image.resize((place.width, place.height), LANCZOS).crop(place.box)


class Place(NamedTuple):
    """Where a square lies in the resized image, and how large that is as a whole, in pixels.

    Attributes:
        given: width and height before resizing.
        width, height: after it.
        left, top: of the square.
        size: of the square.
    """

    given: tuple[int, int]
    width: int
    height: int
    left: int
    top: int
    size: int

    @classmethod
    def of(cls, given: tuple[int, int], size: int, across: float, down: float, cut_from: int | None = None) -> "Place":
        """Return the place of a square of `size` in an image of the width and height `given`.

        Args:
            given: width and height, pixels.
            size: side of the square, pixels.
            across, down: where the square lies in the room that is left, 0 to 1 each.
            cut_from: pixels that the short side is reduced to where it is longer, at least `size`; nothing is
                enlarged. None: the short side is resized to `size`.
        """
        short = size if cut_from is None else min(cut_from, min(given))
        width, height = (int(short * side / min(given)) for side in given)
        return cls(given, width, height, round((width - size) * across), round((height - size) * down), size)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The square's left, top, right and bottom."""
        return self.left, self.top, self.left + self.size, self.top + self.size

    @property
    def is_strip(self) -> bool:
        """Whether the image is so long that it is cut before it is resized."""
        return max(self.width, self.height) > LONGEST * min(self.width, self.height)

    @property
    def height_first(self) -> bool:
        """Whether Pillow resamples the columns before the rows, which some pixels depend on."""
        width, height = self.given
        return _takes_height_first() and height - self.height > 2 * max(0, width - self.width)

    @property
    def rows(self) -> tuple[int, int]:
        """The first row of the given image that the square is made of, and the one behind the last."""
        height = self.given[1]
        step = height / self.height
        reach = LOBES * max(step, 1.0) + 1
        first, last = self.top * step - reach, (self.top + self.size) * step + reach
        return max(0, math.floor(first)), min(height, math.ceil(last))


# ------------------------------------------------------------------------------------------- rows and columns


def _by_torch(pixels: Tensor, place: Place) -> Tensor:
    """Return the square of pixels [3, H, W], uint8 [3, size, size]. All are resized, which costs less than copies."""
    sides = [(place.height, place.width)]
    if place.height_first:  # torch takes the rows first
        sides.insert(0, (place.height, place.given[0]))
    batch = pixels[None]  # [1, 3, H, W]
    for side in sides:
        if batch.shape[2:] != side:
            batch = F.interpolate(batch, side, mode="lanczos", antialias=True)  # [1, 3, h, w]
    left, top, right, bottom = place.box
    square = batch[0, :, top:bottom, left:right]  # [3, S, S]
    return square if min(place.width, place.height) == place.size else square.clone()  # the whole would be kept


def _by_pillow(image: Image.Image, place: Place) -> Image.Image:
    """Return the square of an RGB image: rows and columns one after the other, and no more of them than it takes."""
    (width, height), size = place.given, place.size
    left, top, right, bottom = place.box
    if place.height_first:
        high = _resized(image, width, place.height).crop((0, top, width, bottom))
        return _resized(high, place.width, size).crop((left, 0, right, size))
    first, last = place.rows
    rows = image if last - first == height else image.crop((0, first, width, last))
    wide = _resized(rows, place.width, last - first).crop((left, 0, right, last - first))
    if last - first != height:  # what the filter weighs a row with depends on where it lies in the whole height
        whole = Image.new("RGB", (size, height))
        whole.paste(wide, (0, first))
        wide = whole
    return _resized(wide, size, place.height).crop((0, top, size, bottom))


def _resized(image: Image.Image, width: int, height: int) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), LANCZOS)


@cache
def _takes_height_first() -> bool:
    """Return whether this Pillow takes the columns first where many rows go away, as 13.0 does and 12 does not."""
    tall = _noise(4, 24)
    return tall.resize((3, 12), LANCZOS) == tall.resize((4, 12), LANCZOS).resize((3, 12), LANCZOS)


@cache
def _order_is_known() -> bool:
    """Return whether this Pillow's rows and columns, taken as it is done here, make its very pixels."""
    for width, height, size in PROBES:
        image, place = _noise(width, height), Place.of((width, height), size, 0.3, 0.3)
        if _by_pillow(image, place) != image.resize((place.width, place.height), LANCZOS).crop(place.box):
            return False
    return True


def _noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (height, width, 3), dtype=np.uint8))
