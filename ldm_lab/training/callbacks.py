"""The callbacks of every run, and the order in which Lightning calls them."""

from dataclasses import dataclass
from pathlib import Path

from pytorch_lightning import Callback, Trainer
from torch import Tensor

from ldm_lab.config import to_yaml
from ldm_lab.data.rank_state import RankState
from ldm_lab.interfaces import Batch
from ldm_lab.io.atomic import atomic_write
from ldm_lab.pretrained.own_runs import note_own
from ldm_lab.training.checkpointing import Checkpointing
from ldm_lab.training.guard import Guard
from ldm_lab.training.interrupt import Interrupt
from ldm_lab.training.lock import RunLock
from ldm_lab.training.resume import Resume
from ldm_lab.training.speed import Speed, StepProgress
from ldm_lab.training.task import Task, gather
from ldm_lab.training.watching import Watching


class Bookkeeping(Callback):
    """Writes the config into the run's folder, counts batches and tells the data which of them were consumed.

    Attributes:
        data_states: at the end of training, where each rank stands in the data and what it skipped.
    """

    data_states: list[RankState] | None = None

    def __init__(self, folder: Path, lock: RunLock) -> None:
        self.folder, self.lock = folder, lock

    def on_fit_start(self, trainer: Trainer, task: Task) -> None:
        if trainer.is_global_zero:  # not before all is known to be right: a mistake leaves no folder
            self.lock.acquire()
            with atomic_write(self.folder / "config.yaml") as file:
                file.write(to_yaml(task.run_config.to_dict()).encode())
            note_own(self.folder)

    def on_train_end(self, trainer: Trainer, task: Task) -> None:
        self.data_states = gather(trainer.datamodule.rank_state())

    def on_train_batch_end(self, trainer: Trainer, task: Task, outputs: Tensor, batch: Batch, index: int) -> None:
        task.count_batch(batch, completes_step=(index + 1) % trainer.accumulate_grad_batches == 0)


@dataclass(frozen=True)
class RunCallbacks:
    """The callbacks of a run in the order in which Lightning calls them.

    Attributes:
        bookkeeping: counts a batch before any other callback sees that it is done.
        resume: sets the learning rate before anything reports it.
        speed: notes when the batch was done, before anything else takes time.
        guard: undoes what must not be learned, or stops the run, before a picture is drawn or a file written of it.
        of_task: draw and measure with the network as it is after the batch.
        checkpoint: saves all that the ones before have counted and drawn.
        interrupt: stops after the batch; Lightning then asks `checkpoint` to save.
        watching: renews the run's page with all of it.
        progress: shows what the batch has come to.
    """

    bookkeeping: Bookkeeping
    resume: Resume
    speed: Speed
    guard: Guard
    of_task: list[Callback]
    checkpoint: Checkpointing
    interrupt: Interrupt
    watching: Watching
    progress: StepProgress

    def in_order(self) -> list[Callback]:
        """Return all of them."""
        return [
            self.bookkeeping,
            self.resume,
            self.speed,
            self.guard,
            *self.of_task,
            self.checkpoint,
            self.interrupt,
            self.watching,
            self.progress,
        ]
