"""Half-open buckets of scores: the only ones, for histograms of tables, stores and shards alike."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ldm_lab.errors import UserError

MOST = 1000  # buckets


@dataclass(frozen=True)
class Buckets:
    """Buckets [low, low + width), [low + width, low + 2 width), ... up to `high`.

    A *place* says where a score falls: 0 below all buckets, k in bucket k - 1, `len(edges)` above all of them.
    """

    low: float = 0.0
    high: float = 10.0
    width: float = 1.0

    @cached_property
    def edges(self) -> list[float]:
        """The lower ends of the buckets, and the upper end of the last."""
        count = round((self.high - self.low) / self.width)
        return [round(self.low + i * self.width, 9) for i in range(count + 1)]

    @property
    def names(self) -> list[str]:
        """Such as "0-1", in the order of the buckets."""
        return [f"{low:g}-{high:g}" for low, high in zip(self.edges, self.edges[1:])]

    def check(self) -> None:
        """Raise UserError for what makes no sense."""
        finite = all(map(math.isfinite, (self.low, self.high, self.width)))
        whole = finite and self.width > 0 and abs((self.high - self.low) / self.width - len(self.edges) + 1) < 1e-6
        if not whole or not 1 <= len(self.edges) - 1 <= MOST:
            span = f"{self.low:g} to {self.high:g}"
            raise UserError(f"buckets: {span} is not 1 to {MOST} times a width of {self.width:g}")

    def places(self, scores: ArrayLike) -> NDArray[np.int64]:
        """Return the places of scores [N] that are numbers, int64 [N]."""
        return np.searchsorted(self.edges, np.asarray(scores, dtype=np.float64), side="right")  # [N]

    def counts(self, scores: ArrayLike) -> NDArray[np.int64]:
        """Return how many of some scores [N] are below all buckets, in each one, above all, and NaN, int64 [B + 3]."""
        values = np.asarray(scores, dtype=np.float64)  # [N]
        missing = np.isnan(values)  # [N]
        places = np.bincount(self.places(values[~missing]), minlength=len(self.edges) + 1)  # [B + 2]
        return np.append(places, missing.sum())  # [B + 3]
