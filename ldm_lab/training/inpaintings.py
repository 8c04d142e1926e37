"""Grids of images with a part erased and what an inpainting model paints there during its training."""

from dataclasses import replace

import torch
from PIL import Image
from pytorch_lightning import Trainer
from torch import Tensor

from ldm_lab.condition_sources.inpaint import Inpaint
from ldm_lab.condition_sources.low_res import shrink
from ldm_lab.config import register
from ldm_lab.io.images import grid, to_images
from ldm_lab.sampling import Pipeline
from ldm_lab.training.captioned_grids import CaptionedGrids
from ldm_lab.training.demo import trained_model
from ldm_lab.training.diffusion import DiffusionTask


@register("inpaintings")
class Inpaintings(CaptionedGrids):
    """Draw images with a part erased, what the (averaged) model paints there, and the images, every N steps.

    What is erased is drawn as in training (`condition_sources.inpaint`), the same in every grid; the captions are the
    prompts. By default it is painted in 50 steps of plms.
    """

    @torch.no_grad()
    def draw(self, trainer: Trainer, task: DiffusionTask) -> None:
        """Write and log the grid: what is known above, grey elsewhere; what is made of it; the images below."""
        image = self.kept(task.device)  # [n, 3, H, W]
        source = task.sources["inpaint"]
        assert isinstance(source, Inpaint), "the task has such a source"
        erased = source.erased(image.cpu(), torch.Generator().manual_seed(self.options.seed))  # [n, 1, H, W]
        with torch.random.fork_rng(devices=[task.device] if task.device.type == "cuda" else []):
            painted = self.paint(task, image, erased)
        known = to_images(image * ~erased.to(task.device))
        picture = grid([*known, *painted, *to_images(image)], columns=len(image))
        self.write(trainer, picture, "known above, painted in the middle, the images below")

    def paint(self, task: DiffusionTask, image: Tensor, erased: Tensor) -> list[Image.Image]:
        """Return images [n, 3, H, W] with what is erased of them, bool [n, 1, H, W], painted as their captions say."""
        model = trained_model(task, (image.shape[2], image.shape[3]))
        low = None if model.upscale_factor is None else shrink(image, model.upscale_factor)  # [n, 3, h, w]
        painted = []
        for i, (picture, mask) in enumerate(zip(to_images(image), erased.cpu(), strict=True)):
            where = Image.fromarray((mask[0] * 255).to(torch.uint8).numpy())
            options = replace(self.options, seed=self.options.seed + i)
            if not mask.all():  # else nothing is known, as without a picture
                options = replace(options, init_image=picture, mask=where)
            painted += Pipeline(model)([self.texts[i]], options, low_res=None if low is None else low[i : i + 1])
        return painted
