"""Grids of samples from fixed prompts, texts or images, and fixed noise during training."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from PIL import Image
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.utilities.types import STEP_OUTPUT

from ldm_lab.batch import Batch
from ldm_lab.config import PartSection, Plain, PositiveInt, register
from ldm_lab.data.image_lists import read_list
from ldm_lab.errors import UserError, told_in_one_line
from ldm_lab.io.images import center_crop_to, grid, open_image, save_png
from ldm_lab.prompts import Prompt, read_prompts
from ldm_lab.sampling import Model, Pipeline, SamplingOptions
from ldm_lab.sampling.options import DEMO
from ldm_lab.training.diffusion import DiffusionTask
from ldm_lab.training.logs import log_images
from ldm_lab.training.task import gather


@register("demo")
class Demo(Callback):
    """Sample fixed prompts with the averaged weights every N steps, shared out over all ranks."""

    def __init__(
        self,
        folder: Path,
        *,
        prompts: str | None = None,
        images: str | None = None,
        every: PositiveInt = 2000,
        columns: PositiveInt | None = None,
        sampling: Annotated[dict[str, Plain] | None, PartSection("sampling")] = None,
    ) -> None:
        """Set what is sampled.

        Args:
            folder: the run's folder; grids are `demo/step=....png` below it.
            prompts: a file with one prompt per line.
            images: in its place a text file with one path of an image per line, relative ones relative to the list's
                folder. Each is a prompt, and stands in the grid to the left of what is drawn of it.
            every: optimizer steps between grids; also one after the first step, so that a broken set-up shows early.
            columns: of the grid, pairs count as one; by default about a square.
            sampling: how pictures are made (`ldm_lab.sampling.options`), by default with 50 steps of plms. Prompt i has
                the seed of `seed` + i, the same in every grid; the batch size is that of each device; the size is by
                default the data's.

        Raises:
            UserError: neither or both of `prompts` and `images`, a file of them that cannot be read.
        """
        self.folder, self.every, self.columns = folder, every, columns
        self.options = comparable(SamplingOptions.from_values({**DEMO, **(sampling or {})}), "demo")
        self.prompts = prompts_of(prompts, images)
        self.captions = [its if isinstance(its, str) else Path(its.text).name for its in self.prompts]
        self.done_at = -1

    def setup(self, trainer: Trainer, task: DiffusionTask, stage: str) -> None:
        """Find out before training whether this model can draw them. Raises UserError."""
        try:
            self.pipeline(trainer, task).check(self.prompts, self.options)
        except UserError as error:
            raise UserError(f"demo: {error}") from None

    def on_train_start(self, trainer: Trainer, task: DiffusionTask) -> None:
        self.done_at = trainer.global_step  # what belongs to it was drawn before it was saved

    def on_train_batch_end(
        self, trainer: Trainer, task: DiffusionTask, outputs: STEP_OUTPUT, batch: Batch, index: int
    ) -> None:
        step = trainer.global_step
        if step != self.done_at and (step == 1 or step % self.every == 0):
            self.done_at = step
            self.draw(trainer, task)

    @told_in_one_line(lambda: "drawing the demo grid", "a smaller demo.sampling.batch_size or fewer prompts need less")
    def draw(self, trainer: Trainer, task: DiffusionTask) -> None:
        """Sample this rank's share of the prompts; rank 0 gathers, writes and logs the grid."""
        # As many pictures on each rank, and so as many runs of a network that they may share: the last one is repeated.
        rounds = -(-len(self.prompts) // trainer.world_size)
        places = range(trainer.global_rank, rounds * trainer.world_size, trainer.world_size)
        mine = [min(place, len(self.prompts) - 1) for place in places]
        with torch.random.fork_rng(devices=[task.device] if task.device.type == "cuda" else []):
            images = self.pipeline(trainer, task)(
                [self.prompts[i] for i in mine], self.options, seeds=[self.options.seed + i for i in mine]
            )
        shares: list[list[Image.Image]] = gather(images)
        if not trainer.is_global_zero:
            return
        drawn = [shares[i % trainer.world_size][i // trainer.world_size] for i in range(len(self.prompts))]
        picture = self.grid_of(drawn)
        path = self.folder / "demo" / f"step={trainer.global_step:08d}.png"
        facts = {"step": str(trainer.global_step), "prompts": "\n".join(self.captions)}
        save_png(path, picture, facts, level=3)  # the training waits for it
        log_images(trainer, "demo/grid", [picture], ["\n".join(self.captions)])
        log_images(trainer, "demo/images", drawn, self.captions)

    def grid_of(self, drawn: Sequence[Image.Image]) -> Image.Image:
        """Return pictures as a grid, each with its prompt: a text below it, an image to its left."""
        given = [its.image for its in self.prompts if isinstance(its, Prompt) and its.image]
        if not given:
            return grid(drawn, columns=self.columns, captions=self.captions)
        pairs, captions = list[Image.Image](), list[str]()
        for image, name, picture in zip(given, self.captions, drawn, strict=True):
            pairs += [center_crop_to(image, picture.height, picture.width), picture]
            captions += [name, "drawn from it"]
        columns = self.columns or math.ceil(math.sqrt(len(drawn) / 2))
        return grid(pairs, columns=2 * columns, captions=captions)

    def pipeline(self, trainer: Trainer, task: DiffusionTask) -> Pipeline:
        """Return a pipeline over the task's own parts, with the averaged weights if there are any."""
        side = trainer.datamodule.source.image_size
        return Pipeline(trained_model(task, (side, side)))


def prompts_of(texts: str | None, images: str | None) -> list[str | Prompt]:
    """Return the prompts in a file of texts, or those in a list of images. Raises UserError."""
    if (texts is None) == (images is None):
        raise UserError("demo: prompts (a file of texts) or images (a list of image files) is needed, one of the two")
    if texts is not None:
        return [*read_prompts(texts)]
    listed = Path(str(images)).expanduser()
    try:
        paths = [listed.parent / Path(name).expanduser() for name in read_list(listed).names]
    except UserError as error:
        raise UserError(f"demo.images: {str(error).removeprefix('data.path: ')}") from None
    return [Prompt(str(path), image=open_image(str(path))) for path in paths]


def comparable(options: SamplingOptions, where: str) -> SamplingOptions:
    """Return the options of grids that are drawn again and again in a run, on any number of devices.

    Raises:
        UserError: options by which two grids of a run could not be compared, or would depend on the devices.
    """
    if options.seed < 0:
        raise UserError(f"{where}.sampling.seed: the grids of a run share their noise; a seed from 0 on is needed")
    if options.rerank > 1:
        raise UserError(
            f"{where}.sampling.rerank: grids show what the model makes, not the best of several; leave it out"
        )
    return options


def trained_model(task: DiffusionTask, size: tuple[int, int]) -> Model:
    """Return a task's parts as a model that pictures can be asked of, where they are."""
    return Model(
        denoiser=task.best_model,
        objective=task.objective,
        autoencoder=task.autoencoder,
        conditioner=task.conditioner,
        condition_sources=task.sources,
        dropout=task.dropout,
        image_size=size,
        gap=task.conditioning.gap,
    )
