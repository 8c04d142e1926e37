"""Waiting for a batch: a long wait is said, and it ends when it has become hopeless or the run is told to stop."""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

from ldm_lab.errors import UserError
from ldm_lab.progress import print_line

LOOK_EVERY = 1.0  # seconds between looks
SAY_AFTER = 30.0  # seconds without a batch, and again after twice, four times, ... as many
PATIENCE = 20.0  # seconds that a run which was told to stop waits for a batch that it could still train on

Handler = Callable[[int, FrameType | None], None] | signal.Handlers | int | None  # of a signal


class ReadingError(UserError):
    """The data stopped coming. What was trained until then is intact and can be saved.

    Attributes:
        may_pass: whether going on later may help as things are: a killed process, a reader that gives nothing.
    """

    def __init__(self, message: str, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class WaitingEnded(BaseException):
    """Raised out of the midst of a wait. No Exception: readers would take it for a sample that cannot be read."""


class Wait:
    """The wait for one batch, as a `with` block of the main thread.

    Elsewhere, and where a platform has no interval timers, it does nothing.

    Args:
        at: what is being read, in words; "" if nobody knows.
        died: how a loader process ended, in words, or None.
        told_to_stop: whether the run is to end.
        timeout: seconds after which a wait is hopeless.
    """

    def __init__(
        self, *, at: Callable[[], str], died: Callable[[], str | None], told_to_stop: Callable[[], bool], timeout: float
    ) -> None:
        self.at, self.died, self.told_to_stop, self.timeout = at, died, told_to_stop, timeout
        self.since, self.say_at = 0.0, SAY_AFTER
        self.works = os.name == "posix" and threading.current_thread() is threading.main_thread()
        self.before: Handler = None

    def __enter__(self) -> None:
        if not self.works:
            return
        self.since, self.say_at = time.monotonic(), SAY_AFTER
        self.before = signal.signal(signal.SIGALRM, self.look)
        signal.setitimer(signal.ITIMER_REAL, LOOK_EVERY, LOOK_EVERY)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.works:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self.before)

    def look(self, number: int, frame: FrameType | None) -> None:
        """Say that it takes long, or raise WaitingEnded."""
        waited = time.monotonic() - self.since
        if (death := self.died()) is not None:
            raise WaitingEnded(death)
        at = f" ({self.at()})" if self.at() else ""
        if waited >= self.timeout or (waited >= PATIENCE and self.told_to_stop()):
            raise WaitingEnded(f"no batch for {waited:.0f} s{at}")
        if waited >= self.say_at:
            self.say_at *= 2
            print_line(f"data: no batch for {waited:.0f} s, still waiting{at}; data.timeout={self.timeout:g} ends it")
