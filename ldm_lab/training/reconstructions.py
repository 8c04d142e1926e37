"""Grids of images and their reconstructions during the training of an autoencoder."""

from collections.abc import Mapping
from pathlib import Path

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.types import STEP_OUTPUT
from torch import Tensor

from ldm_lab.batch import Batch
from ldm_lab.config import PositiveInt, register
from ldm_lab.io.images import grid, save_png, to_images
from ldm_lab.sharded import is_sharded
from ldm_lab.training.logs import log_images


@register("reconstructions")
class Reconstructions(Callback):
    """Draw the same images and what the (averaged) autoencoder makes of them, every N steps."""

    def __init__(self, folder: Path, *, every: PositiveInt = 1000, images: PositiveInt = 8) -> None:
        """Set what is drawn.

        Args:
            folder: the run's folder; grids are `reconstructions/step=....png` below it.
            every: optimizer steps between grids; also one after the first step.
            images: of the run's first batch on rank 0; a resumed run draws the same ones.
        """
        self.folder, self.every, self.count = folder, every, images
        self.levels: Tensor | None = None  # [count, 3, H, W], uint8
        self.done_at = -1

    def state_dict(self) -> dict[str, Tensor | None]:
        return {"levels": self.levels}

    def load_state_dict(self, state_dict: Mapping[str, Tensor | None]) -> None:
        self.levels = state_dict["levels"]

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        self.done_at = trainer.global_step  # what belongs to it was drawn before it was saved

    def on_train_batch_end(
        self, trainer: Trainer, task: LightningModule, outputs: STEP_OUTPUT, batch: Batch, index: int
    ) -> None:
        if trainer.is_global_zero:
            self.keep(batch)
        step = trainer.global_step
        if step != self.done_at and (step == 1 or step % self.every == 0):
            self.done_at = step
            shared = is_sharded(task.best_model)  # then it runs only where all ranks run it, on the same images
            if shared:
                self.hand_out(trainer)
            if shared or trainer.is_global_zero:
                self.draw(trainer, task)

    def hand_out(self, trainer: Trainer) -> None:
        """Give every rank the images of the first one."""
        self.load_state_dict(trainer.strategy.broadcast(self.state_dict()))

    def keep(self, batch: Batch) -> None:
        """Keep images of the first batch."""
        if self.levels is None and batch.image is not None:
            self.levels = to_levels(batch.image[: self.count])  # [n, 3, H, W]

    @torch.no_grad()
    def draw(self, trainer: Trainer, task: LightningModule) -> None:
        """Write and log the grid, on rank 0: images above, reconstructions of the latents' means below."""
        assert self.levels is not None, "images are kept before any are drawn"
        model, training = task.best_model, task.best_model.training
        image = self.levels.to(model.latent_std) / 127.5 - 1  # [n, 3, H, W]
        reconstruction = model.eval().decode(model.encode(image))  # [n, 3, H, W]
        model.train(training)
        if not trainer.is_global_zero:
            return
        picture = grid(to_images(image) + to_images(reconstruction), columns=len(image))
        caption = f"step {trainer.global_step}: images above, reconstructions below"
        path = self.folder / "reconstructions" / f"step={trainer.global_step:08d}.png"
        save_png(path, picture, {"step": str(trainer.global_step), "description": caption})
        log_images(trainer, "reconstructions", [picture], [caption])


def to_levels(image: Tensor) -> Tensor:
    """Return images [n, 3, H, W] in [-1, 1] in 8-bit levels, uint8 on the CPU."""
    return ((image + 1) * 127.5).round().to("cpu", torch.uint8)  # [n, 3, H, W]
