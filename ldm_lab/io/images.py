"""Images: from any file to RGB, resized and cropped; to and from tensors in [-1, 1]; labelled grids, PNG files."""

import contextlib
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm_lab.errors import UserError, first_line
from ldm_lab.io.atomic import atomic_write
from ldm_lab.io.http import HTTPError, read_url

BACKGROUND, INK = "white", "black"
CELL = 160  # pixels; a labelled cell is at least this wide, so that its caption has room
WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf")  # Linux, macOS, Windows
LONGEST = 8  # short sides; a longer strip is cut before it is resized: 1 x 10000 would become 224 x 2240000
CAPTION_LINES = 4  # a longer caption ends in an ellipsis
URL_LIMIT = 64 * 2**20  # bytes; no image worth a 224-pixel embedding is larger


class BadImage(Exception):
    """Bytes that cannot become an image.

    Its text is the reason by which such images are counted: "undecodable image", "truncated image", "too small",
    "too many pixels", "unsupported image mode".
    """


# ------------------------------------------------------------------------------------------------------- decoding


def decode_image(data: bytes, min_size: int = 1, max_pixels: int | None = None) -> Image.Image:
    """Return the decoded image (first frame) in its own mode, upright as its EXIF orientation says.

    Args:
        data: an encoded image of any format that Pillow reads.
        min_size: least length of the short side, pixels.
        max_pixels: most pixels, told from the header.

    Raises:
        BadImage: what is wrong with it. "too many pixels" is also said beyond Pillow's limit, 179 million.
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
    except Image.DecompressionBombError as error:
        raise BadImage("too many pixels") from error
    except Exception as error:  # on malformed bytes the decoders raise nearly anything, such as struct.error
        truncated = isinstance(error, EOFError) or "truncated" in str(error).lower()
        raise BadImage("truncated image" if truncated else "undecodable image") from error


def open_image(source: str) -> Image.Image:
    """Return the image behind a path or an http(s) address, upright as its EXIF orientation says, in its own mode.

    Raises:
        UserError: missing, unreachable, too large, or not a readable image.
    """
    scheme, separator, _ = source.partition("://")
    if separator and scheme.lower() not in ("http", "https"):
        raise UserError(f"{source}: an image is given as a path or an http(s) address")
    data = _fetched(source) if separator else _read(source)
    try:
        return decode_image(data)
    except BadImage as error:
        cause = error.__cause__
        reason = "no image format that Pillow knows"
        if isinstance(cause, Exception) and not isinstance(cause, UnidentifiedImageError):
            reason = first_line(cause)
        raise UserError(f"{source}: not a readable image: {reason}") from None


def _read(source: str) -> bytes:
    try:
        return Path(source).expanduser().read_bytes()
    except FileNotFoundError:
        raise UserError(f"{source}: no such image file") from None
    except OSError as error:
        raise UserError(f"{source}: image cannot be read: {error.strerror}") from None


def _fetched(address: str) -> bytes:
    try:
        return read_url(address, URL_LIMIT)
    except HTTPError as error:
        raise UserError(f"{address}: image cannot be fetched: {error}") from None


# ------------------------------------------------------------------------------------------- RGB, resized, cropped


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as RGB: 16 bits scaled to 8, transparency laid over white. How data sets are read.

    Raises:
        BadImage: "unsupported image mode", for those without an agreed range or conversion (float, LAB).
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    # I;16, I;16B, and I: what Pillow makes of a 16-bit PGM; Pillow itself would clip at 255.
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64).clip(0, 65535)  # [H, W]
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("F", "LAB", "HSV"):
        raise BadImage("unsupported image mode")
    return _over_white(image)


def flatten_alpha(image: Image.Image) -> Image.Image:
    """Return an image of any mode as RGB, laid over white where it is transparent; of a long strip only the middle.

    How image prompts are read: other modes are Pillow's own conversions.
    """
    image = _over_white(image)
    limit = LONGEST * min(image.size)
    return _center_crop(image, *(min(side, limit) for side in image.size)) if max(image.size) > limit else image


def resize_and_crop(image: Image.Image, size: int, across: float = 0.5, down: float = 0.5) -> Image.Image:
    """Return a square of `size` pixels: the short side resized to it (Lanczos), the long side cropped.

    The sizes and the center crop are those of torchvision's Resize and CenterCrop on Pillow images, to the pixel.

    Args:
        image: an RGB image.
        size: side of the square, pixels.
        across, down: where the crop lies in the room that the long side leaves: 0 left/top, 0.5 center, 1 right/bottom.
    """
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    left, top = round((width - size) * across), round((height - size) * down)
    if max(width, height) > LONGEST * size:
        x, y = image.width / width, image.height / height
        box = (left * x, top * y, (left + size) * x, (top + size) * y)
        return image.resize((size, size), Image.Resampling.LANCZOS, box=box)
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    return resized.crop((left, top, left + size, top + size))


def center_crop_to(
    image: Image.Image, height: int, width: int, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """Return the middle, width x height, of an image of any mode resized so that it just covers that, RGB.

    Transparent images are laid over white. Sizes are rounded, so that nothing has to be padded.
    """
    image = _over_white(image)
    # As a fraction, so that the side that just fits comes out exactly.
    wanted, given = (width, image.width) if width * image.height >= height * image.width else (height, image.height)
    limit = LONGEST * max(width, height) * given // wanted
    if max(image.size) > limit:
        image = _center_crop(image, *(min(side, limit) for side in image.size))
    resized = tuple(round(side * wanted / given) for side in image.size)
    return _center_crop(image if resized == image.size else image.resize(resized, resample), width, height)


def _over_white(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _center_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


# -------------------------------------------------------------------------------------------------------- tensors


def to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB image as float32 [3, H, W] in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB")))  # [H, W, 3], uint8
    return pixels.permute(2, 0, 1).float() / 127.5 - 1  # [3, H, W]


def to_images(batch: Tensor, rounded: bool = False) -> list[Image.Image]:
    """Return 8-bit RGB images of a batch [B, 3, H, W] in [-1, 1]; values outside are clamped.

    The fraction of a level is cut off, as in cloob-latent-diffusion, or `rounded`, as for GLIDE's pixels.
    """
    levels = batch.detach().float().clamp(-1, 1).add(1).div(2).mul(255)  # [B, 3, H, W]
    levels = (levels.round() if rounded else levels).to(torch.uint8)  # [B, 3, H, W]
    return [Image.fromarray(pixels) for pixels in levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def round_to_uint8(batch: Tensor) -> Tensor:
    """Return a batch [B, 3, H, W] in [-1, 1] with its values rounded to 8-bit levels; those outside stay outside.

    For what an upsampler is to enlarge: in training it saw images out of files.
    """
    return batch.add(1).mul(127.5).round().div(127.5).sub(1)  # [B, 3, H, W]


def parse_size(written: str) -> tuple[int, int]:
    """Return `(height, width)` in pixels of "256" (a square) or "384x256" (width x height).

    Raises:
        UserError: anything else.
    """
    parts = written.lower().split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"size {written!r}: write pixels as 256 or as WIDTHxHEIGHT, e.g. 384x256")
    width, height = int(parts[0]), int(parts[-1])
    return height, width


# ------------------------------------------------------------------------------------------------- grids and files


def grid(
    images: Sequence[Image.Image], columns: int | None = None, captions: Sequence[str] | None = None
) -> Image.Image:
    """Return one picture of equally large images, row by row.

    Without captions the images touch each other and keep their pixels. With captions each image stands above its text
    on a white page; images narrower than 160 pixels are enlarged by a whole factor.

    Args:
        images: at least one.
        columns: images in a row; by default the smallest number that makes the grid no higher than wide.
        captions: one text per image.
    """
    assert images, "a grid needs an image"
    assert len({image.size for image in images}) == 1, "the images of a grid have one size"
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    if captions is None:
        return _paste(images, columns, gap=0)
    assert len(captions) == len(images), "one caption per image"
    factor = math.ceil(CELL / images[0].width)
    width, height = images[0].width * factor, images[0].height * factor
    captions = [" ".join(caption.split()) for caption in captions]
    font = _font("".join(captions), size=max(12, min(24, width // 16)))
    line = sum(font.getmetrics())
    cells, texts = [], [_wrap(caption, font, width) for caption in captions]
    for i, (image, lines) in enumerate(zip(images, texts, strict=True)):
        first = i - i % columns  # of this row; all labels of a row are as high as the highest
        label = line // 3 + line * max(map(len, texts[first : first + columns]))
        cell = Image.new("RGB", (width, height + label), BACKGROUND)
        cell.paste(image.resize((width, height), Image.Resampling.LANCZOS) if factor > 1 else image)
        draw = ImageDraw.Draw(cell)
        for j, text in enumerate(lines):
            left = (width - font.getlength(text)) / 2
            draw.text((left, height + line // 3 + j * line), text, fill=INK, font=font)
        cells.append(cell)
    return _paste(cells, columns, gap=line // 2)


def _paste(cells: Sequence[Image.Image], columns: int, gap: int) -> Image.Image:
    """Return cells side by side, with `gap` pixels around and between them; the cells of a row are equally high."""
    width = cells[0].width
    tops = [gap]
    for first in range(0, len(cells), columns):
        tops.append(tops[-1] + cells[first].height + gap)
    page = Image.new("RGB", (columns * (width + gap) + gap, tops[-1]), BACKGROUND)
    for i, cell in enumerate(cells):
        page.paste(cell, (gap + i % columns * (width + gap), tops[i // columns]))
    return page


def _font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Return Pillow's own font, or for more than ASCII, which it lacks, the first of the usual ones that is here."""
    if not text.isascii():
        for name in WIDE_FONTS:
            with contextlib.suppress(OSError):
                return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Return the lines of a text that fit into `width` pixels; words that do not fit are broken."""
    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > CAPTION_LINES:
        last = lines[CAPTION_LINES - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: CAPTION_LINES - 1], last + "…"]
    return lines


def save_png(path: str | Path, image: Image.Image, text: dict[str, str] | None = None) -> None:
    """Write a PNG with text metadata, atomically.

    Args:
        path: the file; its folder is made if needed.
        image: the picture.
        text: keyword -> text, shown by image viewers and `PIL.Image.open(path).text`. Latin-1 goes into tEXt chunks,
            other text as UTF-8 into iTXt.

    Raises:
        UserError: the folder cannot be written to, or is full.
    """
    info = PngInfo()
    for keyword, value in (text or {}).items():
        info.add_text(keyword, value)
    with atomic_write(path) as file:
        image.save(file, "PNG", pnginfo=info)
