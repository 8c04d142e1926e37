"""Measuring while a run trains: every so many steps, and where it ends."""

import math
import time

from pytorch_lightning import Callback, Trainer
from pytorch_lightning.utilities.types import STEP_OUTPUT

from ldm_lab.batch import Batch
from ldm_lab.training.checkpointing import Checkpointing
from ldm_lab.training.diffusion import DiffusionTask
from ldm_lab.training.guard import Guard
from ldm_lab.training.interrupt import Interrupt
from ldm_lab.training.logs import print_rank_zero
from ldm_lab.training.task import gather

PATIENCE = (
    20.0  # seconds that whoever sends a signal waits at least before it kills: SLURM and Kubernetes 30, docker 10
)


class Measuring(Callback):
    """Base class: measures every N optimizer steps, and at the last one of the run, on all ranks alike.

    Attributes:
        every: optimizer steps between measurements.
        section: of the config, which lines that are said begin with.
        measured_at: the step that was measured last, or that this session began at.
        seconds: that the last measurement took; None if there was none in this session.
    """

    every: int
    section: str
    measured_at = -1
    seconds: float | None = None

    def measure(self, trainer: Trainer, task: DiffusionTask) -> None:
        """Measure, log, hand the values to who keeps the best weights."""
        raise NotImplementedError

    def measure_now(self, trainer: Trainer, task: DiffusionTask) -> None:
        """Measure, and note at which step and how long it took."""
        self.measured_at, began = trainer.global_step, time.monotonic()
        self.measure(trainer, task)
        self.seconds = time.monotonic() - began

    def on_train_batch_end(
        self, trainer: Trainer, task: DiffusionTask, outputs: STEP_OUTPUT, batch: Batch, index: int
    ) -> None:
        if trainer.global_step != self.measured_at and trainer.global_step % self.every == 0:
            self.measure_now(trainer, task)

    def on_train_end(self, trainer: Trainer, task: DiffusionTask) -> None:
        """Measure the last step, too, by whatever the run ends; it is saved before, as the time may be short."""
        step = trainer.global_step
        if step == self.measured_at or any(isinstance(its, Guard) and its.leaves_for for its in trainer.callbacks):
            return  # in another precision the same run goes on at once
        keepers = [its for its in trainer.callbacks if isinstance(its, Checkpointing)]
        for keeper in keepers:
            keeper.save_unsaved(trainer, task)
        if (lacking := self.lack_of_time(trainer)) is not None:
            print_rank_zero(f"{self.section}: step {step}, where the run was told to stop, is not measured: {lacking}")
            return
        print_rank_zero(f"{self.section}: step {step} is measured, too, as the run ends there; it is saved")
        before = self.state_dict(), [keeper.best.state for keeper in keepers]
        self.measure_now(trainer, task)
        if before != (self.state_dict(), [keeper.best.state for keeper in keepers]):
            for keeper in keepers:
                keeper.is_outdated = True

    def lack_of_time(self, trainer: Trainer) -> str | None:
        """Return why a run that a signal has told to stop does not measure any more; None if it does.

        Whoever sent it kills what does not leave, and the exit code that says that the run goes on would be lost. Time
        runs from the signal on, whatever it is spent on. All ranks decide alike, whichever of them had the signal.
        """
        mine = [its.since_signal() for its in trainer.callbacks if isinstance(its, Interrupt)]
        ranks = gather((max((its for its in mine if its is not None), default=None), self.seconds))
        since = max((own for own, _ in ranks if own is not None), default=None)
        took = max((math.inf if own is None else own) for _, own in ranks)
        if since is None or since + took <= PATIENCE:
            return None
        long = "nobody knows yet how long it takes" if math.isinf(took) else f"it takes about {took:.0f} s"
        return f"{long}, and a signal leaves no such time"
