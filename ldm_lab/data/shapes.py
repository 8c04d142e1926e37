"""The built-in data set: captioned shapes, drawn deterministically and kept as shards in img2dataset's layout.

One filled shape on a plain background of another color: 8 colors x 6 shapes x 7 backgrounds = 336 kinds of image, and
every image of a kind differs in size, place, angle and shade, by as much as `variety` says. Small enough to train on
without a GPU, yet text and image can be compared attribute by attribute (`ldm_lab.evaluation.shapes_checker`).
"""

import io
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge, Interval
from PIL import Image, ImageDraw

from ldm_lab.config import PositiveInt, Share, register
from ldm_lab.data.shape_wordings import WORDINGS, derived
from ldm_lab.data.shard_source import ShardSource
from ldm_lab.data.tar import write_shard
from ldm_lab.errors import UserError
from ldm_lab.io.atomic import new_folder

# Near the corners of the RGB cube, so that jitter, blur and compression leave them apart.
COLORS = {
    "black": (20, 20, 20),
    "white": (240, 240, 240),
    "red": (220, 35, 35),
    "green": (35, 165, 55),
    "blue": (40, 60, 220),
    "yellow": (245, 220, 40),
    "cyan": (50, 205, 225),
    "magenta": (215, 50, 200),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
JITTER = 12  # 8-bit levels that each channel of a color may be off, either way
EXTENT = (0.5, 0.8)  # the longer side of the shape's bounding box, as a share of the image's side
MARGIN = 1 / 32  # least distance between shape and border, as a share of the image's side
ANGLE = 12  # degrees that a shape may be turned, either way
SUPERSAMPLE = 4  # drawn at this multiple of the size and averaged down
GRAMMAR_CAPTIONS = 8  # of an image, where the grammar makes them
Wordings = Annotated[int, Interval(ge=1, le=len(WORDINGS))] | Literal["grammar"]


class Attributes(NamedTuple):
    """What an image shows: three names, and where the shape lies.

    Attributes:
        color: of the shape, a key of COLORS.
        shape: one of SHAPES.
        background: another key of COLORS.
        extent: longer side of the shape's bounding box, as a share of the image's side.
        x, y: middle of the bounding box, from the left and from the top, as shares of the image's side.
        angle: degrees, clockwise.
    """

    color: str
    shape: str
    background: str
    extent: float
    x: float
    y: float
    angle: float


# ------------------------------------------------------------------------------------------------------- drawing


def draw(seed: int | str | random.Random, size: int = 64, variety: float = 1.0) -> tuple[Image.Image, Attributes]:
    """Draw one image, `size` pixels square, RGB, and say what it shows; the same seed draws the same pixels.

    Args:
        seed: a seed, or a generator to draw the next numbers from.
        size: pixels, at least 16.
        variety: how far size, place, angle and shade may be off their middle, from 0 (all images of a kind alike) to 1.
    """
    rng = seed if isinstance(seed, random.Random) else random.Random(seed)
    # Everything comes from rng.random(), the one method whose numbers Python promises to keep.
    color = _choose(rng, tuple(COLORS))
    background = _choose(rng, tuple(name for name in COLORS if name != color))
    shape = _choose(rng, SHAPES)
    angle = _about(rng, 0, variety * ANGLE)
    extent = _about(rng, sum(EXTENT) / 2, variety * (EXTENT[1] - EXTENT[0]) / 2)
    width, height = (extent * side for side in _bounding_box(shape, angle))
    x = _about(rng, 0.5, variety * (0.5 - MARGIN - width / 2))
    y = _about(rng, 0.5, variety * (0.5 - MARGIN - height / 2))
    attributes = Attributes(color, shape, background, extent, x, y, angle)
    shades = [_jittered(rng, COLORS[name], variety * JITTER) for name in (color, background)]
    return render(attributes, size, *shades), attributes


def render(
    attributes: Attributes,
    size: int = 64,
    color: tuple[int, int, int] | None = None,
    background: tuple[int, int, int] | None = None,
) -> Image.Image:
    """Draw what the attributes say, `size` pixels square, in their palette colors or in the RGB shades given."""
    large = size * SUPERSAMPLE
    foreground = color or COLORS[attributes.color]
    behind = background or COLORS[attributes.background]
    image = Image.new("RGB", (large, large), behind)
    pen = ImageDraw.Draw(image)
    left, top = _offset(attributes.shape, attributes.angle)
    scale = attributes.extent * large
    for ring, fill in zip(_outlines(attributes.shape, attributes.angle), (foreground, behind)):
        pen.polygon(
            [
                (attributes.x * large + (px - left) * scale, attributes.y * large + (py - top) * scale)
                for px, py in ring
            ],
            fill=fill,
        )
    return image.reduce(SUPERSAMPLE)


def _outlines(shape: str, angle: float) -> list[list[tuple[float, float]]]:
    """Return the outer outline and, for a ring, the inner one, turned, with a bounding box whose longer side is 1."""
    turned = [_turned(outline, angle) for outline in _UNIT_OUTLINES[shape]]
    longer = max(max(axis) - min(axis) for axis in zip(*turned[0]))
    return [[(x / longer, y / longer) for x, y in outline] for outline in turned]


def _bounding_box(shape: str, angle: float) -> tuple[float, float]:
    """Return width and height of the shape whose longer side is 1."""
    return tuple(max(axis) - min(axis) for axis in zip(*_outlines(shape, angle)[0]))


def _offset(shape: str, angle: float) -> tuple[float, float]:
    """Return the middle of that bounding box, in the outline's own coordinates."""
    return tuple((max(axis) + min(axis)) / 2 for axis in zip(*_outlines(shape, angle)[0]))


def _turned(outline: list[tuple[float, float]], degrees: float) -> list[tuple[float, float]]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in outline]


def _around(radii: tuple[float, ...], corners: int) -> list[tuple[float, float]]:
    """Return `corners` points around the origin, the first one on top, their distances taken from `radii` in turn."""
    angles = [2 * math.pi * corner / corners for corner in range(corners)]
    return [(radii[i % len(radii)] * math.sin(a), -radii[i % len(radii)] * math.cos(a)) for i, a in enumerate(angles)]


_ARM = 1 / 3  # half the width of a cross's arm, where the cross reaches from -1 to 1
_UNIT_OUTLINES = {
    "circle": [_around((1,), 72)],
    "square": [[(-1, -1), (1, -1), (1, 1), (-1, 1)]],
    "triangle": [_around((1,), 3)],
    "star": [_around((1, 0.42), 10)],
    "cross": [
        [
            *((-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)),
            *((_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)),
        ]
    ],
    "ring": [_around((1,), 72), _around((0.5,), 72)],
}


def _choose(rng: random.Random, choices: tuple) -> str:
    return choices[int(rng.random() * len(choices))]


def _about(rng: random.Random, middle: float, off: float) -> float:
    return middle + off * (2 * rng.random() - 1)


def _jittered(rng: random.Random, color: tuple[int, int, int], jitter: float) -> tuple[int, int, int]:
    return tuple(min(max(round(_about(rng, level, jitter)), 0), 255) for level in color)


# ------------------------------------------------------------------------------------------------------ captions


def random_caption(attributes: Attributes, rng: random.Random, wordings: int | None = None) -> str:
    """Return a caption in one of the first so many WORDINGS (None: of all), chosen by `rng`."""
    return caption(attributes, _choose(rng, WORDINGS[:wordings]))


def random_captions(attributes: Attributes, rng: random.Random, wordings: Wordings | None) -> list[str]:
    """Return the captions of an image: one as above, or several that the grammar derives."""
    if wordings == "grammar":
        return [caption(attributes, derived(rng)) for _ in range(GRAMMAR_CAPTIONS)]
    return [random_caption(attributes, rng, wordings)]


def caption(attributes: Attributes, wording: str) -> str:
    """Return the caption in a wording, such as one of WORDINGS (`ldm_lab.data.shape_wordings`)."""
    return wording.format(color=attributes.color, shape=attributes.shape, background=attributes.background)


# -------------------------------------------------------------------------------------------------------- shards

MANIFEST = "shapes.json"  # what a folder of shards was made with; it appears together with them


@register("data", "shapes")
class Shapes(ShardSource):
    """The built-in captioned shapes: drawn and written as shards at first use, then read like any others.

    Args:
        folder: where the shards lie; made at first use.
        count: images.
        image_size: side of the images, pixels; on fewer than 16 the shapes cannot be told apart.
        shards: tar files that they are spread over; at least as many as loader processes of all devices.
        drawing_seed: another number, other images.
        variety: how much images of a kind differ in size, place, angle and shade, from 0 (not at all) to 1.
        wordings: how many different sentences captions are made with, the plainest first; null is all 20, grammar
            is eight of an endless number for each image, of which every epoch takes one.
    """

    def __init__(
        self,
        *,
        folder: str,
        count: PositiveInt,
        image_size: Annotated[int, Ge(16)],
        shards: PositiveInt = 16,
        drawing_seed: int = 0,
        variety: Share = 1.0,
        wordings: Wordings | None = None,
        **common: Any,
    ):
        super().__init__(image_size=image_size, **common)
        self.folder, self.images, self.shards = Path(folder).expanduser(), count, shards
        self.drawing_seed, self.variety, self.wordings = drawing_seed, variety, wordings

    @staticmethod
    def check(*, count: int, shards: int) -> list[str]:
        """Return what is wrong across the options."""
        if count < shards:
            return [f"count: {count} images do not fill {shards} shards; at least one in each is needed"]
        return []

    def prepare(self) -> None:
        self.list_shards()

    def files(self) -> list[tuple[str, Path | None]]:
        return []  # the options tell every pixel

    def list_shards(self) -> list[str]:
        made_with = (self.image_size, self.drawing_seed, self.variety, self.wordings)
        return [str(path) for path in write_shards(self.folder, self.images, self.shards, *made_with)]


class MadeWith(NamedTuple):
    """What a folder of shards is made with, see `write_shards`."""

    count: int
    shards: int
    size: int
    seed: int
    variety: float
    wordings: Wordings | None


def write_shards(
    folder: str | Path,
    count: int,
    shards: int,
    size: int,
    seed: int = 0,
    variety: float = 1.0,
    wordings: Wordings | None = None,
) -> list[Path]:
    """Return the shards in `folder`, drawing and writing them first if the folder is not there yet.

    The layout is img2dataset's: `00000.tar` ... with `000000000.png`, `.txt`, `.json` ... The whole folder appears at
    once, by a rename, so that it is never seen half-written, and of several processes that begin together one wins.

    Args:
        folder: its parent has to be writable.
        count: images in all.
        shards: tar files.
        size: pixels per side.
        seed: another number, other images.
        variety: of the images of a kind, see `draw`.
        wordings: of the captions, see `random_captions`.

    Raises:
        UserError: the folder holds something else, or shapes made with other numbers.
    """
    folder = Path(folder)
    made_with = MadeWith(count, shards, size, seed, variety, wordings)
    if not _is_filled(folder):
        with new_folder(folder) as drafts:
            for shard in range(shards):
                first, last = (count * edge // shards for edge in (shard, shard + 1))
                drawn = _samples(range(first, last), shard, size, seed, variety, wordings)
                write_shard(drafts / f"{shard:05}.tar", drawn)
            (drafts / MANIFEST).write_text(json.dumps(made_with._asdict(), indent=2) + "\n")
    _check_manifest(folder, made_with)
    return [folder / f"{shard:05}.tar" for shard in range(shards)]


def _is_filled(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _check_manifest(folder: Path, made_with: MadeWith) -> None:
    """Raise UserError unless the folder's shapes were made with the wanted numbers."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        raise UserError(
            f"data.folder: {folder} holds other files than shapes; give a folder that does not exist"
        ) from None
    found = found if isinstance(found, dict) else {}
    wanted = made_with._asdict()
    keys = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    if keys:
        differences = ", ".join(f"{key} {found.get(key)}, not {wanted.get(key)}" for key in keys)
        raise UserError(f"data.folder: the shapes in {folder} have {differences}; delete it or give another folder")


def _samples(
    indices: range, shard: int, size: int, seed: int, variety: float, wordings: Wordings | None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield (key, {extension: bytes}) of the images with these indices; an image depends on seed and index alone."""
    for place, index in enumerate(indices):
        rng = random.Random(f"{seed}/{index}")
        image, attributes = draw(rng, size, variety)
        texts = random_captions(attributes, rng, wordings)
        encoded = io.BytesIO()
        image.save(encoded, "PNG")
        key = f"{shard:05}{place:04}"
        about = {
            "key": key,
            "caption": texts[0],
            "status": "success",
            "width": size,
            "height": size,
            **attributes._asdict(),
        }
        yield key, {"png": encoded.getvalue(), "txt": "\n".join(texts).encode(), "json": json.dumps(about).encode()}
