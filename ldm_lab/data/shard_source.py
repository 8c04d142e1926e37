"""What the sources that read shards have in common: the order of shards and samples, found again on resume."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ldm_lab.config import NonNegativeInt
from ldm_lab.data.order import Order, shuffled
from ldm_lab.data.samples import FilteredOut, RawSample, SkippedSample
from ldm_lab.data.source import ImageSource
from ldm_lab.data.tar import read_shard

GROUP = 4  # shards that are shuffled together: a group ends once it has this many times the shuffle buffer


class ShardSource(ImageSource):
    """Base class of the sources that read shards: a subclass gives `list_shards`.

    Args:
        shuffle_buffer: undecoded samples that a loader process holds to draw the next one from. 0 keeps the order
            within a shard.
    """

    unit = "shards"

    def __init__(self, *, shuffle_buffer: NonNegativeInt = 1000, **common: Any):
        super().__init__(**common)
        self.shuffle_buffer = shuffle_buffer

    def list_shards(self) -> list[str]:
        """Return the addresses of all shards, in a fixed order. Raises UserError where there are none."""
        raise NotImplementedError

    def open(self) -> None:
        self.addresses = self.list_shards()
        self.count = len(self.addresses)

    def items(self, order: Order, start: int = 0) -> Iterator[tuple[int, RawSample | SkippedSample]]:
        """Yield the samples; a restart point is the place of the first shard of a group.

        The shuffle buffer is emptied at the end of every group, so that resuming reads at most one group again and not
        the whole epoch.
        """
        share = order.share(self.count or 0)  # [about count / readers]
        places = iter(range(start, len(share)))
        for first in places:
            group = self._shard_group(share, first, places)
            for item in shuffled(group, self.shuffle_buffer, order.random("run", order.reader, first), FilteredOut):
                yield first, item

    def _shard_group(
        self, share: np.ndarray, place: int | None, places: Iterator[int]
    ) -> Iterator[RawSample | SkippedSample]:
        """Yield the samples of the shard at `place` and of further shards until there are enough of them."""
        samples = 0
        while place is not None:
            self.note(self.addresses[share[place]])
            for item in self.samples(self.addresses[share[place]]):
                samples += not isinstance(item, FilteredOut)
                yield item
            place = next(places, None) if samples < GROUP * self.shuffle_buffer else None

    def samples(self, address: str) -> Iterator[RawSample | SkippedSample]:
        """Yield the samples of a shard."""
        return read_shard(address)
