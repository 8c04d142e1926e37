"""The order of samples: a function of seed, epoch and position alone."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, TypeVar

import numpy as np

Item = TypeVar("Item")


class Position(NamedTuple):
    """How far a reader has come; what it reads next follows from it.

    Attributes:
        epoch: passes over the reader's share that are complete.
        start: the restart point of the last item read (what a source can jump to: the first of the shards that are
            shuffled together, the place of an image in a list).
        offset: items read since that point; they are read again on resume, but not decoded.
    """

    epoch: int = 0
    start: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Order:
    """One reader's order of one epoch.

    Attributes:
        seed: the run's seed.
        epoch: pass over the data, from 0.
        reader: this reader, from 0 to readers - 1.
        readers: world size x loader processes per rank.
    """

    seed: int
    epoch: int
    reader: int
    readers: int

    def share(self, count: int) -> np.ndarray:
        """Return the reader's part of a permutation of range(count), int64; all readers' parts make up the whole.

        The permutation depends on seed and epoch alone.
        """
        words = np.frombuffer(_digest(self.seed, self.epoch, "share"), dtype="<u4")  # [8]
        # RandomState, not Generator: its streams are frozen, so a resumed run may bring a newer NumPy.
        return np.random.RandomState(words).permutation(count)[self.reader :: self.readers]  # [about count / readers]

    def random(self, *key: str | int) -> Random:
        """Return a random generator that depends on seed, epoch and key alone."""
        return Random(int.from_bytes(_digest(self.seed, self.epoch, *key)[:8], "little"))

    def turn(self, unit: int, choices: int) -> int:
        """Return which of some choices a unit has in this epoch: the next one each epoch, from a random one on."""
        return (int.from_bytes(_digest(self.seed, "turn", unit)[:8], "little") + self.epoch) % choices


def _digest(*key: str | int) -> bytes:
    return hashlib.sha256(repr(key).encode()).digest()


def shuffled(items: Iterable[Item], size: int, random: Random, past: type | tuple[type, ...] = ()) -> Iterator[Item]:
    """Yield all items in an order shuffled through a buffer of `size` items; below 2 the order stays as it is.

    Items of the type `past` go past the buffer and take no room in it.
    """
    buffer = []
    for item in items:
        if isinstance(item, past):
            yield item
            continue
        if len(buffer) < size:
            buffer.append(item)
            continue
        if not buffer:
            yield item
            continue
        place = int(random.random() * len(buffer))
        yield buffer[place]
        buffer[place] = item
    while buffer:
        place = int(random.random() * len(buffer))
        buffer[place], buffer[-1] = buffer[-1], buffer[place]
        yield buffer.pop()
