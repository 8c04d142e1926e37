"""DuckDB: one machine, tables larger than its memory."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import duckdb
import ibis
import ibis.expr.types as ir
import pyarrow.parquet as pq

from ldm_lab.config import PositiveInt, register
from ldm_lab.curation import sql
from ldm_lab.curation.metadata.engine import Engine, ResultRow
from ldm_lab.curation.metadata.inputs import DISK_FULL
from ldm_lab.curation.metadata.layouts import unique_names
from ldm_lab.errors import UserError, first_line

BATCH = 50_000  # rows that are held while a file is cut into parts


@register("engine", "duckdb")
class DuckDB(Engine):
    """DuckDB within this process.

    Args:
        memory_limit: what its tables may take, such as 800MB or 4GB; beyond it they spill to the disk. The
            process takes about 250 MB more.
        threads: null is all cores.
        temp_directory: where it spills to; null is the folder of the output.
    """

    def __init__(
        self, *, memory_limit: str = "2GB", threads: PositiveInt | None = None, temp_directory: str | None = None
    ):
        self.memory_limit, self.threads, self.temp_directory = memory_limit, threads, temp_directory

    @contextlib.contextmanager
    def open(self, spill: str | Path) -> Iterator["DuckDB"]:
        settings = {
            "memory_limit": self.memory_limit,
            "temp_directory": str(Path(self.temp_directory).expanduser() if self.temp_directory else spill),
            **({"threads": self.threads} if self.threads is not None else {}),
        }
        try:
            self.ibis = ibis.duckdb.connect(**settings)
        except duckdb.Error as error:
            raise UserError(f"engine: {_first_line(error)}") from None
        self.ibis.con.execute("set enable_progress_bar = false")
        try:
            yield self
        except duckdb.OutOfMemoryException as error:
            raise UserError(
                f"engine: {_first_line(error)}; engine.memory_limit {self.memory_limit} is too little: allow more, or "
                "take fewer engine.threads"
            ) from None
        except duckdb.Error as error:
            cause = None if any(text in str(error) for text in DISK_FULL) else error
            raise UserError(f"engine: {_first_line(error)}") from cause
        finally:
            self.ibis.disconnect()

    def read_parquet(self, paths: Sequence[str], names: Sequence[str]) -> ir.Table:
        # Without can_have_nan the statistics in the file make `isnan(x)` false: they leave NaN out (duckdb #25521).
        elsewhere = any("://" in path for path in paths)
        table = self.ibis.read_parquet(list(paths), can_have_nan=True, union_by_name=elsewhere)
        return table.rename(dict(zip(unique_names(names) or table.columns, table.columns)))

    def rows(self, expression: ir.Table) -> list[ResultRow]:
        return expression.to_pyarrow().to_pylist()

    def write(
        self, expression: ir.Table, folder: Path, *, parts: int | None, key: str | None, metadata: dict[str, str]
    ) -> int:
        """Write a table; see `Engine.write`. `parts` have equal numbers of rows; None is one."""
        query = self.ibis.compile(expression)
        if key is not None:
            self.ibis.con.execute("set preserve_insertion_order = false")
            name = sql.identifier(key)
            query = f"select * exclude ({name}) from ({query}) order by {name}"
        in_parts = parts is not None and parts > 1
        whole = folder / ("whole" if in_parts else "part-00000.parquet")
        entries = ", ".join(f"{name}: {sql.literal(value)}" for name, value in metadata.items())
        options = f"format parquet, compression snappy, kv_metadata {{{entries}}}"
        self.ibis.con.execute(f"copy ({query}) to {sql.literal(str(whole))} ({options})")
        rows = pq.read_metadata(whole).num_rows
        if in_parts:
            cut(whole, rows, max(min(parts, rows), 1))
        return rows


def cut(whole: Path, rows: int, parts: int) -> None:
    """Cut a Parquet file into `part-00000.parquet`, ... in its place, in its order."""
    ends = [rows * (part + 1) // parts for part in range(parts)]
    with pq.ParquetFile(whole) as file:
        schema, part, place, writer = file.schema_arrow, 0, 0, None
        for batch in file.iter_batches(BATCH, use_threads=False):
            while batch.num_rows:
                writer = writer or pq.ParquetWriter(whole.with_name(f"part-{part:05d}.parquet"), schema)
                take = min(batch.num_rows, ends[part] - place)
                writer.write_batch(batch.slice(0, take))
                batch, place = batch.slice(take), place + take
                if place == ends[part]:
                    writer.close()
                    part, writer = part + 1, None
    os.unlink(whole)


def _first_line(error: Exception) -> str:
    text = first_line(error, 3000)
    with contextlib.suppress(ValueError):
        text = json.loads(text)["exception_message"] if text.startswith("{") else text
    return text[:300]
