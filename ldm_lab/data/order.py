"""The order of samples: a function of seed, epoch and place alone."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")

TABLE = 2**16  # units up to which a permutation is drawn as a whole; beyond it, each place of it is computed
ROUNDS = 8
BLOCK = 1024  # places that are computed at once


class Permutation:
    """A permutation of range(count); a place of it costs the same whatever the count.

    Small ones are drawn. Large ones are a Feistel network on pairs of digits (Black & Rogaway 2002, "Ciphers with
    arbitrary finite domains"), of which places outside the range are sent through again until they are inside.

    Args:
        count: units.
        key: 64 bytes that it depends on.
    """

    def __init__(self, count: int, key: bytes):
        self.count = count
        self.table = _table(count, key) if count <= TABLE else None
        self.keys = np.frombuffer(key, dtype="<u8").astype(np.uint64)  # [ROUNDS]
        self.high = np.uint64(int(np.ceil(np.sqrt(count))) or 1)
        self.low = np.uint64(-(-count // int(self.high)) or 1)  # high * low is at least count, and hardly more

    def at(self, places: np.ndarray) -> np.ndarray:
        """Return the units at some places in [0, count), int64 [n] each."""
        if self.table is not None:
            return self.table[places]
        units = self._pass(places.astype(np.uint64))
        while (outside := units >= np.uint64(self.count)).any():
            units[outside] = self._pass(units[outside])
        return units.astype(np.int64)

    def units(self, places: range) -> Iterator[int]:
        """Yield the units at some places."""
        block = 16
        while places:
            now, places = places[:block], places[block:]
            yield from self.at(np.arange(now.start, now.stop, now.step)).tolist()
            block = min(2 * block, BLOCK)

    def _pass(self, x: np.ndarray) -> np.ndarray:
        """Return a permutation of [0, high * low), uint64 [n] -> [n]."""
        one, other = np.divmod(x, self.low)  # digits, below `high` and `low`
        for number, key in enumerate(self.keys):
            if number % 2:
                other = (other + _mixed(one + key) % self.low) % self.low
            else:
                one = (one + _mixed(other + key) % self.high) % self.high
        return one * self.low + other


@lru_cache(maxsize=4)
def _table(count: int, key: bytes) -> np.ndarray:
    """Return a permutation of range(count), int64 [count]."""
    # RandomState, not Generator: its streams are frozen, so a resumed run may bring a newer NumPy.
    return np.random.RandomState(np.frombuffer(key[:32], dtype="<u4")).permutation(count)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Return numbers in which each bit depends on all bits of x (SplitMix64's last step), uint64 [n] -> [n]."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Order:
    """The order of one epoch.

    Attributes:
        seed: the run's seed.
        epoch: pass over the data, from 0.
    """

    seed: int
    epoch: int

    def permutation(self, count: int) -> Permutation:
        """Return the order of range(count)."""
        return Permutation(count, self._digest("share") + self._digest("share", "more"))

    def random(self, *key: str | int) -> Random:
        """Return a random generator that depends on seed, epoch and key alone."""
        return Random(int.from_bytes(self._digest(*key)[:8], "little"))

    def turn(self, unit: int, choices: int) -> int:
        """Return which of some choices a unit has in this epoch: the next one each epoch, from a random one on."""
        first = hashlib.sha256(repr((self.seed, "turn", unit)).encode()).digest()[:8]
        return (int.from_bytes(first, "little") + self.epoch) % choices

    def _digest(self, *key: str | int) -> bytes:
        return hashlib.sha256(repr((self.seed, self.epoch, *key)).encode()).digest()


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
