"""Where the time of training steps goes: how long each part of them takes, on the clock of the device that does it."""

import time
from collections import defaultdict

import torch

MOST_PENDING = 2048  # marks whose times the host has not asked for


class Laps:
    """Sums of the times between marks, by name; nothing waits for the device but `take`.

    On a GPU marks are events in its queue, so that a time is what the device took, however far ahead of it the host is.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        """Get ready to measure what a device does; None measures nothing."""
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.before: float | None = None  # on the host's clock, in seconds
        self.pending: list[tuple[str | None, torch.cuda.Event]] = []  # None begins

    def begin(self) -> None:
        """Note that what comes now belongs to the lap that ends next."""
        self._mark(None)

    def lap(self, name: str) -> None:
        """Note that a lap ends, and the next one begins; nothing has begun before `begin`."""
        if self.pending or self.before is not None:
            self._mark(name)

    def take(self) -> dict[str, float]:
        """Return name -> seconds in all since the last call. On a GPU it waits for the last mark."""
        self._settle(len(self.pending) - 1)
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds

    def _mark(self, name: str | None) -> None:
        if self.device is None:
            return
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self.pending.append((name, event))
            if len(self.pending) > MOST_PENDING:
                self._settle(MOST_PENDING // 2)  # long done
            return
        now = time.perf_counter()
        if name is not None and self.before is not None:
            self.seconds[name] += now - self.before
        self.before = now

    def _settle(self, last: int) -> None:
        """Add up the times of the marks up to the one with a number, which is kept."""
        if last < 1:
            return
        self.pending[last][1].synchronize()
        for (_, before), (name, event) in zip(self.pending, self.pending[1 : last + 1]):
            if name is not None:
                self.seconds[name] += before.elapsed_time(event) / 1000
        del self.pending[:last]
