"""Being told to stop, by a signal or by the clock: finish the optimizer step, save, leave."""

import re
import signal
import time
from collections.abc import Callable
from types import FrameType

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.types import STEP_OUTPUT

from ldm_lab.batch import Batch
from ldm_lab.errors import UserError

AGREE_EVERY = 8  # batches between asking the other ranks whether one of them was told to stop
# Ctrl-C; what batch systems and shells send before they kill; what SLURM's --signal=USR1 sends before the time is up.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
STOPPED = 75  # exit code of a run that was told to stop, and saved: EX_TEMPFAIL, going on is useful
CLOCK = re.compile(r"(?:(\d+):)?(\d+):([0-5]?\d):([0-5]?\d)")
Handler = Callable[[int, FrameType | None], None] | signal.Handlers | None  # of a signal
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd])")


class Interrupt(Callback):
    """Stop after the optimizer step during which a signal came or the job's time was up, on all ranks at the same one.

    A second signal meets the handlers that were there before: it kills. Only a second Ctrl-C still tidies up.

    Attributes:
        received: the signal's number, or None.
        received_at: when it came, on the monotonic clock; of another rank's, when this one heard of it.
        time_is_up: whether `max_time` has passed.
        reader_lost: whether a loader process of one of several ranks has died.
    """

    def __init__(self, max_time: float | None = None, began: float | None = None) -> None:
        """Set how long this job may train.

        Args:
            max_time: seconds from the start of its training; None is without end.
            began: when that was, on the monotonic clock, if it goes on with another Trainer.
        """
        self.max_time = max_time
        self.received: int | None = None
        self.received_at: float | None = None
        self.time_is_up = False
        self.reader_lost = False
        self.stopping = False  # all ranks have agreed
        self.began = began
        self.before: dict[int, Handler] = {}

    def on_fit_start(self, trainer: Trainer, task: LightningModule) -> None:
        self.install()  # for the wait for the first batch
        trainer.datamodule.told_to_stop = self.told_to_stop

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        self.began = time.monotonic() if self.began is None else self.began
        self.install()  # after Lightning's own handlers, which do not save, or save in the midst of a step

    def install(self) -> None:
        """Handle signals; `restore` undoes it."""
        for number in SIGNALS:
            if self.received != number:
                before = signal.signal(number, self.handle)
                self.before.setdefault(number, before)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the signal; the next one meets the handlers that were there before."""
        self.received, self.received_at = number, time.monotonic()
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def since_signal(self) -> float | None:
        """Return how many seconds ago the signal came; None if there was none."""
        return None if self.received is None or self.received_at is None else time.monotonic() - self.received_at

    def told_to_stop(self) -> bool:
        """Return whether this process has had a signal, or its time is up."""
        since = None if self.began is None else time.monotonic() - self.began
        self.time_is_up = self.max_time is not None and since is not None and since >= self.max_time
        return self.received is not None or self.time_is_up

    def on_train_batch_end(
        self, trainer: Trainer, task: LightningModule, outputs: STEP_OUTPUT, batch: Batch, index: int
    ) -> None:
        told = self.told_to_stop()
        if trainer.world_size == 1:
            self.stopping = told
        elif index % AGREE_EVERY == 0:
            flags = [self.received or 0, self.time_is_up, trainer.datamodule.lost is not None]
            heard = torch.tensor(flags, dtype=torch.int64, device=task.device)  # [3]
            torch.distributed.all_reduce(heard, torch.distributed.ReduceOp.MAX)
            self.received, self.time_is_up, self.reader_lost = int(heard[0]) or None, bool(heard[1]), bool(heard[2])
            if self.received is not None and self.received_at is None:
                self.received_at = time.monotonic()
            self.stopping = self.received is not None or self.time_is_up or self.reader_lost
        if self.stopping and (index + 1) % trainer.accumulate_grad_batches == 0:
            trainer.should_stop = True

    def restore(self) -> None:
        """Put back the handlers that were there before training."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def why(self) -> str:
        """Return what told the run to stop, in words."""
        if self.received:
            return f"signal {self.received}"
        return "trainer.max_time" if self.time_is_up else "a loader process that died"


def seconds(duration: str) -> float:
    """Return the seconds of a duration: "90m", "11.5h", "2d", "HH:MM:SS" or "DD:HH:MM:SS".

    Raises:
        UserError: anything else, or no time at all.
    """
    if clock := CLOCK.fullmatch(duration):
        days, hours, minutes, rest = (int(part or 0) for part in clock.groups())
        total = float(((days * 24 + hours) * 60 + minutes) * 60 + rest)
    elif simple := DURATION.fullmatch(duration):
        total = float(simple[1]) * UNITS[simple[2]]
    else:
        total = 0.0
    if not total:
        raise UserError(f"a duration such as 90m, 11h, 2d or 11:30:00 (HH:MM:SS) is needed, not {duration!r}")
    return total
