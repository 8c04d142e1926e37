"""Writing checkpoints: all that is needed to go on (`last.ckpt`, `step=....ckpt`), and the exported model."""

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.plugins.io import CheckpointIO

from ldm_lab.checkpoints.files import atomic_write, existing_file, read_pickled
from ldm_lab.checkpoints.parts import FORMAT
from ldm_lab.config import register
from ldm_lab.errors import UserError

LAST = "last.ckpt"


class SafeCheckpointIO(CheckpointIO):
    """Atomic writing and reading that never executes code, in place of Lightning's."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str, storage_options: Any | None = None) -> None:
        with atomic_write(path) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        content = read_pickled(existing_file(path, "resume.checkpoint"))
        if FORMAT not in content:
            raise UserError(f"{path}: not a checkpoint of a run of ldm_lab; for other weights use init_from")
        return content

    def remove_checkpoint(self, path: str) -> None:
        Path(path).unlink(missing_ok=True)


@register("checkpoint")
class Checkpointing(Callback):
    """Save every N optimizer steps and at the end, keep the newest few, export the model each time."""

    def __init__(
        self,
        folder: Path,
        *,
        every: int = 1000,
        keep: int = 3,
        keep_every: int | None = None,
        half_export: bool = False,
    ) -> None:
        """Set when to save.

        Args:
            folder: the run's folder.
            every: optimizer steps between `last.ckpt` (and exports).
            keep: numbered checkpoints that are kept, the newest ones; 0 keeps `last.ckpt` alone.
            keep_every: optimizer steps between numbered checkpoints; by default `every`.
            half_export: export in float16, at half the size; 11 bits are enough to use a network, not to train it on.
        """
        self.folder, self.every, self.keep = folder, every, keep
        self.keep_every = keep_every or every
        self.export_dtype = torch.float16 if half_export else torch.float32
        self.saved_at = -1

    @staticmethod
    def check(section: dict) -> list[str]:
        """Return what is wrong across keys."""
        every, keep_every = section.get("every", 1000), section.get("keep_every")
        problems = [f"every: {every} is not a positive number of steps"] if every < 1 else []
        if keep_every is not None and every > 0 and (keep_every < 1 or keep_every % every):
            problems.append(f"keep_every: {keep_every} is not a multiple of every ({every})")
        return problems

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        self.saved_at = trainer.global_step  # nothing new yet

    def on_train_batch_end(self, trainer: Trainer, task: LightningModule, *_: Any) -> None:
        if trainer.global_step % self.every == 0 and trainer.global_step != self.saved_at:
            self.save(trainer, task)

    def on_train_end(self, trainer: Trainer, task: LightningModule) -> None:
        if trainer.global_step != self.saved_at:
            self.save(trainer, task)

    def save(self, trainer: Trainer, task: LightningModule) -> None:
        """Write `last.ckpt`, the numbered checkpoint if one is due, and the export; then delete the oldest."""
        step = self.saved_at = trainer.global_step
        trainer.save_checkpoint(self.folder / LAST, weights_only=False)
        if not trainer.is_global_zero:
            return
        verify(self.folder / LAST, step)
        task.export(self.folder, self.export_dtype)
        if self.keep and step % self.keep_every == 0:
            numbered = self.folder / f"step={step:08d}.ckpt"
            numbered.unlink(missing_ok=True)
            try:
                numbered.hardlink_to(
                    self.folder / LAST
                )  # last.ckpt is replaced, never rewritten: the link keeps this one
            except OSError:  # a file system without hard links
                with atomic_write(numbered) as file, open(self.folder / LAST, "rb") as source:
                    while chunk := source.read(1 << 24):
                        file.write(chunk)
            for old in sorted(self.folder.glob("step=*.ckpt"))[: -self.keep]:
                old.unlink()


def verify(path: Path, step: int) -> None:
    """Read a checkpoint back (lazily). Raises UserError if it is not what was written."""
    content = read_pickled(path, mmap=True)
    if content.get("global_step") != step or not content.get("state_dict"):
        raise UserError(f"{path}: reading it back gave another content; is the disk in order?")
