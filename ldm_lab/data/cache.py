"""Latents (or pixels) and conditions computed beforehand, read from a folder, or shard by shard from a server.

`cache_files.py` says what the files are, `cache_places.py` where they lie, `ldm_lab.training.caching` makes them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_lab.config import PositiveInt, register
from ldm_lab.data.cache_files import DTYPES, CacheShard
from ldm_lab.data.cache_places import LocalCache, Opened, RemoteCache, open_place
from ldm_lab.data.order import Order
from ldm_lab.data.samples import Sample, SkippedSample
from ldm_lab.data.source import Source, Unusable
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Batch

IMAGE, MEAN, LOGVAR = "image", "mean", "logvar"  # columns that are no conditions
ENCODERS = ("autoencoder", "conditioner")  # the roles whose parts a description names


def encoders_of(description: dict[str, str]) -> dict[str, dict[str, str]]:
    """Return what a description says of the parts that encoded: role -> name, checksum and options, as JSON."""
    found: dict[str, dict[str, str]] = {}
    for key, value in description.items():
        role, _, name = key.partition(".")
        if role in ENCODERS:
            found.setdefault(role, {})[name] = value
    return found


@dataclass
class CachedRow(Sample):
    """A sample that is not read yet: a row of a shard; its batch reads all its rows together."""

    shard: CacheShard | None = None
    row: int = 0


@register("data", "cache")
class Cache(Source):
    """Latents and conditions that `python -m ldm_lab cache` wrote.

    Batches have `mean` and `logvar`, float32 [B, C, h, w], or of a model of pixels `image`; and as `conditions` what
    the conditioner gave, ids as int64, masks as bool, all else as float32. Of several variants of an image each epoch
    takes the next one, from a random one on.

    The order of a cache on the disk is a permutation of all its samples. One on a server is read like shards: whole
    files, `shuffle_shards` of them shuffled together.

    Args:
        path: the cache's folder, or where a server has it: http(s)://..., hf://datasets/OWNER/REPOSITORY/FOLDER.
        local: folder in which what comes from a server stays for the next epoch and run; null keeps it no longer than
            it is needed.
        shuffle_shards: shards from a server that a reader has at once, to draw from them at random.

    Attributes:
        description: what the cache was made with, such as the checksums of the encoding parts; set by `open`.
        image_size: pixels, of the images that were encoded, if the description says it; set by `open`.
    """

    def __init__(self, *, path: str, local: str | None = None, shuffle_shards: PositiveInt = 4, **common: Any):
        super().__init__(**common)
        self.path, self.local, self.shuffle_shards = path, local, shuffle_shards
        self.opened = Opened()

    def open(self) -> None:
        self.place = open_place(self.path, self.local)
        meta = self.meta = self.place.meta
        if not meta.complete:
            raise UserError(f"data.path: the cache {self.path} is not complete; the command that began it can end it")
        self.place.check()
        self.description = meta.description
        size = self.description.get("image_size", "")
        self.image_size = int(size) if size.isdecimal() else None
        self.encoded_by = encoders_of(self.description)
        self.ends = np.cumsum([shard.samples for shard in meta.shards], dtype=np.int64)  # [shards]
        is_local = isinstance(self.place, LocalCache)
        self.unit = "samples" if is_local else "shards"
        self.count = meta.samples if is_local else len(meta.shards)
        if not meta.samples:
            raise UserError(f"data.path: the cache {self.path} holds no sample")

    def found(self) -> list[str]:
        variants = f" in {self.meta.variants} variants" if self.meta.variants > 1 else ""
        columns = ", ".join(f"{name} {column}" for name, column in self.meta.columns.items())
        return [f"{self.path}: {self.meta.samples:,} samples{variants} in {len(self.ends):,} shards; {columns}"]

    def items(self, order: Order, start: int = 0) -> Iterator[tuple[int, int | Unusable]]:
        """Yield samples by their numbers; from a server group by group, the restart point being a group's first place.

        A shard that cannot be had, or is not the right one, is one `SkippedSample`.
        """
        if isinstance(self.place, RemoteCache):
            yield from self._of_groups(self.place, order, start)
        else:
            yield from super().items(order, start)

    def _of_groups(self, place: RemoteCache, order: Order, start: int) -> Iterator[tuple[int, int | Unusable]]:
        share = order.share(self.count or 0)  # [about count / readers]
        with place.fetching(self.note) as fetched:
            for first in range(start, len(share), self.shuffle_shards):
                group = [int(shard) for shard in share[first : first + self.shuffle_shards]]
                upcoming = share[first + self.shuffle_shards : first + 2 * self.shuffle_shards]
                shards, samples = dict[int, CacheShard](), list[np.ndarray]()
                for shard in group:
                    try:
                        shards[shard] = fetched.shard(shard)
                        samples.append(np.arange(self.ends[shard] - shards[shard].samples, self.ends[shard]))
                    except SkippedSample as problem:
                        yield first, problem
                fetched.begin([int(shard) for shard in upcoming])
                self.opened.shards = shards  # batches that hold rows of those before keep them
                numbers = np.concatenate([np.zeros(0, dtype=np.int64), *samples])  # [samples of the group]
                random = order.random("group", order.reader, first)
                seed = [random.getrandbits(32) for _ in range(8)]
                for number in np.random.RandomState(seed).permutation(numbers):
                    yield first, int(number)

    def decode(self, item: int, order: Order) -> CachedRow:
        """Return where the sample is; `collate` reads it."""
        number = int(np.searchsorted(self.ends, item, side="right"))
        shard = self.opened.get(number, self.place)
        sample = item - (int(self.ends[number - 1]) if number else 0)
        variant = order.turn(item, self.meta.variants) if self.meta.variants > 1 else 0
        row = sample * self.meta.variants + variant
        return CachedRow(shard.key[sample], shard.text[row], shard=shard, row=row)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Return the batch of some rows, read shard by shard, in the cache's own precision."""
        by_shard: dict[int, tuple[CacheShard, list[int], list[int]]] = {}  # the shard, places in the batch, rows
        for place, sample in enumerate(samples):
            if isinstance(sample, CachedRow) and sample.shard is not None:
                _, places, rows = by_shard.setdefault(id(sample.shard), (sample.shard, [], []))
                places.append(place)
                rows.append(sample.row)
        tensors: dict[str, Tensor] = {}
        for name, column in self.meta.columns.items():
            values = torch.empty(len(samples), *column.shape, dtype=DTYPES[column.dtype])  # [B, ...]
            for shard, places, rows in by_shard.values():
                values[places] = shard.rows(name, rows)
            tensors[name] = values
        own = {name: tensors.pop(name, None) for name in (IMAGE, MEAN, LOGVAR)}
        return Batch([s.key for s in samples], [s.text for s in samples], conditions=tensors, **own)

    def to_device_format(self, batch: Batch) -> Batch:
        image = None if batch.image is None else batch.image.float().div_(127.5).sub_(1)  # [B, 3, S, S]
        mean, logvar = (None if value is None else value.float() for value in (batch.mean, batch.logvar))
        conditions = {
            name: value.float() if value.is_floating_point() else value for name, value in batch.conditions.items()
        }
        return replace(batch, image=image, mean=mean, logvar=logvar, conditions=conditions)
