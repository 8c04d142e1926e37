"""Progress: a bar on a terminal; elsewhere, as in the log file of a job, a line now and then, and one at the end."""

import sys
import time
from typing import TextIO

from tqdm import tqdm

REFRESH = 0.5  # seconds between two states of a bar that cost something to find out
PAUSE = 30.0  # seconds from line to line at first, and a tenth of the time that has gone by when that is more,
LONGEST_PAUSE = 600.0  # but never longer than this


class Bar(tqdm):
    """How much of something is done, and how fast. Closed, it leaves its last state behind."""

    def __init__(
        self,
        what: str,
        unit: str,
        total: float | None = None,
        *,
        initial: float = 0,
        scaled: bool = False,
        shown: bool = True,
    ) -> None:
        """Begin.

        Args:
            what: a word for what is being done.
            unit: of what is counted; "B" counts bytes.
            total: how much there is to do, or None if nobody knows.
            initial: how much of it was done before.
            scaled: whether to write 12k in place of 12,000.
            shown: False shows nothing at all.
        """
        self.is_bar = sys.stderr is not None and sys.stderr.isatty()
        self._began = self._shown_at = time.monotonic()
        self._last_line = ""
        super().__init__(
            desc=what, unit=unit, total=total, initial=initial, disable=not shown, unit_scale=scaled or unit == "B",
            unit_divisor=1024 if unit == "B" else 1000, ncols=None if self.is_bar else 0, dynamic_ncols=self.is_bar,
            mininterval=0.1, maxinterval=10.0,
        )  # fmt: skip

    @property
    def is_due(self) -> bool:
        """Whether it is time to show another state."""
        now = time.monotonic()
        pause = min(max(PAUSE, (now - self._began) / 10), LONGEST_PAUSE)
        return now - self._shown_at >= (REFRESH if self.is_bar else pause)

    def advance(self, done: float) -> None:
        """Go on to so much that is done, counted from the very beginning."""
        self.update(done - self.n)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Show the state; called by tqdm whenever something may have changed."""
        if self.is_bar:
            self._shown_at = time.monotonic()
            return bool(super().display(msg, pos))
        if self.is_due:
            self._print_line()
        return False

    def clear(self, nolock: bool = False) -> None:
        """Make room for other lines; called by tqdm."""
        if self.is_bar:
            super().clear(nolock)

    def close(self) -> None:
        """Show the last state and end."""
        if not self.is_bar and not self.disable:
            self._print_line()
            self.leave = False
        super().close()

    def _print_line(self) -> None:
        self._shown_at = time.monotonic()
        line = str(self)
        if line != self._last_line:
            self._last_line = line
            print(line, file=self.fp, flush=True)


def print_line(text: str, file: TextIO | None = None) -> None:
    """Print a line, by default to standard output, without breaking a bar."""
    tqdm.write(text, file=file)
