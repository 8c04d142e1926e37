"""What a run needs and how fast it is, in words at its start and in numbers on its way."""

import time
from dataclasses import dataclass
from datetime import datetime, timedelta

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.utilities.types import STEP_OUTPUT

from ldm_lab.batch import Batch
from ldm_lab.estimate import in_units, listed, peak_flops
from ldm_lab.progress import Bar
from ldm_lab.training.cost import RunCost
from ldm_lab.training.laps import Laps
from ldm_lab.training.logs import print_rank_zero
from ldm_lab.training.sharding import FSDP2
from ldm_lab.training.task import Task

FIRST_RATE = 50  # optimizer steps after which the speed is said


@dataclass(frozen=True)
class Mark:
    """A moment of a run.

    Attributes:
        seconds: on a clock that never goes back.
        images: trained on since the run began, on all devices.
        waited: seconds that this process has waited for data.
        steps: optimizer steps since the run began.
    """

    seconds: float
    images: int
    waited: float
    steps: int = 0


@dataclass(frozen=True)
class Rates:
    """How fast a stretch of a run was.

    Attributes:
        images: a second, over all devices.
        waiting: share of the time that went by waiting for data.
        mfu: model FLOPs utilization, the operations that were needed as a share of what the cards can do at most
            (Chowdhery et al. 2022, arXiv 2204.02311, appendix B); None where that is not known.
    """

    images: float
    waiting: float
    mfu: float | None

    def in_words(self) -> str:
        """Return "567 images/s, 1 % of the time waiting for data, MFU 48 %"."""
        mfu = "" if self.mfu is None else f", MFU {self.mfu:.0%}"
        return f"{self.images:.3g} images/s, {self.waiting:.0%} of the time waiting for data{mfu}"


class Speed(Callback):
    """Says what memory a run needs, after its first steps how fast it is; logs it from then on, with its parts.

    Nothing waits for the device, but where a step is logged, which waits for it anyway.
    """

    def __init__(self, cost: RunCost, tf32: bool) -> None:
        """Begin to measure.

        Args:
            cost: of a step of the run.
            tf32: whether products in single precision may be rounded to TF32.
        """
        self.cost, self.tf32 = cost, tf32
        self.images = self.steps = 0
        self.began_at = 0  # optimizer steps, of the run that goes on
        self.first: Mark | None = None  # behind the first step, which warms up
        self.logged: Mark | None = None
        self.flops_at_most: float | None = None  # a second, of one device

    def on_train_start(self, trainer: Trainer, task: Task) -> None:
        self.began_at, self.first = trainer.global_step, None
        task.laps = Laps(task.device)
        self.cost.image_size = trainer.datamodule.source.image_size
        device = task.device
        if device.type == "cuda":
            name, precision = torch.cuda.get_device_name(device), str(trainer.precision)
            self.flops_at_most = peak_flops(name, precision, self.tf32)
            room = torch.cuda.get_device_properties(device).total_memory
            print_rank_zero(self.memory_line(trainer, room, f"the {in_units(room)} of {name}"))
        else:
            print_rank_zero(f"memory: {listed(self.cost.lasting())}; train.py --check counts the rest")

    def memory_line(self, trainer: Trainer, room: int, where: str) -> str:
        """Return what is expected to be taken of a device's memory."""
        cost = self.cost.step
        if cost is None:
            return f"memory: {listed(self.cost.lasting())}; the rest cannot be counted beforehand: {self.cost.why_not}"
        if self.cost.task.run_config.part("trainer").option("strategy") == FSDP2:
            cost = cost.shared_by(trainer.world_size)
        line = f"memory: {cost.in_words()}, of {where}"
        if cost.peak > room:
            fit = cost.batch_that_fits(room)
            line += f"; that does not fit, {f'data.batch_size={fit} would' if fit else 'nor would a smaller batch'}"
        return line

    def on_train_batch_start(self, trainer: Trainer, task: Task, batch: Batch, index: int) -> None:
        if self.first is None and trainer.global_step > self.began_at:
            self.first = self.logged = self.mark(trainer)
            task.laps.take()
        task.laps.begin()

    def on_after_backward(self, trainer: Trainer, task: Task) -> None:
        task.laps.lap("loss")

    def on_train_batch_end(self, trainer: Trainer, task: Task, outputs: STEP_OUTPUT, batch: Batch, index: int) -> None:
        task.laps.lap("update")
        self.images += len(batch) * trainer.world_size
        self.steps += (index + 1) % trainer.accumulate_grad_batches == 0
        if self.first is None or self.logged is None or (index + 1) % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        if step == self.began_at + FIRST_RATE:
            self.say(trainer, self.since(self.first, trainer))
        if step % trainer.log_every_n_steps == 0:
            rates, parts = self.since(self.logged, trainer), self.parts_since(self.logged, trainer, task.laps)
            self.logged = self.mark(trainer)
            values = {"images_per_s": rates.images, "waiting": rates.waiting, "mfu": rates.mfu, **parts}
            for name, value in values.items():
                if value is not None:
                    task.log(f"speed/{name}", value, batch_size=len(batch))

    def mark(self, trainer: Trainer) -> Mark:
        """Return where the run is now."""
        return Mark(time.monotonic(), self.images, trainer.datamodule.waited, self.steps)

    def parts_since(self, mark: Mark, trainer: Trainer, laps: Laps) -> dict[str, float]:
        """Return the seconds that each part of an optimizer step took since a moment, on average, and what is left.

        Args:
            mark: the moment; laps were taken then.
            trainer: of the run.
            laps: of the parts that the device does.
        """
        taken, now = laps.take(), self.mark(trainer)
        parts = {"fetch": now.waited - mark.waited, **taken}
        parts["rest"] = max(now.seconds - mark.seconds - sum(parts.values()), 0.0)
        return {f"{name}_s": seconds / max(now.steps - mark.steps, 1) for name, seconds in parts.items()}

    def since(self, mark: Mark, trainer: Trainer) -> Rates:
        """Return how fast the run was from a moment until now."""
        now = self.mark(trainer)
        seconds = max(now.seconds - mark.seconds, 1e-9)
        images = (now.images - mark.images) / seconds
        mfu = None
        if self.flops_at_most and self.cost.step is not None:
            per_image = self.cost.step.flops / self.cost.step.batch_size
            mfu = images * per_image / (self.flops_at_most * trainer.world_size)
        return Rates(images, min((now.waited - mark.waited) / seconds, 1.0), mfu)

    def say(self, trainer: Trainer, rates: Rates) -> None:
        """Print the speed, and when the run will end at this speed."""
        end = ""
        if trainer.max_steps > 0 and rates.images:
            batches = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
            images = batches * trainer.datamodule.source.batch_size * trainer.world_size
            left = timedelta(seconds=round(images / rates.images))
            at = (datetime.now() + left).strftime("%a %d %b %H:%M")
            end = f"; at this speed step {trainer.max_steps:,} is reached in {left}, on {at}"
        print_rank_zero(f"speed: {rates.in_words()}{end}")


class StepProgress(ProgressBar):
    """Progress over the whole run: optimizer steps, loss, learning rate, and how fast it is."""

    RATE_OVER = 30  # seconds at least, for a rate that follows what is happening now

    def __init__(self, speed: Speed) -> None:
        """Begin, with what measures the images per second."""
        super().__init__()
        self.speed = speed
        self.bar: Bar | None = None
        self.mark: Mark | None = None
        self.last: STEP_OUTPUT = None

    def disable(self) -> None:
        """Called by Lightning on every rank but the first."""
        self.is_enabled = False

    def enable(self) -> None:
        """Called by Lightning to undo `disable`."""
        self.is_enabled = True

    is_enabled = True

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        if self.is_enabled:
            total = trainer.max_steps if trainer.max_steps > 0 else None
            self.bar = Bar("train", "step", total, initial=trainer.global_step)
        self.mark = self.speed.mark(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, task: LightningModule, outputs: STEP_OUTPUT, batch: Batch, index: int
    ) -> None:
        self.last = outputs
        if self.bar is not None and self.bar.is_due:  # reading the loss waits for the device
            self.show(trainer)

    def show(self, trainer: Trainer) -> None:
        """Bring the bar to where the run is."""
        if self.bar is None or self.mark is None:
            return
        rates = self.speed.since(self.mark, trainer)
        loss = self.last["loss"] if isinstance(self.last, dict) else self.last
        shown = {
            "loss": f"{float(loss):.4f}" if isinstance(loss, torch.Tensor) else None,
            "lr": f"{trainer.optimizers[0].param_groups[0]['lr']:.2e}",
            "images/s": f"{rates.images:.1f}",
            "waiting": f"{rates.waiting:.0%}",
            "MFU": None if rates.mfu is None else f"{rates.mfu:.0%}",
        }
        self.bar.set_postfix({k: v for k, v in shown.items() if v is not None}, refresh=False)
        self.bar.advance(trainer.global_step)
        if time.monotonic() - self.mark.seconds > self.RATE_OVER:
            self.mark = self.speed.mark(trainer)

    def on_train_end(self, trainer: Trainer, task: LightningModule) -> None:
        self.show(trainer)
        self.close()

    def on_exception(self, trainer: Trainer, task: LightningModule, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar's last state behind."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
