"""Prompts: texts and images with weights, from the command line and from files.

A weighted prompt is written `text:weight`. What follows the last colon is the weight if it is a finite number; if it is
no number, the colon belongs to the text ("a photo: of a cat"). A backslash right before the last colon makes that text,
too: `meet at 12\\:30` is the text "meet at 12:30". Image prompts are written alike: a path or an http(s) address.
"""

import codecs
import functools
import logging
import math
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ldm_lab.errors import UserError
from ldm_lab.io.images import open_image
from ldm_lab.io.text import is_text
from ldm_lab.pretrained.resolve import REPOSITORY

BYTE_ORDER_MARKS = {  # the longer ones first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
SHOWN = 60  # characters of a line that a warning quotes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """One weighted prompt.

    Attributes:
        text: what is to be seen; of an image prompt its path or address.
        weight: its weight in the guided prediction (`ldm_lab.guidance`); None stands for the guidance scale.
        image: the image of an image prompt, of any mode and size.

    Raises:
        UserError: the text is none, such as a command line's bytes in another encoding.
    """

    text: str
    weight: float | None = None
    image: Image.Image | None = None

    def __post_init__(self) -> None:
        if self.image is None and not is_text(self.text):  # a file's name may be any bytes
            raise UserError(f"{self.text!r}: a prompt is text in UTF-8; these bytes are none")

    @property
    def direction(self) -> int:
        """Where it leads a picture: 1 to it, -1 away from it by a negative weight, 0 nowhere at a weight of 0.

        How like its prompt a picture is (`evaluate`, `compare`, `rerank`) is the cosine of their embeddings times this.
        """
        return 1 if self.weight is None else (self.weight > 0) - (self.weight < 0)

    def __str__(self) -> str:
        return self.text if self.weight is None else f"{self.text}:{self.weight:g}"


def parse_prompt(written: str) -> Prompt:
    """Return the prompt that `text`, `text:weight` or `text\\:with a colon` stands for.

    Raises:
        UserError: the weight is nan or infinite, or the command line's bytes are no text.
    """
    text, colon, tail = written.rpartition(":")
    if not colon:
        return Prompt(written)
    if text.endswith("\\"):
        return Prompt(text[:-1] + colon + tail)
    try:
        weight = float(tail)
    except ValueError:
        return Prompt(written)
    if not math.isfinite(weight):
        raise UserError(f"{written!r}: a weight must be finite; write '\\:' for a colon that belongs to the text")
    return Prompt(text, weight)


def write_prompt(prompt: Prompt) -> str:
    """Return how a text with its weight is written, in one line: what `parse_prompt` reads."""
    text = " ".join(prompt.text.splitlines())
    if prompt.weight is not None:
        return f"{text}:{prompt.weight:g}"
    if parse_prompt(text) == Prompt(text):
        return text
    before, colon, after = text.rpartition(":")
    return f"{before}\\{colon}{after}"


def read_prompts(path: str | Path) -> list[str]:
    """Return the prompts of a text file as they are written, one per line; only blank lines are dropped.

    The file is UTF-8, or what its byte order mark says. A line that looks like a comment is a prompt, which is said.
    A relative path is looked for here and then in the repository's folder, as those of weights are.

    Raises:
        UserError: no such file, not such text, no prompt in it.
    """
    path = Path(path).expanduser()
    if not path.exists() and (REPOSITORY / path).is_file():
        path = REPOSITORY / path
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such prompts file") from None
    except OSError as error:
        raise UserError(f"{path}: prompts file cannot be read: {error.strerror}") from None
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        marked = "" if encoding == "utf-8" else f", or what its byte order mark says ({encoding.upper()})"
        raise UserError(f"{path}: a prompts file is UTF-8 text{marked}; this one is not (byte {error.start})") from None
    if "\0" in text:
        raise UserError(f"{path}: a prompts file is UTF-8 text, this one has zero bytes in it; save it as UTF-8")
    lines = text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path}: no prompt in this file; one per line is needed")
    comments = [line for line in prompts if line.startswith(("#", "//"))]
    if comments:
        _tell_comment(path, comments[0])
    return prompts


@functools.cache
def _tell_comment(path: Path, line: str) -> None:
    """Say, once, that what looks like a comment is a prompt."""
    log.warning("%s: there are no comments in a prompts file: %r is a prompt", path, line[:SHOWN])


def parse_image_prompt(written: str) -> Prompt:
    """Return the image prompt that `path`, `address`, `path:weight` or `address:weight` stands for, its image loaded.

    Raises:
        UserError: no such file or address, not a readable image, a weight that is not finite.
    """
    prompt = parse_prompt(written)
    return Prompt(prompt.text, prompt.weight, open_image(prompt.text))
