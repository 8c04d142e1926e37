"""Images: from any file to RGB, resized and cropped; to and from tensors in [-1, 1]; labeled grids, PNG files."""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm_lab.errors import UserError, first_line
from ldm_lab.io.atomic import atomic_write
from ldm_lab.io.color import BadImage, lay_over, to_srgb
from ldm_lab.io.decoding import decode_image
from ldm_lab.io.http import HTTPError, read_url

BACKGROUND, INK = "white", "black"
CELL = 160  # pixels; a labeled cell is at least this wide, so that its caption has room
WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf")  # Linux, macOS, Windows
LONGEST = 8  # short sides; a longer strip is cut before it is resized: 1 x 10000 would become 224 x 2240000
CAPTION_LINES = 4  # a longer caption ends in an ellipsis
URL_LIMIT = 64 * 2**20  # bytes; no image worth a 224-pixel embedding is larger


def open_image(source: str) -> Image.Image:
    """Return the image behind a path or an http(s) address as `decode_image` gives it.

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
        reason = str(error)
        if isinstance(cause, UnidentifiedImageError):
            reason = "no image format that Pillow knows"
        elif isinstance(cause, Exception):
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
    """Return an image of any mode as RGB in sRGB, 8 bits a channel (see `to_srgb`), laid over white where transparent.

    So every picture is read: in data sets, scores, prompts, and what sampling begins with.

    Raises:
        BadImage: "unknown range of values".
    """
    if image.mode == "RGB" and not image.has_transparency_data and "icc_profile" not in image.info:
        return image
    return lay_over(to_srgb(image), "white")


def flatten_alpha(image: Image.Image) -> Image.Image:
    """Return an image of any mode as RGB (see `to_rgb`); of a long strip only the middle.

    How image prompts are read.
    """
    image = to_rgb(image)
    limit = LONGEST * min(image.size)
    return _center_crop(image, *(min(side, limit) for side in image.size)) if max(image.size) > limit else image


Resize = Literal["crop", "pad", "stretch"]


def fit(image: Image.Image, height: int, width: int, resize: Resize = "crop") -> Image.Image:
    """Return an image of any mode as RGB, width x height.

    Args:
        image: see `to_rgb`.
        height, width: pixels.
        resize: "crop" covers the size and takes the middle (`center_crop_to`), "pad" fits into it and repeats the edge
            pixels around, "stretch" gives up the aspect.
    """
    if resize == "crop":
        return center_crop_to(image, height, width)
    image = to_rgb(image)
    left, top, inner_width, inner_height = inner_box(image.size, height, width, resize)
    inner = image.resize((inner_width, inner_height), Image.Resampling.LANCZOS)
    if (inner_width, inner_height) == (width, height):
        return inner
    right, bottom = width - inner_width - left, height - inner_height - top
    return Image.fromarray(np.pad(np.asarray(inner), ((top, bottom), (left, right), (0, 0)), mode="edge"))


def inner_box(size: tuple[int, int], height: int, width: int, resize: Resize) -> tuple[int, int, int, int]:
    """Return where a picture of a size (width, height) comes to lie: left, top, width, height.

    With "crop" it reaches beyond the height and width: left or top is negative.
    """
    if resize == "stretch":
        return 0, 0, width, height
    given_width, given_height = size
    wider = width * given_height >= height * given_width  # than the picture
    wanted, given = (width, given_width) if wider == (resize == "crop") else (height, given_height)
    inner_width, inner_height = (max(1, round(side * wanted / given)) for side in size)
    return -round((inner_width - width) / 2), -round((inner_height - height) / 2), inner_width, inner_height


def own_size(size: tuple[int, int], height: int, width: int, multiple: int) -> tuple[int, int]:
    """Return the height and width of a picture's own aspect (1:8 at most), with about as many pixels as height x width.

    Args:
        size: of the picture, width and height.
        height, width: the model's own size, pixels.
        multiple: both sides are multiples of it.
    """
    aspect = min(max(size[0] / size[1], 1 / LONGEST), LONGEST)
    sides = math.sqrt(height * width / aspect), math.sqrt(height * width * aspect)  # height, width
    high, wide = (max(multiple, round(side / multiple) * multiple) for side in sides)
    return high, wide


def center_crop_to(image: Image.Image, height: int, width: int) -> Image.Image:
    """Return the middle, width x height, of an image of any mode resized so that it just covers that, RGB.

    Any image is made RGB first (see `to_rgb`). Sizes are rounded, so that nothing has to be padded.
    """
    image = to_rgb(image)
    # As a fraction, so that the side that just fits comes out exactly.
    wanted, given = (width, image.width) if width * image.height >= height * image.width else (height, image.height)
    limit = LONGEST * max(width, height) * given // wanted
    if max(image.size) > limit:
        image = _center_crop(image, *(min(side, limit) for side in image.size))
    resized = tuple(round(side * wanted / given) for side in image.size)
    if resized != image.size:
        image = image.resize(resized, Image.Resampling.LANCZOS)
    return _center_crop(image, width, height)


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


def save_png(path: str | Path, image: Image.Image, text: dict[str, str] | None = None, level: int = 6) -> None:
    """Write a PNG with text metadata, atomically.

    Args:
        path: the file; its folder is made if needed.
        image: the picture.
        text: keyword -> text, shown by image viewers and `PIL.Image.open(path).text`. Latin-1 goes into tEXt chunks,
            other text as UTF-8 into iTXt; bytes of a file's name that are no text as \\udc80 and the like.
        level: of compression, 0 to 9; 3 takes a third of the time of 6, and a seventh more room.

    Raises:
        UserError: the folder cannot be written to, or is full.
    """
    info = PngInfo()
    for keyword, value in (text or {}).items():
        info.add_text(keyword, value.encode(errors="backslashreplace").decode())
    with atomic_write(path) as file:
        image.save(file, "PNG", pnginfo=info, compress_level=level)
