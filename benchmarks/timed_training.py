"""The diffusion task with a clock: a part for `imports`, by which benchmarks/gpu.py times what `train.py` does.

Prints one row when the steps to be timed are over: images per second, seconds a step, peak memory, and the places where
the host waited for the device, a step.
"""

import os
import time
import warnings
from pathlib import Path

import torch
from pytorch_lightning import Callback, Trainer
from torch import Tensor

from ldm_lab.batch import Batch
from ldm_lab.config import register
from ldm_lab.training.diffusion import DiffusionTask

WARM_UP = int(os.environ.get("TIMED_WARM_UP", "6"))  # optimizer steps that are not timed
TIMED = int(os.environ.get("TIMED_STEPS", "12"))


@register("task", "timed_diffusion")
class TimedDiffusion(DiffusionTask):
    """`diffusion`, timed."""

    def callbacks(self, folder: Path) -> list[Callback]:
        return [*super().callbacks(folder), StepTimer()]


class StepTimer(Callback):
    """Times `TIMED` optimizer steps behind the first `WARM_UP`, without a wait for the device within them."""

    def __init__(self) -> None:
        self.steps = self.images = 0
        self.began = 0.0
        self.waits: warnings.catch_warnings | None = None
        self.seen: list[warnings.WarningMessage] = []

    def on_train_batch_end(
        self, trainer: Trainer, task: DiffusionTask, outputs: dict[str, Tensor], batch: Batch, index: int
    ) -> None:
        self.steps += 1
        self.images += len(batch) * trainer.world_size
        if self.steps == WARM_UP:
            self.begin(task.device)
        elif self.steps == WARM_UP + TIMED:
            self.end(trainer, task.device, float(outputs["loss"]))

    def begin(self, device: torch.device) -> None:
        """Start the clock."""
        self.images = 0
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.set_sync_debug_mode("warn")
        self.waits = warnings.catch_warnings(record=True)
        self.seen = self.waits.__enter__() or []
        warnings.simplefilter("always")
        self.began = time.perf_counter()

    def end(self, trainer: Trainer, device: torch.device, loss: float) -> None:
        """Stop the clock, print the row."""
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.began
        if self.waits is not None:
            self.waits.__exit__(None, None, None)
        places = [f"{Path(w.filename).name}:{w.lineno}" for w in self.seen if "synchronizing" in str(w.message)]
        waits = f"{len(places) / TIMED:.1f} waits a step" + "".join(f" {place}" for place in sorted({*places})[:4])
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if device.type == "cuda" else "not counted"
        name, precision = os.environ.get("TIMED_NAME", "training_step"), trainer.precision
        rate, step = self.images / seconds, 1000 * seconds / TIMED
        print(
            f"| {name} | {precision} | {rate:.1f} images/s | {step:.1f} ms | {peak} | {waits}, loss {loss:.4f} |",
            flush=True,
        )
        if os.environ.get("TIMED_LEAVES"):
            os._exit(0)  # without the last checkpoint
