"""Pictures: Pillow images to and from tensors in [-1, 1], labelled grids, PNG files with metadata."""

import contextlib
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm_lab.errors import UserError

BACKGROUND, INK = "white", "black"
CELL = 160  # pixels; a labelled cell is at least this wide, so that its caption has room
WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf")  # Linux, macOS, Windows
LONGEST = 8  # sides of the target; of a longer strip only the middle is resized: 1 x 10000 would become 224 x 2240000
CAPTION_LINES = 4  # a longer caption ends in an ellipsis


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


def quantised(batch: Tensor) -> Tensor:
    """Return a batch [B, 3, H, W] in [-1, 1] with its values rounded to 8-bit levels; those outside stay outside.

    What an upsampler is to enlarge: in training it saw pictures out of files.
    """
    return batch.add(1).mul(127.5).round().div(127.5).sub(1)  # [B, 3, H, W]


def cover(
    image: Image.Image, height: int, width: int, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """Return the middle, width x height, of an image resized so that it just covers that, RGB.

    Transparent images are laid over white. Sizes are rounded, so that nothing has to be padded.
    """
    image = _rgb(image)
    # As a fraction, so that the side that just fits comes out exactly.
    wanted, given = (width, image.width) if width * image.height >= height * image.width else (height, image.height)
    limit = LONGEST * max(width, height) * given // wanted
    if max(image.size) > limit:
        image = _centre(image, *(min(side, limit) for side in image.size))
    resized = tuple(round(side * wanted / given) for side in image.size)
    return _centre(image if resized == image.size else image.resize(resized, resample), width, height)


def opaque(image: Image.Image) -> Image.Image:
    """Return an image of any mode as RGB, laid over white where it is transparent; of a long strip only the middle."""
    image = _rgb(image)
    limit = LONGEST * min(image.size)
    return _centre(image, *(min(side, limit) for side in image.size)) if max(image.size) > limit else image


def _rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


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
    """Write a PNG with text metadata; the file appears only when all of it is on the disk.

    Args:
        path: the file; its folder is made if needed.
        image: the picture.
        text: keyword -> text, shown by image viewers and `PIL.Image.open(path).text`. Latin-1 goes into tEXt chunks,
            other text as UTF-8 into iTXt.

    Raises:
        UserError: the folder cannot be written to, or is full.
    """
    path = Path(path)
    info = PngInfo()
    for keyword, value in (text or {}).items():
        info.add_text(keyword, value)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the target's own folder: a rename is atomic only within one file system.
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=".part", delete=False
        ) as file:
            temporary = Path(file.name)
            image.save(file, "PNG", pnginfo=info)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
