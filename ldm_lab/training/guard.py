"""The guard against divergence: what becomes of a step that must not be learned from."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypedDict

import torch
from annotated_types import Gt, Le
from pytorch_lightning import Callback, Trainer
from torch import Tensor

from ldm_lab.config import NonNegativeInt, PositiveFloat, PositiveInt, register
from ldm_lab.errors import NotFiniteError
from ldm_lab.interfaces import Batch
from ldm_lab.sharded import local
from ldm_lab.training.divergence import Detector, Spikes, SpikesState, Verdict
from ldm_lab.training.guard_log import LOG, Event, Kind, worst_keys
from ldm_lab.training.logs import print_rank_zero
from ldm_lab.training.snapshot import Snapshot
from ldm_lab.training.task import Task, gather

ADVICE = "a lower optim.lr, trainer.gradient_clip_val=1.0 or trainer.precision=bf16-mixed may help"
LEAST_SCALE = 1.0  # of fp16: a gradient that overflows without being scaled up at all
Policy = Literal["stop", "skip", "rollback"]


class Seen(NamedTuple):
    """An optimizer step that the host has not heard of yet.

    Attributes:
        step: counted from 1.
        keys: of the samples, for each of this rank's batches.
        verdict: what was found, on the device.
    """

    step: int
    keys: list[list[str]]
    verdict: Verdict


class GuardState(TypedDict):
    """What a checkpoint keeps of the guard.

    Attributes:
        skipped: steps that were left out one by one.
        rolled_back: steps whose learning was undone.
        rollbacks: times that this happened.
        in_a_row: steps left out since the last one that was learned from.
        precision: that it has changed to; None if it has not.
        spikes: the losses that spikes are measured against.
    """

    skipped: int
    rolled_back: int
    rollbacks: int
    in_a_row: int
    precision: str | None
    spikes: SpikesState | None


@register("guard")
class Guard(Callback):
    """Look at the loss and the gradient of every step, on the device; what is not finite never reaches the weights.

    The host asks every `logging.every` optimizer steps, where it waits for the device anyway, and does then what the
    policy says. All ranks see the same numbers, ask at the same steps and decide alike.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        *,
        on_nonfinite: Policy = "stop",
        on_spike: Policy | None = None,
        spike_factor: PositiveFloat = 10.0,
        spike_window: Annotated[PositiveInt, Gt(7)] = 100,
        max_in_a_row: PositiveInt = 10,
        snapshot_every: PositiveInt = 500,
        max_rollbacks: NonNegativeInt = 3,
        lr_factor: Annotated[float, Gt(0), Le(1)] = 1.0,
        precision: Literal["32-true", "bf16-mixed"] | None = None,
    ) -> None:
        """Set what becomes of a bad step.

        Args:
            folder: the run's folder.
            every: optimizer steps between questions of the host.
            on_nonfinite: of a loss or gradient of NaN or infinity. "stop" saves the state before that step and ends the
                run with exit code 3; "skip" leaves the step out; "rollback" goes back to the last good state, leaves
                out the data since, and goes on.
            on_spike: the same for a loss far above the last ones; null looks for none.
            spike_factor: how far a spike is above the median of the last losses, in their standard deviations
                (estimated by their median absolute deviation).
            spike_window: losses of how many optimizer steps.
            max_in_a_row: steps left out in a row after which the run stops.
            snapshot_every: optimizer steps between copies of the state in main memory, for rollbacks.
            max_rollbacks: how many there may be; the next one stops the run.
            lr_factor: what each rollback multiplies the peak of the learning rate with; optim.final_lr stays.
            precision: what a rollback changes trainer.precision to, as for runs that begin in fp16.
        """
        self.folder, self.every = folder, every
        self.on_nonfinite, self.on_spike = on_nonfinite, on_spike
        self.max_in_a_row, self.snapshot_every, self.max_rollbacks = max_in_a_row, snapshot_every, max_rollbacks
        self.lr_factor, self.precision = lr_factor, precision
        self.detector = Detector(on_nonfinite != "skip", on_spike not in ("skip", None))
        if on_spike is not None:
            self.detector.spikes = Spikes(spike_factor, spike_window)
        self.snapshot = Snapshot() if "rollback" in (on_nonfinite, on_spike) else None
        self.keys: list[list[str]] = []  # of the batches of a step that is not complete
        self.window: list[Seen] = []
        self.skipped = self.rolled_back = self.rollbacks = self.in_a_row = 0
        self.changed_precision: str | None = None
        self.leaves_for: str | None = None  # the same, where this Trainer has to leave for it
        self.save_before_leaving: Callable[[], bool] = lambda: False  # set by what writes checkpoints; whether it has

    @staticmethod
    def check(*, on_nonfinite: str, on_spike: str | None, lr_factor: float, precision: str | None) -> list[str]:
        """Return what is wrong across the options."""
        if "rollback" in (on_nonfinite, on_spike):
            return []
        given = {"lr_factor": lr_factor != 1, "precision": precision is not None}
        return [
            f"{key}: is for rollbacks, and neither on_nonfinite nor on_spike asks for any"
            for key in given
            if given[key]
        ]

    @staticmethod
    def unused(*, on_nonfinite: str, on_spike: str | None) -> dict[str, str]:
        """Return which options have no effect, and why."""
        policies = (on_nonfinite, on_spike)
        found = {}
        if on_spike is None:
            found = dict.fromkeys(("spike_factor", "spike_window"), "guard.on_spike looks for no spikes")
        if "skip" not in policies:
            found["max_in_a_row"] = "neither guard.on_nonfinite nor guard.on_spike is skip"
        if "rollback" not in policies:
            why = "neither guard.on_nonfinite nor guard.on_spike is rollback"
            found |= dict.fromkeys(("snapshot_every", "max_rollbacks"), why)
        return found

    # ------------------------------------------------------------------------------------------------ Lightning

    def setup(self, trainer: Trainer, task: Task, stage: str) -> None:
        task.detector = self.detector

    def on_train_batch_start(self, trainer: Trainer, task: Task, batch: Batch, index: int) -> None:
        if self.snapshot is not None and self.snapshot.step < 0:  # when all that is resumed is in place
            self.snapshot.take(task)

    def on_train_batch_end(
        self, trainer: Trainer, task: Task, outputs: dict[str, Tensor], batch: Batch, index: int
    ) -> None:
        self.keys.append(batch.key)
        if (index + 1) % trainer.accumulate_grad_batches:
            return
        self.window.append(Seen(trainer.global_step, self.keys, self.detector.last))
        self.keys = []
        if trainer.global_step % self.every == 0:
            self.ask(task)

    def state_dict(self) -> GuardState:
        spikes = self.detector.spikes
        return GuardState(
            skipped=self.skipped,
            rolled_back=self.rolled_back,
            rollbacks=self.rollbacks,
            in_a_row=self.in_a_row,
            precision=self.changed_precision,
            spikes=None if spikes is None else spikes.state_dict(),
        )

    def load_state_dict(self, state: GuardState) -> None:
        self.skipped, self.rolled_back, self.rollbacks = state["skipped"], state["rolled_back"], state["rollbacks"]
        self.in_a_row, self.changed_precision = state["in_a_row"], state["precision"]
        if state["spikes"] is not None and self.detector.spikes is not None:
            self.detector.spikes.load_state_dict(state["spikes"])

    # ------------------------------------------------------------------------------------------------ asking

    def ask(self, task: Task) -> None:
        """Ask for what was found since the last question, and do what the policy says, on all ranks alike.

        Raises:
            NotFiniteError: the policy is to stop, or nothing else has helped.
        """
        window, self.window = self.window, []
        try:
            for event in self.events(task, window):
                if not self.is_passed(task, event):
                    return
        finally:
            self.detector.release()
        if self.snapshot is not None and task.trainer.global_step - self.snapshot.step >= self.snapshot_every:
            self.snapshot.take(task)

    def events(self, task: Task, window: list[Seen]) -> Iterator[Event]:
        """Yield what has happened in a window, step by step, with the steps left out in a row counted."""
        if not window:
            return
        verdicts = [torch.stack([v.loss, v.norm.float(), v.limit, v.event]) for v in (seen.verdict for seen in window)]
        rows = torch.stack(verdicts).tolist()  # the host waits for the device here
        for seen, (loss, norm, limit, event) in zip(window, rows):
            self.in_a_row = self.in_a_row + 1 if event else 0
            if event:
                overflows = not math.isfinite(norm) and task.scaler is None
                kind: Kind = "loss" if not math.isfinite(loss) else "gradient" if overflows else "spike"
                shares = [(float(own), keys) for own, keys in zip(seen.verdict.losses, seen.keys)]
                yield Event(seen.step, kind, loss, limit, norm, worst_keys(shares))
        scaler = task.scaler
        if scaler is not None and scaler.get_scale() < LEAST_SCALE and not math.isfinite(rows[-1][1]):
            loss, norm, limit, _ = rows[-1]
            yield Event(window[-1].step, "scale", loss, limit, norm, worst_keys([(loss, k) for k in window[-1].keys]))

    def is_passed(self, task: Task, event: Event) -> bool:
        """Do what the policy says of an event. Returns whether the steps after it were learned from."""
        policy = self.on_spike if event.kind == "spike" else self.on_nonfinite
        if policy == "skip" and event.kind not in ("scale", "weights"):
            if self.in_a_row > self.max_in_a_row:
                self.stop(event, f"; {self.in_a_row} steps in a row were left out (guard.max_in_a_row)")
            self.skipped += 1
            event.log(self.folder, "left out")
            print_rank_zero(f"guard: {event}: left out")
            return True
        if policy == "rollback" and self.rollbacks < self.max_rollbacks:
            self.roll_back(task, event)
        elif policy == "rollback":
            self.stop(event, f"; {self.rollbacks} rollbacks have not helped (guard.max_rollbacks)")
        else:
            self.stop(event)
        return False

    def check_before_saving(self, task: Task) -> None:
        """Ask, and look besides at all that a checkpoint would hold, on all ranks together.

        Raises:
            NotFiniteError: something of it is not finite, and there is no way back.
        """
        self.ask(task)
        while (name := not_finite(task)) is not None:
            self.is_passed(task, Event(task.trainer.global_step, "weights", name=name))
        if self.snapshot is not None:  # as a run that is resumed from this checkpoint takes one
            self.snapshot.take(task)

    # ------------------------------------------------------------------------------------------------ doing

    def roll_back(self, task: Task, event: Event) -> None:
        """Go back to the last good state, perhaps with a lower learning rate, or to go on in another precision."""
        trainer, since = task.trainer, self.snapshot.step
        self.snapshot.put_back(task)
        self.rollbacks += 1
        self.rolled_back += trainer.global_step - since
        self.in_a_row = 0
        done = f"back to the state of step {since}, the data since are left out"
        if self.lr_factor != 1:
            lower_rate(task, self.lr_factor)
            done += f", learning rate times {self.lr_factor:g}"
        if self.precision is not None and trainer.precision != self.precision:
            self.changed_precision = self.leaves_for = self.precision
            trainer.should_stop = True
            done += f", and on with trainer.precision={self.precision}"
        event.log(self.folder, done)
        print_rank_zero(f"guard: {event}: {done} (rollback {self.rollbacks} of {self.max_rollbacks})")

    def stop(self, event: Event, why: str = "") -> None:
        """Save the state before an event, and raise NotFiniteError."""
        event.log(self.folder, "stopped")
        saved = False
        if event.kind != "weights":
            self.detector.release()
            try:
                saved = self.save_before_leaving()
            except NotFiniteError:  # finite steps have led to weights that are not: what is on the disk is better
                saved = False
        raise NotFiniteError(f"{event}{why}; {self.cure(saved)}")

    def cure(self, saved: bool) -> str:
        """Return what is left of the run, whose state before an event may have been saved, and what helps, in words."""
        last = self.folder / "last.ckpt"
        if not last.exists():
            return f"nothing was saved; {ADVICE}"
        before = "holds the state before it" if saved else "is from before"
        behind = ", behind these samples" if saved else ""
        return f"{last} {before}, and resume.checkpoint=last goes on with it{behind}; {ADVICE}"

    def summary(self) -> list[str]:
        """Return what the guard has done in this run's whole life, in one line; no line for nothing."""
        counts = {"left out": self.skipped, "undone by rollbacks": self.rolled_back}
        done = [f"{count} {'step' if count == 1 else 'steps'} {what}" for what, count in counts.items() if count]
        return [f"guard: {', '.join(done)}; see {self.folder / LOG}"] if done else []


def not_finite(task: Task) -> str | None:
    """Return the name of a tensor of the weights, averages or the optimizer that is not finite; None if all are.

    All ranks ask together and get the first one's answer that has found something.
    """
    named = [(name, value) for name, value in checkpointed_tensors(task) if value.is_floating_point()]
    flags = torch.stack([torch.isfinite(local(value)).all() for _, value in named])  # [n]
    found = [name for (name, _), fine in zip(named, flags.tolist()) if not fine]
    return next((names[0] for names in gather(found[:1]) if names), None)


def checkpointed_tensors(task: Task) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the trained networks, their average and the optimizer's state."""
    yield from task.state_dict().items()
    for optimizer in task.trainer.optimizers:
        for i, state in enumerate(optimizer.state.values()):
            yield from ((f"optimizer state {i}.{key}", v) for key, v in state.items() if isinstance(v, Tensor))


def lower_rate(task: Task, factor: float) -> None:
    """Multiply the peak of the learning rate; what its schedule ends at stays, as in a run that is resumed."""
    task.optim.peak *= factor
    for optimizer, config in zip(task.trainer.optimizers, task.trainer.lr_scheduler_configs):
        scheduler = config.scheduler
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
        rate = task.optim.peak * task.optim.factor(scheduler.last_epoch, task.trainer.max_steps)
        for group in optimizer.param_groups:
            group["initial_lr"], group["lr"] = group["initial_lr"] * factor, rate
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
