"""The loss on held-out images during training, and early stopping by it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, TypedDict

import torch
from pytorch_lightning import Trainer

from ldm_lab.batch import Batch
from ldm_lab.config import PartSection, Plain, PositiveInt, build, register
from ldm_lab.data.datamodule import DataModule
from ldm_lab.data.source import Source
from ldm_lab.errors import UserError, told_in_one_line
from ldm_lab.evaluation.held_out import HeldOutBatch, loss_sums
from ldm_lab.training.best import LOSS, Measurement
from ldm_lab.training.checkpointing import offer
from ldm_lab.training.diffusion import DiffusionTask
from ldm_lab.training.logs import log_values, print_rank_zero
from ldm_lab.training.measured_data import digest, opened
from ldm_lab.training.measuring import Measuring
from ldm_lab.training.task import batch_seed, gather

# Options of the data that losses do not depend on, or (the buffer that their order comes from) as `items_key` tells;
# where they lie is told by what is there.
UNIMPORTANT = ("workers", "timeout", "max_skipped", "path", "shards", "folder", "local", "shuffle_buffer")


class HeldOutState(TypedDict):
    """What a checkpoint keeps: the lowest loss so far and its step, measurements since then, what was measured on."""

    best: float
    best_step: int
    since: int
    measured_on: str


@register("held_out")
class HeldOut(Measuring):
    """Measure the loss of the (averaged) network on images of their own every N steps, on all devices together.

    Latents, noise and times are the same at every measurement, and conditions are never dropped, so that the numbers
    of a run can be compared with each other, and with those of other runs with the same section and seed.
    """

    section = "held_out"
    goes_on = True  # with a checkpoint's measurements; not where it is tried out on a few images

    def __init__(
        self,
        folder: Path,
        *,
        data: Annotated[dict[str, Plain], PartSection("data")],
        every: PositiveInt = 1000,
        samples: PositiveInt = 512,
        levels: PositiveInt = 4,
        patience: PositiveInt | None = None,
    ) -> None:
        """Set what is measured.

        Args:
            folder: the run's folder.
            data: images that are not among those trained on, described as in the section `data`.
            every: optimizer steps between measurements; there is one before the first step, and where the run ends.
            samples: the first so many of the data, in an order that the run's seed gives.
            levels: times at which each sample is looked at, spread over all noise levels.
            patience: stop the run after this many measurements in a row without a new lowest loss; null never does.
                One where a run ends between two others does not count, as a run may be stopped often. Started again,
                a run that was stopped by it trains nothing unless this is larger.
        """
        self.source: Source = build("data", data)
        self.source.workers = min(self.source.workers, 1)  # the order depends on their number
        self.every, self.samples, self.levels = every, samples, levels
        self.patience = patience
        self.best, self.best_step, self.since = math.inf, 0, 0
        self.encoded: list[HeldOutBatch] = []
        options = {key: value for key, value in data.items() if key not in UNIMPORTANT}
        self.described = json.dumps([options, samples, levels], sort_keys=True, default=str)
        self.measured_on = self.measured_on_before = ""

    def setup(self, trainer: Trainer, task: DiffusionTask, stage: str) -> None:
        """Find the data before training. Raises UserError where there are none, or of another size."""
        contents = opened(trainer, self.source, "held_out")
        task.check_encoded_by(self.source, "held_out.data")
        self.measured_on = digest(self.described, task.seed, contents)

    @told_in_one_line(lambda: "encoding the held-out images", "a smaller held_out.data.batch_size needs less")
    def on_train_start(self, trainer: Trainer, task: DiffusionTask) -> None:
        """Encode this rank's share. Raises UserError for data without a usable image."""
        self.measured_at = trainer.global_step  # that of a run that goes on was measured before it was saved
        self.forget_others()
        if self.is_exhausted(trainer):
            self.measured_on = self.measured_on_before
            return
        size, ours = self.source.image_size, trainer.datamodule.source.image_size
        if size is not None and ours is not None and size != ours:
            raise UserError(f"held_out.data.image_size: {size}; data.image_size is {ours}, and losses depend on it")
        if self.source.cut_from != trainer.datamodule.source.cut_from:
            print_rank_zero("held_out.data.resize_to: is not data.resize_to, and losses depend on it")
        self.encoded, texts = self.encode(trainer, task)
        # They may change beside the same images, and conditions with them. All ranks go by the first one's, as one may
        # have had an error that passes, and would keep, or save, what the others do not.
        self.measured_on += trainer.strategy.broadcast(digest(texts))
        self.forget_others()
        count = sum(gather(sum(batch.count for batch in self.encoded)))
        if not count:
            raise UserError("held_out.data: no usable image")
        if count < self.samples:
            print_rank_zero(f"held_out: {count} images are there, fewer than held_out.samples={self.samples}")
        if trainer.global_step == 0:
            self.measure_now(trainer, task)

    def forget_others(self) -> None:
        """Let losses on other images, other texts or at other times, as far as it is known, count no more; say so."""
        if self.measured_on_before.startswith(self.measured_on):
            return
        if self.measured_on_before:
            print_rank_zero(
                f"held_out: other images, captions or times than before: the lowest loss so far, {self.best:.5f} at "
                f"step {self.best_step}, does not count any more"
            )
        self.best, self.best_step, self.since, self.measured_on_before = math.inf, 0, 0, ""

    def is_exhausted(self, trainer: Trainer) -> bool:
        """Return whether the run has been stopped for want of lower losses, and is to train nothing more; say so."""
        if self.patience is None or self.since < self.patience:
            return False
        print_rank_zero(
            f"held_out.patience={self.patience}: this run has ended at step {trainer.global_step}: {self.since} "
            f"measurements were not below the lowest loss, {self.best:.5f} at step {self.best_step}; nothing is "
            "trained (a larger patience, or null, goes on)"
        )
        trainer.should_stop = True
        return True

    def encode(self, trainer: Trainer, task: DiffusionTask) -> tuple[list[HeldOutBatch], list[str]]:
        """Return this rank's batches, in main memory, and the texts of all samples.

        Batches are every n-th one, and the same number on each of n ranks.

        All ranks take part in what a sharded network does; one that has fewer gets a last one that counts nothing.
        """
        data = DataModule(self.source, seed=task.seed, rank=0, world_size=1, epochs=1)
        mine: list[HeldOutBatch] = []
        texts: list[str] = []
        taken, number = 0, -1
        for number, batch in enumerate(data.train_dataloader()):
            if number % trainer.world_size == trainer.global_rank:
                mine.append(self.encode_batch(trainer, task, batch, number, taken))
            texts += batch.text[: self.samples - taken]
            taken += len(batch)
            if taken >= self.samples:
                break
        rounds = max(gather(number)) // trainer.world_size + 1 if trainer.world_size > 1 else len(mine)
        while number >= 0 and len(mine) < rounds:  # more than one behind an error that passes on another rank
            spare = mine[-1] if mine else self.encode_batch(trainer, task, batch, number, 0)
            mine.append(replace(spare, count=0))
        return mine, texts

    @torch.no_grad()
    def encode_batch(
        self, trainer: Trainer, task: DiffusionTask, batch: Batch, number: int, first: int
    ) -> HeldOutBatch:
        """Return latents and conditions of a batch; sample `first` is its first one."""
        batch = trainer.strategy.batch_to_device(batch)
        with torch.random.fork_rng(devices=[task.device] if task.device.type == "cuda" else []):
            torch.manual_seed(batch_seed(task.seed, 0, number))
            x0, conditions = task.encode(batch, noisy=False)  # [B, C, h, w], name -> [B, ...]
            conditions |= task.from_sources(batch, x0)
        kept = {name: value.cpu() for name, value in conditions.items()}
        return HeldOutBatch(x0.cpu(), kept, first, min(len(batch), max(self.samples - first, 0)))

    @told_in_one_line(lambda: "measuring the held-out loss", "a smaller held_out.data.batch_size needs less")
    def measure(self, trainer: Trainer, task: DiffusionTask) -> None:
        """Measure, log, hand it to who keeps the best weights, stop if it has not fallen for long."""
        step = trainer.global_step
        network = task.best_model
        was_training = network.training
        network.eval()
        with trainer.precision_plugin.val_step_context():
            batches = (self.timely(trainer, batch).to(task.device) for batch in self.encoded)
            sums = loss_sums(network, task.objective, batches, self.levels, task.seed)  # [2, 4]
        network.train(was_training)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        means = (sums[0] / sums[1]).tolist()
        loss = float(sums[0].sum() / sums[1].sum())
        by_time = {f"held_out/loss_t{i / len(means):.2f}": value for i, value in enumerate(means) if value == value}
        log_values(trainer, {LOSS: loss, **by_time})
        lowest = "" if math.isinf(self.best) else f" (lowest so far: {self.best:.5f} at step {self.best_step})"
        print_rank_zero(f"held-out loss {loss:.5f} at step {step}{lowest}")
        offer(trainer, task, Measurement(LOSS, loss, higher_is_better=False, measured_on=self.measured_on))
        if loss < self.best:
            self.best, self.best_step, self.since = loss, step, 0
        elif step % self.every == 0:
            self.since += 1
        if self.patience is not None and self.since >= self.patience:
            print_rank_zero(
                f"held_out.patience: no lower held-out loss in {self.since} measurements; the run ends at step {step}, "
                f"the lowest, {self.best:.5f}, was at step {self.best_step}"
            )
            trainer.should_stop = True

    def timely(self, trainer: Trainer, batch: HeldOutBatch) -> HeldOutBatch:
        """Return a batch if there is still time for it. Raises OutOfTime."""
        self.check_time(trainer)
        return batch

    def state_dict(self) -> HeldOutState:
        return HeldOutState(best=self.best, best_step=self.best_step, since=self.since, measured_on=self.measured_on)

    def load_state_dict(self, state: HeldOutState) -> None:
        if not self.goes_on:
            return
        self.best, self.best_step, self.since = state["best"], state["best_step"], state["since"]
        self.measured_on_before = state["measured_on"]
