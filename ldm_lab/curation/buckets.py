"""Scores sorted into buckets of width 1, and the mean embedding of each: a direction from ugly to beautiful.

Bucket k holds k <= score < k + 1, for k from 0 to 9. Heads are not bounded: scores below 0, from 10 on, and missing
ones are counted apart.
"""

import numpy as np
import torch
from torch import Tensor

from ldm_lab.curation.heads.head import unit

BUCKETS = 10
BELOW, ABOVE, MISSING = -1, BUCKETS, -2


def bucket_of(scores: np.ndarray) -> np.ndarray:
    """Return the bucket of each score, int64 [N]: 0 to 9, or BELOW, ABOVE, MISSING (NaN)."""
    values = np.asarray(scores, dtype=np.float64)  # [N]
    floors = np.floor(np.clip(np.where(np.isnan(values), 0.0, values), BELOW, ABOVE))  # [N]
    return np.where(np.isnan(values), MISSING, floors).astype(np.int64)  # [N]


class BucketMeans:
    """Sums the unit embeddings of each bucket.

    Attributes:
        counts: images in each bucket, int64 [10].
        below, above, missing: images whose score is in none of them.
    """

    def __init__(self, embed_dim: int) -> None:
        self.sums = torch.zeros(BUCKETS, embed_dim, dtype=torch.float64)  # [10, D]
        self.counts = np.zeros(BUCKETS, dtype=np.int64)  # [10]
        self.below = self.above = self.missing = 0

    def add(self, embeds: Tensor, scores: np.ndarray) -> None:
        """Add images: embeddings [N, D] of any length, scores [N]."""
        buckets = bucket_of(scores)  # [N]
        self.below += int((buckets == BELOW).sum())
        self.above += int((buckets == ABOVE).sum())
        self.missing += int((buckets == MISSING).sum())
        inside = (buckets >= 0) & (buckets < BUCKETS)  # [N]
        index = torch.from_numpy(buckets[inside])  # [n]
        self.sums.index_add_(0, index, unit(embeds)[torch.from_numpy(inside)].double())
        self.counts += np.bincount(buckets[inside], minlength=BUCKETS)

    def means(self) -> dict[int, Tensor]:
        """Return bucket -> mean embedding divided by its length, float32 [D]; an empty bucket has none.

        The published ones are of length 1, too, so that their scores run from below 0 to above 10.
        """
        rows = ((k, self.sums[k]) for k in range(BUCKETS) if self.counts[k])
        return {k: (row / row.norm()).float() for k, row in rows if row.norm() > 0}  # [D] each
