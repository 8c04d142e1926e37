"""Grids that are made of a run's first images and their captions, again and again."""

from pathlib import Path
from typing import Annotated, TypedDict

import torch
from PIL import Image
from pytorch_lightning import Trainer
from torch import Tensor

from ldm_lab.batch import Batch
from ldm_lab.config import PartSection, Plain, PositiveInt
from ldm_lab.errors import UserError
from ldm_lab.io.images import save_png
from ldm_lab.sampling import Pipeline
from ldm_lab.sampling.options import DEMO, SamplingOptions
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


class CaptionedGrids(Reconstructions):
    """Base class: keeps images of a run with their captions. A subclass is registered, and its grids bear its name.

    Attributes:
        texts: the captions.
        DEFAULTS: of the options of sampling.
    """

    DEFAULTS = DEMO

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
            folder: the run's folder; grids are `NAME/step=....png` below it.
            every: optimizer steps between grids; also one after the first step.
            images: of the run's first batches on rank 0, with their captions; a resumed run draws the same ones.
            sampling: how pictures are made (`ldm_lab.sampling.options`).
        """
        super().__init__(folder, every=every, images=images)
        self.options = comparable(SamplingOptions.from_values({**self.DEFAULTS, **(sampling or {})}), self.part_name)
        self.texts: list[str] = []

    def setup(self, trainer: Trainer, task: DiffusionTask, stage: str) -> None:
        """Find out before training whether this model can draw them. Raises UserError."""
        side = trainer.datamodule.source.image_size
        if side is None:
            return
        model = trained_model(task, (side, side))
        scale = model.upscale_factor
        low = None if scale is None else torch.zeros(1, 3, side // scale, side // scale)
        try:
            Pipeline(model).check([""], self.options, low_res=low)
        except UserError as error:
            raise UserError(f"{self.part_name}: {error}") from None

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

    def kept(self, device: torch.device) -> Tensor:
        """Return the images, [n, 3, H, W] in [-1, 1]."""
        assert self.levels is not None, "images are kept before any are drawn"
        return self.levels.to(device) / 127.5 - 1  # [n, 3, H, W]

    def write(self, trainer: Trainer, picture: Image.Image, rows: str) -> None:
        """Write and log a grid, whose rows are described from above, on rank 0."""
        if not trainer.is_global_zero:
            return
        caption = f"step {trainer.global_step}: {rows}"
        path = self.folder / self.part_name / f"step={trainer.global_step:08d}.png"
        save_png(path, picture, {"step": str(trainer.global_step), "description": caption})
        log_images(trainer, self.part_name, [picture], [caption])
