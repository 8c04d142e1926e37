"""What a pass makes of images when they are scored: every image is embedded once, then asked by every head."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ldm_lab.checkpoints import embedders
from ldm_lab.curation.heads.head import LoadedHead
from ldm_lab.curation.scoring import files
from ldm_lab.curation.scoring.files import EMBEDDINGS, SCORES, HeadFacts, ScoreFacts, ScoreRows
from ldm_lab.curation.scoring.rewrite import rewrite_shard
from ldm_lab.curation.store.format import hash_of
from ldm_lab.data.counts import Counts
from ldm_lab.data.jobs import Fingerprint, Finished, Job
from ldm_lab.data.samples import RawSample, SkippedSample, as_utf8, caption_of
from ldm_lab.data.work_items import FileBatch, Shard, WorkItem
from ldm_lab.embed import Encoder, Prepare
from ldm_lab.errors import UserError
from ldm_lab.io.images import BadImage, decode_image, to_rgb
from ldm_lab.io.json_files import Json, parse_json

SIMILARITY = "similarity"  # the column of the cosines of images and captions
ROW_COLUMNS = ("key", "url", "hash")  # the columns that are no scores


@dataclass(frozen=True)
class ScoringOptions:
    """What is asked of every image.

    Attributes:
        similarity: also the cosine of an image's and its caption's embedding.
        embeddings: also write the images' embeddings.
        rewrite: the folder of new shards whose json has the scores; None for none.
    """

    similarity: bool = True
    embeddings: bool = False
    rewrite: Path | None = None


# ------------------------------------------------------------------------------------------------------------ reading


class PreparedImage(NamedTuple):
    """An image as the encoder takes it, and what its sample says.

    Attributes:
        pixels: [3, S, S].
        text: the caption, the first of several; "" where there is none.
        key, url, hash: of the sample.
        caption_place: where the caption came from, or why it cannot be read.
    """

    pixels: Tensor
    text: str
    key: str
    url: str | None
    hash: int | None
    caption_place: str


class ImageBatch(NamedTuple):
    """Several prepared images: pixels [B, 3, S, S], B of all else."""

    pixels: Tensor
    text: list[str]
    key: list[str]
    url: list[str | None]
    hash: list[int | None]


@dataclass(frozen=True)
class ImagePreparation:
    """From a sample to what the encoder takes, in the loader processes."""

    unique_keys: ClassVar[bool] = True

    transform: Prepare

    def prepare(self, sample: RawSample) -> PreparedImage:
        """Return a sample's image, its caption and what its json says of it. Raises SkippedSample."""
        if sample.image is None:
            raise SkippedSample("no image", sample.key)
        try:
            pixels = self.transform(to_rgb(decode_image(sample.image)))  # [3, S, S]
        except BadImage as problem:
            raise SkippedSample(str(problem), sample.key) from None
        fields = {name.lower(): value for name, value in parse_json(sample.json).items()}
        url = fields.get("url")
        url = as_utf8(url) if isinstance(url, str) else None
        caption = caption_of(sample)
        place = caption.problem or caption.place
        return PreparedImage(pixels, caption.first, sample.key, url, sample_hash(fields), place)

    def collate(self, samples: list[PreparedImage]) -> ImageBatch:
        """Return the batch of some images."""
        return ImageBatch(
            torch.stack([sample.pixels for sample in samples]),  # [B, 3, S, S]
            [sample.text for sample in samples],
            [as_utf8(sample.key) for sample in samples],
            [sample.url for sample in samples],
            [sample.hash for sample in samples],
        )


def sample_hash(fields: Mapping[str, Json]) -> int | None:
    """Return LAION's hash of a sample: its own, or that of the url and caption that img2dataset notes of each.

    Args:
        fields: of its json, their names in lower case.
    """
    number, url, caption = fields.get("hash"), fields.get("url"), fields.get("caption", False)
    if isinstance(number, int) and not isinstance(number, bool) and -(2**63) <= number < 2**63:
        return number
    if not isinstance(url, str) or not isinstance(caption, str | None):
        return None
    try:
        return hash_of(url, caption)
    except UserError:  # half a surrogate pair
        return None


# ------------------------------------------------------------------------------------------------------------ scoring


@dataclass(frozen=True)
class ScoredBatch:
    """The scores of a batch, on the CPU.

    Attributes:
        key, url, hash: B of each.
        scores: column -> float32 [B]; NaN where there is none.
        embeds: float16 [B, D], if embeddings are written.
        finite: whether the embedding's numbers all are, bool [B].
    """

    key: list[str]
    url: list[str | None]
    hash: list[int | None]
    scores: dict[str, Tensor]
    embeds: Tensor | None
    finite: Tensor


class ScoreJob(Job[RawSample, PreparedImage, ImageBatch, ScoredBatch]):
    """Embeds images and asks heads; writes `files.SCORES`, and if asked to embeddings and a new shard."""

    task, results = "score", "scores"

    def __init__(self, encoder: Encoder, heads: dict[str, LoadedHead], options: ScoringOptions) -> None:
        """Take everything that a run needs.

        Args:
            encoder: of all heads' embeddings.
            heads: column -> head.
            options: what to write.

        Raises:
            UserError: a head of another embedder, or of another width; a column that is another one.
        """
        super().__init__()
        self.encoder, self.heads, self.options = encoder, heads, options
        for column, loaded in heads.items():
            embedders.check_same(f"head {loaded.source}", loaded.head.embedder, encoder.embedder)
            loaded.head.check_width(encoder.embed_dim)
            if column in (*ROW_COLUMNS, SIMILARITY):
                raise UserError(
                    f"--head {column}={loaded.source}: the column {column} is another one; name it otherwise"
                )
        self.modules_of_heads = nn.ModuleList(loaded.head for loaded in heads.values())
        self.preparation = ImagePreparation(encoder.prepare)

    @property
    def columns(self) -> list[str]:
        """The columns of scores, in their order."""
        return [*self.heads, *[SIMILARITY] * self.options.similarity]

    def check(self, items: Sequence[WorkItem]) -> None:
        """Raise UserError if new shards are asked of files, or would lie over the old ones."""
        if self.options.rewrite is None:
            return
        for item in items:
            if isinstance(item, FileBatch):
                raise UserError("--rewrite: writes shards anew, and these are files of their own")
            if self.rewritten(item).resolve() == Path(item.address).resolve():
                raise UserError(
                    f"--rewrite {self.options.rewrite}: would overwrite {item.address}; take another folder"
                )

    def fingerprint(self, precision: str) -> Fingerprint:
        return _fingerprint(self.encoder.embedder, precision, self.predictors(), self.options.similarity)

    def predictors(self) -> dict[str, str]:
        """Return column -> sha256 of the head."""
        return {column: loaded.sha256 for column, loaded in self.heads.items()}

    def files(self, item: WorkItem) -> list[Path]:
        embeddings = [item.file(EMBEDDINGS)] if self.options.embeddings else []
        rewritten = [self.rewritten(item)] if self.options.rewrite is not None else []
        return [*embeddings, *rewritten, item.file(SCORES)]

    def rewritten(self, item: WorkItem) -> Path:
        """Return the path of a shard's new shard."""
        if self.options.rewrite is None or not isinstance(item, Shard):
            raise ValueError(f"{item.address}: has no new shard")
        return self.options.rewrite / item.name.with_name(f"{item.name.name}.tar")

    def finished(self, item: WorkItem) -> Finished | None:
        facts = files.read_facts(item.file(SCORES))
        if facts is None:  # a damaged one is ours: a name like this is nobody else's
            return None
        fingerprint = _fingerprint(facts.embedder, facts.precision, facts.predictors, facts.similarity)
        counts = Counts(facts.read, facts.skipped, facts.examples, captions=facts.captions)
        return Finished(fingerprint, facts.content, counts)

    # ------------------------------------------------------------------------------------------------ one batch

    def process(self, batch: ImageBatch) -> ScoredBatch:
        embeds = self.encoder.images(batch.pixels)  # [B, D]
        with torch.autocast(embeds.device.type, enabled=False):  # heads are too small to save anything
            scores = {column: head(embeds) for column, head in zip(self.heads, self.modules_of_heads)}  # [B] each
        if self.options.similarity:
            scores[SIMILARITY] = self.similarity(embeds, batch.text)  # [B]
        return ScoredBatch(
            batch.key,
            batch.url,
            batch.hash,
            {column: values.float().cpu() for column, values in scores.items()},  # [B] each
            embeds.half().cpu() if self.options.embeddings else None,  # [B, D]
            embeds.isfinite().all(dim=1).cpu(),  # [B]
        )

    def similarity(self, embeds: Tensor, texts: list[str]) -> Tensor:
        """Return the cosines of images [B, D] and their captions, [B], NaN where there is no caption."""
        similar = embeds.new_full((len(texts),), torch.nan)  # [B]
        at = [i for i, text in enumerate(texts) if text]
        if at:
            similar[at] = (embeds[at] * self.encoder.texts([texts[i] for i in at])).sum(dim=1)  # [captions]
        return similar

    # ------------------------------------------------------------------------------------------------ one item

    def write(self, item: WorkItem, rows: list[ScoredBatch], done: Finished) -> None:
        """Write an item's files; images whose embedding has numbers that are not finite are skipped."""
        finite = torch.cat([batch.finite for batch in rows]) if rows else torch.ones(0, dtype=torch.bool)  # [N]
        for key, is_finite in zip([key for batch in rows for key in batch.key], finite.tolist()):
            if not is_finite:
                done.counts.skip(SkippedSample("non-finite embedding", key))
        scored = self.joined(rows, finite)
        if self.options.embeddings:
            embeds = [batch.embeds for batch in rows if batch.embeds is not None]  # [B, D] each
            joined = torch.cat(embeds)[finite] if embeds else torch.zeros(0, self.encoder.embed_dim)  # [N, D]
            files.write_embeddings(item.file(EMBEDDINGS), joined, scored.key, self.encoder.embedder)
        if self.options.rewrite is not None:
            rewrite_shard(item.address, self.rewritten(item), scored)
        facts = ScoreFacts(
            embedder=self.encoder.embedder,
            precision=done.fingerprint["precision"],
            predictors=self.predictors(),
            similarity=self.options.similarity,
            heads={c: HeadFacts(head.source, head.head.part_name, head.trained) for c, head in self.heads.items()},
            content=done.content,
            read=done.counts.read,
            skipped=done.counts.skipped,
            examples=done.counts.examples,
            captions=done.counts.captions,
        )
        files.write_scores(item.file(SCORES), scored, facts)

    def joined(self, batches: list[ScoredBatch], wanted: Tensor) -> ScoreRows:
        """Return the rows of some batches that are wanted, bool [N]."""
        row = [i for i, is_wanted in enumerate(wanted.tolist()) if is_wanted]
        key = [value for batch in batches for value in batch.key]
        url = [value for batch in batches for value in batch.url]
        hashes = [value for batch in batches for value in batch.hash]
        scores = {
            column: torch.cat([batch.scores[column] for batch in batches])[wanted].numpy()  # [N]
            if batches
            else np.zeros(0, dtype=np.float32)
            for column in self.columns
        }
        return ScoreRows([key[i] for i in row], [url[i] for i in row], [hashes[i] for i in row], scores)


def _fingerprint(embedder: dict[str, str], precision: str, predictors: dict[str, str], similarity: bool) -> Fingerprint:
    """Return what makes scores what they are."""
    return {
        "embedder": json.dumps(embedder, sort_keys=True),
        "precision": precision,
        "predictors": json.dumps(predictors, sort_keys=True),
        "similarity": str(similarity),
    }
