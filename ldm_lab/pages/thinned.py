"""A column of a long log in few numbers: buckets of steps, each with its mean, lowest and highest value.

What is no number is counted by itself. A spike of one step in a million is still the highest value of its bucket.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
# Columns of `Thinned.sums`: entries, sum of their steps, of finite values, counts of finite ones, NaN, inf, -inf.
ENTRIES, STEPS, VALUES, FINITE, NAN, INF, MINUS_INF = range(7)
DIGITS = 6  # significant ones of what a page shows


@dataclass(frozen=True)
class Extreme:
    """A value and its step; of several equal ones the first."""

    value: float
    step: int


@dataclass(frozen=True, kw_only=True)
class Points:
    """What a page draws of a column, n buckets.

    Attributes:
        width: steps that a bucket is of; 1 where every value is there.
        steps: of each bucket, the mean of its entries' steps.
        mean, low, high: of finite values; None where a bucket has none. `low` and `high` are empty for width 1.
        odd: buckets with what is no number: [place in `steps`, how many NaN, inf, -inf].
        first_odd: the first step of these; None without any.
    """

    width: int
    steps: list[int]
    mean: list[float | None]
    low: list[float | None]
    high: list[float | None]
    odd: list[list[int]]
    first_odd: int | None


class Thinned:
    """A column of a log that is read on and on, in at most `most` buckets: they get wider as it grows.

    Attributes:
        most: buckets at most.
        width: steps of a bucket, a power of two.
        last: the newest finite entry; None without one.
        lowest, highest: of all finite values; None without any.
        first_odd: step of the first value that is no number; None without one.
    """

    def __init__(self, most: int) -> None:
        self.most, self.width = most, 1
        self.index = np.empty(0, np.int64)  # [n], rising: step // width
        self.sums = np.empty((0, 7))  # [n, 7]
        self.low, self.high = np.empty(0), np.empty(0)  # [n] each
        self.last: Extreme | None = None
        self.lowest: Extreme | None = None
        self.highest: Extreme | None = None
        self.first_odd: int | None = None

    def add(self, steps: Whole, values: Floats) -> None:
        """Take entries, [n] each."""
        if not len(steps):
            return
        finite = np.isfinite(values)  # [n]
        self._note(steps, values, finite)
        kinds = [finite, np.isnan(values), values == np.inf, values == -np.inf]
        sums = np.stack([np.ones(len(steps)), steps, np.where(finite, values, 0), *kinds], axis=1)  # [n, 7]
        self.sums = np.concatenate([self.sums, sums])
        self.low = np.concatenate([self.low, np.where(finite, values, np.inf)])
        self.high = np.concatenate([self.high, np.where(finite, values, -np.inf)])
        self.index = np.concatenate([self.index, steps // self.width])
        self._merge()

    def coarsened(self, most: int) -> "Thinned":
        """Return the same in fewer buckets."""
        twin = Thinned(most)
        twin.width, twin.index, twin.sums, twin.low, twin.high = self.width, self.index, self.sums, self.low, self.high
        twin.last, twin.lowest, twin.highest, twin.first_odd = self.last, self.lowest, self.highest, self.first_odd
        twin._merge()
        return twin

    def _note(self, steps: Whole, values: Floats, finite: Flags) -> None:
        """Keep the newest, lowest and highest value, and the first that is no number."""
        if not finite.all() and self.first_odd is None:
            self.first_odd = int(steps[~finite].min())
        steps, values = steps[finite], values[finite]
        if not len(values):
            return
        self.last = Extreme(float(values[-1]), int(steps[-1]))
        low, high = int(values.argmin()), int(values.argmax())
        if self.lowest is None or values[low] < self.lowest.value:
            self.lowest = Extreme(float(values[low]), int(steps[low]))
        if self.highest is None or values[high] > self.highest.value:
            self.highest = Extreme(float(values[high]), int(steps[high]))

    def _merge(self) -> None:
        """Add up what belongs to one bucket, and make buckets twice as wide until they are few enough."""
        while True:
            if (np.diff(self.index) < 0).any():  # a log whose steps go back
                order = np.argsort(self.index, kind="stable")  # [n]
                self.index, self.sums = self.index[order], self.sums[order]
                self.low, self.high = self.low[order], self.high[order]
            starts = np.flatnonzero(np.diff(self.index, prepend=-1))  # [m]
            if len(starts) < len(self.index):
                with np.errstate(over="ignore"):
                    self.sums = np.add.reduceat(self.sums, starts, axis=0)  # [m, 7]
                self.low = np.minimum.reduceat(self.low, starts)  # [m]
                self.high = np.maximum.reduceat(self.high, starts)  # [m]
                self.index = self.index[starts]  # [m]
            if len(self.index) <= self.most:
                return
            self.width *= 2
            self.index = self.index // 2

    def odd_counts(self) -> dict[str, int]:
        """Return how many values are no numbers, by what they are."""
        totals = self.sums[:, [NAN, INF, MINUS_INF]].sum(axis=0)  # [3]
        return {kind: int(total) for kind, total in zip(("NaN", "inf", "-inf"), totals)}

    def points(self) -> Points:
        """Return what a page draws."""
        count = self.sums[:, FINITE]  # [n]
        has = count > 0  # [n]
        mean = np.clip(self.sums[:, VALUES] / np.maximum(count, 1), self.low, self.high)  # [n]; sums may overflow
        steps = np.rint(self.sums[:, STEPS] / np.maximum(self.sums[:, ENTRIES], 1)).astype(np.int64)  # [n]
        kinds = self.sums[:, [NAN, INF, MINUS_INF]].astype(np.int64)  # [n, 3]
        odd = np.flatnonzero(kinds.any(axis=1))  # [m]
        thin = self.width == 1
        return Points(
            width=self.width,
            steps=steps.tolist(),
            mean=_rounded(mean, has),
            low=[] if thin else _rounded(self.low, has),
            high=[] if thin else _rounded(self.high, has),
            odd=[[place, *counts] for place, counts in zip(odd.tolist(), kinds[odd].tolist())],
            first_odd=self.first_odd,
        )


def _rounded(values: Floats, has: Flags) -> list[float | None]:
    """Return values with so many digits as are shown; None where there is none."""
    return [float(f"{value:.{DIGITS}g}") if there else None for value, there in zip(values.tolist(), has.tolist())]
