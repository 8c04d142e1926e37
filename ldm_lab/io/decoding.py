"""The one way from the bytes of any image file to a picture: upright, 8 bits a channel, in sRGB."""

import contextlib
import io
import struct
import sys
import warnings
from importlib import import_module

from PIL import Image, UnidentifiedImageError

from ldm_lab.errors import install
from ldm_lab.io.color import SIGNIFICANT_BITS, BadImage, to_srgb
from ldm_lab.io.metadata import JXL_STARTS, PNG, jxl_size, orientation_of, png_chunk, upright, without_metadata
from ldm_lab.io.profiles import stated_profile
from ldm_lab.io.tiff import MAGIC as TIFF
from ldm_lab.io.tiff import UnsupportedTiff, full_size_first, open_tiff

# How image files' names end, in lower case: those that folders, lists and shards look for. Among the files of one
# sample of a shard, the first of these is its image.
IMAGE_ENDINGS = (
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "avif", "jpe", "jfif", "apng", "dib"),
    *("pbm", "pnm", "mpo", "jp2", "j2k", "jpx", "tga", "qoi", "heic", "heif", "hif", "jxl"),
)
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
DEEP = 9  # bits of a sample
EMPTY_ALPHA = ("TGA", "BMP", "DIB", "DDS")  # formats of which a fourth channel is often nothing but zeros
CODE_STREAM = b"\xff\x4f\xff\x51"  # the beginning of a JPEG 2000 picture


def decode_image(data: bytes, min_size: int = 1, max_pixels: int | None = None) -> Image.Image:
    """Return the decoded image, upright as its EXIF orientation says, 8 bits a channel, in sRGB.

    Of several frames it is the first, of a TIFF file the first that is no thumbnail.
    8-bit images without a color profile keep their mode and every value. Metadata that cannot be read are no reason to
    refuse a picture.

    Args:
        data: an encoded image of any format that Pillow reads; HEIC and JPEG XL by the extra `images`.
        min_size: least length of the short side, pixels.
        max_pixels: most pixels, told from the header.

    Raises:
        BadImage: what is wrong with it. "too many pixels" is also said beyond Pillow's limit, 179 million.
    """
    if data.startswith(TIFF):
        data = full_size_first(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow's: odd metadata beside a good picture
            return _decode(data, {}, min_size, max_pixels)
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage("too many pixels") from error
    except Exception as error:  # on malformed bytes the decoders raise nearly anything, such as struct.error
        image = _second_try(data, error, min_size, max_pixels)
        if image is not None:
            return image
        truncated = isinstance(error, EOFError) or "truncated" in str(error).lower()
        raise BadImage("truncated image" if truncated else "undecodable image") from error


def _decode(data: bytes, info: dict[str, bytes], min_size: int, max_pixels: int | None) -> Image.Image:
    """Return the decoded image; `info` is laid over Pillow's own."""
    if data.startswith(TIFF):
        with contextlib.suppress(UnsupportedTiff, struct.error):
            image = _deep_tiff(data, min_size, max_pixels, DEEP)
            if image is not None:
                return image
    is_jxl = data.startswith(JXL_STARTS)
    _need_plugin(data, is_jxl)
    if is_jxl:  # its plugin decodes at once
        check_pixels(jxl_size(data), min_size, max_pixels)
    image = Image.open(io.BytesIO(data))
    check_pixels(image.size, min_size, max_pixels)
    image.load()
    image.info.update(info)
    _mend_png(image, data)
    _check_jpeg2000(image, data)
    if image.format in EMPTY_ALPHA and image.mode == "RGBA" and not image.getchannel("A").getbbox():
        image = _without_alpha(image)
    stated = None if image.info.get("icc_profile") else stated_profile(image, png_chunk(data, b"cICP"))
    if stated is not None:
        image.info["icc_profile"] = stated
    # JPEG XL's decoder has turned the image already, unless it holds a whole JPEG.
    orientation = 1 if is_jxl and not image.jpeg else orientation_of(image)
    return _finish(image, orientation)


def check_pixels(size: tuple[int, int], min_size: int, max_pixels: int | None) -> None:
    """Raise BadImage if a width and height are below or above the limits, Pillow's included."""
    pixels = size[0] * size[1]
    if min(size) < min_size:
        raise BadImage("too small")
    if pixels > _most_pixels() or (max_pixels is not None and pixels > max_pixels):
        raise BadImage("too many pixels")


def _most_pixels() -> int:
    return 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else sys.maxsize


def _finish(image: Image.Image, orientation: int) -> Image.Image:
    result = to_srgb(image)
    result.format = image.format
    result = upright(result, orientation)
    for done in ("icc_profile", "exif"):  # so that nobody applies them again
        result.info.pop(done, None)
    return result


def _second_try(data: bytes, error: Exception, min_size: int, max_pixels: int | None) -> Image.Image | None:
    """Return the image that Pillow has failed at by an error, without what it may have failed for; None if it fails
    again.

    Raises:
        BadImage: its size, or a kind of TIFF that is not supported.
    """
    try:
        if data.startswith(TIFF):
            return _deep_tiff(data, min_size, max_pixels)
        plain = without_metadata(data)
        return plain and _decode(plain.data, plain.info, min_size, max_pixels)
    except BadImage as problem:
        if isinstance(error, UnidentifiedImageError) or str(problem).startswith("too "):
            raise
    except Image.DecompressionBombError as problem:
        raise BadImage("too many pixels") from problem
    except Exception:  # the first error is the one to be told
        pass
    return None


def _deep_tiff(data: bytes, min_size: int, max_pixels: int | None, least_bits: int = 1) -> Image.Image | None:
    """Return the image of a TIFF of so many bits a sample at least; None if it has fewer.

    Pillow takes some of more than 8 bits for what they are not, such as compressed big-endian ones.
    """
    image = open_tiff(data, min(_most_pixels(), max_pixels or sys.maxsize), least_bits)
    if image is None:
        return None
    check_pixels(image.size, min_size, max_pixels)
    return _finish(image, image.info["orientation"])


def _need_plugin(data: bytes, is_jxl: bool) -> None:
    """Teach Pillow the format of some bytes, if that takes a package of the extra `images`.

    Raises:
        BadImage: it is not installed.
    """
    brands = data[8:12], *(data[i : i + 4] for i in range(16, min(int.from_bytes(data[:4], "big"), 64), 4))
    heif = data[4:8] == b"ftyp" and any(brand in HEIF_BRANDS for brand in brands) and b"avif" not in brands
    try:
        if heif:
            import pillow_heif

            pillow_heif.register_heif_opener()
        elif is_jxl:
            import_module("pillow_jxl")  # registers itself
    except ImportError:
        raise BadImage(f"{'HEIC' if heif else 'JPEG XL'} image, which takes {install('images')}") from None


def _without_alpha(image: Image.Image) -> Image.Image:
    """Return an RGBA image as RGB, what is transparent as opaque as the rest."""
    plain = image.convert("RGB")
    plain.format = image.format
    return plain


def _check_jpeg2000(image: Image.Image, data: bytes) -> None:
    """Raise BadImage for a JPEG 2000 picture in which white may have become black.

    Pillow rounds samples of more than 8 bits in several channels beyond 255, which is 0 again.
    """
    start = data.find(CODE_STREAM)
    if image.format != "JPEG2000" or image.mode.startswith("I") or start < 0 or len(data) < start + 43:
        return
    if data[start + 42] % 128 >= 8 and any(0 in channel.getextrema() for channel in image.split()):
        raise BadImage("JPEG 2000 image of more than 8 bits in color, which Pillow reads wrongly (TIFF or PNG will do)")


def _mend_png(image: Image.Image, data: bytes) -> None:
    """Put right what Pillow says of a PNG's grey levels.

    A transparent level stands in the file's own bits; those that matter may be fewer than the stored ones.
    """
    if not data.startswith(PNG) or len(data) < 26:
        return
    depth, grey, transparent = data[24], data[25] == 0, image.info.get("transparency")
    if grey and isinstance(transparent, int) and depth in (2, 4):
        image.info["transparency"] = transparent * 255 // (2**depth - 1)
    elif depth == 16 and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    significant = png_chunk(data, b"sBIT")
    if image.mode == "I;16" and significant:
        image.info[SIGNIFICANT_BITS] = significant[0]
