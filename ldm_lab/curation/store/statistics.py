"""What is in a score store: the histogram of all its scores, and whether its keys ascend."""

from typing import Any

import numpy as np
from tqdm import tqdm

from ldm_lab.curation.buckets import Buckets
from ldm_lab.curation.store.format import ScoreStore

BATCH = 2**17  # entries
BUCKETS = Buckets(0, 10, 1)


def store_stats(store: ScoreStore, progress: bool = False) -> dict[str, Any]:
    """Return what is in a store, as plain data, having read it from end to end.

    `count`, `entry_bytes`, `first_key`, `last_key`, `repeated` (entries with the key of the one before), and in
    `scores`, for each score of an entry, `min`, `max`, `mean` (None without any), the `histogram` of half-open buckets
    `{"0-1": ..., "9-10": ...}`, and apart from it `below` 0, `above` (10 and more) and `nan`.

    Raises UserError where the keys do not ascend.
    """
    ends: list[int] = []
    repeated = 0
    counts = np.zeros((store.scores, len(BUCKETS.edges) + 2), dtype=np.int64)  # [V, below, 0-1 ... 9-10, above, NaN]
    low, high = np.full(store.scores, np.inf), np.full(store.scores, -np.inf)  # [V]
    sums = np.zeros(store.scores)  # [V]
    bar = tqdm(desc="reading", total=len(store), unit="entry", unit_scale=True, disable=not progress)
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
            {
                "min": float(low[n]) if some else None,
                "max": float(high[n]) if some else None,
                "mean": float(sums[n] / some) if some else None,
                "histogram": dict(zip(BUCKETS.names, buckets)),
                "below": below,
                "above": above,
                "nan": missing,
            }
        )
    return {
        "count": len(store),
        "entry_bytes": store.entry_bytes,
        "first_key": ends[0] if ends else None,
        "last_key": ends[-1] if ends else None,
        "repeated": repeated,
        "scores": described,
    }
