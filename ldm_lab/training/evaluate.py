"""Metrics of pictures during training: the section `evaluate`."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Len
from PIL import Image
from pytorch_lightning import Trainer

from ldm_lab.checkpoints.embedders import embedder_of
from ldm_lab.conditioners.embedding import EmbeddingConditioner
from ldm_lab.config import PartConfig, PartSection, Plain, PositiveInt, build, register
from ldm_lab.data.datamodule import DataModule
from ldm_lab.data.source import Source
from ldm_lab.embed import Encoder
from ldm_lab.errors import NotFiniteError, UserError, told_in_one_line
from ldm_lab.evaluation.checks import check_words
from ldm_lab.evaluation.distances import check_rows
from ldm_lab.evaluation.feature_files import FEATURES, PictureRows
from ldm_lab.evaluation.features import EmbeddingFeatures, Features, InceptionFeatures, rows_of
from ldm_lab.evaluation.jobs import clip_scores, directed
from ldm_lab.evaluation.metrics import CLIP_SCORE, RealSet, few_images, picture_value
from ldm_lab.evaluation.settings import check_prompts
from ldm_lab.io.images import to_images
from ldm_lab.metrics import METRICS, check_names, is_higher_better, of_kind, spaces_of
from ldm_lab.prompts import Prompt, parse_prompt, read_prompts
from ldm_lab.sampling import Pipeline, SamplingOptions
from ldm_lab.sampling.options import DEMO
from ldm_lab.training.best import Measurement
from ldm_lab.training.checkpointing import offer
from ldm_lab.training.demo import comparable, trained_model
from ldm_lab.training.diffusion import DiffusionTask
from ldm_lab.training.logs import log_values, print_rank_zero
from ldm_lab.training.measured_data import digest, opened
from ldm_lab.training.measuring import Measuring
from ldm_lab.training.task import gather

ADVICE = "a smaller evaluate.sampling.batch_size needs less"
# Options that neither the images nor their order depend on, or (the buffer, shuffled through) as `items_key` tells;
# where data lie is told by what is there.
UNIMPORTANT = ("workers", "timeout", "max_skipped", "path", "shards", "folder", "local", "batch_size", "shuffle_buffer")


@dataclass(frozen=True)
class Made:
    """What is seen on the pictures of one batch: its number among all; None of pictures that are not finite."""

    number: int
    rows: PictureRows | None


@register("evaluate")
class Evaluate(Measuring):
    """Make pictures with the averaged weights every N steps, on all devices, and compare them with real images."""

    section = "evaluate"

    def __init__(
        self,
        folder: Path,
        *,
        data: Annotated[dict[str, Plain], PartSection("data")],
        every: PositiveInt = 5000,
        metrics: Annotated[list[str], Len(1)] = ("fd", "cmmd", "precision", "recall", "clip_score"),
        images: PositiveInt = 1000,
        pictures: PositiveInt = 256,
        prompts: str | None = None,
        sampling: Annotated[dict[str, Plain] | None, PartSection("sampling")] = None,
        clip: Annotated[dict[str, Plain] | None, PartSection("conditioner")] = None,
        inception: str | None = None,
    ) -> None:
        """Set what is measured.

        Args:
            folder: the run's folder; nothing is written there but by the logs and `checkpoint.best`.
            data: real images that are not among those trained on, described as in the section `data`.
            every: optimizer steps between measurements; there is one where the run ends, too.
            metrics: names, as `python -m ldm_lab evaluate` has them, of those that look at pictures.
            images: the first so many of the data, in an order that the run's seed gives.
            pictures: that are made at each measurement.
            prompts: a file with one prompt per line; null takes the captions of the real images.
            sampling: how pictures are made (`ldm_lab.sampling.options`), by default with 50 steps of plms. Picture i
                has the seed of `seed` + i; the batch size is that of each device.
            clip: a section `conditioner` whose embeddings are compared; null takes the run's own.
            inception: a file with Inception's weights; null takes the released one where a metric needs it.
        """
        self.source: Source = build("data", data)
        self.source.workers = min(self.source.workers, 1)  # the order depends on their number
        self.every, self.metrics, self.images, self.pictures = every, list(metrics), images, pictures
        lines = None if prompts is None else read_prompts(prompts)
        self.prompts = None if lines is None else [parse_prompt(line) for line in lines]
        check_words("evaluate.prompts", self.metrics, self.prompts or [])
        self.options = comparable(SamplingOptions.from_values({**DEMO, **(sampling or {})}), "evaluate")
        self.clip, self.inception = clip, inception
        shown, drawn = ({key: its for key, its in (section or {}).items() if key not in UNIMPORTANT}
                        for section in (data, sampling))  # fmt: skip
        judge = {key: its for key, its in (clip or {}).items() if key != "weights"}  # known by their content
        self.described = json.dumps([shown, images, pictures, lines, drawn, judge], sort_keys=True, default=str)
        self.networks: list[Features] = []
        self.real: RealSet | None = None
        self.measured_on = ""

    @staticmethod
    def check(*, metrics: Sequence[str], pictures: int, images: int) -> list[str]:
        """Return what is wrong with the names of metrics, and which of them need more pictures or images."""
        try:
            known = check_names(metrics, "metrics")
        except UserError as error:
            return [str(error)]
        if wrong := of_kind(known, "data"):
            return [f"metrics: {wrong[0]}: looks at no picture; `python -m ldm_lab evaluate` and `held_out` measure it"]
        counts = (("pictures", pictures, known), ("images", images, of_kind(known, "pictures")))
        return [
            f"{key}: {count}; {name} needs at least {METRICS[name].least}"
            for key, count, names in counts
            for name in names
            if count < METRICS[name].least
        ]

    # ---------------------------------------------------------------------------------------------- before it begins

    def setup(self, trainer: Trainer, task: DiffusionTask, stage: str) -> None:
        """Find the data before training. Raises UserError where there are none, or nothing to compare them by."""
        contents = opened(trainer, self.source, "evaluate")
        self.networks = [self.network(space, task) for space in spaces_of(self.metrics)]
        self.measured_on = digest(self.described, task.seed, contents, [network.key for network in self.networks])

    def network(self, space: str, task: DiffusionTask) -> Features:
        """Return a network whose features are compared. Raises UserError where there is none."""
        if space == "inception":
            return InceptionFeatures(self.inception)
        if self.clip is not None:
            encoder = Encoder(PartConfig.from_dict("conditioner", self.clip))
            return EmbeddingFeatures(encoder.conditioner, encoder.embedder)
        name = next(name for name in self.metrics if METRICS[name].space == space)
        if not isinstance(task.conditioner, EmbeddingConditioner):
            raise UserError(
                f"evaluate.metrics: {name}: the conditioner {task.conditioner.part_name} embeds no images; "
                "evaluate.clip says whose embeddings are compared"
            )
        return EmbeddingFeatures(task.conditioner, embedder_of(task.run_config["conditioner"]))

    @told_in_one_line(lambda: "looking at the images of evaluate.data", "a smaller evaluate.data.batch_size needs less")
    def on_train_start(self, trainer: Trainer, task: DiffusionTask) -> None:
        """Look at the real images, each rank at its share. Raises UserError for none, or none with a caption."""
        self.measured_at = trainer.global_step  # that of a run that goes on was measured before it was saved
        with self.on_device(task):
            mine = self.real_parts(trainer, task)
        parts = sorted((made for rank in gather(mine) for made in rank), key=_number)
        rows = PictureRows.joined([made.rows for made in parts if made.rows is not None])
        if not len(rows):
            raise UserError("evaluate.data: no usable image")
        if len(rows) < self.images:
            print_rank_zero(f"evaluate: {len(rows)} images are there, fewer than evaluate.images={self.images}")
        for name in of_kind(self.metrics, "pictures"):
            space = METRICS[name].space
            assert space is not None, f"{name} compares features"
            check_rows(f"evaluate.data: {name}: real images", rows.features(space), METRICS[name].least)
        self.real = RealSet(rows)
        if self.prompts is None:
            self.prompts = [Prompt(text) for text in rows.texts if text]
        if not self.prompts:
            raise UserError("evaluate.prompts: has to be given, as evaluate.data has no captions")
        self.measured_on += digest(rows.texts)  # which may change beside the same images
        try:
            check_prompts(self.pipeline(trainer, task), self.prompts[: self.pictures], self.options)
        except UserError as error:
            raise UserError(f"evaluate: {error}") from None
        counts = {"pictures": self.pictures, "real images": len(rows)}
        for line in few_images(self.metrics, counts, {network.space: network.width for network in self.networks}):
            print_rank_zero(f"evaluate: {line}")

    @contextmanager
    def on_device(self, task: DiffusionTask) -> Iterator[None]:
        """Have the networks where the run trains, as long as they are needed; training needs the memory between."""
        own = [its for its in self.networks if not any(part is task.conditioner for part in its.modules())]
        try:
            for network in own:
                network.to(task.device)
            yield
        finally:
            for network in own:
                network.cpu()

    def real_parts(self, trainer: Trainer, task: DiffusionTask) -> list[Made]:
        """Return what this rank sees of the real images: every n-th batch of n ranks'."""
        data = DataModule(self.source, seed=task.seed, rank=0, world_size=1, epochs=1)
        mine: list[Made] = []
        taken = 0
        for number, batch in enumerate(data.train_dataloader()):
            count = min(len(batch), self.images - taken)
            if number % trainer.world_size == trainer.global_rank:
                pictures = to_images(batch.require_image("evaluate"), rounded=True)[:count]
                mine.append(Made(number, self.seen(task, pictures, batch.text[:count], with_texts=False)))
            taken += count
            if taken >= self.images:
                break
        return mine

    def seen(
        self, task: DiffusionTask, pictures: Sequence[Image.Image], texts: Sequence[str], with_texts: bool
    ) -> PictureRows:
        """Return the features of pictures, and if wanted how alike they and their texts are."""
        rows = PictureRows(texts=list(texts))
        for network in self.networks:
            rows.tensors[FEATURES + network.space] = rows_of(network, pictures, task.device)  # [n, D]
            if with_texts and isinstance(network, EmbeddingFeatures):
                scores = clip_scores(network, rows.features(network.space), rows.texts)  # [n]
                rows.tensors[CLIP_SCORE] = scores
        return rows

    # ------------------------------------------------------------------------------------------------- while it trains

    @told_in_one_line(lambda: "evaluating", ADVICE)
    def measure(self, trainer: Trainer, task: DiffusionTask) -> None:
        """Make pictures, measure, log, hand the values to who keeps the best weights."""
        with self.on_device(task):
            mine = self.made_parts(trainer, task)
        parts = sorted((made for rank in gather(mine) for made in rank), key=_number)
        step = trainer.global_step
        if any(made.rows is None for made in parts):
            print_rank_zero(f"evaluate: pictures at step {step} are not finite; nothing is measured")
            return
        values: dict[str, float] = {}
        if trainer.is_global_zero:
            rows = PictureRows.joined([made.rows for made in parts if made.rows is not None])
            values = self.values(rows, step)
        values = trainer.strategy.broadcast(values)
        if not values:
            return
        log_values(trainer, {f"evaluate/{name}": value for name, value in values.items()})
        print_rank_zero(f"evaluate: {', '.join(f'{name} {its:.4g}' for name, its in values.items())} at step {step}")
        for name, value in values.items():
            better = is_higher_better(name)
            offer(trainer, task, Measurement(f"evaluate/{name}", value, better, self.measured_on))

    def values(self, rows: PictureRows, step: int) -> dict[str, float]:
        """Return the values of the metrics; say which have none, as features are not finite, and go on."""
        values: dict[str, float] = {}
        for name in self.metrics:
            try:
                values[name] = picture_value(name, self.real, rows, 0).value
            except UserError as error:
                print_rank_zero(f"evaluate: {error} at step {step}; {name} is left out")
        return values

    def made_parts(self, trainer: Trainer, task: DiffusionTask) -> list[Made]:
        """Return what this rank sees on its share of the pictures, batch by batch.

        Batches are the same ones on any number of ranks. All ranks run the network equally often, as they may share it:
        one that has fewer batches makes its last one, or the first, again.
        """
        size = self.options.batch_size
        firsts = range(0, self.pictures, size)
        rounds = -(-len(firsts) // trainer.world_size)
        places = [trainer.global_rank + turn * trainer.world_size for turn in range(rounds)]
        made = []
        for place in places:
            self.check_time(trainer)
            made.append(self.make(trainer, task, place % len(firsts)))
        return [one for one, place in zip(made, places, strict=True) if place < len(firsts)]

    def make(self, trainer: Trainer, task: DiffusionTask, number: int) -> Made:
        """Return what is seen on the pictures of a batch."""
        assert self.prompts is not None, "prompts are there when training begins"
        size = self.options.batch_size
        numbers = range(number * size, min((number + 1) * size, self.pictures))
        prompts = [self.prompts[i % len(self.prompts)] for i in numbers]
        seeds = [self.options.seed + i for i in numbers]
        with torch.random.fork_rng(devices=[task.device] if task.device.type == "cuda" else []):
            try:
                pictures = self.pipeline(trainer, task)([[its] for its in prompts], self.options, seeds=seeds)
            except NotFiniteError:
                return Made(number, None)
        return Made(
            number, directed(self.seen(task, pictures, [its.text for its in prompts], with_texts=True), prompts)
        )

    def pipeline(self, trainer: Trainer, task: DiffusionTask) -> Pipeline:
        """Return a pipeline over the task's own parts, with the averaged weights if there are any."""
        side = trainer.datamodule.source.image_size
        return Pipeline(trained_model(task, (side, side)))


def _number(made: Made) -> int:
    return made.number
