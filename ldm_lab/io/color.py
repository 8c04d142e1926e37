"""Colors of decoded images: any depth to 8 bits, any color space to sRGB, transparency laid over a background."""

import io
import logging
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms
from PIL.TiffImagePlugin import TiffImageFile

log = logging.getLogger(__name__)

STANDARD_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits, with an agreed meaning
SAME = 2  # levels; a profile that moves no color further than that is taken for sRGB, and pixels stay as they are
OVERSHOOT = 0.05  # share of the white level by which resampled floating-point values may lie outside of the range
DARKEST = 16  # a floating-point picture whose brightest value is below that part of white has another range
PHOTOMETRIC, BITS, MAXIMUM, SAMPLE_FORMAT = 262, 258, 281, 339  # TIFF tags
WHITE_IS_ZERO = 0
SIGNIFICANT_BITS = "significant_bits"  # key of `Image.info`: of a PNG's 16, according to its chunk sBIT


class BadImage(Exception):
    """Bytes that cannot become an image.

    Its text is the reason by which such images are counted: "undecodable image", "truncated image", "too small",
    "too many pixels", "unsupported image mode", "unknown range of values".
    """


def to_srgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode in a mode of 8 bits a channel, its colors in sRGB.

    What has 8 bits and no color profile, or one of sRGB, is returned as it is. 16 and 12 bits, 32-bit integers and
    floating-point values become levels (`to_levels`); premultiplied alpha becomes straight; an embedded ICC profile is
    applied (perceptual intent). A profile that cannot be used is ignored, which the log says.

    Raises:
        BadImage: values of an unknown range.
    """
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    elif image.mode == "La":
        image = image.convert("LA")
    elif image.mode == "RGBa":
        image = image.convert("RGBA")
    elif image.mode == "LAB":
        return ImageCms.applyTransform(image, _lab_to_srgb())
    elif image.mode not in STANDARD_MODES:
        image = image.convert("RGB")
    return image if not profile or image.mode == "1" else _with_profile(image, profile)


def lay_over(image: Image.Image, background: str) -> Image.Image:
    """Return a standard image as RGB, laid over a background color where it is transparent."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


# -------------------------------------------------------------------------------------------------------- 8 bits


def to_levels(values: np.ndarray, bits: int | None = None) -> np.ndarray:
    """Return values of any type as 8-bit levels, uint8 of the same shape.

    Args:
        values: unsigned integers use the whole range of their `bits`, unless there are more than 16. Otherwise the
            range follows from the largest value: up to 255, 65535 (of signed 16 bits 32767), or that of the type. Of
            floating-point values those up to 1 are shares, larger ones levels, up to 255 or 65535.
        bits: of unsigned integers in a larger type.

    Raises:
        BadImage: values that fit into no such range, as of a scene in linear light, or that are not finite.
    """
    if values.dtype.kind == "f":
        return _float_levels(values)
    if values.size and values.min() < 0:
        raise BadImage("unknown range of values")
    size = bits or 8 * values.dtype.itemsize
    if values.dtype.kind == "u" and size <= 16:
        white = 2**size - 1
    else:
        top = int(values.max(initial=0))
        full = 2 ** (size - (values.dtype.kind == "i")) - 1
        white = next(white for white in (min(255, full), min(65535, full), full) if top <= white)
    if white == 255:
        return values.astype(np.uint8)
    if white < 2**32:
        values = np.minimum(values, white).astype(np.uint64)
        return ((values * 255 + white // 2) // white).astype(np.uint8)
    return (values.astype(np.float64) * (255 / white)).round().astype(np.uint8)


def _float_levels(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise BadImage("unknown range of values")
    top, bottom = float(values.max(initial=0)), float(values.min(initial=0))
    whites = (1, 255, 65535)
    white = next((white for white in whites if top <= white * (1 + OVERSHOOT)), None)
    if white is None or bottom < -OVERSHOOT * white or (white > 1 and top < white / DARKEST):
        raise BadImage("unknown range of values")
    if white > 1 and np.median(values[values > 0]) <= 1:  # light, with lamps in it
        raise BadImage("unknown range of values")
    return (values.astype(np.float64) * (255 / white)).round().clip(0, 255).astype(np.uint8)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return a grey image of 16 or 32 bits or of floating-point values as mode L, or LA if a value is transparent."""
    values, bits, inverted = np.asarray(image), None, False  # [H, W]
    if isinstance(image, TiffImageFile):
        # Pillow inverts those of 8 bits at most, and reads unsigned 32 bits as signed ones.
        inverted = image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO
        sample_format = image.tag_v2.get(SAMPLE_FORMAT, (1,))[0]
        depth = image.tag_v2.get(BITS, (1,))[0]
        if image.mode == "I" and depth == 32 and sample_format == 1:
            values = values.view(np.uint32)  # [H, W]
        elif image.mode == "I" and depth == 16:
            values = values.astype(np.int16)  # [H, W]
        bits = _used_bits(depth, image.tag_v2.get(MAXIMUM)) if image.mode.startswith("I;16") else None
    elif image.mode == "I" and image.format == "PPM":  # Pillow has scaled them to 16 bits
        values = values.astype(np.uint16)  # [H, W]
    significant = image.info.get(SIGNIFICANT_BITS, 16)
    if 8 < significant < 16 and values.max() < 2**significant:  # else they have been scaled, as they should be
        bits = significant
    levels = to_levels(values, bits)  # [H, W]
    result = Image.fromarray(255 - levels if inverted else levels)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        result.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return result


def _used_bits(depth: int, maximum: tuple[int, ...] | int | None) -> int:
    """Return how many bits a TIFF's values have: those stored, or fewer if it states the largest value of fewer."""
    stated = maximum[0] if isinstance(maximum, tuple) else maximum
    if isinstance(stated, int) and stated + 1 in (2**10, 2**12, 2**14):
        return stated.bit_length()
    return depth if 8 < depth < 16 else 16


# --------------------------------------------------------------------------------------------------- color profiles


def _with_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """Return a standard image with its profile applied: as it is if that is sRGB or of no use; L, LA, RGB or RGBA."""
    mode = {"L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    try:
        transform, space = _transform(profile, mode)
    except Exception as error:  # on malformed bytes lcms and its wrapper raise all kinds
        _say_once(f"a color profile that cannot be used is ignored: {error}")
        return image
    if transform is None:
        return image
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    mode = "RGB" if space == "RGB" else mode
    if mode == "L":  # a table of all levels, exact; transforms of whole images are not in the dark
        table = np.asarray(ImageCms.applyTransform(_probe("L"), transform))[..., 1].reshape(256)  # [256]
        converted = image.convert("L").point(table.tolist())
    else:
        opaque = image.convert("RGBA").convert("RGB") if alpha is not None else image.convert(mode)
        converted = ImageCms.applyTransform(opaque, transform)
    if alpha is not None:
        converted.putalpha(alpha)
        converted.info.pop("transparency", None)
    converted.format = image.format
    return converted


def is_srgb(profile: bytes, mode: str) -> bool:
    """Return whether a profile changes nothing to speak of in images of a mode (L, RGB); False if it is of no use."""
    try:
        return _transform(profile, mode)[0] is None
    except Exception:  # on malformed bytes lcms and its wrapper raise all kinds
        return False


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """Return what brings images of a mode (L, RGB, CMYK) from a profile to sRGB, and the profile's color space.

    The transform is None if it changes nothing to speak of, by perceptual or by colorimetric intent.

    Raises:
        ValueError: a profile of another color space.
        Exception: whatever else is wrong with it.
    """
    given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = given.profile.xcolor_space.strip()
    if space != {"L": "GRAY"}.get(mode, mode) and not (mode == "L" and space == "RGB"):
        raise ValueError(f"it is one of {space} colors, the image is {mode}")
    source = {"GRAY": "L"}.get(space, space)
    srgb = ImageCms.createProfile("sRGB")
    intents = (ImageCms.Intent.PERCEPTUAL, ImageCms.Intent.RELATIVE_COLORIMETRIC)
    flags = ImageCms.Flags.NOOPTIMIZE if source == "L" else ImageCms.Flags.NONE
    transforms = [ImageCms.buildTransform(given, srgb, source, "RGB", intent, flags) for intent in intents]
    if source != "CMYK":
        probe = _probe(source)
        for transform in transforms:
            moved = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int)  # [n, n, 3]
            if np.abs(moved - np.asarray(probe.convert("RGB"))).max() <= SAME:
                return None, space
    return transforms[0], space


def _probe(mode: str) -> Image.Image:
    """Return an image of all greys, or of 16 x 16 x 16 colors."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    steps = np.arange(0, 256, 17, dtype=np.uint8)  # [16]
    colors = np.stack(np.meshgrid(steps, steps, steps), -1)  # [16, 16, 16, 3]
    return Image.fromarray(colors.reshape(64, 64, 3))


@lru_cache(maxsize=1)
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")


@lru_cache(maxsize=64)
def _say_once(message: str) -> None:
    log.warning("%s", message)
