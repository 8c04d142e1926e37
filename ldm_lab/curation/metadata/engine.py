"""The contract of engines, which run expressions of ibis on tables of any size."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Self

import ibis.expr.types as ir

from ldm_lab.curation.metadata.inputs import Files

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
        """Return the table in Parquet, TSV or CSV files; its columns are `files.unique_names`."""
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
