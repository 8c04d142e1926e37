"""Grids of small images and what an upsampler makes of them (super-resolution) during its training."""

from dataclasses import replace

import torch
from pytorch_lightning import Trainer
from torch.nn import functional as F

from ldm_lab.condition_sources.low_res import shrink
from ldm_lab.config import register
from ldm_lab.io.images import grid, to_images
from ldm_lab.sampling import Pipeline
from ldm_lab.sampling.options import SUPER_RESOLUTION_DEMO
from ldm_lab.training.captioned_grids import CaptionedGrids
from ldm_lab.training.demo import trained_model
from ldm_lab.training.diffusion import DiffusionTask


@register("enlargements")
class Enlargements(CaptionedGrids):
    """Draw the same images made small, enlarged again by the (averaged) upsampler, and as they were, every N steps.

    By default they are enlarged in 27 steps of ddim, without guidance; all of them at once.
    """

    DEFAULTS = SUPER_RESOLUTION_DEMO

    @torch.no_grad()
    def draw(self, trainer: Trainer, task: DiffusionTask) -> None:
        """Write and log the grid: small images above, what is made of them in the middle, the originals below."""
        image = self.kept(task.device)  # [n, 3, H, W]
        model = trained_model(task, (image.shape[2], image.shape[3]))
        assert model.upscale_factor is not None, "a base model has no enlargements"
        low = shrink(image, model.upscale_factor)  # [n, 3, h, w]
        options = replace(self.options, batch_size=len(image))
        with torch.random.fork_rng(devices=[task.device] if task.device.type == "cuda" else []):
            made = Pipeline(model)(self.texts, options, low_res=low)
        small = to_images(F.interpolate(low, image.shape[2:], mode="nearest"))
        picture = grid([*small, *made, *to_images(image)], columns=len(image))
        rows = "made small above, enlarged in the middle, the images below"
        self.write(trainer, picture, rows)
