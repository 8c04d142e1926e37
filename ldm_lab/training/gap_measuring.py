"""What a pass over images (or a cache) tells of the gap: means of both clouds, how pairs meet, noise, perhaps a map."""

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm_lab.batch import Batch
from ldm_lab.checkpoints.gap_files import GapFile
from ldm_lab.checkpoints.importer import Section
from ldm_lab.conditioners.embedding import EmbeddingConditioner
from ldm_lab.conditioners.gap import Gap, unit
from ldm_lab.data.cache_files import ENDING, CacheShard, Column, Rows, size_of, write_shard
from ldm_lab.data.cache_items import DONE, ItemDone
from ldm_lab.data.jobs import Fingerprint, Finished, Job, PassReport
from ldm_lab.data.order import Order
from ldm_lab.data.samples import Sample, SkippedSample, as_utf8
from ldm_lab.data.source import Item, Source
from ldm_lab.data.varied_texts import CAPTIONS, COUNT, texts_of
from ldm_lab.data.work_items import WorkItem
from ldm_lab.errors import UserError
from ldm_lab.progress import print_line
from ldm_lab.training.gap_maps import Fitted, Retrieval, fit, retrieval

USUAL_NOISE = 0.5  # where no captions tell how far texts are from their images
LEAST_COSINE = 0.1  # of a pair without means, below which nothing can be said
CHUNK = 256  # texts that are embedded at once
EMBED, TEXT, CAPTIONED = "embed", "text_embed", "captioned"  # columns


@dataclass(frozen=True)
class GapWanted:
    """What is measured, and where it goes.

    Attributes:
        out: the file.
        texts: a file of texts whose mean is the texts', `CAPTIONS`, or None for our own list.
        map: of texts that is fitted, "none" for none.
        about: what else the file says of how it came about.
    """

    out: Path
    texts: str | None = None
    map: str = "none"
    about: str = ""

    @property
    def parts(self) -> Path:
        """The folder of what is not finished, in a folder of its own for whatever is measured (`GapJob.folder`)."""
        return self.out.with_name(f"{self.out.name}.parts")


class EmbeddedBatch(NamedTuple):
    """Samples on their way to the conditioner: keys, texts, and images uint8 [B, 3, S, S] or a cache's embeddings."""

    keys: list[str]
    texts: list[str]
    image: Tensor | None
    embed: Tensor | None


@dataclass(frozen=True)
class GapPreparation:
    """From a source's items to what the conditioner embeds, in the loader processes."""

    unique_keys: ClassVar[bool] = False

    source: Source

    def prepare(self, sample: Item) -> Sample:
        """Return a sample. Raises SkippedSample."""
        return self.source.decode(sample, Order(0, 0))

    def collate(self, samples: list[Sample]) -> EmbeddedBatch:
        """Return the batch of some samples."""
        batch = self.source.collate(samples)
        return EmbeddedBatch(batch.key, batch.text, batch.image, batch.conditions.get(EMBED))


class GapJob(Job[Item, Sample, EmbeddedBatch, Rows]):
    """Embeds images and their captions; at the end the means of all, and what they come to, go into one file.

    Attributes:
        report: what was found, on the first process, once it is done.
    """

    task, results = "measure", "embeddings"

    def __init__(
        self, conditioner: EmbeddingConditioner, embedder: dict[str, str], source: Source, wanted: GapWanted
    ) -> None:
        """Take what a pass needs: what embeds, whose embeddings these are, the opened source, what is wanted."""
        super().__init__()
        self.conditioner, self.embedder, self.source, self.wanted = conditioner, embedder, source, wanted
        self.preparation = GapPreparation(source)
        width = conditioner.embed_dim
        self.columns = {
            EMBED: Column("float32", (width,)),
            TEXT: Column("float32", (width,)),
            CAPTIONED: Column("bool", ()),
        }
        self.report: GapReport | None = None

    def folder(self, precision: str) -> Path:
        """Return where the results go: those of other data or of another conditioner lie in another folder."""
        told = json.dumps(self.fingerprint(precision), sort_keys=True)
        return self.wanted.parts / hashlib.sha256(told.encode()).hexdigest()[:12]

    def describe(self, items: Sequence[WorkItem[Item]]) -> list[str]:
        return self.source.found()

    def fingerprint(self, precision: str) -> Fingerprint:
        return {"description": json.dumps([self.embedder, self.wanted.about], sort_keys=True), "precision": precision}

    def files(self, item: WorkItem[Item]) -> list[Path]:
        return [item.file(DONE)]  # there is no shard of an item without a usable sample; `finished` looks for others

    def finished(self, item: WorkItem[Item]) -> Finished | None:
        done = ItemDone.read(item.file(DONE))
        if done is None or (done.shard is not None and size_of(item.file(ENDING)) != done.shard.bytes):
            return None
        return done.finished

    def process(self, batch: EmbeddedBatch) -> Rows:
        made = self.source.to_device_format(Batch(batch.keys, batch.texts, image=batch.image))
        embeds = batch.embed if batch.embed is not None else self.conditioner.from_batch(made)[EMBED]  # [B, D]
        embeds = unit(embeds.float())  # [B, D]
        there = [i for i, text in enumerate(batch.texts) if text.strip()]
        texts, captioned = torch.zeros_like(embeds), torch.zeros(len(embeds), dtype=torch.bool)  # [B, D], [B]
        if there:
            texts[there] = self.embed_texts([batch.texts[i] for i in there])  # [n, D]
            captioned[there] = True
        tensors = {EMBED: embeds.cpu(), TEXT: texts.cpu(), CAPTIONED: captioned}
        return Rows(tensors, {}, batch.keys, batch.texts)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """Return the embeddings of texts, float32 [n, D], unit rows; long ones are cut."""
        tokens = self.conditioner.tokenize(texts).to(self.conditioner.device)  # [n, L]
        parts = [self.conditioner.encode_tokens(some).float() for some in tokens.split(CHUNK)]  # [m, D] each
        return F.normalize(torch.cat(parts), dim=-1)  # [n, D]

    def write(self, item: WorkItem[Item], rows: list[Rows], done: Finished) -> None:
        shard = None
        if rows:
            joined = Rows.joined(rows)
            finite = joined.tensors[EMBED].isfinite().all(1)  # [n]
            for key, is_finite in zip(joined.keys, finite.tolist()):
                if not is_finite:
                    done.counts.skip(SkippedSample("non-finite embedding", as_utf8(key)))
            kept = [i for i, is_finite in enumerate(finite.tolist()) if is_finite]
            tensors = {name: value[kept] for name, value in joined.tensors.items()}
            rest = Rows(tensors, {}, [joined.keys[i] for i in kept], [joined.texts[i] for i in kept])
            shard = write_shard(item.file(ENDING), rest, self.columns) if kept else None
        ItemDone(done, self.columns, shard).write(item.file(DONE))

    def finish(self, items: Sequence[WorkItem[Item]], report: PassReport) -> None:
        """Write the file, unless some of the data could not be reached. Raises UserError without a usable image."""
        if report.unreached:
            return
        shards = [CacheShard(item.file(ENDING), self.columns, 1) for item in items if item.file(ENDING).is_file()]
        rows = {
            name: torch.cat([shard.rows(name, list(range(shard.samples))) for shard in shards]) if shards else None
            for name in self.columns
        }
        images, texts, captioned = (rows[name] for name in (EMBED, TEXT, CAPTIONED))
        if images is None or texts is None or captioned is None:
            raise UserError(f"conditioner.gap: no image to measure. data: {report.counts}")
        self.report = self.measured(images, texts[captioned], captioned)
        self.report.file.save(self.wanted.out)
        shutil.rmtree(self.wanted.parts, ignore_errors=True)

    def measured(self, images: Tensor, captions: Tensor, captioned: Tensor) -> "GapReport":
        """Return what was found.

        Args:
            images: embeddings [N, D], unit rows.
            captions: of those that have one, [n, D].
            captioned: which these are, bool [N].
        """
        whose = self.wanted.texts
        if whose == CAPTIONS and len(captions) < 2:
            raise UserError(
                "conditioner.gap.texts: captions: the data have none; leave it out, or name a file of texts"
            )
        texts = captions if whose == CAPTIONS else self.embed_texts(texts_of(whose))  # [m, D]
        gap = Gap(images.mean(0), texts.mean(0).cpu())
        pairs, fitted = images[captioned], None
        if self.wanted.map != "none":
            fitted = fit(self.wanted.map, gap.texts(captions), gap.images(pairs))
            gap = Gap(gap.image_mean, gap.text_mean, map=fitted.map)
        before = retrieval(captions, pairs) if len(captions) > 1 else None
        after = None if before is None else retrieval(gap.texts(captions), gap.images(pairs))
        meet = fitted.held_out if fitted is not None else after
        noise = USUAL_NOISE if meet is None else min(noise_of(meet.cosine), USUAL_NOISE)
        said = {None: f"{COUNT:,} texts of our own", CAPTIONS: f"{len(captions):,} captions"}
        facts = Section(
            images=len(images), captions=len(captions), texts=said.get(whose, str(whose)), map=self.wanted.map,
            about=self.wanted.about,
        )  # fmt: skip
        found = GapFile(Gap(gap.image_mean, gap.text_mean, noise, gap.map), self.embedder, facts)
        return GapReport(found, before, after, fitted, images, texts.cpu(), captions)


def noise_of(cosine: float) -> float:
    """Return how long the noise has to be for a noised image to be as far from the image as its text is.

    The cosine of a unit vector and itself with noise of length n at right angles is 1 / sqrt(1 + n^2).
    """
    return math.sqrt(1 / max(cosine, LEAST_COSINE) ** 2 - 1) if cosine < 1 else 0.0


@dataclass(frozen=True)
class GapReport:
    """What was found.

    Attributes:
        file: what is written.
        before, after: retrieval on pairs with and without the means (and through the map); None without captions.
        fitted: the map, on pairs that it was not fitted on; None if none was asked for.
        images, texts, captions: unit embeddings [N, D], [m, D], [n, D].
    """

    file: GapFile
    before: Retrieval | None
    after: Retrieval | None
    fitted: Fitted | None
    images: Tensor
    texts: Tensor
    captions: Tensor

    def lines(self) -> list[str]:
        """Return it for people."""
        gap, facts = self.file.gap, self.file.facts
        cosine = float(F.cosine_similarity(gap.image_mean, gap.text_mean, dim=0))
        lines = [
            f"image mean of {facts['images']:,} images, length {gap.image_mean.norm():.3f}; "
            f"text mean of {facts['texts']}, length {gap.text_mean.norm():.3f}",
            f"gap: the means are {gap.distance:.3f} apart (cosine {cosine:.3f})",
        ]
        if self.before is None or self.after is None:
            lines.append("no captions: how pairs meet is not known")
        else:
            lines.append(f"pairs as they are: {self.before}")
            through = "" if self.fitted is None or self.fitted.map is None else f", through the {self.fitted.name} map"
            lines.append(f"pairs without their means{through}: {self.after}")
        if self.fitted is not None:
            asked = " (the best of none, ridge, residual)" if facts["map"] == "best" else ""
            lines.append(f"map: {self.fitted.name}{asked}; on pairs held out: {self.fitted.held_out}")
        why = "as far as captions are from their images" if self.before is not None else "usual; no captions tell"
        lines.append(f"suggested noise: {gap.noise_length:.3f} ({why})")
        return lines


def say(report: GapReport | None) -> None:
    """Print a report, if this is the process that has it."""
    for line in report.lines() if report is not None else []:
        print_line(f"gap: {line.removeprefix('gap: ')}")
