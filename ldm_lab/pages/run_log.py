"""A run's `metrics.csv`, read on as it grows, in few numbers for each column however long it is."""

import csv
from pathlib import Path

import numpy as np

from ldm_lab.pages.thinned import Flags, Floats, Thinned, Whole

MOST = 500  # buckets of a column
BLOCK = 2**22  # bytes read at once
LONGEST = 40  # characters of a number
HEAD = 2**20  # bytes that the names of all columns may take
TAIL = 256  # bytes before the place that has been read to, which tell whether the file is still the same
STEP = "step"


class RunLog:
    """A `metrics.csv`. Steps count from 1 here, as everywhere but in the file: a row is of the step that logged it.

    Rows that a full disk or a power failure has cut off are left out, and counted.

    Attributes:
        columns: by name, in the file's order, those that have entries.
        rows: that were read.
        torn: lines that are no rows.
        is_cut_off: whether the file's last line has no end: a row that is being written, or one that never was.
        last_step: the newest row's; 0 before there is one.
    """

    def __init__(self, path: Path, most: int = MOST) -> None:
        """Begin; nothing is read yet.

        Args:
            path: of the file; it may not be there yet.
            most: buckets of a column.
        """
        self.path, self.most = path, most
        self._begin(b"")

    def _begin(self, head: bytes) -> None:
        self._head, self._offset, self._tail = head, len(head), head[-TAIL:]
        self._names = next(csv.reader([head.decode("utf-8", "replace")]), [])
        self._thinned = [Thinned(self.most) for _ in self._names]
        self.rows = self.torn = self.last_step = 0
        self.is_cut_off = False

    @property
    def columns(self) -> dict[str, Thinned]:
        """The columns that have entries."""
        return {name: its for name, its in zip(self._names, self._thinned) if name not in ("", STEP) and len(its.index)}

    def read(self, most: int | None = None) -> bool:
        """Read what has come since the last time.

        A file that has been written anew, or cut by a run that goes on, is read from its beginning.

        Args:
            most: bytes to read at most, about.

        Returns:
            Whether all was read. Raises OSError for a file that cannot be read.
        """
        try:
            file = open(self.path, "rb")  # noqa: SIM115
        except FileNotFoundError:
            self._begin(b"")
            return True
        with file:
            head = file.readline(HEAD)
            file.seek(self._offset - len(self._tail))
            if head != self._head or file.read(len(self._tail)) != self._tail:
                self._begin(head if head.endswith(b"\n") else b"")
            end = None if most is None else self._offset + most
            while end is None or self._offset < end:
                file.seek(self._offset)
                block = file.read(BLOCK)
                whole = block.rfind(b"\n") + 1 or (len(block) if len(block) == BLOCK else 0)
                if self._head:
                    self._take(block[:whole])
                self._offset += whole
                self._tail = (self._tail + block[:whole])[-TAIL:]
                if len(block) < BLOCK:
                    self.is_cut_off = whole < len(block)
                    return True
        return False

    def _take(self, block: bytes) -> None:
        """Take whole lines."""
        width = len(self._names)
        lines = [line for line in block.replace(b"\r\n", b"\n").split(b"\n") if line]
        fit = [line for line in lines if line.count(b",") == width - 1 and len(line) <= LONGEST * width]
        if not fit or STEP not in self._names:
            self.torn += len(lines)
            return
        table, there = numbers(fit, width)
        place = self._names.index(STEP)
        steps = table[:, place]  # [n]
        sound = (steps >= 0) & (steps < 2**53) & (steps == np.floor(steps)) & there[:, place]  # [n]
        self.torn += len(lines) - int(sound.sum())
        self._add(steps[sound].astype(np.int64) + 1, table[sound], there[sound])

    def _add(self, steps: Whole, table: Floats, there: Flags) -> None:
        """Add rows: their steps [n], numbers [n, columns], and where there is one [n, columns]."""
        if not len(steps):
            return
        self.rows += len(steps)
        self.last_step = max(self.last_step, int(steps.max()))
        for place, thinned in enumerate(self._thinned):
            has = there[:, place]
            thinned.add(steps[has], table[has, place])


def numbers(lines: list[bytes], width: int) -> tuple[Floats, Flags]:
    """Return the numbers of lines of `width` fields, [n, width], and where there are any, [n, width].

    A line with something else in it has none.
    """
    fields = b",".join(lines).split(b",")
    there = np.fromiter(map(bool, fields), bool, len(fields)).reshape(-1, width)  # [n, width]
    try:
        table = np.array([field or b"0" for field in fields]).astype(np.float64).reshape(-1, width)  # [n, width]
    except ValueError:
        if len(lines) == 1:
            return np.full((1, width), np.nan), np.zeros((1, width), bool)
        half = len(lines) // 2
        parts = [numbers(its, width) for its in (lines[:half], lines[half:])]
        return np.concatenate([its[0] for its in parts]), np.concatenate([its[1] for its in parts])
    return table, there
