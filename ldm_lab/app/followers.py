"""Who follows a job: the open streams of events, seen where requests come in."""

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

PATIENCE = 10.0  # seconds within which somebody has to follow what they have asked for
REJOINING = 1.0  # seconds between two streams of one page
MOST_KEPT = 4096  # streams that have ended


class Followers:
    """The streams of events that are open now, by what they follow: a session of a page, or an event."""

    def __init__(self, patience: float = PATIENCE) -> None:
        """`patience`: seconds within which a stream has to be opened."""
        self.patience = patience
        self._open: Counter[str] = Counter()
        self._left: OrderedDict[str, float] = OrderedDict()  # when the last stream of a key was closed
        self._door = threading.Lock()  # the server writes, jobs read

    @contextmanager
    def following(self, key: str) -> Iterator[None]:
        """Count a stream while it is open."""
        with self._door:
            self._open[key] += 1
        try:
            yield
        finally:
            with self._door:
                self._open[key] -= 1
                if self._open[key] <= 0:
                    del self._open[key]
                    self._left[key] = time.monotonic()
                    self._left.move_to_end(key)
                while len(self._left) > MOST_KEPT:
                    self._left.popitem(last=False)

    def are_there(self, keys: Sequence[str]) -> bool:
        """Return whether a stream is open."""
        with self._door:
            return any(self._open[key] > 0 for key in keys)

    def may_come(self, keys: Sequence[str], asked: float) -> bool:
        """Return whether a stream may still be opened for what was asked for at a time of `time.monotonic`."""
        with self._door:
            left = [self._left[key] for key in keys if self._left.get(key, 0.0) > asked]
        return time.monotonic() < (max(left) + REJOINING if left else asked + self.patience)


@dataclass(frozen=True)
class Following:
    """Those who follow one job.

    Attributes:
        followers: of all jobs.
        keys: the job's event, and its session.
        asked: when it was asked for, of `time.monotonic`.
    """

    followers: Followers
    keys: Sequence[str]
    asked: float

    @property
    def is_followed(self) -> bool:
        """Whether somebody follows now."""
        return self.followers.are_there(self.keys)

    @property
    def is_over(self) -> bool:
        """Whether nobody follows, and nobody is waited for any more."""
        return not self.is_followed and not self.followers.may_come(self.keys, self.asked)
