"""Text files as Parquet: TSV, CSV, lists of urls, JSON lines. A bad line is left out and counted, not its neighbors.

Engines read such files in ways of their own and stop at the first bad line. Read here, line by line, they are one table
for all engines.
"""

import json
import re
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ldm_lab.curation.metadata.inputs import Files, TextHead, find_files
from ldm_lab.curation.metadata.layouts import unique_names
from ldm_lab.curation.metadata.text_lines import LONGEST, BadLine, csv_fields, open_bytes, read_lines
from ldm_lab.errors import UserError
from ldm_lab.io.json_files import Json

MOST_QUOTED = 1000  # lines that one quoted field may go over
ROWS = 50_000  # held at a time
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://\S+", re.I)
EXAMPLES = 3  # bad lines that are named for each reason
Row = Sequence[str | None]
Line = tuple[int, str]  # its number and text


@dataclass
class BadLines:
    """Lines that were left out.

    Attributes:
        as_error: raise instead of counting.
        counts: reason -> lines.
        examples: reason -> the first of them, as "file, line 7".
    """

    as_error: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, path: str, line: int, reason: str) -> None:
        """Note a bad line. Raises UserError if it is to be an error."""
        where = f"{path}, line {line}"
        if self.as_error:
            raise UserError(f"{where}: {reason}; bad_lines=skip leaves such lines out and counts them")
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(where)

    def notes(self) -> list[str]:
        """Return what to say for each reason."""
        return [
            f"{count:,} bad {'line' if count == 1 else 'lines'} left out: {reason} ({'; '.join(self.examples[reason])}"
            f"{'; ...' if count > len(self.examples[reason]) else ''})"
            for reason, count in self.counts.most_common()
        ]


def as_parquet(files: Files, folder: Path, bad: BadLines, where: str) -> Files:
    """Return text files as Parquet files in a folder; other files as they are.

    Raises:
        UserError: a file that cannot be read, no good line in any, a bad line if these are to be errors.
    """
    if not files.format:
        return files
    folder.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(files.paths):
        target = folder / f"{number:06d}.parquet"
        try:
            if files.format == "jsonl":
                _write_json(path, target, bad)
            else:
                _write_rows(path, files.format, files.heads[number], target, bad)
        except (EOFError, zlib.error, UnicodeError) as error:
            raise UserError(f"{where}: {path}: not a readable text file ({error})") from None
        except OSError as error:
            if error.errno is not None:
                raise
            raise UserError(f"{where}: {path}: not a readable text file ({error})") from None
    read = find_files(str(folder), where) if any(folder.glob("*.parquet")) else None
    if read is None or not read.rows:
        said = "; ".join(bad.notes())
        raise UserError(f"{where}: {files.paths[0]}: no row in it{': ' if said else ''}{said}")
    return replace(read, sources=files.paths, heads=files.heads, notes=files.notes)


def _text_lines(path: str, bad: BadLines) -> Iterator[Line]:
    """Return the lines of a file that can be read, empty ones too."""
    with open_bytes(path) as file:
        for number, line in read_lines(file):
            if line is None:
                bad.add(path, number, f"over {LONGEST // 2**20} MB")
            else:
                try:
                    yield number, line.decode()
                except UnicodeDecodeError:
                    bad.add(path, number, "not UTF-8")


def _write_rows(path: str, kind: str, head: TextHead, target: Path, bad: BadLines) -> None:
    """Write the rows of a TSV, CSV or list of urls, all columns as texts, empty ones as unknown."""
    lines = _text_lines(path, bad)
    width = len(head.names)
    rows = _csv_rows(path, lines, width, bad) if kind == "csv" else _plain_rows(path, lines, kind, width, bad)
    if head.is_line:
        next(rows, None)
    schema = pa.schema([(name, pa.string()) for name in unique_names(head.names)])
    with pq.ParquetWriter(target, schema, compression="snappy") as writer:
        while batch := list(islice(rows, ROWS)):
            columns = [pa.array(column, pa.string()) for column in zip(*batch, strict=True)]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _plain_rows(path: str, lines: Iterable[Line], kind: str, width: int, bad: BadLines) -> Iterator[Row]:
    """Return the rows of lines without quotes."""
    for number, line in lines:
        if not line:
            continue
        try:
            yield _checked(line.split("\t") if kind == "tsv" else [_address(line)], width)
        except BadLine as error:
            bad.add(path, number, str(error))


def _address(line: str) -> str:
    """Return the url on a line, or the word "url" above a list of them. Raises BadLine."""
    address = line.strip()
    if address.lower() != "url" and not ADDRESS.fullmatch(address):
        raise BadLine("no url")
    return address


def _checked(row: Sequence[str], width: int, is_quoted: bool = False) -> Row:
    """Return a row with None for empty fields. Raises BadLine."""
    if len(row) != width:
        raise BadLine(f"{len(row)} {'field' if len(row) == 1 else 'fields'} instead of {width}")
    if not is_quoted and any("\r" in value for value in row):
        raise BadLine("a stray carriage return")
    return [value or None for value in row]


def _csv_rows(path: str, lines: Iterator[Line], width: int, bad: BadLines) -> Iterator[Row]:
    """Return the rows of a CSV, whose quoted fields may go over several lines.

    A quotation mark without an end spoils its own line, not those that were looked at in search of the end.
    """
    ahead: deque[Line] = deque()
    while line := (ahead.popleft() if ahead else next(lines, None)):
        number, record = line
        if not record:
            continue
        taken: list[Line] = []
        try:
            while (row := csv_fields(record)) is None:
                record = _continued(record, ahead, lines, taken)
            yield _checked(row, width, is_quoted='"' in record)
        except BadLine as error:
            ahead.extendleft(reversed(taken))
            bad.add(path, number, str(error))


def _continued(record: str, ahead: deque[Line], lines: Iterator[Line], taken: list[Line]) -> str:
    """Return a record with the lines behind it up to the next with a quotation mark, which go into `taken`."""
    while line := (ahead.popleft() if ahead else next(lines, None)):
        taken.append(line)
        if len(taken) > MOST_QUOTED or len(record) + len(line[1]) > LONGEST:
            break
        record += f"\n{line[1]}"
        if '"' in line[1]:
            return record
    raise BadLine("a quotation mark without its end")


def _write_json(path: str, target: Path, bad: BadLines) -> None:
    """Write the objects of JSON lines, some at a time: each Parquet file has the types of its own."""
    rows = _json_rows(path, bad)
    part = 0
    while batch := list(islice(rows, ROWS)):
        names = list(dict.fromkeys(name for row in batch for name in row))
        columns = [_json_column([row.get(name) for row in batch]) for name in names]
        table = pa.Table.from_arrays(columns, names=names)
        pq.write_table(table, target.with_name(f"{target.stem}-{part:06d}.parquet"), compression="snappy")
        part += 1


def _json_rows(path: str, bad: BadLines) -> Iterator[Mapping[str, Json]]:
    for number, line in _text_lines(path, bad):
        if not line:
            continue
        try:
            row = json.loads(line)
            line.encode() if "\\ud" not in line.lower() else json.dumps(row, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            bad.add(path, number, "not JSON")
            continue
        if isinstance(row, dict) and row:
            yield row
        else:
            bad.add(path, number, "not a JSON object with fields")


def _json_column(values: list[Json]) -> pa.Array:
    """Return values as a column of the narrowest type that holds all: numbers, or texts; lists as JSON."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {bool}:
        return pa.array(values, pa.bool_() if kinds else pa.null())
    if kinds == {int}:
        for kind in (pa.int64(), pa.uint64()):
            try:
                return pa.array(values, kind)
            except (OverflowError, pa.ArrowInvalid):
                continue
    elif kinds == {int, float} or kinds == {float}:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    return pa.array(texts, pa.string())
