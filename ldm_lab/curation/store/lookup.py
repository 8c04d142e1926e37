"""A column of scores out of a store for each row of a table."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow
from numpy.typing import NDArray
from pyarrow import compute, types
from pyarrow.parquet import ParquetFile, ParquetWriter

from ldm_lab.curation.metadata.inputs import Files, find_files
from ldm_lab.curation.metadata.text_files import BadLines, as_parquet
from ldm_lab.curation.store.columns import Columns, not_a_hash
from ldm_lab.curation.store.format import ScoreStore, hashes_of, signed
from ldm_lab.errors import UserError, first_line
from ldm_lab.io.atomic import atomic_write
from ldm_lab.progress import Bar

BATCH = 2**17  # rows
Keys = Callable[[pyarrow.RecordBatch], tuple[NDArray[np.int64], NDArray[np.bool_]]]


def add_scores(
    store: ScoreStore,
    table: str | Path,
    out: str | Path,
    *,
    names: Sequence[str] = ("aesthetic",),
    key: str | None = None,
    url: str | None = None,
    text: str | None = None,
    progress: bool = False,
    bad: BadLines | None = None,
) -> tuple[int, int]:
    """Write a copy of a table as Parquet, with the scores of each row beside its columns.

    Args:
        table: `.parquet`, `.csv`, `.tsv`; the latter with a line of the columns' names, or url and caption.
        out: the Parquet file, replaced when all is written.
        names: of the new columns, float32, null where the store has no such key; one per score of an entry.
        key, url, text: columns, see `Columns.of`.
        progress: show a bar.
        bad: counts the lines of a text file that are left out.

    Returns:
        Rows, and how many of them the store has.

    Raises:
        UserError: no such file, a damaged one, missing columns, hashes that are no integers, no space left.
    """
    if len(names) != store.scores:
        raise UserError(f"--name: {len(names)} names for entries of {store.scores} scores")
    files = find_files(str(table), "table")
    if len(files.paths) > 1 or "://" in files.paths[0]:
        raise UserError(f"table: {table}: one file is looked up at a time")
    if files.format in ("jsonl", "txt"):
        raise UserError(f"table: {table}: a .parquet, .csv or .tsv is looked up")
    out = Path(out).expanduser()
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = found = 0
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", suffix=".text") as folder:
        files = as_parquet(files, Path(folder) / "text", bad or BadLines(), "table")
        schema, batches = _read(files)
        lower = {column.lower(): column for column in schema.names}
        taken = [lower[name.lower()] for name in names if name.lower() in lower]
        if taken:
            raise UserError(f"{table}: has a column {taken[0]!r} already; --name gives the new one another name")
        keys_of = _key_reader(schema, Columns.of(schema.names, str(table), key, url, text))
        added = [pyarrow.field(name, pyarrow.float32()) for name in names]
        whole = pyarrow.schema([*schema, *added], metadata=schema.metadata)
        bar = Bar("looking up", "row", files.rows, scaled=True, shown=progress)
        with bar, atomic_write(out) as file, ParquetWriter(file, whole, compression="zstd") as writer:
            for batch in batches:
                keys, known = keys_of(batch)
                scores, hit = store.get(keys)
                hit &= known
                scores = scores.reshape(len(keys), store.scores)  # [n, V]
                columns = [pyarrow.array(scores[:, n], mask=~hit) for n in range(store.scores)]
                writer.write_batch(pyarrow.record_batch([*batch.columns, *columns], schema=whole))
                rows, found = rows + len(keys), found + int(hit.sum())
                bar.update(len(keys))
    return rows, found


def _read(files: Files) -> tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch]]:
    """Return the schema of a table in Parquet and its record batches. Raises UserError."""
    damaged: tuple[type[Exception], ...] = (pyarrow.ArrowException, OSError)

    def broken(error: Exception) -> UserError:
        return UserError(f"{files.given[0]}: cannot be read, truncated or damaged ({first_line(error)})")

    def guarded(batches: Iterator[pyarrow.RecordBatch]) -> Iterator[pyarrow.RecordBatch]:
        try:
            yield from batches
        except damaged as error:
            raise broken(error) from None

    try:
        file = ParquetFile(files.paths[0])
        return file.schema_arrow, guarded(file.iter_batches(BATCH))
    except damaged as error:
        raise broken(error) from None


def _key_reader(schema: pyarrow.Schema, columns: Columns) -> Keys:
    """Return the function from a batch of n rows to its keys int64 [n], and bool [n] where there is one."""
    if columns.hash is None:
        for name in (columns.url, columns.text):
            kind = _plain(schema.field(name).type)
            if not (_is_text(kind) or types.is_null(kind)):
                raise UserError(f"column {name!r}: texts are hashed, this column is {kind}")

        def hashed(batch: pyarrow.RecordBatch) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
            urls, texts = (batch.column(name).to_pylist() for name in (columns.url, columns.text))
            return hashes_of(urls, texts), np.ones(len(batch), dtype=bool)

        return hashed
    kind = _plain(schema.field(columns.hash).type)
    if not (types.is_integer(kind) or _is_text(kind) or (types.is_decimal(kind) and kind.scale == 0)):
        raise not_a_hash(columns.hash, str(kind), types.is_floating(kind))

    def read(batch: pyarrow.RecordBatch) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        column = batch.column(columns.hash)
        known = column.is_valid().to_numpy(zero_copy_only=False)
        if types.is_signed_integer(kind) and not types.is_dictionary(column.type):
            # with nulls numpy would get floats
            return compute.fill_null(column.cast(pyarrow.int64()), 0).to_numpy(), known
        try:
            keys = [0 if value is None else signed(int(value)) for value in column.to_pylist()]
            return np.array(keys, dtype=np.int64), known
        except (ValueError, OverflowError) as error:
            raise UserError(f"column {columns.hash!r}: a hash is an integer of 64 bits ({first_line(error)})") from None

    return read


def _plain(kind: pyarrow.DataType) -> pyarrow.DataType:
    return kind.value_type if types.is_dictionary(kind) else kind


def _is_text(kind: pyarrow.DataType) -> bool:
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
