"""Captions in a table of their own, such as the `metadata.jsonl` of a Hugging Face image folder."""

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from os.path import basename, isabs, join, splitext
from pathlib import Path

import numpy as np

from ldm_lab.data.captions import image_stem, texts_in
from ldm_lab.data.strings import Strings
from ldm_lab.data.text import MARKS, composed
from ldm_lab.errors import UserError, install, unknown

NAMES = ("file_name", "filename", "file", "image", "image_path", "img", "path", "filepath", "key", "__key__", "id")
TEXTS = ("text", "caption", "prompt", "captions", "texts", "description", "title")
ENDINGS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
LARGEST_FIELD = 2**27  # bytes
REST = "\0"  # stands for the column of cells that have none

Cells = dict[str, list[str]]  # column -> the texts in it: one, several, or none


class CaptionTable:
    """Image names and their captions, packed: millions of rows cost little more than their text.

    Attributes:
        name: of its file.
        root: the folder of the images, which names may begin with; "" where they are in shards.
        rows: rows read.
        incomplete: rows without a name or without a caption.
        too_long: rows with more cells than there are columns, as of a comma in a text without quotes; left out.
        column: of the captions.
    """

    def __init__(self, name: str, root: str = "") -> None:
        self.root = root
        self.name, self.rows, self.incomplete, self.too_long, self.column = name, 0, 0, 0, ""
        self._keys = np.empty(0, np.uint64)
        self._rows = np.empty(0, np.int64)
        self._texts = Strings.pack([])
        self._names = Strings.pack([])

    @classmethod
    def read(
        cls, files: Sequence[tuple[str, Path]], column: str | None, encoding: str | None, root: str = ""
    ) -> "CaptionTable":
        """Return the table in some files.

        Args:
            files: (folder that the names in it are relative to, from the data's own, with / or ""; path) of each.
            column: of the captions; None takes the first of `TEXTS` that is there.
            encoding: of a text file that is not UTF-8.
            root: the absolute path of the images' folder.

        Raises:
            UserError: a file that cannot be read, or without such columns.
        """
        table = cls(files[0][1].name, root)
        keys: list[int] = []
        names: list[str] = []
        texts: list[str] = []
        for folder, path in files:
            for name, captions in table.pairs(path, column, encoding):
                keys.append(_key(f"{folder}/{name}" if folder and not isabs(name) else name))
                names.append(name)
                texts.append(json.dumps(captions))
        order = np.argsort(np.array(keys, np.uint64), kind="stable")  # [rows]
        table._keys, table._rows, table._texts = np.array(keys, np.uint64)[order], order, Strings.pack(texts)
        table._names = Strings.pack(names)
        return table

    def pairs(self, path: Path, column: str | None, encoding: str | None) -> Iterator[tuple[str, list[str]]]:
        """Yield (name, captions) of a file's rows. Raises UserError."""
        chosen = ("", "")
        for row in _rows_of(path, encoding):
            if not chosen[0]:
                chosen = _columns(path, row, column)
                self.column = chosen[1]
            self.rows += 1
            if REST in row:
                self.too_long += 1
                continue
            name, texts = row.get(chosen[0], []), [text for text in row.get(chosen[1], []) if text.strip()]
            if len(name) == 1 and texts:
                yield name[0], texts
            else:
                self.incomplete += 1

    def captions(self, key: str) -> list[str] | None:
        """Return the captions of an image: those under its whole name, or else under its last part."""
        rows = self._rows_under(key)
        return [text for row in rows for text in json.loads(self._texts[row])] if rows else None

    def _rows_under(self, key: str) -> list[int]:
        for name in dict.fromkeys((key, join(self.root, key), basename(key))):
            number = np.uint64(_key(name))
            first, last = (int(np.searchsorted(self._keys, number, side)) for side in ("left", "right"))
            if first < last:
                return sorted(self._rows[first:last].tolist())
        return []

    def lines(self, images: Sequence[str] | None) -> list[str]:
        """Return what is in the table, in words, a line each.

        Args:
            images: names of all there are; None if nobody knows.
        """
        if not self.rows:
            return [f"{self.name}: no row"]
        unnamed = f", {self.incomplete:,} without a name or a caption" if self.incomplete else ""
        lines = [f"{self.name}: {self.rows:,} rows, captions in the column {self.column}{unnamed}"]
        if self.too_long:
            more = "more cells than the first line has columns, and are left out (a comma in a text without quotes?)"
            lines.append(f"{self.name}: {self.too_long:,} rows have {more}")
        others, example = self.strangers(images) if images is not None else (0, "")
        if others:
            lines.append(f"{self.name}: {others:,} rows are of images that are not here (e.g. {example})")
        return lines

    def strangers(self, images: Iterable[str]) -> tuple[int, str]:
        """Return how many rows are of none of some images, and how the first of these calls its image."""
        is_known = np.zeros(len(self._names), bool)  # [rows]
        for image in images:
            is_known[self._rows_under(image)] = True
        others = np.flatnonzero(~is_known)  # [rows of no image]
        return len(others), self._names[int(others[0])] if len(others) else ""


def _key(name: str) -> int:
    """Return 64 bits that stand for an image's name, however it is written: ./a/b.jpg, a\\b.jpg, a/b."""
    name = image_stem(composed(name.replace("\\", "/")).removeprefix("./"))
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest(), "little")


def _columns(path: Path, row: Cells, column: str | None) -> tuple[str, str]:
    """Return the columns of names and captions. Raises UserError if they are not there."""
    name = next((known for known in NAMES if known in row), None)
    if name is None:
        raise UserError(
            f"data.captions.metadata: {path}: none of its columns ({', '.join(row)}) says which image a row is of; "
            f"one has to be called file_name (or {', '.join(NAMES[1:])})"
        )
    if column is not None and column not in row:
        raise UserError(f"data.captions.column: {path}: {unknown('column', column, row)}")
    column = column or next((known for known in TEXTS if known in row and known != name), None)
    if column is None:
        raise UserError(
            f"data.captions.column: has to be given: which column of {path} has the captions? {', '.join(row)}"
        )
    return name, column


def _rows_of(path: Path, encoding: str | None) -> Iterator[Cells]:
    """Yield the rows of a table. Raises UserError."""
    ending = splitext(path.name)[1].lower()
    if ending not in ENDINGS:
        raise UserError(f"data.captions.metadata: {path}: one of {', '.join(ENDINGS)} is needed")
    try:
        if ending == ".parquet":
            yield from _parquet_rows(path)
            return
        with path.open(encoding=_codec_of(path, encoding), newline="") as file:
            if ending in (".csv", ".tsv"):
                yield from _csv_rows(path, file, ending)
            else:
                yield from _json_rows(path, file)
    except OSError as error:
        raise UserError(f"data.captions.metadata: {path}: {error.strerror or error}") from None


def _codec_of(path: Path, encoding: str | None) -> str:
    """Return the codec that reads a whole file. Raises UserError if neither UTF-8 nor `encoding` does."""
    with path.open("rb") as file:
        start = file.read(4)
    marked = {"utf-8": "utf-8-sig", "utf-16-le": "utf-16", "utf-16-be": "utf-16"}
    for mark, name in MARKS:
        if start.startswith(mark):
            return marked.get(name, "utf-32")
    for codec in dict.fromkeys(("utf-8", encoding or "utf-8")):
        try:
            with path.open(encoding=codec, newline="") as file:
                if not any("\0" in line for line in file):
                    return codec
        except UnicodeError:
            continue
    raise UserError(f"data.captions.metadata: {path} is not {encoding or 'UTF-8'}: set data.captions.encoding")


def _csv_rows(path: Path, file: Iterable[str], ending: str) -> Iterator[Cells]:
    csv.field_size_limit(LARGEST_FIELD)
    lines = iter(file)
    header = next(lines, "")
    record, last = list[str](), list[str]()
    delimiter = "\t" if ending == ".tsv" else ";" if ";" in header and "," not in header else ","
    columns = next(csv.reader([header], delimiter=delimiter), [])
    try:
        for row in csv.reader(_noted(lines, record), delimiter=delimiter):
            last = record.copy()
            record.clear()
            if row:
                rest = {REST: row[len(columns) :]} if any(row[len(columns) :]) else {}
                yield {column: [text] for column, text in zip(columns, row)} | rest
        if len(last) > 1 and sum(line.count('"') for line in last) % 2:  # all lines from there on are in one cell
            raise csv.Error(f"a quote is opened and never closed: {last[0].strip()[:80]}")
    except csv.Error as error:
        raise UserError(f"data.captions.metadata: {path}: {error}") from None


def _noted(lines: Iterable[str], record: list[str]) -> Iterator[str]:
    """Yield lines, each added to a record first."""
    for line in lines:
        record.append(line)
        yield line


def _json_rows(path: Path, file: Iterable[str]) -> Iterator[Cells]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"data.captions.metadata: {path}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"data.captions.metadata: {path}, line {number}: {{...}} is needed in every line")
        yield {column: [str(its)] if isinstance(its, int) else texts_in(its) for column, its in row.items()}


def _parquet_rows(path: Path) -> Iterator[Cells]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"data.captions.metadata: pyarrow has to be installed: {install('curation')}") from None
    try:
        file = pq.ParquetFile(path)
        wanted = [name for name, kind in zip(file.schema_arrow.names, file.schema_arrow.types)
                  if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)
                  or pa.types.is_list(kind)]  # fmt: skip
        for batch in file.iter_batches(columns=wanted):
            for row in batch.to_pylist():
                yield {column: [str(its)] if isinstance(its, int) else texts_in(its) for column, its in row.items()}
    except pa.ArrowException as error:
        raise UserError(f"data.captions.metadata: {path}: not a readable Parquet file ({error})") from None
