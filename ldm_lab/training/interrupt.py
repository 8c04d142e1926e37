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

    A second signal meets the handlers that were there before: it kills.

    Attributes:
        received: the signal's number, or None.
        time_is_up: whether `max_time` has passed.
    """

    def __init__(self, max_time: float | None = None) -> None:
        """Set how long this job may train, in seconds from the start of its training; None is without end."""
        self.max_time = max_time
        self.received: int | None = None
        self.time_is_up = False
        self.stopping = False  # all ranks have agreed
        self.began = 0.0  # on the monotonic clock
        self.before: dict[int, Handler] = {}

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        self.began = time.monotonic()
        for number in SIGNALS:  # after Lightning's own handlers, which do not save, or save in the midst of a step
            self.before[number] = signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the signal; the next one meets the handlers that were there before."""
        self.received = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def on_train_batch_end(
        self, trainer: Trainer, task: LightningModule, outputs: STEP_OUTPUT, batch: Batch, index: int
    ) -> None:
        self.time_is_up = self.max_time is not None and time.monotonic() - self.began >= self.max_time
        if trainer.world_size == 1:
            self.stopping = self.received is not None or self.time_is_up
        elif index % AGREE_EVERY == 0:
            heard = torch.tensor([self.received or 0, self.time_is_up], dtype=torch.int64, device=task.device)  # [2]
            torch.distributed.all_reduce(heard, torch.distributed.ReduceOp.MAX)
            self.received, self.time_is_up = int(heard[0]) or None, bool(heard[1])
            self.stopping = self.received is not None or self.time_is_up
        if self.stopping and (index + 1) % trainer.accumulate_grad_batches == 0:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, task: LightningModule) -> None:
        self.restore()

    def on_exception(self, trainer: Trainer, task: LightningModule, exception: BaseException) -> None:
        self.restore()

    def restore(self) -> None:
        """Put back the handlers that were there before training."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


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
