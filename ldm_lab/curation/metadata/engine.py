"""The contract of engines, which run expressions of ibis on tables of any size."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Self

import ibis
import ibis.expr.datatypes as dt
import ibis.expr.types as ir
import pyarrow as pa

from ldm_lab.curation.metadata.inputs import Files
from ldm_lab.curation.metadata.layouts import Layout, unique_names

ResultRow = Mapping[str, int | float | str | None]  # column -> value


class Engine:
    """Base class of the parts of role "engine"."""

    def open(self, spill: str | Path) -> AbstractContextManager[Self]:
        """Hand out the engine, connected. Its own errors come out as UserError.

        Args:
            spill: a folder for what does not fit into memory.
        """
        raise NotImplementedError

    def read(self, files: Files) -> ir.Table:
        """Return the table in Parquet files; its columns are `files.unique_names`.

        Files of other columns or types than the first are brought to the types of the whole table one layout at a
        time: engines take the first file's types for all, and round, or refuse the others.
        """
        if not files.layouts:
            return self.read_parquet(files.paths, ())
        tables = [_aligned(self.read_parquet(one.paths, one.names), one, files) for one in files.layouts]
        kinds = tables[0].schema()
        return _joined([table.cast({n: kinds[n] for n in kinds if table[n].type() != kinds[n]}) for table in tables])

    def read_parquet(self, paths: Sequence[str], names: Sequence[str]) -> ir.Table:
        """Return the table in Parquet files of equal columns `names`, made unique; () for columns not known yet."""
        raise NotImplementedError

    def rows(self, expression: ir.Table) -> list[ResultRow]:
        """Return a small result."""
        raise NotImplementedError

    def write(
        self, expression: ir.Table, folder: Path, *, parts: int | None, key: str | None, metadata: dict[str, str]
    ) -> int:
        """Write a table as `part-00000.parquet`, ... and return its number of rows.

        Args:
            parts: how many files, at most one per row; None leaves it to the engine.
            key: the column that the rows are ordered by, which is not written; None keeps the order of the input.
            metadata: goes into each file, where the engine has a way to.
        """
        raise NotImplementedError


def _aligned(table: ir.Table, layout: Layout, files: Files) -> ir.Table:
    """Return a layout's table with the columns and types of the whole one."""
    own = dict(zip(layout.names, unique_names(layout.names)))
    values: dict[str, ir.Value] = {}
    for name, column in files.columns.items():
        kind = files.types[name]
        there, own_kind = layout.columns.get(name, ("", None))
        if own_kind is None or (own_kind != kind and own_kind.equals(pa.null())):
            values[column] = ibis.null(dt.DataType.from_pyarrow(kind))
        elif own_kind == kind:
            values[column] = table[own[there]]
        else:
            values[column] = table[own[there]].cast(dt.DataType.from_pyarrow(kind))
    return table.select(**values)


def _joined(tables: Sequence[ir.Table]) -> ir.Table:
    """Return the rows of tables of equal columns, one behind the other; `ibis.union` of several takes another order."""
    if len(tables) == 1:
        return tables[0]
    half = len(tables) // 2
    return _joined(tables[:half]).union(_joined(tables[half:]))
