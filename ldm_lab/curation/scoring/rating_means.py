"""The mean embedding of each range of scores: a direction from ugly to beautiful.

Bucket k holds k <= score < k + 1, for k from 0 to 9. Heads are not bounded: scores below 0, from 10 on, and missing
ones are counted apart.
"""

import numpy as np
import torch
from torch import Tensor

from ldm_lab.curation.buckets import Buckets
from ldm_lab.curation.heads.head import l2_normalize

BUCKETS = Buckets(0, 10, 1)
COUNT = len(BUCKETS.names)


class BucketMeans:
    """Sums the unit embeddings of each bucket.

    Attributes:
        counts: images in each bucket, int64 [10].
        below, above, missing: images whose score is in none of them.
    """

    def __init__(self, embed_dim: int) -> None:
        self.sums = torch.zeros(COUNT, embed_dim, dtype=torch.float64)  # [10, D]
        self.counts = np.zeros(COUNT, dtype=np.int64)  # [10]
        self.below = self.above = self.missing = 0

    def add(self, embeds: Tensor, scores: np.ndarray) -> None:
        """Add images: embeddings [N, D] of any length, scores [N]."""
        below, *counts, above, missing = BUCKETS.counts(scores).tolist()
        self.below, self.above, self.missing = self.below + below, self.above + above, self.missing + missing
        self.counts += np.array(counts)
        buckets = BUCKETS.places(scores) - 1  # [N], NaN above all
        inside = (buckets >= 0) & (buckets < COUNT)  # [N]
        rows = l2_normalize(embeds)[torch.from_numpy(inside)].double()  # [n, D]
        self.sums.index_add_(0, torch.from_numpy(buckets[inside]), rows)

    def means(self) -> dict[int, Tensor]:
        """Return bucket -> mean embedding divided by its length, float32 [D]; an empty bucket has none.

        The published ones are of length 1, too, so that their scores run from below 0 to above 10.
        """
        rows = ((k, self.sums[k]) for k in range(COUNT) if self.counts[k])
        return {k: (row / row.norm()).float() for k, row in rows if row.norm() > 0}  # [D] each
