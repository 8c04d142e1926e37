"""Odd image files, made by hand, with the colors that they stand for: nothing here uses what it is to check."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

WHITE, D50 = np.array([0.3127, 0.329]), np.array([0.9642, 1.0, 0.8249])
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
SPACES = {  # primaries r, g, b; white; gamma
    "adobe": (((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)), (0.3127, 0.329), 563 / 256),
    "p3": (((0.68, 0.32), (0.265, 0.69), (0.15, 0.06)), (0.3127, 0.329), 2.4),
    "prophoto": (((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001)), (0.3457, 0.3585), 1.8),
    "linear": (((0.64, 0.33), (0.3, 0.6), (0.15, 0.06)), (0.3127, 0.329), 1.0),
    "swapped": (((0.3, 0.6), (0.64, 0.33), (0.15, 0.06)), (0.3127, 0.329), 2.2),  # red is green: nobody can miss it
}


def stored(image: Image.Image, kind: str = "png", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


# ------------------------------------------------------------------------------------------------------------- colors


def to_xyz(space: str) -> np.ndarray:
    """Return the matrix from a space's light to XYZ under D50, [3, 3]."""
    primaries, white, _ = SPACES[space]
    points = np.array([white, *primaries])
    xyz = np.stack([points[:, 0], points[:, 1], 1 - points.sum(1)]) / points[:, 1]  # [3, 4]
    matrix = xyz[:, 1:] * np.linalg.solve(xyz[:, 1:], xyz[:, 0])  # [3, 3]
    scale = np.diag((BRADFORD @ D50) / (BRADFORD @ xyz[:, 0]))
    return np.linalg.inv(BRADFORD) @ scale @ BRADFORD @ matrix


def srgb_of(levels: np.ndarray, space: str) -> np.ndarray:
    """Return the sRGB levels of 8-bit levels [..., 3] of another space, clipped to what sRGB has."""
    light = (levels / 255.0) ** SPACES[space][2] @ to_xyz(space).T @ np.linalg.inv(to_xyz("linear")).T
    return curve(light)


def curve(light: np.ndarray) -> np.ndarray:
    """Return sRGB's 8-bit levels of light."""
    light = light.clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def profile(space: str) -> bytes:
    """Return an ICC profile of a matrix and a gamma."""
    gamma = struct.pack(">4sIIH2x", b"curv", 0, 1, round(SPACES[space][2] * 256))
    columns = [struct.pack(">4sI3i", b"XYZ ", 0, *np.round(c * 65536).astype(int)) for c in to_xyz(space).T]
    names = (b"rXYZ", b"gXYZ", b"bXYZ", b"rTRC", b"gTRC", b"bTRC")
    return icc(b"mntr", b"RGB ", b"XYZ ", dict(zip(names, [*columns, gamma, gamma, gamma])))


def grey_profile(gamma: float) -> bytes:
    return icc(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": struct.pack(">4sIIH2x", b"curv", 0, 1, round(gamma * 256))})


def cmyk_profile(swap: bool = False) -> bytes:
    """Return a profile of four inks, as a table of 2 x 2 x 2 x 2 colors in Lab; `swap` prints red where cyan is."""
    table = b""
    for inks in np.ndindex(2, 2, 2, 2):
        c, m, y, k = inks
        if swap:
            c, m = m, c
        rgb = np.array([1 - c, 1 - m, 1 - y]) * (1 - k)
        table += lab16(rgb @ to_xyz("linear").T)
    ramp = struct.pack(">2H", 0, 65535)
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    lut = b"mft2" + bytes(4) + bytes([4, 3, 2, 0]) + identity + struct.pack(">2H", 2, 2) + ramp * 4 + table + ramp * 3
    return icc(b"prtr", b"CMYK", b"Lab ", {b"A2B0": lut})


def lab16(xyz: np.ndarray) -> bytes:
    ratio = xyz / D50
    f = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    lab = (116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2]))
    coded = (lab[0] * 652.8, (lab[1] + 128) * 256, (lab[2] + 128) * 256)
    return struct.pack(">3H", *(int(np.clip(round(v), 0, 65535)) for v in coded))


def icc(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    text = b"a test\0"
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78),
        b"cprt": b"text" + bytes(4) + text,
        b"wtpt": struct.pack(">4sI3i", b"XYZ ", 0, *np.round(D50 * 65536).astype(int)),
        **tags,
    }
    start, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">2I", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(">4s4B4s4s4s6H4s", b"", 2, 0x40, 0, 0, kind, space, connection, 2020, 1, 1, 0, 0, 0, b"acsp")
    head += bytes(28) + struct.pack(">3i", *np.round(D50 * 65536).astype(int)) + bytes(48)
    return struct.pack(">I", 4 + len(head) + len(table) + len(body)) + head + table + body


# ---------------------------------------------------------------------------------------------------------------- PNG


def png_chunk(kind: bytes, content: bytes, check: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + content) if check is None else check
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def with_chunks(data: bytes, *chunks: bytes) -> bytes:
    """Return a PNG with more chunks right behind its header."""
    return data[:33] + b"".join(chunks) + data[33:]


def png16(values: np.ndarray, *chunks: bytes) -> bytes:
    """Return a PNG of uint16 [H, W] or [H, W, n]: 1 grey, 2 with alpha, 3 RGB, 4 with alpha."""
    values = values if values.ndim == 3 else values[..., None]
    height, width, samples = values.shape
    head = struct.pack(">2I5B", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[samples], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = (png_chunk(b"IHDR", head), *chunks, png_chunk(b"IDAT", zlib.compress(rows)), png_chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# --------------------------------------------------------------------------------------------------------------- TIFF


def tiff(
    values: np.ndarray,
    order: str = "<",
    bits: int | None = None,
    photometric: int | None = None,
    deflate: bool = False,
    predictor: int = 1,
    planar: bool = False,
    tile: int | None = None,
    rows: int | None = None,
    big: bool = False,
    extra: dict[int, tuple[str, int] | tuple[str, tuple[int, ...]] | tuple[str, bytes]] | None = None,
) -> bytes:
    """Return a TIFF of [H, W] or [H, W, n] values of any type.

    Args:
        order: of bytes, "<" or ">".
        bits: of a packed sample, 9 to 15.
        photometric: 0 WhiteIsZero, 1 BlackIsZero, 2 RGB; by default 1, and 2 for three samples or more.
        predictor: 2 horizontal differences, 3 those of floating-point bytes.
        tile, rows: side of a tile; rows of a strip.
        extra: tag -> (type, value); type "H" (short), "I" (long), "B" (bytes).
    """
    values = values if values.ndim == 3 else values[..., None]
    height, width, samples = values.shape
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    depth = bits or 8 * values.dtype.itemsize
    blocks = []
    for plane in np.split(values, samples, -1) if planar else [values]:
        for block in cut(plane, tile, rows or height):
            packed = pack(block, order, bits, predictor)
            blocks.append(zlib.compress(packed) if deflate else packed)
    tags = {
        256: ("I", width),
        257: ("I", height),
        258: ("H", (depth,) * samples),
        259: ("H", 8 if deflate else 1),
        262: ("H", photometric if photometric is not None else 2 if samples >= 3 else 1),
        277: ("H", samples),
        284: ("H", 2 if planar else 1),
        317: ("H", predictor),
        339: ("H", (kind,) * samples),
        **({322: ("I", tile), 323: ("I", tile)} if tile else {278: ("I", rows or height)}),
        **(extra or {}),
    }
    return tiff_file(order, blocks, tags, bool(tile), big)


def cut(plane: np.ndarray, tile: int | None, rows: int) -> list[np.ndarray]:
    if tile is None:
        return [plane[top : top + rows] for top in range(0, len(plane), rows)]
    down, across = -len(plane) % tile, -plane.shape[1] % tile
    plane = np.pad(plane, ((0, down), (0, across), (0, 0)))
    places = [(y, x) for y in range(0, len(plane), tile) for x in range(0, plane.shape[1], tile)]
    return [plane[y : y + tile, x : x + tile] for y, x in places]


def pack(block: np.ndarray, order: str, bits: int | None, predictor: int) -> bytes:
    height, width, samples = block.shape
    if bits:
        flat = block.reshape(height, width * samples, 1).astype(np.uint16)
        ones = (flat >> np.arange(bits - 1, -1, -1)) & 1  # [height, width * samples, bits]
        return np.packbits(ones.reshape(height, -1).astype(np.uint8), axis=1).tobytes()
    if predictor == 2:
        block = np.diff(block, axis=1, prepend=np.zeros_like(block[:, :1]))
    if predictor == 3:
        size = block.dtype.itemsize
        planes = block.astype(block.dtype.newbyteorder(">")).view(np.uint8).reshape(height, width * samples, size)
        planes = planes.transpose(0, 2, 1).reshape(height, -1, samples)
        return np.diff(planes, axis=1, prepend=np.zeros_like(planes[:, :1])).tobytes()
    return block.astype(block.dtype.newbyteorder(order)).tobytes()


def tiff_file(order: str, blocks: list[bytes], tags: dict, tiled: bool, big: bool) -> bytes:
    word, head = ("Q", 16) if big else ("I", 8)
    starts = [head + sum(map(len, blocks[:i])) for i in range(len(blocks))]
    places, lengths = (324, 325) if tiled else (273, 279)
    tags = {places: (word, tuple(starts)), lengths: (word, tuple(map(len, blocks))), **tags}
    pixels = b"".join(blocks)
    pixels += bytes(len(pixels) % 2)
    place = head + len(pixels)
    room, entries, more = (8 if big else 4), b"", b""
    after = place + (8 if big else 2) + len(tags) * (20 if big else 12) + room
    for tag, (code, value) in sorted(tags.items()):
        items = value if isinstance(value, tuple | bytes) else (value,)
        content = value if isinstance(value, bytes) else struct.pack(f"{order}{len(items)}{code}", *items)
        number = {"B": 7, "H": 3, "I": 4, "Q": 16}[code]
        if len(content) > room:
            content, more = struct.pack(order + word, after + len(more)), more + content + bytes(len(content) % 2)
        entries += struct.pack(f"{order}HH{word}", tag, number, len(items)) + content.ljust(room, b"\0")
    count = struct.pack(order + ("Q" if big else "H"), len(tags))
    version = (43, 8, 0) if big else (42,)
    magic = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}{len(version)}H", *version)
    return magic + struct.pack(order + word, place) + pixels + count + entries + bytes(room) + more
