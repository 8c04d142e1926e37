"""A score store from Parquet tables larger than memory: DuckDB sorts them by key, spilling to disk.

What the released stores were made with is copied: entries without a key or a score are left out, repeated keys stay
(unless `unique`), in the order of the tables. So the result is, byte for byte, what the published writer makes of the
rows after a stable sort.
"""

import contextlib
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow

from ldm_lab.curation.metadata.inputs import Files, find_files
from ldm_lab.curation.metadata.text_files import BadLines, as_parquet
from ldm_lab.curation.sql import identifier, literal
from ldm_lab.curation.store.columns import Columns, named, not_a_hash
from ldm_lab.curation.store.format import StoreWriter, hashes_of
from ldm_lab.errors import UserError, first_line
from ldm_lab.progress import Bar

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

BATCH = 2**17  # rows
INTEGERS = ("BIGINT", "INTEGER", "SMALLINT", "TINYINT")
UNSIGNED = ("HUGEINT", "UBIGINT", "UINTEGER", "USMALLINT", "UTINYINT")  # or of wider types than a hash's


@dataclass
class Built:
    """What became of the rows of the tables."""

    rows: int
    no_key: int
    no_score: int
    entries: int
    repeated: int
    nan: int


def build_store(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    key: str | None = None,
    url: str | None = None,
    text: str | None = None,
    scores: Sequence[str | None] = (None,),
    unique: bool = False,
    memory: str = "512MB",
    threads: int | None = None,
    temporary: str | Path | None = None,
    progress: bool = False,
    bad: BadLines | None = None,
) -> Built:
    """Write a store of the rows of tables: Parquet, TSV, CSV, JSON lines.

    Args:
        sources: files, globs, folders.
        out: the store, replaced when all is written.
        key, url, text: columns, see `Columns.of`.
        scores: columns of the scores, in the order of the entry; None is the aesthetic score under its known names.
        unique: of repeated keys keep the first; else all, of which look-ups see the first.
        memory: what sorting may hold, as DuckDB writes it; beyond that it spills.
        threads: of DuckDB; None is one per core.
        temporary: folder to spill to; by default the one of `out`. Takes about 30 bytes per row.
        progress: show progress bars.
        bad: counts the lines of text files that are left out.

    Raises:
        UserError: no files, damaged ones, missing columns, hashes that are no integers, a score that no half float
            holds, no space left.
    """
    import duckdb

    files = find_files(list(map(str, sources)), "tables")
    out = Path(out).expanduser()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        spill = tempfile.TemporaryDirectory(dir=temporary or out.parent, prefix=f".{out.name}.", suffix=".sort")
    except OSError as error:
        raise UserError(f"{temporary or out.parent}: cannot be written: {error.strerror}") from None
    try:
        with spill, _connected(spill.name, memory, threads) as db, StoreWriter(out, len(scores), unique) as writer:
            tables = as_parquet(files, Path(spill.name) / "text", bad or BadLines(), "tables")
            rows = _select(db, tables, key, url, text, scores)
            counts = _count(db, rows, len(scores), files.paths[0])
            _write(db, rows, writer, counts, progress)
    except duckdb.OutOfMemoryException as error:
        if "offload" in str(error):  # so it says when the disk is full
            folder = Path(spill.name).parent
            raise UserError(f"{folder}: no space left to sort in; --temporary names another folder") from None
        raise UserError(f"--memory {memory}: too little to sort in ({first_line(error)})") from None
    except duckdb.Error as error:
        more = f" and {len(files.paths) - 1} more" if len(files.paths) > 1 else ""
        raise UserError(f"{files.paths[0]}{more}: {first_line(error)}") from None
    no_key, no_score = counts.total - counts.keyed, counts.keyed - counts.whole
    return Built(counts.total, no_key, no_score, writer.count, writer.repeated, writer.nan)


class _Counts(NamedTuple):
    """Rows, those with a key, those with a key and all scores."""

    total: int
    keyed: int
    whole: int


def _scored(scores: int) -> str:
    """Return the condition that a row has so many scores."""
    return " AND ".join(f"score{n} IS NOT NULL" for n in range(scores))


def _count(database: "DuckDBPyConnection", rows: str, scores: int, where: str) -> _Counts:
    """Return how many rows there are. Raises UserError if none can go into a store."""
    counts = _Counts(
        *database.sql(
            f"SELECT count(*), count(key), count(*) FILTER (WHERE key IS NOT NULL AND {_scored(scores)}) FROM ({rows})"
        ).fetchall()[0]
    )
    if not counts.whole:
        raise UserError(
            f"{where}: no row to build from: of {counts.total:,} rows {counts.total - counts.keyed:,} have no hash, "
            f"{counts.keyed:,} have one and no score"
        )
    return counts


def _write(database: "DuckDBPyConnection", rows: str, writer: StoreWriter, counts: _Counts, progress: bool) -> None:
    """Write the rows that have a key and all scores, in the order of the keys, and of the tables."""
    names = [f"score{n}" for n in range(writer.scores)]
    query = (
        f"SELECT key, {', '.join(names)} FROM ({rows}) WHERE key IS NOT NULL AND {_scored(writer.scores)} "
        "ORDER BY key, file_index, file_row_number"
    )
    database.execute("SET enable_progress_bar = true; SET enable_progress_bar_print = false")
    with _sorting(database, progress):
        batches = database.sql(query).to_arrow_reader(BATCH)
    with Bar("writing", "row", counts.whole, scaled=True, shown=progress) as bar:
        for batch in batches:
            keys, *values = (column.to_numpy(zero_copy_only=False) for column in batch.columns)
            writer.add(keys, np.stack(values, axis=1))  # [n], [n, V]
            bar.update(len(keys))


def _connected(spill: str, memory: str, threads: int | None) -> "DuckDBPyConnection":
    """Return DuckDB, with a folder for what does not fit into memory. Raises UserError about its settings."""
    import duckdb

    config = {"memory_limit": memory, "temp_directory": spill, "preserve_insertion_order": False}
    if threads is not None:
        config["threads"] = threads

    try:
        return duckdb.connect(config=config)
    except duckdb.Error as error:
        given = f"--memory {memory}, --threads {'as many as cores' if threads is None else threads}"
        raise UserError(f"{given}: {first_line(error)}") from None


def _select(
    database: "DuckDBPyConnection",
    tables: Files,
    key: str | None,
    url: str | None,
    text: str | None,
    scores: Sequence[str | None],
) -> str:
    """Return the query of key, score0, score1, ... and of each row's place. Raises UserError about columns."""
    # By name: the first file's types would be those of all, and a float32 among them would round.
    table = f"read_parquet([{', '.join(map(literal, tables.paths))}], union_by_name = true)"
    types = {name: kind for name, kind, *_ in database.sql(f"DESCRIBE SELECT * FROM {table}").fetchall()}
    where, names = tables.given[0], tables.names or tuple(types)
    keys = Columns.of(names, where, key, url, text)
    if keys.hash is None:
        options = {"type": "arrow", "null_handling": "special"}
        database.create_function("ldm_hash", _hash_columns, ["VARCHAR", "VARCHAR"], "BIGINT", **options)
        keyed = f"ldm_hash({', '.join(f'CAST({identifier(name)} AS VARCHAR)' for name in (keys.url, keys.text))})"
    else:
        keyed = _signed(keys.hash, types[keys.hash])
    picked = []
    for number, given in enumerate(scores):
        name = named(given, "aesthetic", names, where)
        kind = types[name]
        if kind not in ("FLOAT", "DOUBLE", "VARCHAR", *INTEGERS, *UNSIGNED) and not kind.startswith("DECIMAL"):
            raise UserError(f"column {name!r}: a score is a number, this column is {kind}")
        cast, to = "TRY_CAST" if kind == "VARCHAR" else "CAST", "FLOAT" if kind == "FLOAT" else "DOUBLE"
        picked.append(f"{cast}({identifier(name)} AS {to}) AS score{number}")
    return f"SELECT {keyed} AS key, {', '.join(picked)}, file_index, file_row_number FROM {table}"


def _signed(name: str, kind: str) -> str:
    """Return the expression of a column of hashes as signed integers. Raises UserError for one of another type."""
    if kind in INTEGERS:
        return identifier(name)
    if kind not in (*UNSIGNED, "VARCHAR") and not (kind.startswith("DECIMAL") and kind.endswith(",0)")):
        raise not_a_hash(name, kind, kind in ("DOUBLE", "FLOAT"))
    wide = f"TRY_CAST({identifier(name)} AS HUGEINT)"
    turns = f"CASE WHEN {wide} BETWEEN {2**63} AND {2**64 - 1} THEN {2**64}::HUGEINT ELSE 0 END"
    return f"TRY_CAST({wide} - {turns} AS BIGINT)"


def _hash_columns(urls: pyarrow.ChunkedArray, texts: pyarrow.ChunkedArray) -> pyarrow.Array:
    return pyarrow.array(hashes_of(urls.to_pylist(), texts.to_pylist()))


@contextlib.contextmanager
def _sorting(database: "DuckDBPyConnection", progress: bool) -> Iterator[None]:
    """Show how far DuckDB is with the query that runs inside; it says so in per cent, to whoever asks."""
    done = threading.Event()

    def watch() -> None:
        with Bar("sorting", "%", 100) as bar:
            while not done.wait(0.5):
                bar.advance(max(round(database.query_progress()), bar.n))
            bar.advance(100)

    watcher = threading.Thread(target=watch, daemon=True) if progress else None
    if watcher:
        watcher.start()
    try:
        yield
    finally:
        done.set()
        if watcher:
            watcher.join()
