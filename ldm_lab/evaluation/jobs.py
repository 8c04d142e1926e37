"""What passes make features of: real images, image files, pictures that models are asked for (`data.passes`)."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ldm_lab.data.jobs import Fingerprint, Finished, Job, PassReport
from ldm_lab.data.samples import RawSample
from ldm_lab.data.source import Item, Source
from ldm_lab.data.work_items import WorkItem
from ldm_lab.errors import NotFiniteError, UserError
from ldm_lab.evaluation.feature_files import FEATURES, PictureRows, read_part, read_rows, write_part
from ldm_lab.evaluation.features import EmbeddingFeatures, Features, rows_of
from ldm_lab.evaluation.metrics import CLIP_SCORE
from ldm_lab.evaluation.reading import AsAsked, Asked, AskedBatch, FromFiles, FromSource, PictureBatch, PreparedPicture
from ldm_lab.evaluation.settings import Models, Setting
from ldm_lab.progress import print_line
from ldm_lab.prompts import Prompt

ENDING = ".safetensors"
Raw = TypeVar("Raw")
One = TypeVar("One", PreparedPicture, Asked)
Many = TypeVar("Many", PictureBatch, AskedBatch)


class FeatureJob(Job[Raw, One, Many, PictureRows]):
    """Base class: writes a file of rows for each work item.

    Attributes:
        networks: whose features are taken.
    """

    task, results = "evaluate", "features"

    def __init__(self, networks: Sequence[Features]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.parameters()).device

    def fingerprint(self, precision: str) -> Fingerprint:
        identities = {network.space: json.dumps(network.identity, sort_keys=True) for network in self.features()}
        return {**identities, "precision": precision}

    def features(self) -> list[Features]:
        """Return the networks."""
        return [network for network in self.networks if isinstance(network, Features)]

    def embedding(self) -> EmbeddingFeatures | None:
        """Return the network that compares pictures with texts; None without."""
        return next((its for its in self.features() if isinstance(its, EmbeddingFeatures)), None)

    def files(self, item: WorkItem[Raw]) -> list[Path]:
        return [item.file(ENDING)]

    def finished(self, item: WorkItem[Raw]) -> Finished | None:
        return read_part(item.file(ENDING), self.tensors())

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return what is kept of pictures: name of a tensor -> shape of its rows."""
        found: dict[str, tuple[int, ...]] = {FEATURES + its.space: (its.width,) for its in self.features()}
        return found if self.embedding() is None else {**found, CLIP_SCORE: ()}

    def write(self, item: WorkItem[Raw], rows: list[PictureRows], done: Finished) -> None:
        write_part(item.file(ENDING), PictureRows.joined(rows), done)

    def finish(self, items: Sequence[WorkItem[Raw]], report: PassReport) -> None:
        """Refuse to take a part for the whole. Raises UserError if some items could not be reached."""
        if report.unreached:
            raise UserError(
                f"--data: {len(report.unreached)} of {report.items} shards could not be read, such as "
                f"{report.unreached[0]}; what was read is kept, and the same command goes on when they can be, or "
                "--data has to leave them out"
            )

    def scored(self, tensors: dict[str, Tensor], texts: list[str]) -> PictureRows:
        """Return rows of features on the CPU, with how alike each picture and its text are (`clip_score`)."""
        network = self.embedding()
        if network is not None:
            tensors[CLIP_SCORE] = clip_scores(network, tensors[FEATURES + network.space], texts)
        return PictureRows(tensors, texts)


@torch.no_grad()
def clip_scores(network: EmbeddingFeatures, embeds: Tensor, texts: Sequence[str]) -> Tensor:
    """Return 100 x the cosine of embeddings [B, D] and their texts', [B], NaN where there is no text.

    Hessel et al. 2021 (arXiv 2104.08718, eq. 1) without its factor 2.5, and not cut off below 0.
    """
    scores = torch.full((len(texts),), torch.nan)  # [B]
    if there := [place for place, text in enumerate(texts) if text]:
        told = network.texts([texts[place] for place in there]).cpu()  # [n, D]
        scores[there] = 100 * (embeds[there] * told).sum(1)
    return scores


def directed(rows: PictureRows, prompts: Sequence[Prompt]) -> PictureRows:
    """Return rows of pictures whose scores heed where their prompts lead (`Prompt.direction`)."""
    if CLIP_SCORE in rows.tensors:
        rows.tensors[CLIP_SCORE] *= torch.tensor([prompt.direction for prompt in prompts])  # [B]
    return rows


class ImagesJob(FeatureJob[Raw, PreparedPicture, PictureBatch]):
    """Features of images that are there: of a data source as training reads it, or of files as they are."""

    def __init__(
        self, networks: Sequence[Features], source: Source | None = None, listed: frozenset[str] | None = None
    ) -> None:
        """Take the networks, and the opened source that items are of; None for files, of which those listed count."""
        super().__init__(networks)
        prepares = tuple(network.prepare for network in networks)
        self.source = source
        self.preparation = FromFiles(prepares, listed) if source is None else FromSource(source, prepares)

    def describe(self, items: Sequence[WorkItem[Raw]]) -> list[str]:
        return super().describe(items) if self.source is None else self.source.found()

    @torch.no_grad()
    def process(self, batch: PictureBatch) -> PictureRows:
        tensors = {}
        for network, inputs in zip(self.features(), batch.inputs, strict=True):
            with torch.autocast(inputs.device.type, enabled=False):
                tensors[FEATURES + network.space] = network.rows(inputs).float().cpu()  # [B, D]
        return self.scored(tensors, batch.text)


class SourceJob(ImagesJob[Item]):
    """Features of a data source's images."""

    def __init__(
        self,
        networks: Sequence[Features],
        source: Source,
        ended: Callable[[Sequence[WorkItem[Item]], PassReport], None],
    ) -> None:
        """Take the networks, the opened source, and what is done at the end, in the first process."""
        super().__init__(networks, source)
        self.ended = ended

    def finish(self, items: Sequence[WorkItem[Item]], report: PassReport) -> None:
        super().finish(items, report)
        self.ended(items, report)


class FilesJob(ImagesJob[RawSample]):
    """Features of image files."""


@dataclass(frozen=True)
class PicturesItem(WorkItem[Asked]):
    """Pictures of one setting that are made in one batch, so that they do not depend on how many processes there are.

    Attributes:
        setting: number of the setting.
        asked: what stands for the setting and the prompts (`Setting.key`).
        seeds: of the pictures' noise.
        prompts: numbers of their prompts.
    """

    setting: int
    asked: str
    seeds: tuple[int, ...]
    prompts: tuple[int, ...] = field(repr=False)

    @property
    def address(self) -> str:
        return f"pictures of seeds {self.seeds[0]} to {self.seeds[-1]}"

    def content(self) -> str:
        return f"{self.asked} {len(self.seeds)} from {self.seeds[0]} on"

    def samples(self) -> Iterator[Asked]:
        for seed, prompt in zip(self.seeds, self.prompts, strict=True):
            yield Asked(self.setting, seed, prompt)


class PicturesJob(FeatureJob[Asked, Asked, AskedBatch]):
    """Makes pictures, and keeps their features."""

    unit: ClassVar[str] = "picture"
    preparation = AsAsked()

    def __init__(
        self, networks: Sequence[Features], models: Models, settings: Sequence[Setting], prompts: Sequence[Prompt]
    ) -> None:
        """Take the networks that look at pictures, and models, settings and prompts that they are made with."""
        super().__init__(networks)
        self.models, self.settings, self.prompts = models, settings, prompts

    def describe(self, items: Sequence[WorkItem[Asked]]) -> list[str]:
        return []

    def process(self, batch: AskedBatch) -> PictureRows:
        setting, prompts = self.settings[batch.setting], [self.prompts[number] for number in batch.prompt]
        pipeline = self.models.pipeline(setting.checkpoint, self.device)
        try:
            pictures = pipeline([[prompt] for prompt in prompts], setting.options, seeds=batch.seed)
        except NotFiniteError as error:  # its row of the table says so, and the others are measured
            print_line(f"{setting.checkpoint}: pictures of seeds {batch.seed[0]} to {batch.seed[-1]}: {error}")
            none = {its.space: torch.full((len(prompts), its.width), torch.nan) for its in self.features()}
            tensors = {FEATURES + space: rows for space, rows in none.items()}  # [B, D] each
        else:
            tensors = {FEATURES + its.space: rows_of(its, pictures, self.device) for its in self.features()}
        return directed(self.scored(tensors, [prompt.text for prompt in prompts]), prompts)


def rows_of_items(items: Sequence[WorkItem[Raw]]) -> PictureRows:
    """Return what a pass has made of items, in their order."""
    return PictureRows.joined([read_rows(path)[0] for item in items if (path := item.file(ENDING)).exists()])
