"""Measuring while a run trains: every so many steps, and where it ends."""

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


class OutOfTime(Exception):
    """A signal has told the run to stop, and the measurement at its end takes too long."""


class Measuring(Callback):
    """Base class: measures every N optimizer steps, and at the last one of the run, on all ranks alike.

    Attributes:
        every: optimizer steps between measurements.
        section: of the config, which lines that are said begin with.
        measured_at: the step that was measured last, or that this session began at.
        seconds: that the last measurement took; None if there was none in this session.
        deadline: on the monotonic clock, of the measurement at the end of a run that a signal has told to stop.
    """

    every: int
    section: str
    measured_at = -1
    seconds: float | None = None
    deadline: float | None = None

    def measure(self, trainer: Trainer, task: DiffusionTask) -> None:
        """Measure, log, hand the values to who keeps the best weights; ask `check_time` on all ranks now and then."""
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
        since, took = self.since_signal(trainer), max(gather(self.seconds or 0.0))  # so that all ranks decide alike
        before = self.state_dict(), [keeper.best.state for keeper in keepers]
        self.deadline = None if since is None else time.monotonic() + PATIENCE - since
        try:
            if since is not None and since + took > PATIENCE:
                raise OutOfTime
            print_rank_zero(f"{self.section}: step {step} is measured, too, as the run ends there; it is saved")
            self.measure_now(trainer, task)
        except OutOfTime:  # who sent the signal kills, and the exit code that says that the run goes on would be lost
            print_rank_zero(
                f"{self.section}: step {step}, where the run was told to stop, is not measured: it is not done "
                f"within {PATIENCE:g} s of the signal, which leaves no more time"
            )
        if before != (self.state_dict(), [keeper.best.state for keeper in keepers]):
            for keeper in keepers:
                keeper.is_outdated = True

    def check_time(self, trainer: Trainer) -> None:
        """Raise OutOfTime, on all ranks alike, if there is a deadline and it has passed."""
        if self.deadline is not None and trainer.strategy.broadcast(time.monotonic() > self.deadline):
            raise OutOfTime

    def since_signal(self, trainer: Trainer) -> float | None:
        """Return how many seconds ago a signal came to any of the ranks, the same on all of them; None for no signal.

        Counted from there, not anew, so that saving and several sections together stay within the time that there is.
        """
        own = [its.since_signal() for its in trainer.callbacks if isinstance(its, Interrupt)]
        return max((since for rank in gather(own) for since in rank if since is not None), default=None)
