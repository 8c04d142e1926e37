"""Files of metadata: which ones a pattern stands for, their columns, and what is wrong with them."""

import glob
import os
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ldm_lab.curation.metadata.layouts import Layout, check_columns, is_index, layouts_of, table_types, unique_names
from ldm_lab.curation.metadata.text_lines import BadLine, csv_fields, open_bytes, read_lines
from ldm_lab.errors import UserError, first_line
from ldm_lab.io.near import meant, near_paths

# ending -> format, also with .gz behind it
FORMATS = {".tsv": "tsv", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "txt"}
HEAD_LINES = 100  # that are looked at to see how many columns a text file without names has
DISK_FULL = (
    "No space left",
    "File too large",
    "quota exceeded",
)  # in an engine's errors that are not the input's fault
UNNAMED = ("url", "caption")  # the columns of a text file without a header line, as CC12M comes; CC3M the other way


class TextHead(NamedTuple):
    """The columns of a text file; `is_line`: they are the file's first line."""

    names: tuple[str, ...]
    is_line: bool


@dataclass(frozen=True)
class Files:
    """Files of one table.

    Attributes:
        paths: local paths or addresses, in a fixed order.
        names: the columns as the files spell them.
        format: of text files, one of `FORMATS`; "" for Parquet.
        heads: of each text file but JSON lines.
        sources: the text files that these were made of, which their names number; () where they are their own.
        notes: of files that were left aside.
        rows: how many there are, if that is known without reading them.
        layouts: of Parquet files, by the columns that they have; () where they cannot be read from here.
        types: column -> its type in the whole table.
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]
    format: str = ""
    heads: tuple[TextHead, ...] = ()
    sources: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    rows: int | None = None
    layouts: tuple[Layout, ...] = ()
    types: Mapping[str, pa.DataType] = field(default_factory=dict)

    @property
    def given(self) -> tuple[str, ...]:
        """The files as the user knows them."""
        return self.sources or self.paths

    @property
    def unique_names(self) -> list[str]:
        """The columns, made different in more than case."""
        return unique_names(self.names)

    @property
    def columns(self) -> dict[str, str]:
        """The column of an engine's table for each name in the files."""
        return dict(zip(self.names, self.unique_names))

    def known(self, path: str) -> str:
        """Return a file as the user knows it, which is another if this one was made of it."""
        return self.sources[int(Path(path).stem[:6])] if self.sources else path

    def without(self, broken: "Sequence[Broken]") -> "Files":
        """Return the table without some of its files."""
        gone = {one.path for one in broken}
        left = [replace(one, paths=tuple(path for path in one.paths if path not in gone)) for one in self.layouts]
        return replace(
            self,
            paths=tuple(path for path in self.paths if path not in gone),
            layouts=tuple(one for one in left if one.paths),
            rows=None if self.rows is None else self.rows - sum(one.rows for one in broken),
        )


def find_files(patterns: str | Sequence[str], where: str) -> Files:
    """Return the files that some patterns stand for: paths, folders, globs; addresses with :// are taken as they are.

    Raises:
        UserError: none there, of different kinds or columns, or not readable.
    """
    given: list[str] = []
    notes: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found, more = _expand(pattern, where)
        given, notes = given + found, notes + more
    if not given:
        raise UserError(f"{where}: no file is given")
    places = {path: path if "://" in path else os.path.realpath(path) for path in given}
    paths = list({place: path for path, place in reversed(places.items())}.values())[::-1]
    if len(paths) < len(given):
        notes.append(f"{len(given) - len(paths):,} files are given more than once, and read once")
    return replace(_files(paths, where), notes=tuple(notes))


def _files(paths: list[str], where: str) -> Files:
    """Return files with their columns. Raises UserError."""
    kinds = {_format(path) for path in paths}
    if len(kinds) > 1:
        said = " and ".join(sorted(kind.upper() or "Parquet" for kind in kinds))
        raise UserError(f"{where}: {said} files cannot be mixed in one table")
    kind = kinds.pop()
    local = [path for path in paths if "://" not in path]
    if kind:
        if len(local) < len(paths):
            raise UserError(f"{where}: text files have to lie on a local disk")
        return _text_files(paths, kind, where)
    if not local:
        return Files(tuple(paths), ())
    return _parquet_files(paths, local, where)


def _expand(pattern: str, where: str) -> tuple[list[str], list[str]]:
    """Return the files that a pattern stands for, and notes of what else is in a folder."""
    if pattern.startswith("file:///"):
        pattern = pattern.removeprefix("file://")
    if "://" in pattern:
        return [pattern], []
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = _tables_in(path)
        below = [str(one) for one in sorted(path.glob("*/*.parquet"))]
        if not found:
            hint = f"; below it there are such as {below[0]}: write {path}/**/*.parquet" if below else ""
            raise UserError(f"{where}: {path}: no .parquet, .tsv, .csv, .jsonl or .txt file in this folder{hint}")
        aside = [*(str(one) for one in sorted(path.iterdir()) if _is_other_table(one, found)), *below]
        notes = [f"{len(aside)} files of {path} are left aside, such as {aside[0]}"] if aside else []
        return found, notes
    if glob.has_magic(str(path)) and not path.exists():
        found = sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
        if not found:
            raise UserError(f"{where}: {pattern!r} matches no file")
        return found, []
    if not path.is_file():
        raise UserError(f"{where}: {path}: no such file or folder{meant(near_paths(path))}")
    return [str(path)], []


def _tables_in(folder: Path) -> list[str]:
    """Return the files of a table in a folder: Parquet, or else the first format of texts that is there.

    Names that begin with a dot or _ are what systems and programs keep for themselves.
    """
    names = sorted(str(one) for one in folder.iterdir() if one.is_file() and not one.name.startswith((".", "_")))
    found = [name for name in names if name.endswith(".parquet")]
    for kind in FORMATS.values():
        found = found or [name for name in names if _format(name) == kind]
    return found


def _is_other_table(path: Path, found: list[str]) -> bool:
    """Return whether a file is a table, not a README, that is not among those of a folder that are read."""
    is_table = path.suffix == ".parquet" or _format(path.name) not in ("", "txt")
    return is_table and path.is_file() and str(path) not in found


def _format(path: str) -> str:
    return FORMATS.get(Path(path.lower().removesuffix(".gz")).suffix, "")


def _text_files(paths: list[str], kind: str, where: str) -> Files:
    """Return text files with their columns, as far as their beginnings say them."""
    if kind == "jsonl":
        return Files(tuple(paths), (), kind)
    heads: list[TextHead] = []
    for path in paths:
        try:
            with open_bytes(path) as file:
                begin = [line.decode(errors="replace") for _, line in islice(read_lines(file), HEAD_LINES) if line]
        except (OSError, EOFError, zlib.error, UnicodeError) as error:
            raise UserError(f"{where}: {path}: not a readable text file ({first_line(error)})") from None
        if not begin:
            raise UserError(f"{where}: {path}: is empty, or begins with empty lines")
        if begin[0].startswith("PAR1"):
            raise UserError(f"{where}: {path}: is a Parquet file; its name has to end in .parquet")
        if len(begin) == 1 and begin[0].count("\r") > 1:
            raise UserError(f"{where}: {path}: its lines end in carriage returns alone; line feeds are needed")
        heads.append(_head(path, kind, begin, heads[0].names if heads else (), where))
    names = dict.fromkeys(name for head in heads for name in head.names)
    return Files(tuple(paths), tuple(names), kind, tuple(heads))


def _head(path: str, kind: str, lines: list[str], others: tuple[str, ...], where: str) -> TextHead:
    """Return a file's columns: those of its first line, unless that holds an address; then those of the first file, if
    they are as many, or url and caption."""
    if kind == "txt":
        return TextHead(("url",), lines[0].strip().lower() == "url")
    rows = [row for line in lines if (row := _fields(line, kind))]
    first = rows[0] if rows else []
    if first and not any("://" in value for value in first):
        names = tuple(name.strip() for name in first)
        check_columns(names, f"{where}: {path}")
        return TextHead(names, True)
    width = Counter(len(row) for row in rows).most_common(1)[0][0] if rows else 0
    first_of_two, second = (sum("://" in row[place] for row in rows if len(row) == 2) for place in (0, 1))
    for names in (others, UNNAMED if first_of_two >= second else UNNAMED[::-1]):
        if len(names) == width:
            return TextHead(tuple(names), False)
    raise UserError(
        f"{where}: {path} has no line with the columns' names, and {width} columns; without names it is taken for "
        f"{' and '.join(UNNAMED)}"
    )


def _fields(line: str, kind: str) -> list[str]:
    try:
        return line.split("\t") if kind == "tsv" else csv_fields(line) or []
    except BadLine:
        return []


def _parquet_files(paths: list[str], local: list[str], where: str) -> Files:
    schemas, rows = [], 0
    for path in local:
        try:
            metadata = pq.read_metadata(path)
            schemas.append((path, metadata.schema.to_arrow_schema()))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{where}: {path}: not a readable Parquet file: {first_line(error)}") from None
        rows += metadata.num_rows
    for path, schema in schemas:
        check_columns(schema.names, f"{where}: {path}")
    names, layouts = layouts_of(schemas)
    if not names:
        raise UserError(f"{where}: {local[0]} has no columns")
    kinds = table_types(names, layouts, where)
    if len(local) < len(paths):  # what lies elsewhere is taken for files like the first
        elsewhere = tuple(path for path in paths if "://" in path)
        layouts[0] = replace(layouts[0], paths=layouts[0].paths + elsewhere)
    known = rows if len(local) == len(paths) else None
    return Files(tuple(paths), tuple(names), rows=known, layouts=tuple(layouts), types=kinds)


def table_notes(files: Files) -> list[str]:
    """Return what to say of a table's columns: assumed names, those left out, those that some files do not have."""
    notes = list(files.notes)
    partitions = {part for path in files.given for part in Path(path).parent.parts if "=" in part}
    if partitions:
        notes.append(f"what folders are called is no column of the table: {', '.join(sorted(partitions)[:3])}")
    unnamed = [path for path, head in zip(files.given, files.heads) if not head.is_line and head.names != ("url",)]
    if unnamed:
        names = next(head.names for head in files.heads if not head.is_line)
        more = f" (and {len(unnamed) - 1} more)" if len(unnamed) > 1 else ""
        notes.append(f"{unnamed[0]}{more} has no line with the columns' names; taken for {', '.join(names)}")
    indices = dict.fromkeys(name for one in files.layouts for name in one.names if is_index(name))
    if indices:
        notes.append(f"left out, as an index of pandas': {', '.join(name or repr(name) for name in indices)}")
    total = sum(len(layout.paths) for layout in files.layouts)
    for name in files.names:
        without = [path for layout in files.layouts if name not in layout.columns for path in layout.paths]
        if without:
            where = files.known(without[0])
            notes.append(f"the column {name} is not in {len(without)} of {total} files, such as {where}: unknown")
    return notes


@dataclass(frozen=True)
class Broken:
    """A Parquet file with a row group that cannot be read."""

    path: str
    row_group: int
    row_groups: int
    rows: int  # of the file
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: row group {self.row_group + 1} of {self.row_groups} is damaged ({self.reason})"


def broken_files(files: Files, columns: Sequence[str] | None = None) -> list[Broken]:
    """Return the local Parquet files that cannot be read to their end. Reads all of them."""
    broken = []
    for path in files.paths:
        if "://" in path or files.format:
            continue
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                try:
                    file.read_row_group(group, columns=columns)
                except (pa.ArrowException, OSError, ValueError) as error:
                    rows = file.metadata.num_rows
                    broken.append(Broken(path, group, file.num_row_groups, rows, first_line(error)))
                    break
    return broken
