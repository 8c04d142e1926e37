"""Writing checkpoints: all that is needed to go on (`last.ckpt`, `step=....ckpt`), and the exported model."""

import time
from pathlib import Path

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.plugins.io import CheckpointIO
from pytorch_lightning.utilities.types import STEP_OUTPUT

from ldm_lab.batch import Batch
from ldm_lab.checkpoints.files import FORMAT, read_pickled
from ldm_lab.config import NonNegativeInt, PositiveFloat, PositiveInt, register
from ldm_lab.data.waiting import ReadingError
from ldm_lab.errors import UserError
from ldm_lab.io.atomic import atomic_write, existing_file
from ldm_lab.sharded import whole_state
from ldm_lab.training.best import Best, KeptBest, Measured, Measurement
from ldm_lab.training.guard import Guard
from ldm_lab.training.logs import log_before_saving, print_rank_zero
from ldm_lab.training.run_state import Checkpoint
from ldm_lab.training.task import Task

LAST = "last.ckpt"
DEFAULT_EVERY = 1000  # optimizer steps
ASK_EVERY = 10  # optimizer steps between questions for the time among several processes, as they wait for the answer


class SafeCheckpointIO(CheckpointIO):
    """Atomic writing and reading that never executes code, in place of Lightning's."""

    def __init__(self, lazily: bool = False) -> None:
        """Set how checkpoints are read: `lazily` brings tensors into memory where they are used, and as far."""
        self.lazily = lazily

    def save_checkpoint(self, checkpoint: Checkpoint, path: str, storage_options: None = None) -> None:
        with atomic_write(path) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: str, map_location: torch.device | str | None = None, weights_only: bool | None = None
    ) -> Checkpoint:
        content = read_pickled(existing_file(path, "resume.checkpoint"), mmap=self.lazily)
        if FORMAT not in content:
            raise UserError(f"{path}: not a checkpoint of a run of ldm_lab; for other weights use init_from")
        return content

    def remove_checkpoint(self, path: str) -> None:
        Path(path).unlink(missing_ok=True)


@register("checkpoint")
class Checkpointing(Callback):
    """Save every N optimizer steps, or every so many seconds, and at the end; keep the newest few, export each time.

    Attributes:
        is_outdated: whether something was measured since the last checkpoint that belongs into it.
    """

    def __init__(
        self,
        folder: Path,
        guard: Guard,
        *,
        every: PositiveInt | None = None,
        seconds: PositiveFloat | None = None,
        keep: NonNegativeInt = 3,
        keep_every: PositiveInt | None = None,
        half_export: bool = False,
        best: str | None = None,
    ) -> None:
        """Set when to save.

        Args:
            folder: the run's folder.
            guard: asked before anything is written; it has the state before a bad step saved.
            every: optimizer steps between `last.ckpt` (and exports); by default 1000, or none if `seconds` is given.
            seconds: time between `last.ckpt` (and exports), instead of steps or beside them.
            keep: numbered checkpoints that are kept, the newest ones; 0 keeps `last.ckpt` alone.
            keep_every: optimizer steps between numbered checkpoints; by default they come as often as `last.ckpt`.
            half_export: export in float16, at half the size; 11 bits are enough to use a network, not to train it on.
            best: keep the best weights by this metric as `best.safetensors`: loss, which `held_out` measures, or one of
                `evaluate.metrics`; null takes the first that the run measures, none keeps none.
        """
        self.folder, self.guard, self.keep, self.keep_every = folder, guard, keep, keep_every
        self.every, self.seconds = every or (DEFAULT_EVERY if seconds is None else None), seconds
        self.export_dtype = torch.float16 if half_export else torch.float32
        guard.save_before_leaving = self.save_before_leaving
        self.best = Best(folder, best)
        self.trainer: Trainer | None = None
        self.saved_at, self.is_outdated = -1, False
        self.saved_here = False  # by this job
        self.saved_when = 0.0  # on the monotonic clock

    @staticmethod
    def check(*, every: int | None, seconds: float | None, keep_every: int | None) -> list[str]:
        """Return what is wrong across the options."""
        every = every or (DEFAULT_EVERY if seconds is None else 1)
        if keep_every is not None and keep_every % every:
            return [f"keep_every: {keep_every} is not a multiple of every ({every})"]
        return []

    @staticmethod
    def unused(*, keep: int) -> dict[str, str]:
        """Return which options have no effect, and why."""
        return {} if keep else {"keep_every": "checkpoint.keep=0 keeps last.ckpt alone"}

    def setup(self, trainer: Trainer, task: Task, stage: str) -> None:
        """Find out by what the best weights are kept. Raises UserError for a metric that is not measured."""
        self.best.choose(task.run_config)

    def state_dict(self) -> KeptBest:
        return self.best.kept()

    def load_state_dict(self, state: KeptBest) -> None:
        self.best.take_over(state)

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        self.trainer = trainer
        self.best.begin(trainer)
        self.saved_at = trainer.global_step  # nothing new yet
        self.saved_when = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, task: LightningModule, outputs: STEP_OUTPUT, batch: Batch, index: int
    ) -> None:
        if trainer.global_step != self.saved_at and self.is_due(trainer):
            self.save(trainer, task)

    def is_due(self, trainer: Trainer) -> bool:
        """Return whether it is time to save; all ranks go by the first one's clock, as all take part in saving."""
        if self.every is not None and trainer.global_step % self.every == 0:
            return True
        if self.seconds is None or (trainer.world_size > 1 and trainer.global_step % ASK_EVERY):
            return False
        return trainer.strategy.broadcast(time.monotonic() - self.saved_when >= self.seconds)

    def on_train_end(self, trainer: Trainer, task: LightningModule) -> None:
        if self.is_outdated:
            self.save(trainer, task)
        self.save_unsaved(trainer, task)

    def save_unsaved(self, trainer: Trainer, task: LightningModule) -> None:
        """Save, if that was not done at this step."""
        if trainer.global_step != self.saved_at:
            self.save(trainer, task)

    def on_exception(self, trainer: Trainer, task: LightningModule, exception: BaseException) -> None:
        """Save what was trained before the data stopped coming; several processes cannot, as the others wait."""
        if isinstance(exception, ReadingError) and trainer.world_size == 1 and trainer.global_step > self.saved_at >= 0:
            self.save(trainer, task)
            print_rank_zero(f"saved at step {trainer.global_step} before leaving")

    def save(self, trainer: Trainer, task: LightningModule) -> None:
        """Write `last.ckpt`, the numbered checkpoint if one is due, and the export; then delete the oldest.

        Raises:
            NotFiniteError: NaN or infinity in what would be saved; then nothing is written.
        """
        self.guard.check_before_saving(task)
        step = self.saved_at = trainer.global_step
        self.saved_when, self.is_outdated = time.monotonic(), False
        log_before_saving(trainer)
        trainer.save_checkpoint(self.folder / LAST, weights_only=False)
        self.saved_here = True
        weights = whole_state(task.best_model)  # where the ranks share the network, all have to take part in this
        if not trainer.is_global_zero:
            return
        verify(self.folder / LAST, step)
        task.export(self.folder, weights, self.export_dtype)
        del weights
        if self.keep and self.is_numbered(step):
            numbered = self.folder / f"step={step:08d}.ckpt"
            link_or_copy(self.folder / LAST, numbered)
            for old in sorted(self.folder.glob("step=*.ckpt"))[: -self.keep]:
                old.unlink()

    def save_before_leaving(self) -> bool:
        """Save what a run that is stopped has learned last; the checkpoint before it stays, as a numbered one.

        Returns:
            Whether there was anything new to save.
        """
        trainer = self.trainer
        if trainer is None or trainer.global_step == self.saved_at:
            return False
        last = self.folder / LAST
        if trainer.is_global_zero and self.saved_at > 0 and last.exists():
            link_or_copy(last, self.folder / f"step={self.saved_at:08d}.ckpt")
        self.save(trainer, trainer.lightning_module)
        return True

    def most_kept(self, max_steps: int) -> int:
        """Return how many checkpoints lie on the disk at most; `max_steps` is the run's, -1 without end."""
        every = self.keep_every or self.every
        if every is None or max_steps < 0:
            return max(self.keep, 1) + (self.keep_every is not None)
        numbered = min(self.keep, max_steps // every)
        alone = not self.keep or max_steps % every or self.keep_every or self.seconds  # last.ckpt is none of them
        return numbered + bool(alone)

    def is_numbered(self, step: int) -> bool:
        """Return whether the checkpoint of a step also gets a file of its own."""
        every = self.keep_every or self.every
        return (self.seconds is not None and self.keep_every is None) or step % every == 0


def offer(trainer: Trainer, task: Measured, measured: Measurement) -> None:
    """Hand a measurement to a run's checkpoints, which keep the best weights; on all ranks alike."""
    for callback in trainer.callbacks:
        if isinstance(callback, Checkpointing):
            callback.best.offer(trainer, task, measured)


def link_or_copy(last: Path, numbered: Path) -> None:
    """Give a checkpoint a second name; `last.ckpt` is replaced, never rewritten, so that the link keeps this one."""
    numbered.unlink(missing_ok=True)
    try:
        numbered.hardlink_to(last)
    except OSError:  # a file system without hard links
        with atomic_write(numbered) as file, open(last, "rb") as source:
            while chunk := source.read(1 << 24):
                file.write(chunk)


def verify(path: Path, step: int) -> None:
    """Read a checkpoint back (lazily). Raises UserError if it is not what was written."""
    content = read_pickled(path, mmap=True)
    if content.get("global_step") != step or not content.get("state_dict"):
        raise UserError(f"{path}: reading it back gave another content; is the disk in order?")
