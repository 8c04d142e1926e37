"""The run's page while it trains, and its events: when it began, went on, with what changes, and how it ended."""

import time
from collections.abc import Sequence
from pathlib import Path

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.types import STEP_OUTPUT

from ldm_lab.batch import Batch
from ldm_lab.errors import UserError, first_line
from ldm_lab.pages.run_events import EVENTS, Event, drop_events, now
from ldm_lab.pages.run_folder import PAGE, find_pictures
from ldm_lab.pages.run_page import RunReader
from ldm_lab.training.logs import print_rank_zero

READ_AT_ONCE = 2**24  # bytes of a long log that one renewal reads at most
LEAST_SHARE = 100  # times as long as a renewal took, training goes on before the next one


class Watching(Callback):
    """Renews `index.html` in the run's folder every so many seconds, on the first rank, and writes `events.jsonl`.

    Neither ever ends a run: what goes wrong is said once.
    """

    def __init__(
        self,
        folder: Path,
        seconds: float | None,
        resumed: Path | None,
        changes: Sequence[str],
        is_same_run: bool = False,
    ) -> None:
        """Set what is written.

        Args:
            folder: the run's.
            seconds: between renewals at least; None writes no page.
            resumed: the checkpoint that the run goes on from; None for a fresh run.
            changes: what the config has otherwise than the checkpoint's, a line each.
            is_same_run: whether this is another Trainer of a run that goes on at once, whose events all count.
        """
        self.is_same_run = is_same_run
        self.folder, self.seconds, self.resumed, self.changes = folder, seconds, resumed, tuple(changes)
        self.reader = RunReader(folder)
        self.due = 0.0  # on the monotonic clock
        self.said: set[str] = set()
        self.has_begun = False

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        if not self.is_same_run:
            self.tidy(trainer.global_step)
        devices = f"{trainer.world_size} device{'s' * (trainer.world_size > 1)}, {trainer.precision}"
        kind, text = ("started", devices) if self.resumed is None else ("resumed", f"from {self.resumed}, {devices}")
        self.note(trainer, kind, text, self.changes)
        self.has_begun = True
        self.renew()

    def tidy(self, step: int) -> None:
        """Drop events of what is trained anew from this step on; say which grids of it are still there."""
        try:
            drop_events(self.folder, None if self.resumed is None else step)
        except (UserError, OSError) as error:
            self.say(f"{first_line(error)}; events of an earlier run count, too")
        for pictures in find_pictures(self.folder):
            if count := sum(its > step for its in pictures.steps):
                self.say(
                    f"{self.folder / pictures.name}: grids of steps after {step} that an earlier run has left: "
                    f"{count}; they are shown until this run draws those steps"
                )

    def on_train_batch_end(
        self, trainer: Trainer, task: LightningModule, outputs: STEP_OUTPUT, batch: Batch, index: int
    ) -> None:
        if trainer.is_global_zero and self.seconds is not None and time.monotonic() >= self.due:
            self.renew()

    def on_exception(self, trainer: Trainer, task: LightningModule, exception: BaseException) -> None:
        if trainer.is_global_zero and self.has_begun:
            what = first_line(exception) if isinstance(exception, Exception) else type(exception).__name__
            self.note(trainer, "broke off", what)
            self.renew(at_end=True)

    def finish(self, trainer: Trainer, stopped: str | None, summary: Sequence[str]) -> None:
        """Write down how the run ended, with what there is to say of it, and renew the page for the last time."""
        if trainer.is_global_zero:
            self.note(trainer, "ended", f"stopped by {stopped}" if stopped else "done", summary)
            self.renew(at_end=True)

    def note(self, trainer: Trainer, kind: str, text: str, details: Sequence[str] = ()) -> None:
        """Add an event to the file of them."""
        event = Event(trainer.global_step, kind, text, now(), tuple(line for line in details if line))
        try:
            with open(self.folder / EVENTS, "ab") as file:
                file.write(event.line())
        except OSError as error:
            self.say(f"{self.folder / EVENTS}: cannot be written: {error.strerror}; the run goes on")

    def renew(self, at_end: bool = False) -> None:
        """Read what is new, and write the page; of a log that is long, in several renewals, but at the end at once."""
        if self.seconds is None:
            return
        began = time.monotonic()
        try:
            if self.reader.read(None if at_end else READ_AT_ONCE):
                self.reader.write_page()
        except (UserError, OSError) as error:
            self.say(f"{first_line(error)}; the run goes on without its page")
        except Exception as error:  # whatever a page may stumble over: the run is worth more
            self.say(f"{self.folder / PAGE}: cannot be made ({type(error).__name__}: {first_line(error)})")
        ended = time.monotonic()
        self.due = ended + max(self.seconds, LEAST_SHARE * (ended - began))

    def say(self, line: str) -> None:
        """Print a line, the first time."""
        if line not in self.said:
            self.said.add(line)
            print_rank_zero(line)
