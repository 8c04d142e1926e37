"""Files of metadata: which ones a pattern stands for, their columns, and what is wrong with them."""

import glob
import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ldm_lab.curation.metadata.layouts import Layout, layouts_of, table_types, unique_names
from ldm_lab.errors import UserError, first_line

TEXTS = {".tsv": "\t", ".csv": ","}  # ending -> delimiter; also with .gz behind it
DISK_FULL = (
    "No space left",
    "File too large",
    "quota exceeded",
)  # in an engine's errors that are not the input's fault
UNNAMED = ["url", "caption"]  # the columns of a text file without a header line, as CC12M comes


@dataclass(frozen=True)
class Files:
    """Files of one table.

    Attributes:
        paths: local paths or addresses, in a fixed order.
        names: the columns as the files spell them.
        delimiter: of a text file, "" for Parquet.
        header: whether a text file begins with the columns' names.
        rows: how many there are, if that is known without reading them.
        layouts: of Parquet files, by the columns that they have; () where they cannot be read from here.
        types: column -> its type in the whole table.
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]
    delimiter: str = ""
    header: bool = True
    rows: int | None = None
    layouts: tuple[Layout, ...] = ()
    types: Mapping[str, pa.DataType] = field(default_factory=dict)

    @property
    def unique_names(self) -> list[str]:
        """The columns, made different in more than case."""
        return unique_names(self.names)

    @property
    def columns(self) -> dict[str, str]:
        """The column of an engine's table for each name in the files."""
        return dict(zip(self.names, self.unique_names))

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
    paths: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        paths += _expand(pattern, where)
    if not paths:
        raise UserError(f"{where}: no file is given")
    kinds = {_delimiter(path) for path in paths}
    if len(kinds) > 1:
        raise UserError(f"{where}: Parquet and text files cannot be mixed in one table")
    delimiter = kinds.pop()
    local = [path for path in paths if "://" not in path]
    if delimiter:
        if not local:
            raise UserError(f"{where}: text files have to lie on a local disk")
        return _text_files(paths, delimiter, where)
    if not local:
        return Files(tuple(paths), ())
    return _parquet_files(paths, local, where)


def _expand(pattern: str, where: str) -> list[str]:
    if pattern.startswith("file:///"):
        pattern = pattern.removeprefix("file://")
    if "://" in pattern:
        return [pattern]
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = sorted(map(str, path.glob("*.parquet"))) or sorted(
            str(file) for file in path.iterdir() if _is_text(str(file))
        )
        if not found:
            raise UserError(f"{where}: {path}: no .parquet, .tsv or .csv file in this folder")
        return found
    if glob.has_magic(str(path)) and not path.exists():
        found = sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
        if not found:
            raise UserError(f"{where}: {pattern!r} matches no file")
        return found
    if not path.is_file():
        raise UserError(f"{where}: {path}: no such file or folder")
    return [str(path)]


def _is_text(path: str) -> bool:
    return Path(path.lower().removesuffix(".gz")).suffix in TEXTS


def _delimiter(path: str) -> str:
    return TEXTS[Path(path.lower().removesuffix(".gz")).suffix] if _is_text(path) else ""


def _text_files(paths: list[str], delimiter: str, where: str) -> Files:
    """Return text files with their columns: those of the first line, unless that holds an address."""
    heads = []
    for path in paths:
        try:
            with (gzip.open if path.lower().endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as file:
                heads.append(file.readline().rstrip("\r\n").split(delimiter))
        except (OSError, UnicodeDecodeError, EOFError) as error:
            raise UserError(f"{where}: {path}: not a readable text file ({error})") from None
        if heads[-1] == [""]:
            raise UserError(f"{where}: {path}: begins with an empty line, or is empty")
    header = not any("://" in value for value in heads[0])
    if header and any(head != heads[0] for head in heads):
        odd = paths[next(i for i, head in enumerate(heads) if head != heads[0])]
        raise UserError(f"{where}: {odd} has other columns than {paths[0]}")
    if not header and len(heads[0]) != len(UNNAMED):
        raise UserError(
            f"{where}: {paths[0]} has no line with the columns' names, and {len(heads[0])} columns; without names it "
            f"is taken for {' and '.join(UNNAMED)}"
        )
    return Files(tuple(paths), tuple(heads[0] if header else UNNAMED), delimiter, header)


def _parquet_files(paths: list[str], local: list[str], where: str) -> Files:
    schemas, rows = [], 0
    for path in local:
        try:
            metadata = pq.read_metadata(path)
            schemas.append((path, metadata.schema.to_arrow_schema()))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{where}: {path}: not a readable Parquet file: {first_line(error)}") from None
        rows += metadata.num_rows
    names, layouts = layouts_of(schemas)
    if not names:
        raise UserError(f"{where}: {local[0]} has no columns")
    kinds = table_types(names, layouts, where)
    if len(local) < len(paths):  # what lies elsewhere is taken for files like the first
        elsewhere = tuple(path for path in paths if "://" in path)
        layouts[0] = replace(layouts[0], paths=layouts[0].paths + elsewhere)
    known = rows if len(local) == len(paths) else None
    return Files(tuple(paths), tuple(names), rows=known, layouts=tuple(layouts), types=kinds)


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
        if "://" in path or files.delimiter:
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
