"""Grids of samples from fixed prompts and fixed noise during training."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image
from pytorch_lightning import Callback, LightningModule, Trainer

from ldm_lab.config import PartSection, PositiveInt, register
from ldm_lab.errors import UserError
from ldm_lab.io.images import grid, save_png
from ldm_lab.prompts import read_prompts
from ldm_lab.sampling import Sampler
from ldm_lab.training.logs import log_images
from ldm_lab.training.task import gather

DEFAULT_SAMPLER = {"name": "plms", "steps": 50}


@register("demo")
class Demo(Callback):
    """Sample a prompts file with the averaged weights every N steps, shared out over all ranks."""

    def __init__(
        self,
        folder: Path,
        *,
        prompts: str,
        every: PositiveInt = 2000,
        guidance: float = 3.0,
        sampler: Annotated[dict[str, Any] | None, PartSection("sampler", "plms")] = None,
        seed: int = 0,
        batch_size: PositiveInt = 16,
        columns: PositiveInt | None = None,
        image_size: PositiveInt | None = None,
    ) -> None:
        """Set what is sampled.

        Args:
            folder: the run's folder; grids are `demo/step=....png` below it.
            prompts: a file with one prompt per line.
            every: optimizer steps between grids; also one after the first step, so that a broken set-up shows early.
            guidance: guidance scale.
            sampler: name and options, by default {name: plms, steps: 50}.
            seed: prompt i starts from the noise of seed + i, the same in every grid.
            batch_size: images per device at once.
            columns: of the grid; by default about a square.
            image_size: side in pixels; by default the data's.
        """
        self.folder, self.every, self.guidance, self.seed = folder, every, guidance, seed
        self.batch_size, self.columns, self.image_size = batch_size, columns, image_size
        self.sampler = {**DEFAULT_SAMPLER, **(sampler or {})}
        self.prompts = read_prompts(prompts)
        self.done_at = -1

    def setup(self, trainer: Trainer, task: LightningModule, stage: str) -> None:
        """Find out before training whether this model can draw them. Raises UserError."""
        try:
            self.batches(trainer, task)
        except UserError as error:
            raise UserError(f"demo: {error}") from None

    def on_train_batch_end(self, trainer: Trainer, task: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step != self.done_at and (step == 1 or step % self.every == 0):
            self.done_at = step
            self.draw(trainer, task)

    def draw(self, trainer: Trainer, task: LightningModule) -> None:
        """Sample this rank's share of the prompts; rank 0 gathers, writes and logs the grid."""
        with torch.random.fork_rng(devices=[task.device] if task.device.type == "cuda" else []):
            images = [image for batch in self.batches(trainer, task) for image in batch]
        shares = gather(images)
        if not trainer.is_global_zero:
            return
        drawn = [shares[i % trainer.world_size][i // trainer.world_size] for i in range(len(self.prompts))]
        picture = grid(drawn, columns=self.columns, captions=self.prompts)
        path = self.folder / "demo" / f"step={trainer.global_step:08d}.png"
        save_png(path, picture, {"step": str(trainer.global_step), "prompts": "\n".join(self.prompts)})
        log_images(trainer, "demo/grid", [picture], ["\n".join(self.prompts)])
        log_images(trainer, "demo/images", drawn, self.prompts)

    def batches(self, trainer: Trainer, task: LightningModule) -> Iterator[list[Image.Image]]:
        """Return an iterator over this rank's images, which are not made before they are asked for."""
        sampler = Sampler(
            task.best_model,
            task.objective,
            task.autoencoder,
            task.conditioner,
            sources=task.sources,
            dropout=task.dropout,
        )
        mine = range(trainer.global_rank, len(self.prompts), trainer.world_size)
        return sampler.batches(
            [self.prompts[i] for i in mine],
            seeds=[self.seed + i for i in mine],
            guidance=self.guidance,
            sampler=self.sampler,
            size=self.image_size or trainer.datamodule.source.image_size,
            batch_size=self.batch_size,
        )
