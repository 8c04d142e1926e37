"""A column of scores out of a store for each row of a table."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow
from numpy.typing import NDArray
from pyarrow import compute, types
from pyarrow.parquet import ParquetFile, ParquetWriter

from ldm_lab.curation.metadata.inputs import Files, find_files
from ldm_lab.curation.sql import literal
from ldm_lab.curation.store.columns import Columns, not_a_hash
from ldm_lab.curation.store.format import ScoreStore, hashes_of
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
) -> tuple[int, int]:
    """Write a copy of a table as Parquet, with the scores of each row beside its columns.

    Args:
        table: `.parquet`, `.csv`, or `.tsv` (without quoting); with a line of the columns' names, or url and caption.
        out: the Parquet file, replaced when all is written.
        names: of the new columns, float32, null where the store has no such key; one per score of an entry.
        key, url, text: columns, see `Columns.of`.
        progress: show a bar.

    Returns:
        Rows, and how many of them the store has.

    Raises:
        UserError: no such file, a damaged one, missing columns, hashes that are no integers, no space left.
    """
    if len(names) != store.scores:
        raise UserError(f"--name: {len(names)} names for entries of {store.scores} scores")
    rows = found = 0
    files = find_files(str(table), "table")
    if len(files.paths) > 1 or "://" in files.paths[0]:
        raise UserError(f"table: {table}: one file is looked up at a time")
    if files.format in ("jsonl", "txt"):
        raise UserError(f"table: {table}: a .parquet, .csv or .tsv is looked up")
    schema, batches = _read(files)
    lower = {column.lower(): column for column in schema.names}
    taken = [lower[name.lower()] for name in names if name.lower() in lower]
    if taken:
        raise UserError(f"{table}: has a column {taken[0]!r} already; --name gives the new one another name")
    keys_of = _key_reader(schema, Columns.of(schema.names, str(table), key, url, text))
    added = [pyarrow.field(name, pyarrow.float32()) for name in names]
    whole = pyarrow.schema([*schema, *added], metadata=schema.metadata)
    bar = Bar("looking up", "row", files.rows, scaled=True, shown=progress)
    with bar, atomic_write(Path(out).expanduser()) as file, ParquetWriter(file, whole, compression="zstd") as writer:
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
    """Return a table's schema and its record batches. Raises UserError."""
    import duckdb

    damaged: tuple[type[Exception], ...] = (duckdb.Error, pyarrow.ArrowException, OSError)

    def broken(error: Exception) -> UserError:
        return UserError(f"{files.paths[0]}: cannot be read, truncated or damaged ({first_line(error)})")

    def guarded(batches: Iterator[pyarrow.RecordBatch]) -> Iterator[pyarrow.RecordBatch]:
        try:
            yield from batches
        except damaged as error:
            raise broken(error) from None

    try:
        if not files.format:
            file = ParquetFile(files.paths[0])
            return file.schema_arrow, guarded(file.iter_batches(BATCH))
        # Texts stay texts, as guessed types would turn 007 into 7; a TSV has no quotes.
        delimiter, quote = ("\t", "") if files.format == "tsv" else (",", '"')
        columns = ", ".join(f"{literal(name)}: 'VARCHAR'" for name in files.unique_names)
        query = (
            f"SELECT * FROM read_csv({literal(files.paths[0])}, delim = {literal(delimiter)}, quote = '{quote}', "
            f"escape = '{quote}', header = {files.heads[0].is_line}, columns = {{{columns}}}, auto_detect = false)"
        )
        reader = duckdb.connect().sql(query).to_arrow_reader(BATCH)
        return reader.schema, guarded(reader)
    except damaged as error:
        raise broken(error) from None


def _key_reader(schema: pyarrow.Schema, columns: Columns) -> Keys:
    """Return the function from a batch of n rows to its keys int64 [n], and bool [n] where there is one."""
    if columns.hash is None:
        for name in (columns.url, columns.text):
            kind = schema.field(name).type
            if not (types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)):
                raise UserError(f"column {name!r}: texts are hashed, this column is {kind}")

        def hashed(batch: pyarrow.RecordBatch) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
            urls, texts = (batch.column(name).to_pylist() for name in (columns.url, columns.text))
            return hashes_of(urls, texts), np.ones(len(batch), dtype=bool)

        return hashed
    kind = schema.field(columns.hash).type
    if not (types.is_signed_integer(kind) or types.is_string(kind) or types.is_large_string(kind)):
        raise not_a_hash(columns.hash, str(kind), types.is_floating(kind))

    def read(batch: pyarrow.RecordBatch) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        column = batch.column(columns.hash)
        try:
            keys = compute.fill_null(column.cast(pyarrow.int64()), 0)  # with nulls numpy would get floats
        except pyarrow.ArrowInvalid as error:
            line = first_line(error)
            raise UserError(f"column {columns.hash!r}: a hash is a signed integer of 64 bits ({line})") from None
        return keys.to_numpy(), column.is_valid().to_numpy(zero_copy_only=False)

    return read
