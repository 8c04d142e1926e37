"""What a pass makes of images when a cache is written: latents' moments (or pixels) and conditions, as columns."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ldm_lab.batch import Batch
from ldm_lab.conditions import MASK, ConditionKind, Embedding, ImageCondition, Level, TokenIds, TokenStates
from ldm_lab.data.cache import IMAGE, LOGVAR, MEAN
from ldm_lab.data.cache_files import (
    AGAIN,
    ENDING,
    CacheMeta,
    Column,
    Rows,
    dtype_name,
    size_of,
    write_shard,
)
from ldm_lab.data.cache_items import DONE, ItemDone
from ldm_lab.data.jobs import Fingerprint, Finished, Job, PassReport
from ldm_lab.data.order import Order
from ldm_lab.data.samples import SkippedSample, as_utf8
from ldm_lab.data.source import Item, Source
from ldm_lab.data.work_items import WorkItem
from ldm_lab.errors import UserError
from ldm_lab.training.encoders import Encoders

# ----------------------------------------------------------------------------------------------------------- variants


@dataclass(frozen=True)
class Variants:
    """The variants of an image that a cache holds.

    Attributes:
        crops: of each image, drawn as the first epochs of a run on the images would draw them.
        flip: whether each crop is there mirrored, too; otherwise it is mirrored as `data.flip` draws it.
    """

    crops: int = 1
    flip: bool = False

    @property
    def count(self) -> int:
        """How many there are."""
        return self.crops * (2 if self.flip else 1)


SEED = "seed"  # its name in a cache's description


class EncodedSample(NamedTuple):
    """A sample in its variants, decoded.

    Attributes:
        key: its name.
        caption_place: where its caption came from, or why it cannot be read.
        images: uint8 [V, 3, S, S].
        texts: V captions.
        drawn: whether something of it was drawn at random.
    """

    key: str
    caption_place: str
    images: Tensor
    texts: list[str]
    drawn: bool = False


class VariantBatch(NamedTuple):
    """Some samples in their variants: images uint8 [B * V, 3, S, S], B keys, B * V texts; whether any was drawn."""

    images: Tensor
    keys: list[str]
    texts: list[str]
    drawn: bool = False


@dataclass(frozen=True)
class NotingOrder(Order):
    """An order that notes what is drawn by it."""

    drawn: list[str] = field(default_factory=list)

    def random(self, *key: str | int) -> Random:
        self.drawn.append(str(key[0]))
        return super().random(*key)


@dataclass(frozen=True)
class VariantPreparation:
    """From a source's items to the variants of their samples, in the loader processes."""

    unique_keys: ClassVar[bool] = False  # a list names an image as often as it should come

    source: Source
    seed: int
    variants: Variants

    def prepare(self, sample: Item) -> EncodedSample:
        """Return a sample in all variants. Raises SkippedSample."""
        orders = [NotingOrder(self.seed, crop) for crop in range(self.variants.crops)]
        decoded = [self.source.decode(sample, order) for order in orders]
        for variant in decoded:
            self.source.accept(variant)
        images, texts = list[Tensor](), list[str]()
        for one in decoded:
            if one.image is None:
                raise SkippedSample("no image", one.key)
            mirrored = [one.image.flip(-1)] if self.variants.flip else []  # [3, S, S]
            images += [one.image, *mirrored]
            texts += [one.text] * (1 + len(mirrored))
        drawn = any(order.drawn for order in orders)
        return EncodedSample(decoded[0].key, decoded[0].caption_place, torch.stack(images), texts, drawn)

    def collate(self, samples: list[EncodedSample]) -> VariantBatch:
        """Return the batch of some samples."""
        images = torch.cat([sample.images for sample in samples])  # [B * V, 3, S, S]
        texts = [text for sample in samples for text in sample.texts]
        return VariantBatch(images, [s.key for s in samples], texts, any(sample.drawn for sample in samples))


# ------------------------------------------------------------------------------------------------------------ columns


def stored_dtype(name: str, values: Tensor, kind: ConditionKind | None) -> torch.dtype:
    """Return the dtype that a cache keeps a condition in: ids and masks as they are, floats as their kind says.

    Args:
        name: of the tensor.
        values: of it, [B, ...].
        kind: in the conditioner's spec; of a tensor that it does not name floats are kept in full precision.
    """
    if not values.is_floating_point():
        return values.dtype
    return torch.float32 if kind is None or isinstance(kind, TokenIds | Level) else STORED[kind.stored]


STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def expected_row_bytes(encoders: Encoders, side: int) -> int:
    """Return about how many bytes a row takes, of images of `side` pixels; token states count at their full length."""
    columns = [Column("uint8", (3, side, side))]
    if not encoders.keeps_pixels:
        own = side // encoders.autoencoder.downscale
        columns = [Column("float16", (encoders.autoencoder.channels, own, own))] * 2
    for kind in encoders.conditioner.spec.values():
        match kind:
            case Embedding():
                columns.append(Column(kind.stored, (kind.width,)))
            case TokenIds():
                columns += [Column("int64", (kind.length,)), Column("bool", (kind.length,))]
            case TokenStates():
                columns += [Column(kind.stored, (kind.length, kind.width)), Column("bool", (kind.length,))]
            case ImageCondition():
                own = side // kind.scale_factor
                columns.append(Column(kind.stored, (kind.channels, own, own)))
            case Level():
                columns.append(Column("float32", ()))
    return sum(column.row_bytes for column in columns)


# ---------------------------------------------------------------------------------------------------------- the pass


@dataclass
class EncodedRows:
    """What has become of a batch.

    Attributes:
        rows: of the samples that can be kept.
        columns: what they are.
        not_finite: keys of the others.
        drawn: whether something of it was drawn at random.
    """

    rows: Rows
    columns: dict[str, Column]
    not_finite: list[str] = field(default_factory=list)
    drawn: bool = False


class CacheJob(Job[Item, EncodedSample, VariantBatch, EncodedRows]):
    """Encodes samples; writes a shard of a cache for each work item, and beside it a file that says that it is done."""

    task, results = "encode", "cached samples"

    def __init__(self, encoders: Encoders, source: Source, variants: Variants, target: "CacheTarget") -> None:
        """Take what a pass needs: what encodes, the opened source of the samples, their variants, the cache."""
        super().__init__()
        self.frozen = nn.ModuleList([encoders.autoencoder, encoders.conditioner])  # moved to the device
        self.encoders, self.source, self.variants, self.target = encoders, source, variants, target
        self.preparation = VariantPreparation(source, target.seed, variants)

    def describe(self, items: Sequence[WorkItem[Item]]) -> list[str]:
        return self.source.found()

    def fingerprint(self, precision: str) -> Fingerprint:
        made_with = {name: its for name, its in self.target.description.items() if name != SEED}  # the cache has it
        return {"description": json.dumps(made_with, sort_keys=True), "precision": precision}

    def files(self, item: WorkItem[Item]) -> list[Path]:
        return [
            item.file(DONE)
        ]  # there is no shard of an item without a usable sample; `finished` looks for the others

    def finished(self, item: WorkItem[Item]) -> Finished | None:
        done = ItemDone.read(item.file(DONE))
        if done is None or (done.shard is not None and size_of(item.file(ENDING)) != done.shard.bytes):
            return None
        return done.finished

    def process(self, batch: VariantBatch) -> EncodedRows:
        count = self.variants.count
        keys = [key for key in batch.keys for _ in range(count)]
        made = self.source.to_device_format(Batch(keys, batch.texts, image=batch.images))
        found = self.encode(made)
        if self.encoders.keeps_pixels:
            found = {IMAGE: batch.images, **found}
        tensors = {name: values.detach().cpu() for name, values in found.items()}  # [B * V, ...] each
        finite = torch.ones(len(keys), dtype=torch.bool)  # [B * V]
        for values in tensors.values():
            finite &= values.isfinite().reshape(len(values), -1).all(1)  # [B * V]
        kept = finite.view(-1, count).all(1)  # [B]
        rows = kept.repeat_interleave(count)  # [B * V]
        not_finite = [key for key, is_kept in zip(batch.keys, kept.tolist()) if not is_kept]
        texts = [text for text, is_kept in zip(batch.texts, rows.tolist()) if is_kept]
        keys = [key for key, is_kept in zip(batch.keys, kept.tolist()) if is_kept]
        columns = self.columns(tensors)
        packed, lengths = dict[str, Tensor](), dict[str, Tensor]()
        for name, values in tensors.items():
            values = values[rows]  # [R, ...]
            if columns[name].ragged:
                lengths[name] = lengths_of(tensors[name + MASK][rows])  # [R]
                there = torch.arange(values.shape[1])[None] < lengths[name][:, None]  # [R, L]
                values = values[there]  # [sum of lengths, ...]
            packed[name] = values
        return EncodedRows(Rows(packed, lengths, keys, texts), columns, not_finite, batch.drawn)

    def encode(self, batch: Batch) -> dict[str, Tensor]:
        """Return what is made of a batch's images in [-1, 1] and texts, column -> [B, ...], each in its own dtype.

        "mean" and "logvar" of the raw latents are in half precision, which is finer than what a posterior leaves open;
        of a model of pixels there is neither, as its images are kept.
        """
        image = batch.require_image("make a cache")  # [B, 3, S, S]
        found = dict[str, Tensor]()
        if not self.encoders.keeps_pixels:
            mean, logvar = self.encoders.moments(image)  # [B, C, h, w] each
            found = {MEAN: mean.half(), LOGVAR: logvar.half()}
        for name, values in self.encoders.conditions(batch, image.device.type).items():
            found[name] = values.to(stored_dtype(name, values, self.encoders.kinds.get(name)))  # [B, ...]
        return found

    def columns(self, tensors: dict[str, Tensor]) -> dict[str, Column]:
        """Return what the columns of some tensors [R, ...] are; token states are ragged: behind a text is nothing."""
        return {
            name: Column(
                dtype_name(values.dtype),
                tuple(values.shape[1:]),
                ragged=isinstance(self.encoders.kinds.get(name), TokenStates) and name + MASK in tensors,
            )
            for name, values in tensors.items()
        }

    def write(self, item: WorkItem[Item], rows: list[EncodedRows], done: Finished) -> None:
        for key in (key for batch in rows for key in batch.not_finite):
            done.counts.skip(SkippedSample("non-finite latent or condition", as_utf8(key)))
        shard = None
        columns = rows[0].columns if rows else {}
        if any(batch.rows.keys for batch in rows):
            shard = write_shard(item.file(ENDING), Rows.joined([batch.rows for batch in rows]), columns)
        ItemDone(done, columns, shard, any(batch.drawn for batch in rows)).write(item.file(DONE))

    def finish(self, items: Sequence[WorkItem[Item]], report: PassReport) -> None:
        """Write `meta.json`, with the list of all shards, unless some of the data could not be reached."""
        if report.unreached and not self.target.without_unreached:
            return
        if not report.counts.used:
            raise UserError(f"{self.target.folder}: no image to encode. data: {report.counts}")
        read = [ItemDone.read(item.file(DONE)) for item in items]
        done = [one for one in read if one is not None and one.shard is not None]
        other = next((one for one in done if one.columns != done[0].columns), None)
        if other is not None:
            raise UserError(f"{self.target.folder}: shards of other columns: {other.shard}, {done[0].shard}; {AGAIN}")
        shards = tuple(one.shard for one in done if one.shard is not None)
        description = self.target.description
        if not any(one.drawn for one in done):
            description = {**description, SEED: "null"}  # with any other one it would be the same
        meta = CacheMeta(description, True, self.variants.count, dict(done[0].columns), shards)
        meta.write(self.target.folder)


@dataclass(frozen=True)
class CacheTarget:
    """The cache that a pass makes.

    Attributes:
        folder: where it lies.
        description: what it is made with.
        seed: of what is drawn.
        without_unreached: whether it is complete without what could not be reached.
    """

    folder: Path
    description: dict[str, str]
    seed: int
    without_unreached: bool = False


def lengths_of(mask: Tensor) -> Tensor:
    """Return where texts end, int64 [R], by their masks, bool [R, L]: behind the last place that counts."""
    places = torch.arange(1, mask.shape[1] + 1)  # [L]
    return (mask * places).amax(1)  # [R]
