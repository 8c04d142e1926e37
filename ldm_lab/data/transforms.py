"""From encoded bytes to a square RGB image: every mode that Pillow reads, the orientation, the resize, the crop."""

import io

import numpy as np
from PIL import Image, ImageOps

# A strip longer than this many short sides is cut to its crop before it is resized, not after: 16 x 60000 pixels
# would become 256 x 960000 otherwise.
LONGEST = 8


class BadImage(Exception):
    """Bytes that cannot become a training image; the message is the reason that is counted."""


def open_image(data: bytes, min_size: int = 1, max_pixels: int | None = None) -> Image.Image:
    """Return the decoded image (first frame) in its own mode, turned upright as its EXIF orientation says.

    Args:
        data: an encoded image of any format that Pillow reads.
        min_size: least length of the short side, pixels.
        max_pixels: most pixels, told from the header.

    Raises:
        BadImage: "undecodable image", "truncated image", "too small", "too many pixels" (Pillow's limit, 179 million).
    """
    try:
        image = Image.open(io.BytesIO(data))
        if min(image.size) < min_size:
            raise BadImage("too small")
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise BadImage("too many pixels")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return image
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage("too many pixels") from None
    except (
        Exception
    ) as error:  # on malformed bytes the decoders raise nearly anything: OSError, SyntaxError, struct.error
        truncated = isinstance(error, EOFError) or "truncated" in str(error).lower()
        raise BadImage("truncated image" if truncated else "undecodable image") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as RGB: 16 bits scaled to 8, transparency composited over white.

    Raises:
        BadImage: "unsupported image mode", for those without an agreed range or conversion (float, LAB).
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith(
        "I"
    ):  # I;16, I;16B, and I: what Pillow makes of a 16-bit PGM; Pillow itself would clip at 255
        values = np.asarray(image).astype(np.int64).clip(0, 65535)  # [H, W]
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("F", "LAB", "HSV"):
        raise BadImage("unsupported image mode")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, size: int, across: float = 0.5, down: float = 0.5) -> Image.Image:
    """Return a square of `size` pixels: the short side resized to it (Lanczos), the long side cropped.

    The sizes and the centre crop are those of the original (torchvision's Resize and CenterCrop on Pillow images), to
    the pixel.

    Args:
        image: an RGB image.
        size: side of the square, pixels.
        across, down: where the crop lies in the room that the long side leaves: 0 left/top, 0.5 centre, 1 right/bottom.
    """
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    left, top = round((width - size) * across), round((height - size) * down)
    if max(width, height) > LONGEST * size:
        x, y = image.width / width, image.height / height
        return image.resize(
            (size, size), Image.Resampling.LANCZOS, box=(left * x, top * y, (left + size) * x, (top + size) * y)
        )
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    return resized.crop((left, top, left + size, top + size))
