"""What is in a score store: the histogram of all its scores, and whether its keys ascend."""

from dataclasses import dataclass

import numpy as np

from ldm_lab.curation.buckets import Buckets
from ldm_lab.curation.store.format import ScoreStore
from ldm_lab.progress import Bar

BATCH = 2**17  # entries
BUCKETS = Buckets(0, 10, 1)


@dataclass(frozen=True)
class ScoreStatistics:
    """One score of all entries.

    Attributes:
        min, max, mean: None without any score.
        histogram: of half-open buckets, "0-1" to "9-10".
        below, above: scores outside of them: below 0, from 10 on.
        nan: entries without this score.
    """

    min: float | None
    max: float | None
    mean: float | None
    histogram: dict[str, int]
    below: int
    above: int
    nan: int


@dataclass(frozen=True)
class StoreStatistics:
    """What is in a store.

    Attributes:
        count: entries.
        entry_bytes: of each.
        first_key, last_key: None without entries.
        repeated: entries with the key of the one before.
        scores: each one of an entry.
    """

    count: int
    entry_bytes: int
    first_key: int | None
    last_key: int | None
    repeated: int
    scores: list[ScoreStatistics]


def store_statistics(store: ScoreStore, progress: bool = False) -> StoreStatistics:
    """Return what is in a store, having read it from end to end. Raises UserError where the keys do not ascend."""
    ends: list[int] = []
    repeated = 0
    counts = np.zeros((store.scores, len(BUCKETS.edges) + 2), dtype=np.int64)  # [V, below, 0-1 ... 9-10, above, NaN]
    low, high = np.full(store.scores, np.inf), np.full(store.scores, -np.inf)  # [V]
    sums = np.zeros(store.scores)  # [V]
    bar = Bar("reading", "entry", len(store), scaled=True, shown=progress)
    with bar:
        for keys, scores in store.blocks(BATCH):
            repeated += int((keys[1:] == keys[:-1]).sum()) + (ends[-1:] == [int(keys[0])])
            ends = [*ends[:1], *([] if ends else [int(keys[0])]), int(keys[-1])]
            for n, values in enumerate(scores.T):
                counts[n] += BUCKETS.counts(values)
                values = values[~np.isnan(values)].astype(np.float64)  # [m]
                if len(values):
                    low[n], high[n] = min(low[n], values.min()), max(high[n], values.max())
                    sums[n] += values.sum()
            bar.update(len(keys))
    described = []
    for n, (below, *buckets, above, missing) in enumerate(counts.tolist()):
        some = len(store) - missing
        described.append(
            ScoreStatistics(
                min=float(low[n]) if some else None,
                max=float(high[n]) if some else None,
                mean=float(sums[n] / some) if some else None,
                histogram=dict(zip(BUCKETS.names, buckets)),
                below=below,
                above=above,
                nan=missing,
            )
        )
    first, last = (ends[0], ends[-1]) if ends else (None, None)
    return StoreStatistics(len(store), store.entry_bytes, first, last, repeated, described)
