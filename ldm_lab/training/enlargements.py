"""Grids of small images and what an upsampler makes of them (super-resolution) during its training."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, TypedDict

import torch
from pytorch_lightning import Trainer
from torch import Tensor
from torch.nn import functional as F

from ldm_lab.batch import Batch
from ldm_lab.condition_sources.low_res import shrink
from ldm_lab.config import PartSection, Plain, PositiveInt, register
from ldm_lab.io.images import grid, save_png, to_images
from ldm_lab.sampling import Pipeline
from ldm_lab.sampling.options import SUPER_RESOLUTION_DEMO
from ldm_lab.training.demo import comparable, trained_model
from ldm_lab.training.diffusion import DiffusionTask
from ldm_lab.training.logs import log_images
from ldm_lab.training.reconstructions import Reconstructions, to_levels


class KeptImages(TypedDict):
    """What a checkpoint keeps of the images that are drawn again and again.

    Attributes:
        levels: uint8 [n, 3, H, W], or None before there are any.
        texts: their captions.
    """

    levels: Tensor | None
    texts: list[str]


@register("enlargements")
class Enlargements(Reconstructions):
    """Draw the same images made small, enlarged again by the (averaged) upsampler, and as they were, every N steps."""

    def __init__(
        self,
        folder: Path,
        *,
        every: PositiveInt = 1000,
        images: PositiveInt = 8,
        sampling: Annotated[dict[str, Plain] | None, PartSection("sampling")] = None,
    ) -> None:
        """Set what is drawn.

        Args:
            folder: the run's folder; grids are `enlargements/step=....png` below it.
            every: optimizer steps between grids; also one after the first step.
            images: of the run's first batches on rank 0, with their captions; a resumed run draws the same ones.
            sampling: how images are enlarged (`ldm_lab.sampling.options`), by default in 27 steps of ddim, without
                guidance; all of them at once.
        """
        super().__init__(folder, every=every, images=images)
        self.options = comparable({**SUPER_RESOLUTION_DEMO, **(sampling or {})}, "enlargements")
        self.texts: list[str] = []

    def state_dict(self) -> KeptImages:
        return {"levels": self.levels, "texts": self.texts}

    def load_state_dict(self, state_dict: KeptImages) -> None:
        self.levels, self.texts = state_dict["levels"], state_dict["texts"]

    def keep(self, batch: Batch) -> None:
        """Keep images of a batch, and their captions, until there are enough."""
        missing = self.count - len(self.texts)
        if missing > 0 and batch.image is not None:
            levels = to_levels(batch.image[:missing])  # [n, 3, H, W]
            self.levels = levels if self.levels is None else torch.cat([self.levels, levels])  # [n, 3, H, W]
            self.texts += batch.text[:missing]

    @torch.no_grad()
    def draw(self, trainer: Trainer, task: DiffusionTask) -> None:
        """Write and log the grid: small images above, what is made of them in the middle, the originals below."""
        assert self.levels is not None, "images are kept before any are drawn"
        image = self.levels.to(task.device) / 127.5 - 1  # [n, 3, H, W]
        model = trained_model(task, (image.shape[2], image.shape[3]))
        assert model.upscale_factor is not None, "a base model has no enlargements"
        low = shrink(image, model.upscale_factor)  # [n, 3, h, w]
        options = replace(self.options, batch_size=len(image))
        with torch.random.fork_rng(devices=[task.device] if task.device.type == "cuda" else []):
            made = Pipeline(model)(self.texts, options, low_res=low)
        small = to_images(F.interpolate(low, image.shape[2:], mode="nearest"))
        picture = grid([*small, *made, *to_images(image)], columns=len(image))
        caption = f"step {trainer.global_step}: made small above, enlarged in the middle, the images below"
        path = self.folder / "enlargements" / f"step={trainer.global_step:08d}.png"
        save_png(path, picture, {"step": str(trainer.global_step), "description": caption})
        log_images(trainer, "enlargements", [picture], [caption])
