"""TIFF images that Pillow does not know: samples of 9 to 64 bits in any byte order, grey or RGB, with or without alpha.

The strips or tiles are laid into a plain TIFF of bytes, which Pillow (libtiff) unpacks; samples are made of the bytes
here. Tags and predictors: Adobe, TIFF Revision 6.0 (1992) and TIFF Technical Note 3 (floating-point predictor, 2005).
"""

import io
import struct
from dataclasses import dataclass, replace

import numpy as np
from einops import rearrange
from PIL import Image, TiffImagePlugin

from ldm_lab.io.color import WHITE_IS_ZERO, BadImage, to_levels

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
STRIP_OFFSETS, SAMPLES, STRIP_ROWS, STRIP_BYTES, PLANAR, PREDICTOR = 273, 277, 278, 279, 284, 317
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES, EXTRA_SAMPLES, SAMPLE_FORMAT = 322, 323, 324, 325, 338, 339
ORIENTATION, MAXIMUM, ICC_PROFILE = 274, 281, 34675
SUBFILE, SUB_DIRECTORIES = 254, 330
REDUCED, MASK = 1, 4  # bits of a directory's kind: a thumbnail, a transparency mask
BYTEWISE = (1, 5, 8, 32773, 32946, 34925, 50000)  # none, LZW, Deflate, PackBits, Deflate, LZMA, Zstandard
SIGNED = 2
KINDS = {1: "u", 2: "i", 3: "f", 4: "u"}  # of samples, as numpy calls them
TYPES = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")
Tags = dict[int, tuple[int, ...]]
ONE = (1,)  # most tags' default
INTEGERS = {
    1: "B",
    3: "H",
    4: "I",
    6: "b",
    7: "B",
    8: "h",
    9: "i",
    13: "I",
    16: "Q",
    18: "Q",
}  # types of values -> as struct calls them
READ = {
    *(
        WIDTH,
        HEIGHT,
        BITS,
        COMPRESSION,
        PHOTOMETRIC,
        FILL_ORDER,
        STRIP_OFFSETS,
        SAMPLES,
        STRIP_ROWS,
        STRIP_BYTES,
        PLANAR,
    ),
    *(PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES, EXTRA_SAMPLES, SAMPLE_FORMAT, ORIENTATION, MAXIMUM),
    *(ICC_PROFILE, SUBFILE, SUB_DIRECTORIES),
}
MOST_TAGS = 4096
MOST_DIRECTORIES = 64
ROWS_AT_ONCE = 64  # whose bits are counted out
MOST_BYTES = 16  # per pixel, with its place in the last tile of a row
MOST_SAMPLES = 16  # per pixel
GREY_SAMPLES, COLOR_SAMPLES = 1, 3
PREMULTIPLIED, STRAIGHT = 1, 2
HORIZONTAL, FLOATING = 2, 3


@dataclass(frozen=True)
class Layout:
    """How a TIFF's samples lie in the file.

    Attributes:
        width, height: pixels.
        bits, kind: of a sample; "u", "i" or "f".
        samples: per pixel.
        order: of bytes, "<" or ">".
        planar: whether each sample has a plane of its own.
        predictor: 1 none, 2 horizontal differences, 3 those of floating-point bytes.
        tile: its width in pixels; None for strips.
    """

    width: int
    height: int
    bits: int
    kind: str
    samples: int
    order: str
    planar: bool
    predictor: int
    tile: int | None

    @property
    def row(self) -> int:
        """Pixels of a row as stored: with tiles, up to the last one's end."""
        return self.width if self.tile is None else -(-self.width // self.tile) * self.tile


class UnsupportedTiff(BadImage):
    """A TIFF of another kind."""

    def __init__(self) -> None:
        super().__init__("unsupported image mode")


def open_tiff(data: bytes, most_pixels: int, least_bits: int = 1) -> Image.Image | None:
    """Return the first image of a TIFF file: L, LA, RGB or RGBA, its orientation and color profile in `info`.

    Args:
        data: the file.
        most_pixels: more are refused.
        least_bits: of a sample; None is returned for images of fewer, unless they are signed.

    Raises:
        UnsupportedTiff: another compression, color space or type of sample.
        BadImage: "truncated image", "too many pixels", "unknown range of values".
        Exception: of a malformed file, all kinds.
    """
    tags = _directory(data, _start(data)[2])
    if max(tags.get(BITS, ONE)) < least_bits and SIGNED not in tags.get(SAMPLE_FORMAT, ONE):
        return None
    layout = _layout(tags, data)
    size = layout.row * layout.height * layout.samples * layout.bits // 8  # bytes
    if layout.width * layout.height > most_pixels or size > MOST_BYTES * most_pixels:
        raise BadImage("too many pixels")
    one_plane = replace(layout, samples=1) if layout.planar else layout
    planes = layout.samples if layout.planar else 1
    values = np.concatenate([_plane(data, tags, one_plane, plane, planes) for plane in range(planes)], -1)  # [H, W, n]
    image = _image(values, layout, tags)
    if ICC_PROFILE in tags:
        image.info["icc_profile"] = bytes(tags[ICC_PROFILE])
    image.info["orientation"] = tags.get(ORIENTATION, ONE)[0]
    image.format = "TIFF"
    return image


def full_size_first(data: bytes) -> bytes:
    """Return a TIFF file that begins with the first of its pictures that is no thumbnail; the same if none is.

    Some programs, and all raw files of cameras, put a small preview in front.
    """
    order, word, first = _start(data)
    place, size, entry = (8, 8, 20) if word == "Q" else (4, 2, 12)
    waiting, seen = [first], set[int]()
    while waiting and len(seen) < MOST_DIRECTORIES:
        start = waiting.pop(0)
        if not start or start in seen:
            continue
        seen.add(start)
        try:
            tags = _directory(data, start)
            (count,) = struct.unpack_from(order + ("Q" if size == 8 else "H"), data, start)
        except struct.error:
            continue
        is_whole = not tags.get(SUBFILE, (0,))[0] & (REDUCED | MASK)
        if is_whole and (start == first or {WIDTH, HEIGHT} <= tags.keys()):
            its_place = struct.pack(order + word, start)
            return data if start == first else data[:place] + its_place + data[place + len(its_place) :]
        following = data[start + size + count * entry :][: struct.calcsize(f"<{word}")]
        waiting += [int.from_bytes(following, "little" if order == "<" else "big"), *tags.get(SUB_DIRECTORIES, ())]
    return data


def _start(data: bytes) -> tuple[str, str, int]:
    """Return the order of bytes, the type of a place in the file, and where the first directory is; 0 if nowhere."""
    order = "<" if data[:2] == b"II" else ">"
    word = "Q" if b"+" in data[2:4] else "I"
    try:
        (start,) = struct.unpack_from(order + word, data, 8 if word == "Q" else 4)
    except struct.error:
        start = 0
    return order, word, start


def _directory(data: bytes, start: int) -> Tags:
    """Return the tags of a directory whose values are integers, whatever is wrong with the others.

    Raises:
        struct.error: the file breaks off within the directory.
    """
    order, word, _ = _start(data)
    big = word == "Q"
    entry = 20 if big else 12
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, start)
    start += 8 if big else 2
    tags: Tags = {}
    for place in range(start, start + entry * min(count, MOST_TAGS), entry):
        tag, kind, number = struct.unpack_from(f"{order}HH{word}", data, place)
        if tag not in READ or kind not in INTEGERS:
            continue
        code, at = INTEGERS[kind], place + entry - struct.calcsize(f"<{word}")
        if number * struct.calcsize(f"<{code}") > struct.calcsize(f"<{word}"):
            (at,) = struct.unpack_from(order + word, data, at)
        if number and at + number * struct.calcsize(f"<{code}") <= len(data):
            tags[tag] = struct.unpack_from(f"{order}{number}{code}", data, at)
    return tags


def _layout(tags: Tags, data: bytes) -> Layout:
    samples, predictor = tags.get(SAMPLES, ONE)[0], tags.get(PREDICTOR, ONE)[0]
    bits, formats = set(tags.get(BITS, ONE)), set(tags.get(SAMPLE_FORMAT, ONE))
    known = (
        len(bits) == len(formats) == 1
        and 1 <= samples <= MOST_SAMPLES
        and formats <= KINDS.keys()
        and tags.get(COMPRESSION, ONE)[0] in BYTEWISE
        and tags.get(FILL_ORDER, ONE)[0] == 1
        and tags.get(PHOTOMETRIC, ONE)[0] in (WHITE_IS_ZERO, 1, 2)
        and predictor in (1, HORIZONTAL, FLOATING)
        and {WIDTH, HEIGHT} <= tags.keys()
    )
    if not known:
        raise UnsupportedTiff
    depth, kind = bits.pop(), KINDS[formats.pop()]
    packed = kind == "u" and 8 < depth < 16 and predictor == 1
    if f"{kind}{depth // 8}" not in TYPES or (depth % 8 and not packed):
        raise UnsupportedTiff
    return Layout(
        width=tags[WIDTH][0],
        height=tags[HEIGHT][0],
        bits=depth,
        kind=kind,
        samples=samples,
        order="<" if data[:2] == b"II" else ">",
        planar=tags.get(PLANAR, ONE)[0] == 2 and samples > 1,
        predictor=predictor,
        tile=tags[TILE_WIDTH][0] if TILE_OFFSETS in tags else None,
    )


def _plane(data: bytes, tags: Tags, layout: Layout, plane: int, planes: int) -> np.ndarray:
    """Return the samples of one plane of several, [H, W, n], in the machine's byte order."""
    raw = _bytes(data, tags, layout, plane, planes)  # [H, bytes of a row]
    if layout.bits % 8:
        parts = np.array_split(raw, -(-len(raw) // ROWS_AT_ONCE))  # [rows, bytes of a row] each
        return np.concatenate([_unpacked(part, layout) for part in parts])[:, : layout.width]  # [H, W, n]
    size, step = layout.bits // 8, layout.tile or layout.row
    blocks = rearrange(raw, "h (t b) -> h t b", b=step * layout.samples * size)  # [H, tiles, bytes of a tile's row]
    if layout.predictor == FLOATING:  # differences of bytes, the most significant ones of all samples first
        blocks = rearrange(blocks, "h t (b n) -> h t b n", n=layout.samples)  # [H, tiles, bytes / n, n]
        blocks = np.cumsum(blocks, axis=2, dtype=np.uint8)  # [H, tiles, bytes / n, n]
        blocks = rearrange(blocks, "h t b n -> h t (b n)")  # [H, tiles, bytes]
        blocks = rearrange(blocks, "h t (s x) -> h t (x s)", s=size)  # [H, tiles, bytes]
    order = ">" if layout.predictor == FLOATING else layout.order
    values = np.ascontiguousarray(blocks).view(f"{order}{layout.kind}{size}").astype(f"{layout.kind}{size}")
    values = rearrange(values, "h t (w n) -> h t w n", n=layout.samples)  # [H, tiles, w, n]
    if layout.predictor == HORIZONTAL:
        values = np.cumsum(values, axis=2, dtype=values.dtype)  # [H, tiles, w, n]
    return rearrange(values, "h t w n -> h (t w) n")[:, : layout.width]  # [H, W, n]


def _unpacked(raw: np.ndarray, layout: Layout) -> np.ndarray:
    """Return samples of 9 to 15 bits, uint16 [H, W, n], of bytes [H, bytes of a row]."""
    bits = np.unpackbits(raw, axis=1)[:, : layout.row * layout.samples * layout.bits]  # [H, bits of a row]
    bits = rearrange(bits, "h (w n b) -> h w n b", n=layout.samples, b=layout.bits)  # [H, W, n, b]
    places = 1 << np.arange(layout.bits - 1, -1, -1, dtype=np.uint16)  # [b]
    return (bits * places).sum(-1, dtype=np.uint16)  # [H, W, n]


def _bytes(data: bytes, tags: Tags, layout: Layout, plane: int, planes: int) -> np.ndarray:
    """Return a plane's unpacked bytes, uint8 [H, bytes of a row]."""
    tiled = layout.tile is not None
    offsets = tags[TILE_OFFSETS if tiled else STRIP_OFFSETS]
    lengths = tags[TILE_BYTES if tiled else STRIP_BYTES]
    share = len(offsets) // planes
    rows = max(1, min(tags.get(TILE_HEIGHT if tiled else STRIP_ROWS, (layout.height,))[0], layout.height))
    if share < -(-layout.height // rows) * (layout.row // (layout.tile or layout.row)):
        raise BadImage("truncated image")
    blocks = []
    for offset, length in list(zip(offsets, lengths, strict=True))[plane * share : (plane + 1) * share]:
        if offset + length > len(data):
            raise BadImage("truncated image")
        blocks.append(data[offset : offset + length])
    per_pixel = layout.samples * layout.bits  # bits
    starts = 8 + np.cumsum([0, *map(len, blocks)])[:-1]  # [blocks]
    plain = {
        WIDTH: [-(-layout.row * per_pixel // 8)],
        HEIGHT: [layout.height],
        COMPRESSION: [tags.get(COMPRESSION, ONE)[0]],
    }
    plain |= {BITS: [8], PHOTOMETRIC: [1], SAMPLES: [1]}
    if layout.tile is not None:
        plain |= {TILE_WIDTH: [layout.tile * per_pixel // 8], TILE_HEIGHT: [tags[TILE_HEIGHT][0]]}
    else:
        plain[STRIP_ROWS] = [rows]
    plain[TILE_OFFSETS if tiled else STRIP_OFFSETS] = starts.tolist()
    plain[TILE_BYTES if tiled else STRIP_BYTES] = [len(block) for block in blocks]
    return np.asarray(TiffImagePlugin.TiffImageFile(io.BytesIO(_file(b"".join(blocks), plain))))  # [H, bytes of a row]


def _file(pixels: bytes, tags: dict[int, list[int]]) -> bytes:
    """Return a TIFF file: header, pixels, the directory of the tags, and those of their values that have no room there.

    All values are 32-bit integers in little-endian order; those of block offsets count from the file's beginning.
    """
    pixels += b"\0" * (len(pixels) % 2)
    directory = 8 + len(pixels)
    entries, values, after = b"", b"", directory + 2 + 12 * len(tags) + 4
    for tag, numbers in sorted(tags.items()):
        content = struct.pack(f"<{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            content, values = struct.pack("<I", after + len(values)), values + content
        entries += struct.pack("<HHI", tag, 4, len(numbers)) + content
    return b"".join(
        (struct.pack("<2sHI", b"II", 42, directory), pixels, struct.pack("<H", len(tags)), entries, bytes(4), values)
    )


def _image(values: np.ndarray, layout: Layout, tags: Tags) -> Image.Image:
    """Return the image of samples [H, W, n]: L, LA, RGB or RGBA; samples without a meaning are left out."""
    colors = COLOR_SAMPLES if tags.get(PHOTOMETRIC, ONE)[0] == 2 else GREY_SAMPLES
    extra = tags.get(EXTRA_SAMPLES, ())[:1]
    if layout.samples < colors:
        raise UnsupportedTiff
    has_alpha = layout.samples > colors and extra and extra[0] in (PREMULTIPLIED, STRAIGHT)
    levels = to_levels(values[..., : colors + bool(has_alpha)], _used_bits(layout, tags))  # [H, W, n]
    if tags.get(PHOTOMETRIC, ONE)[0] == WHITE_IS_ZERO:
        levels[..., :colors] = 255 - levels[..., :colors]  # [H, W, colors]
    if not has_alpha:
        return Image.fromarray(levels if colors > 1 else levels[..., 0])
    if extra[0] == PREMULTIPLIED:
        color, alpha = levels[..., :colors].astype(int), np.maximum(levels[..., colors:], 1).astype(int)
        levels[..., :colors] = ((color * 255 + alpha // 2) // alpha).clip(0, 255)  # [H, W, colors]
    return Image.fromarray(levels)


def _used_bits(layout: Layout, tags: Tags) -> int:
    """Return how many bits the values have: those stored, or fewer if the largest value of fewer is stated."""
    stated = max(tags.get(MAXIMUM, (0,)))
    if layout.kind == "u" and layout.bits == 16 and stated + 1 in (2**10, 2**12, 2**14):
        return stated.bit_length()
    return layout.bits
