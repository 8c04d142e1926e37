"""Captions: where a sample's is, how it is read, and which one of several an epoch takes."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import basename, dirname, splitext
from random import Random
from typing import TYPE_CHECKING, Literal

from ldm_lab.config import register
from ldm_lab.data.text import decode_text, is_encoding
from ldm_lab.io.decoding import IMAGE_ENDINGS
from ldm_lab.io.json_files import Json

if TYPE_CHECKING:
    from ldm_lab.data.caption_tables import CaptionTable

NONE = "none"  # the place of no caption
NOT_READABLE = "caption is not UTF-8 (data.captions.encoding names its encoding)"
BAD_JSON = "json of the caption is not readable"
PROBLEMS = (NOT_READABLE, BAD_JSON)
Read = Callable[[str], bytes | None]  # ending of a file beside an image, such as ".txt" -> its content, if it is there


@dataclass(frozen=True)
class Caption:
    """What is said of an image.

    Attributes:
        texts: its caption, or several; stripped, none of them empty.
        place: where it was, in words.
        problem: why it cannot be read; "" if it can.
        exists: whether there is one at all, be it empty.
    """

    texts: tuple[str, ...] = ()
    place: str = NONE
    problem: str = ""
    exists: bool = False

    def draw(self, random: Random) -> str:
        """Return the caption, or one of several at random; "" where there is none."""
        return self.texts[int(random.random() * len(self.texts))] if len(self.texts) > 1 else self.whole

    @property
    def first(self) -> str:
        """The caption, or the first of several; "" where there is none."""
        return self.texts[0] if self.texts else ""

    @property
    def whole(self) -> str:
        """All of it as one text."""
        return "\n".join(self.texts)


@register("captions")
class Captions:
    """Where captions are, and how they are read.

    Nothing named: `photo.txt` beside `photo.jpg`, in folders and lists or else `caption` in its `photo.json`. What is
    named is looked at alone: metadata first, then json, then files.
    """

    def __init__(
        self,
        *,
        endings: list[str] | str | None = None,
        json_key: str | None = None,
        metadata: str | None = None,
        column: str | None = None,
        source: Literal["file_name", "folder"] | None = None,
        pattern: str | None = None,
        encoding: str | None = None,
        lines: Literal["each", "one"] | None = None,
    ) -> None:
        """Set the places.

        Args:
            endings: of the caption's file, the first that is there counts: .caption is photo.caption, .jpg.txt is
                photo.jpg.txt, ".*.txt" the same for images of every kind.
            json_key: key of the image's json, with dots for one inside another; a text, or a list of them.
            metadata: a table with a row for each image, or several: .jsonl, .csv, .tsv, .parquet; one for all, or one
                in each folder.
            column: of the table; null takes the first of text, caption, prompt, ... that it has.
            source: file_name is the image's name without its ending, underscores as spaces; folder is the name of the
                folder that it lies in.
            pattern: with source: file_name, a regular expression; its first group in the name is the caption.
            encoding: of captions that are not UTF-8, such as cp1252, cp932, gb18030; a byte order mark goes before it.
            lines: each is a caption of its own, of which every epoch draws one; or one text has them all. null is each,
                but for a text that the image's json has as one.
        """
        given = [endings] if isinstance(endings, str) else endings
        self.endings = tuple(e if e.startswith(".") else f".{e}" for e in given or ())
        self.is_default = not (given or json_key or metadata or source)
        if self.is_default:
            self.endings = (".txt",)
        self.json_key, self.metadata, self.column = json_key, metadata, column
        self.source, self.pattern = source, re.compile(pattern) if pattern else None
        self.encoding, self.lines = encoding, lines
        self.table: CaptionTable | None = None  # once `metadata` has been read

    @staticmethod
    def check(
        *,
        endings: list[str] | str | None,
        json_key: str | None,
        metadata: str | None,
        column: str | None,
        source: str | None,
        pattern: str | None,
        encoding: str | None,
    ) -> list[str]:
        """Return what is wrong across the options."""
        problems = []
        if source and (endings or json_key or metadata):
            problems.append(f"source: {source} is the only place then; leave endings, json_key and metadata out")
        if endings is not None and (not endings or (isinstance(endings, list) and "" in endings)):
            problems.append("endings: one at least is needed, such as .caption; without the key it is .txt")
        if column and not metadata:
            problems.append("column: of which table? metadata has to be given")
        if pattern and source != "file_name":
            problems.append("pattern: is for source: file_name")
        if pattern:
            try:
                if not re.compile(pattern).groups:
                    problems.append(f"pattern: {pattern!r} has no group (...) for the caption")
            except re.error as error:
                problems.append(f"pattern: {pattern!r}: {error}")
        if encoding is not None and not is_encoding(encoding):
            problems.append(
                f"encoding: {encoding!r} is no encoding of texts; utf-16-le, cp1252, cp932, gb18030 are some"
            )
        return problems

    def find(self, key: str, read: Read, fallback: str | None = None) -> Caption:
        """Return the caption of an image.

        Args:
            key: the image's name.
            read: of the files beside it.
            fallback: key of its json that is looked at last, if nothing is named.

        Raises:
            OSError: from `read`.
        """
        if self.source is not None:
            return self.in_name(key)
        if self.table is not None and (texts := self.table.captions(key)) is not None:
            return self.several(texts, self.table.name)
        if self.json_key is not None and (data := read(".json")) is not None:
            return self.in_json(data, self.json_key)
        for ending in self.endings:
            if (data := read(ending)) is not None:
                return self.in_text(data, ending, read)
        if self.is_default and fallback is not None and (data := read(".json")) is not None:
            return self.in_json(data, fallback)
        return Caption()

    def in_text(self, data: bytes, place: str, read: Read | None = None) -> Caption:
        """Return the caption in the bytes of a text."""
        text = decode_text(data, self.encoding)
        if text is None:
            return Caption(place=place, problem=NOT_READABLE)
        text = text.strip()
        lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
        if len(lines) < 2 or self.lines == "one" or (self.lines is None and _is_one_text(text, read)):
            lines = [text] if text else []
        return Caption(tuple(lines), place, exists=True)

    def in_json(self, data: bytes, key: str) -> Caption:
        """Return the caption, or the captions, under a key of some JSON."""
        place = json_place(key)
        if not data.strip():
            return Caption()
        text = decode_text(data, self.encoding)
        try:
            content = json.loads(data if text is None else text)
        except (ValueError, RecursionError):
            return Caption(place=place, problem=NOT_READABLE if text is None else BAD_JSON)
        texts = texts_in(content, key.split("."))
        return self.several(texts, place) if texts else Caption()

    def in_name(self, key: str) -> Caption:
        """Return the caption in an image's name, or in that of its folder."""
        place = "file name" if self.source == "file_name" else "folder"
        text = decode_text(_bytes_of(key), self.encoding)
        if text is None:
            return Caption(place=place, problem=NOT_READABLE)
        if self.source == "folder":
            name = class_name(basename(dirname(text)))
        else:
            name = image_stem(basename(text))
            match = self.pattern.search(name) if self.pattern is not None else None
            if self.pattern is not None:
                name = (match[1] or "") if match else ""
            name = name.replace("_", " ").strip()
        return Caption((name,), place, exists=True) if name else Caption()

    def several(self, texts: list[str], place: str) -> Caption:
        """Return the caption that one or several texts are; half surrogate pairs in them become U+FFFD."""
        clean = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
        return Caption(tuple(text.strip() for text in clean if text.strip()), place, exists=True)


def json_place(key: str) -> str:
    """Return what the place of captions in the images' json is called."""
    return f".json ({key})"


def class_name(folder: str) -> str:
    """Return the class in a folder's name: "n02105412-flat-coated_retriever" -> "flat-coated retriever"."""
    return re.sub(r"^n\d{8}[-_]", "", folder).replace("_", " ").strip()


def image_stem(name: str) -> str:
    """Return an image's name without the ending of an image."""
    stem, ending = splitext(name)
    return stem if ending[1:].lower() in IMAGE_ENDINGS else name


def _is_one_text(text: str, read: Read | None) -> bool:
    """Return whether the image's json says that a text of several lines is one caption, as img2dataset's does."""
    data = read(".json") if read is not None else None
    if data is None:
        return False
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return False
    caption = content.get("caption") if isinstance(content, dict) else None
    return isinstance(caption, str) and caption.split() == text.split()


def texts_in(content: Json, keys: Sequence[str] = ()) -> list[str]:
    """Return the texts that a path of keys leads to, through every entry of a list on the way."""
    if isinstance(content, list):
        return [text for entry in content for text in texts_in(entry, keys)]
    if not keys:
        return [content] if isinstance(content, str) else []
    if not isinstance(content, dict):
        return []
    for count in range(len(keys), 0, -1):  # a key may have a dot in it
        if (key := ".".join(keys[:count])) in content:
            return texts_in(content[key], keys[count:])
    return []


def _bytes_of(name: str) -> bytes:
    """Return the bytes that a file's name is made of."""
    return name.encode(errors="surrogateescape")
