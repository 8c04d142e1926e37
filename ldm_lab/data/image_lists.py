"""Lists of image paths, as people write them."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote_to_bytes

from ldm_lab.data.text import MARKS
from ldm_lab.errors import UserError


@dataclass
class ListedImages:
    """What a list says.

    Attributes:
        names: paths of images, absolute or relative to the list's folder.
        captions: of each, None where the list has none.
        comments: lines that begin with #.
    """

    names: list[str] = field(default_factory=list)
    captions: list[str | None] = field(default_factory=list)
    comments: int = 0

    def lines(self) -> list[str]:
        """Return what was left out of the list, in words."""
        return [f"{self.comments:,} lines of the list begin with # and are comments"] if self.comments else []


def read_list(path: Path) -> ListedImages:
    """Return what a list says.

    Args:
        path: a text file; names that are no UTF-8 keep their bytes.

    Raises:
        UserError: it is not there, no text, or without a path.
    """
    found = ListedImages()
    for line in _lines_of(path):
        text = line.strip(b" \t\r")
        if not text.strip(b" ./\t"):
            continue
        name, tab, caption = text.partition(b"\t")
        if text.startswith(b"#") and not _is_file(path, text):
            found.comments += 1
            continue
        if tab and _is_file(path, text):
            name, caption, tab = text, b"", b""
        found.names.append(_path_in(os.fsdecode(name.strip())))
        found.captions.append(os.fsdecode(caption.strip()) if tab else None)
    if not found.names:
        raise UserError(f"data.path: {path} holds no image path; one per line is needed")
    return found


def _lines_of(path: Path) -> Iterator[bytes]:
    """Yield the lines of a list, in UTF-8 or as they are. Raises UserError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"data.path: {path}: {error.strerror}; a text file of image paths is needed") from None
    for mark, name in MARKS:
        if data.startswith(mark):
            data = data[len(mark) :].decode(name, "replace").encode() if name != "utf-8" else data[len(mark) :]
            break
    if b"\0" in data:
        raise UserError(f"data.path: {path} is no text file; one image path per line is needed")
    yield from data.split(b"\n" if b"\n" in data else b"\r")


def _path_in(text: str) -> str:
    """Return the path that an entry of a list means: without quotes, ~ and file:// opened."""
    quoted = re.fullmatch(r"\"(.+)\"|'(.+)'", text)
    if quoted:
        text = quoted[1] or quoted[2]
    if address := re.fullmatch(r"file:(?://[^/]*)?(/.*)", text, re.IGNORECASE):
        return os.fsdecode(unquote_to_bytes(os.fsencode(address[1])))
    if re.match(r"[a-z][a-z0-9+.-]+://", text, re.IGNORECASE):
        raise UserError(f"data.path: {text}: a list is of files on this machine; download them first (img2dataset)")
    return os.path.expanduser(text)


def _is_file(path: Path, line: bytes) -> bool:
    """Return whether a whole line is the name of a file."""
    try:
        return (path.parent / os.fsdecode(line)).is_file()
    except OSError:
        return False
