"""Grids of small images and what an upsampler makes of them during its training."""

from typing import Annotated, Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch.nn import functional as F

from ldm_lab.condition_sources.low_res import shrink
from ldm_lab.config import PartSection, PositiveInt, register
from ldm_lab.interfaces import Batch
from ldm_lab.io.images import grid, save_png, to_images
from ldm_lab.sampling import Sampler
from ldm_lab.training.logs import log_images
from ldm_lab.training.reconstructions import Reconstructions

DEFAULT_SAMPLER = {"name": "ddim", "steps": 27}


@register("enlargements")
class Enlargements(Reconstructions):
    """Draw the same images made small, enlarged again by the (averaged) upsampler, and as they were, every N steps."""

    def __init__(
        self,
        folder: Any,
        *,
        every: PositiveInt = 1000,
        images: PositiveInt = 8,
        sampler: Annotated[dict[str, Any] | None, PartSection("sampler", "ddim")] = None,
    ) -> None:
        """Set what is drawn.

        Args:
            folder: the run's folder; grids are `enlargements/step=....png` below it.
            every: optimizer steps between grids; also one after the first step.
            images: of the run's first batches on rank 0, with their captions; a resumed run draws the same ones.
            sampler: name and options, by default {name: ddim, steps: 27}.
        """
        super().__init__(folder, every=every, images=images)
        self.sampler = {**DEFAULT_SAMPLER, **(sampler or {})}
        self.texts: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "texts": self.texts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.texts = state_dict["texts"]

    def keep(self, batch: Batch) -> None:
        """Keep images of a batch, and their captions, until there are enough."""
        missing = self.count - len(self.texts)
        if missing > 0:
            levels = ((batch.image[:missing] + 1) * 127.5).round().to("cpu", torch.uint8)  # [n, 3, H, W]
            self.levels = levels if self.levels is None else torch.cat([self.levels, levels])  # [n, 3, H, W]
            self.texts += batch.text[:missing]

    @torch.no_grad()
    def draw(self, trainer: Trainer, task: LightningModule) -> None:
        """Write and log the grid: small images above, what is made of them in the middle, the originals below."""
        image = self.levels.to(task.device) / 127.5 - 1  # [n, 3, H, W]
        low = shrink(image, task.model.spec["low_res"].scale_factor)  # [n, 3, h, w]
        sampler = Sampler(
            task.best_model,
            task.objective,
            task.autoencoder,
            task.conditioner,
            sources=task.sources,
            dropout=task.dropout,
            size=tuple(image.shape[2:]),
        )
        with torch.random.fork_rng(devices=[task.device] if task.device.type == "cuda" else []):
            made = sampler(self.texts, low_res=low, guidance=1.0, sampler=self.sampler, batch_size=len(image))
        small = to_images(F.interpolate(low, image.shape[2:], mode="nearest"))
        picture = grid([*small, *made, *to_images(image)], columns=len(image))
        caption = f"step {trainer.global_step}: made small above, enlarged in the middle, the images below"
        path = self.folder / "enlargements" / f"step={trainer.global_step:08d}.png"
        save_png(path, picture, {"step": str(trainer.global_step), "description": caption})
        log_images(trainer, "enlargements", [picture], [caption])
