"""ICC profiles of color spaces that a file names or describes without embedding a profile.

A camera's JPEG in Adobe RGB says so in its EXIF data alone (DCF 2.0, "option file"). A PNG may state a gamma, its
primaries, or a code of them (PNG third edition, sections 11.3.2.1, 11.3.2.2 and 11.3.2.6; codes: ITU-T H.273).
"""

import struct
from functools import lru_cache

import numpy as np
from PIL import ExifTags, Image

# x and y of white, red, green and blue.
Chromaticities = tuple[float, float, float, float, float, float, float, float]
SRGB = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
ADOBE_RGB = (0.3127, 0.329, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
DISPLAY_P3 = (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)
REC_2020 = (0.3127, 0.329, 0.708, 0.292, 0.17, 0.797, 0.131, 0.046)
PRIMARIES = {1: SRGB, 9: REC_2020, 12: DISPLAY_P3}  # of cICP
ADOBE_GAMMA = 563 / 256
SRGB_CURVE = 0.0  # in the place of a gamma
GAMMAS = {1: SRGB_CURVE, 4: 2.2, 6: SRGB_CURVE, 8: 1.0, 13: SRGB_CURVE, 14: SRGB_CURVE, 15: SRGB_CURVE}  # of cICP
USUAL_GAMMA, NEAR = 2.2, 0.05  # a stated one within 5 % means sRGB's curve, as for libpng
D50 = np.array([0.9642, 1.0, 0.8249])  # of ICC's connection space, X, Y, Z
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
CURVE_STEPS = 4096
ADOBE_INDEX = b"R03"  # EXIF's interoperability index of Adobe RGB


def stated_profile(image: Image.Image, cicp: bytes | None = None) -> bytes | None:
    """Return the profile of the color space that an opened image states in other words; None for sRGB or none.

    Args:
        image: with Pillow's `info`.
        cicp: the four bytes of a PNG's chunk of that name.
    """
    if cicp is not None and len(cicp) == 4:
        primaries, transfer = cicp[:2]
        if primaries in PRIMARIES and transfer in GAMMAS:
            return matrix_profile(PRIMARIES[primaries], GAMMAS[transfer])
    exif = image.info.get("exif")
    if isinstance(exif, bytes) and ADOBE_INDEX in exif and _is_adobe_rgb(image):
        return matrix_profile(ADOBE_RGB, ADOBE_GAMMA)
    gamma, chromaticities = image.info.get("gamma"), image.info.get("chromaticity")
    if image.format != "PNG" or not gamma or "srgb" in image.info:
        return None
    stated = 1 / gamma
    if not 0.2 < stated < 10:
        return None
    curve = SRGB_CURVE if abs(stated / USUAL_GAMMA - 1) < NEAR else stated
    if chromaticities is not None and not _plausible(chromaticities):
        return None
    if chromaticities is None or np.abs(np.subtract(chromaticities, SRGB)).max() < 0.001:
        return None if curve == SRGB_CURVE else matrix_profile(SRGB, curve)
    return matrix_profile(tuple(chromaticities), stated)


def _is_adobe_rgb(image: Image.Image) -> bool:
    try:
        index = image.getexif().get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex)
    except Exception:  # on malformed bytes Pillow raises all kinds
        return False
    return str(index).rstrip("\0") == ADOBE_INDEX.decode()


def _plausible(chromaticities: Chromaticities) -> bool:
    """Return whether the primaries span a triangle, none of them without luminance."""
    points = np.reshape(chromaticities, (4, 2))  # [white, red, green, blue; x, y]
    (x1, y1), (x2, y2) = points[2] - points[1], points[3] - points[1]
    return bool((points[:, 1] > 0.01).all() and abs(x1 * y2 - x2 * y1) > 0.01 and points.max() < 1)


@lru_cache(maxsize=32)
def matrix_profile(chromaticities: Chromaticities, gamma: float) -> bytes:
    """Return an ICC profile (ICC.1:2001-04, three-component matrix-based display).

    Args:
        chromaticities: of white, red, green, blue.
        gamma: the exponent from levels to light; `SRGB_CURVE` is sRGB's own function.
    """
    points = np.reshape(chromaticities, (4, 2))  # [4, 2]
    xyz = np.stack([points[:, 0] / points[:, 1], np.ones(4), (1 - points.sum(1)) / points[:, 1]])  # [3, 4]
    white, primaries = xyz[:, 0], xyz[:, 1:]
    primaries = primaries * np.linalg.solve(primaries, white)  # [3, 3]: red, green and blue add up to white
    cones = (BRADFORD @ D50) / (BRADFORD @ white)  # [3]
    adapted = np.linalg.solve(BRADFORD, cones[:, None] * (BRADFORD @ primaries))  # [3, 3], white is D50
    levels = np.linspace(0, 1, CURVE_STEPS)  # [steps]
    if gamma == SRGB_CURVE:
        light = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)  # [steps]
    else:
        light = levels**gamma  # [steps]
    curve = b"curv\0\0\0\0" + struct.pack(">I", CURVE_STEPS) + (light * 65535).round().astype(">u2").tobytes()
    name = b"as the file states\0"
    description = b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78)
    tags = {b"desc": description, b"cprt": b"text\0\0\0\0none\0", b"wtpt": _xyz(D50)}
    tags |= {key: _xyz(column) for key, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), adapted.T, strict=True)}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    return _profile(tags)


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(float(value) * 65536) for value in values))


def _profile(tags: dict[bytes, bytes]) -> bytes:
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    places: dict[bytes, int] = {}  # equal contents are stored once
    for key, content in tags.items():
        if content not in places:
            places[content] = start + len(body)
            body += content + bytes(-len(content) % 4)
        table += key + struct.pack(">II", places[content], len(content))
    kind = b"\0\0\0\0" + b"\x02\x40\0\0" + b"mntrRGB XYZ "
    date = struct.pack(">6H", 2000, 1, 1, 0, 0, 0)
    header = kind + date + b"acsp" + bytes(28) + _xyz(D50)[8:] + bytes(48)
    size = 128 + len(table) + len(body)
    return struct.pack(">I", size) + header[: 128 - 4] + table + body
