"""A score store from Parquet tables larger than memory: DuckDB sorts them by key, spilling to disk.

What the released stores were made with is copied: entries without a key or a score are left out, repeated keys stay
(unless `unique`), in the order of the tables. So the result is, byte for byte, what the published writer makes of the
rows after a stable sort.
"""

import contextlib
import glob
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm_lab.curation.store import StoreWriter, hashes_of
from ldm_lab.errors import UserError

# Names of columns, in the releases and in what img2dataset and `score` write; the case of letters does not matter.
KEY_COLUMNS = ("hash",)
URL_COLUMNS = ("url", "image_url")
TEXT_COLUMNS = ("text", "caption", "top_caption")
SCORE_COLUMNS = ("aesthetic", "aesthetic_score", "prediction")
BATCH = 2**17  # rows


@dataclass
class Built:
    """What became of the rows of the tables."""

    rows: int
    no_key: int
    no_score: int
    entries: int
    repeated: int
    nan: int


def parquet_files(sources: Sequence[str | Path]) -> list[str]:
    """Return the Parquet files that some paths, globs and folders stand for, in the order given; a glob's sorted.

    Raises UserError where there is none.
    """
    files = []
    for source in map(os.path.expanduser, map(str, sources)):
        if os.path.isdir(source):
            found = sorted(glob.glob(os.path.join(glob.escape(source), "**", "*.parquet"), recursive=True))
        elif os.path.isfile(source):
            found = [source]
        else:
            found = sorted(path for path in glob.glob(source, recursive=True) if os.path.isfile(path))
        if not found:
            raise UserError(f"{source}: no Parquet file there")
        files += found
    return files


def pick(columns: Sequence[str], given: str | None, known: Sequence[str], what: str, option: str) -> str:
    """Return the column that holds something: the one given, or else the first known name, in any case of letters.

    Raises UserError, with all the names there are, if it is not there.
    """
    lower = {column.lower(): column for column in reversed(columns)}
    for name in (given,) if given is not None else known:
        if name in columns:
            return name
        if name.lower() in lower:
            return lower[name.lower()]
    looked = repr(given) if given is not None else " or ".join(map(repr, known))
    raise UserError(f"no column with {what} ({looked}); {option} names it. There are: {', '.join(columns) or 'none'}")


def has_hash(columns: Sequence[str]) -> bool:
    """Return whether one of some columns has the name of the hash."""
    return any(column.lower() in KEY_COLUMNS for column in columns)


def not_a_hash(column: str, kind: str, is_float: bool) -> str:
    """Return the message about a column of hashes of the wrong type."""
    why = ", which cannot hold one exactly" if is_float else ""
    return (
        f"column {column!r}: a hash is a signed integer of 64 bits, this column is {kind}{why}; "
        "--url and --text hash these columns instead"
    )


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
) -> Built:
    """Write a store of the rows of Parquet tables.

    Args:
        sources: files, globs, folders.
        out: the store, replaced when all is written.
        key: column of hashes; by default `hash`, and where there is none, or with `url` or `text`, url and text are
            hashed.
        url, text: columns; by default those of the releases and of img2dataset.
        scores: columns of the scores, in the order of the entry; None is the aesthetic score under its known names.
        unique: of repeated keys keep the first; else all, of which look-ups see the first.
        memory: what sorting may hold, as DuckDB writes it; beyond that it spills.
        threads: of DuckDB; None is one per core.
        temporary: folder to spill to; by default the one of `out`. Takes about 30 bytes per row.
        progress: show progress bars.

    Raises:
        UserError: no files, damaged ones, missing columns, hashes that are no integers, a score that no half float
            holds, no space left.
    """
    import duckdb

    files = parquet_files(sources)
    out = Path(out).expanduser()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        spill = tempfile.TemporaryDirectory(dir=temporary or out.parent, prefix=f".{out.name}.", suffix=".sort")
    except OSError as error:
        raise UserError(f"{temporary or out.parent}: cannot be written: {error.strerror}") from None
    config = {"memory_limit": memory, "temp_directory": spill.name, "preserve_insertion_order": False}
    if threads is not None:
        config["threads"] = threads
    try:
        with spill, duckdb.connect(config=config) as database:
            rows = _select(database, files, key, url, text, scores)
            names = [f"score{n}" for n in range(len(scores))]
            some = " AND ".join(f"{name} IS NOT NULL" for name in names)
            total, keyed, whole = database.sql(
                f"SELECT count(*), count(key), count(*) FILTER (WHERE key IS NOT NULL AND {some}) FROM ({rows})"
            ).fetchall()[0]
            query = (
                f"SELECT key, {', '.join(names)} FROM ({rows}) WHERE key IS NOT NULL AND {some} "
                "ORDER BY key, file_index, file_row_number"
            )
            database.execute("SET enable_progress_bar = true; SET enable_progress_bar_print = false")
            with StoreWriter(out, len(scores), unique) as writer:
                with _sorting(database, progress):
                    batches = database.sql(query).to_arrow_reader(BATCH)
                with tqdm(desc="writing", total=whole, unit="row", unit_scale=True, disable=not progress) as bar:
                    for batch in batches:
                        keys, *values = (column.to_numpy(zero_copy_only=False) for column in batch.columns)
                        writer.add(keys, _stacked(values))
                        bar.update(len(keys))
    except duckdb.OutOfMemoryException as error:
        raise UserError(f"memory {memory}: too little to sort in ({first_line(error)})") from None
    except duckdb.Error as error:
        raise UserError(f"{files[0]}{f' and {len(files) - 1} more' * (len(files) > 1)}: {first_line(error)}") from None
    return Built(total, total - keyed, keyed - whole, writer.count, writer.repeated, writer.nan)


def _select(database: Any, files: list[str], key: str | None, url: str | None, text: str | None, scores: Any) -> str:
    """Return the query of key, score0, score1, ... and of each row's place. Raises UserError about columns."""
    table = f"read_parquet([{', '.join(map(literal, files))}], union_by_name = true)"
    types = {name: kind for name, kind, *_ in database.sql(f"DESCRIBE SELECT * FROM {table}").fetchall()}
    columns = list(types)
    if key is None and (url is not None or text is not None or not has_hash(columns)):
        chosen = [
            pick(columns, url, URL_COLUMNS, "the url, and none with the hash", "--url"),
            pick(columns, text, TEXT_COLUMNS, "the text, and none with the hash", "--text"),
        ]
        database.create_function("ldm_hash", _hash_columns, ["VARCHAR", "VARCHAR"], "BIGINT", type="arrow",
                                 null_handling="special")  # fmt: skip
        keyed = f"ldm_hash({', '.join(f'CAST({_quoted(name)} AS VARCHAR)' for name in chosen)})"
    else:
        chosen = [pick(columns, key, KEY_COLUMNS, "the hash", "--key")]
        if types[chosen[0]] not in ("BIGINT", "INTEGER", "SMALLINT", "TINYINT"):
            kind = types[chosen[0]]
            raise UserError(not_a_hash(chosen[0], kind, kind in ("DOUBLE", "FLOAT")))
        keyed = _quoted(chosen[0])
    values = [pick(columns, name, SCORE_COLUMNS, "the score", "--score") for name in scores]
    numbers = ("FLOAT", "DOUBLE", "BIGINT", "INTEGER", "SMALLINT", "TINYINT")
    for name in values:
        if types[name] not in numbers and not types[name].startswith("DECIMAL"):
            raise UserError(f"column {name!r}: a score is a number, this column is {types[name]}")
    _check_everywhere(database, files, [*chosen, *values])
    kinds = ["FLOAT" if types[name] == "FLOAT" else "DOUBLE" for name in values]
    picked = [f"CAST({_quoted(name)} AS {kind}) AS score{n}" for n, (name, kind) in enumerate(zip(values, kinds))]
    return f"SELECT {keyed} AS key, {', '.join(picked)}, file_index, file_row_number FROM {table}"


def _check_everywhere(database: Any, files: list[str], columns: list[str]) -> None:
    """Raise UserError if one of the files lacks one of the columns."""
    listed = f"[{', '.join(map(literal, files))}]"
    for column in columns:
        query = f"SELECT DISTINCT file_name FROM parquet_schema({listed}) WHERE lower(name) = lower({literal(column)})"
        having = {name for (name,) in database.sql(query).fetchall()}
        lacking = [path for path in files if path not in having]
        if lacking:
            raise UserError(f"{lacking[0]}: has no column {column!r}, which {next(iter(having))} has")


def _hash_columns(urls: Any, texts: Any) -> Any:
    import pyarrow

    return pyarrow.array(hashes_of(urls.to_pylist(), texts.to_pylist()))


def _stacked(values: list[Any]) -> Any:
    import numpy as np

    return values[0] if len(values) == 1 else np.stack(values, axis=1)  # [n] or [n, V]


@contextlib.contextmanager
def _sorting(database: Any, progress: bool) -> Iterator[None]:
    """Show how far DuckDB is with the query that runs inside; it says so in per cent, to whoever asks."""
    done = threading.Event()

    def watch() -> None:
        with tqdm(desc="sorting", total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}") as bar:
            while not done.wait(0.5):
                bar.update(max(database.query_progress(), bar.n) - bar.n)
            bar.update(100 - bar.n)

    watcher = threading.Thread(target=watch, daemon=True) if progress else None
    if watcher:
        watcher.start()
    try:
        yield
    finally:
        done.set()
        if watcher:
            watcher.join()


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """Return a text as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"


def first_line(error: Exception) -> str:
    """Return the first line of an error of another library, at most 300 characters of it."""
    return str(error).strip().splitlines()[0][:300]
