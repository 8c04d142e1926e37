"""Latents (or pixels) and conditions computed beforehand, read from a folder, or shard by shard from a server.

`cache_files.py` says what the files are, `cache_places.py` where they lie, `ldm_lab.training.caching` makes them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_lab.batch import Batch
from ldm_lab.config import NonNegativeInt, register
from ldm_lab.data.cache_files import DTYPES, CacheShard
from ldm_lab.data.cache_places import Opened, RemoteCache, open_place
from ldm_lab.data.contents import contents_of
from ldm_lab.data.order import Order
from ldm_lab.data.samples import Captioned, Sample, SkippedSample
from ldm_lab.data.shard_urls import scheme_of
from ldm_lab.data.source import CHECK_AFTER, WHOLE, Source, Unusable
from ldm_lab.errors import UserError

LUMPS = 10  # shards, of which one that is missing must not end the run at once
GROUP = 4  # times the shuffle buffer are shuffled together (`loader.GROUP`)
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

    The order of a cache on the disk is a permutation of all its samples. One on a server is read like shards: each is
    fetched as a whole.

    Args:
        path: the cache's folder, or where a server has it: http(s)://..., hf://datasets/OWNER/REPOSITORY/FOLDER.
        local: folder in which what comes from a server stays for the next epoch and run; null keeps it no longer than
            it is needed.
        shuffle_buffer: samples of a server's shards that a loader process draws the next one from; it holds the shards
            of about five times as many.

    Attributes:
        description: what the cache was made with, such as the checksums of the encoding parts; set by `open`.
        image_size, cut_from: of the images that were encoded, if the description says it; set by `open`.
    """

    def __init__(self, *, path: str, local: str | None = None, shuffle_buffer: NonNegativeInt = 4000, **common: Any):
        super().__init__(**common)
        self.path, self.local, self.held = path, local, shuffle_buffer
        self.opened = Opened()

    @staticmethod
    def unused(*, path: str) -> dict[str, str]:
        """Return which options have no effect, and why."""
        return {} if scheme_of(path) else dict.fromkeys(("local", "shuffle_buffer"), "they are for caches on a server")

    def open(self) -> None:
        self.place = open_place(self.path, self.local)
        meta = self.meta = self.place.meta
        if not meta.complete:
            raise UserError(f"data.path: the cache {self.path} is not complete; the command that began it can end it")
        self.place.check()
        self.description = meta.description
        size = self.description.get("image_size", "")
        self.image_size = int(size) if size.isdecimal() else None
        cut_from = self.description.get("data.resize_to", "null")
        self.cut_from = int(cut_from) if cut_from.isdecimal() else None if cut_from == "null" else WHOLE
        self.encoded_by = encoders_of(self.description)
        self.ends = np.cumsum([shard.samples for shard in meta.shards], dtype=np.int64)  # [shards]
        self.unit, self.count = "samples", meta.samples
        if isinstance(self.place, RemoteCache):
            self.unit, self.count = "shards", len(meta.shards)
            most = max((shard.samples for shard in meta.shards), default=0)
            self.judged_after = max(CHECK_AFTER, min(LUMPS * most, meta.samples))
            self.shuffle_buffer, self.opened.samples = self.held, (GROUP + 1) * self.held
        if not meta.samples:
            raise UserError(f"data.path: the cache {self.path} holds no sample")

    def found(self) -> list[str]:
        variants = f" in {self.meta.variants} variants" if self.meta.variants > 1 else ""
        columns = ", ".join(f"{name} {column}" for name, column in self.meta.columns.items())
        return [f"{self.path}: {self.meta.samples:,} samples{variants} in {len(self.ends):,} shards; {columns}"]

    def contents(self) -> str:
        return contents_of("shards", [(shard.name, shard.sha256) for shard in self.meta.shards])

    def items(self, unit: int) -> Iterator[int | Unusable]:
        """Yield the numbers of a shard's samples; all of one that cannot be had, or is a wrong one, are skipped."""
        self.note(self.place.address_of(unit))
        try:
            shard = self.opened.get(unit, self.place)
        except SkippedSample as problem:
            yield SkippedSample(problem.reason, problem.key, self.meta.shards[unit].samples)
            return
        end = int(self.ends[unit])
        yield from range(end - shard.samples, end)

    def decode(self, item: int, order: Order) -> CachedRow:
        """Return where the sample is; `collate` reads it."""
        number = int(np.searchsorted(self.ends, item, side="right"))
        shard = self.opened.get(number, self.place)
        sample = item - (int(self.ends[number - 1]) if number else 0)
        variant = order.turn(item, self.meta.variants) if self.meta.variants > 1 else 0
        row = sample * self.meta.variants + variant
        return CachedRow(shard.key[sample], shard.text[row], shard=shard, row=row)

    def captions_of(self, item: int) -> Captioned:
        sample = self.decode(item, Order(0, 0))
        variants, shard = self.meta.variants, sample.shard
        first = sample.row - sample.row % variants
        texts = [sample.text] if shard is None else [shard.text[row] for row in range(first, first + variants)]
        return Captioned(sample.key, "", list(dict.fromkeys(texts)))

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
