"""Who reads what: the readers' shares of an epoch, and what is left of them for other readers.

A unit's *place* is where the epoch's permutation has it. Reader r of n reads the places r, r + n, r + 2n, ...

When a run goes on with another number of readers, what the old ones have left is dealt out to the new ones:

- the places behind all that anybody has begun, one by one;
- the places before those, in even runs;
- of each group of units that was being read, the items that are not done, to one reader each.

So every unit, and every item of it, still comes once in that epoch. The next epoch is shared as always.
"""

from collections.abc import Iterator
from typing import NamedTuple

# Readers whose units give different numbers of samples go from epoch to epoch at their own pace. What is left of the
# slowest one's epoch and of so many behind it is dealt out; a reader that is further on begins anew behind them.
EPOCHS_APART = 2


class Stretch(NamedTuple):
    """Places of an epoch that a reader has to read, or what is left of them.

    Attributes:
        epoch: pass over the data, from 0.
        first: the next place, or the first one of the group that is being read.
        stop: end of the places, exclusive.
        step: from one place to the next.
        begun: units of the group that have been opened so far; 0 between groups.
        offset: items of the group that are done; they are read again on resume, but not decoded.
    """

    epoch: int
    first: int
    stop: int
    step: int = 1
    begun: int = 0
    offset: int = 0

    @property
    def places(self) -> range:
        """The places, those of the group that is being read included."""
        return range(self.first, self.stop, self.step)

    def over(self, places: range) -> "Stretch":
        """Return a stretch of the same epoch over other places."""
        return Stretch(self.epoch, places.start, min(places.stop, self.stop), places.step)


def share(epoch: int, reader: int, readers: int, count: int) -> Stretch:
    """Return a reader's part of a whole epoch of `count` units."""
    return Stretch(epoch, reader, count, readers)


def stretches(
    left: list[Stretch], reader: int, readers: int, count: int, epochs: int | None = None
) -> Iterator[tuple[int, Stretch]]:
    """Yield (how many of `left` follow, stretch) of a reader: what is left, then its shares of the epochs behind it.

    Args:
        left: by epochs; the last one's epoch is the last that is not shared by `share`. Empty at the very start.
        reader, readers: this one, of how many.
        count: units.
        epochs: passes over the data; None is without end.
    """
    for number, stretch in enumerate(left, 1):
        if epochs is None or stretch.epoch < epochs:
            yield len(left) - number, stretch
    epoch = left[-1].epoch + 1 if left else 0
    while epochs is None or epoch < epochs:
        yield 0, share(epoch, reader, readers, count)
        epoch += 1


def deal(left: list[list[Stretch]], readers: int, count: int) -> list[list[Stretch]]:
    """Return what each of `readers` new readers has to read before the next whole epoch, given what the old ones left.

    Readers for whom nothing is left get an empty stretch, and so go on with the next epoch at once.
    """
    old = [its or [share(0, reader, len(left), count)] for reader, its in enumerate(left)]
    first = min(its[0].epoch for its in old)
    last = min(max(its[-1].epoch for its in old), first + EPOCHS_APART)
    dealt: list[list[Stretch]] = [[] for _ in range(readers)]
    for epoch in range(first, last + 1):
        parts: list[Stretch] = []
        for reader, its in enumerate(old):
            parts += _of_epoch(its, epoch, reader, len(old), count)
        for mine, more in zip(dealt, _deal_epoch(epoch, parts, readers, count)):
            mine += more
    end = Stretch(last, count, count)
    return [its if its and its[-1].epoch == last else [*its, end] for its in dealt]


def _of_epoch(left: list[Stretch], epoch: int, reader: int, readers: int, count: int) -> list[Stretch]:
    """Return what a reader has left of an epoch."""
    if epoch > left[-1].epoch:
        return [share(epoch, reader, readers, count)]
    return [stretch for stretch in left if stretch.epoch == epoch]


def _deal_epoch(epoch: int, parts: list[Stretch], readers: int, count: int) -> list[list[Stretch]]:
    """Return the parts of an epoch as `readers` lists."""
    heads = [part._replace(stop=min(part.first + part.begun * part.step, part.stop)) for part in parts if part.begun]
    tails = [part.over(part.places[part.begun :]) for part in parts]
    border = untouched([tail for tail in tails if tail.places], count)
    before = [tail.over(range(tail.first, min(tail.stop, border), tail.step)) for tail in tails]
    dealt = [heads[reader::readers] + mine for reader, mine in enumerate(_even_runs(before, readers))]
    for reader, mine in enumerate(reversed(dealt)):  # those with fewer groups to end begin
        if border + reader < count:
            mine.append(Stretch(epoch, border + reader, count, readers))
    return dealt


def untouched(tails: list[Stretch], count: int) -> int:
    """Return the place from which on `tails`, of which none overlaps another, hold every place; `count` without one."""
    to_the_end = [tail for tail in tails if tail.stop >= count]
    step = to_the_end[0].step if to_the_end else 0
    ways = {tail.first % step for tail in to_the_end if tail.step == step}
    if not to_the_end or len(ways) != step:
        return count
    return max(max(tail.first for tail in to_the_end) - step + 1, 0)


def _even_runs(parts: list[Stretch], readers: int) -> list[list[Stretch]]:
    """Return the places of the parts, one part after the other, in `readers` runs of about the same length."""
    total = sum(len(part.places) for part in parts)
    ends = [(reader + 1) * total // readers for reader in range(readers)]
    runs: list[list[Stretch]] = [[] for _ in range(readers)]
    reader = at = 0
    for part in parts:
        places = part.places
        while places:
            while at == ends[reader]:
                reader += 1
            mine, places = places[: ends[reader] - at], places[ends[reader] - at :]
            runs[reader].append(part.over(mine))
            at += len(mine)
    return runs
