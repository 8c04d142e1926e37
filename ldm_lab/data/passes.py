"""One pass over shards or image files: each sample once, on any number of devices and nodes, restartable.

A *work item* (`work_items`) is done as a whole or not at all: a shard, or a batch of image files. A `Job` says what is
made of one: scores, embeddings, latents, statistics. The engine (`run_pass`) deals whole items out to the processes,
reads them in loader processes, hands their batches to the job (a batch never mixes two items, so an item's files do
not depend on how many processes there were), has it write an item's files behind the last batch, and counts what was
read and skipped. An item is done when its last file is there, which the job writes whole; whoever begins anew goes on
with the items that are not done. Lightning's Trainer predicts, so its devices, nodes, torchrun and SLURM work.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import ClassVar, Generic, NamedTuple, Protocol, TypeVar

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ldm_lab.data.counts import Counts
from ldm_lab.data.loader_processes import leave_signals_to_parent
from ldm_lab.data.samples import BROKEN, DUPLICATE, UNREACHABLE, RawSample, SkippedSample, as_utf8, caption_of
from ldm_lab.data.work_items import Content, WorkItem, describe
from ldm_lab.errors import UserError
from ldm_lab.processes import fail_together, keep_freed_memory, quiet_lightning, trainer_options
from ldm_lab.progress import Bar, print_line

LONGEST_WAIT = timedelta(days=30)  # of one process for another one that has more to do

Fingerprint = dict[str, str]  # what makes results what they are -> its value, as a text
One = TypeVar("One")  # a sample, prepared
Many = TypeVar("Many", bound=tuple)  # a batch: a NamedTuple of tensors and lists, pinned and moved as such
Made = TypeVar("Made")  # what a job makes of a batch, on the CPU


# ------------------------------------------------------------------------------------------------------- the contract


class Preparation(Protocol[One, Many]):
    """What happens to samples in the loader processes, to which it is sent: it holds no network."""

    def prepare(self, sample: RawSample) -> One:
        """Return a sample, decoded. Raises SkippedSample."""
        ...

    def collate(self, samples: list[One]) -> Many:
        """Return the batch of some samples."""
        ...


class Finished(NamedTuple):
    """What the last file of a finished item says of itself.

    Attributes:
        fingerprint: `Job.fingerprint` of the pass that made it.
        content: `WorkItem.content` at that time.
        counts: what was read of the item and skipped.
    """

    fingerprint: Fingerprint
    content: Content
    counts: Counts


class Job(nn.Module, Generic[One, Many, Made]):
    """What a pass makes of its items. A module, so that its networks are moved to the device.

    Attributes:
        task: a verb for the progress bar.
        results: what its files hold, in the plural.
        preparation: of the samples.
    """

    task: ClassVar[str]
    results: ClassVar[str]
    preparation: Preparation[One, Many]

    def check(self, items: Sequence[WorkItem]) -> None:
        """Raise UserError for items that this job cannot do."""

    def fingerprint(self, precision: str) -> Fingerprint:
        """Return what makes its results what they are; files with another one are never overwritten.

        Args:
            precision: of the networks' arithmetic, as Lightning calls it.
        """
        raise NotImplementedError

    def files(self, item: WorkItem) -> list[Path]:
        """Return all files of an item, the one that is written last at the end."""
        raise NotImplementedError

    def finished(self, item: WorkItem) -> Finished | None:
        """Return what an item's last file says, None if it is not there, damaged, or another program's."""
        raise NotImplementedError

    def process(self, batch: Many) -> Made:
        """Return what is made of a batch on the device, on the CPU again."""
        raise NotImplementedError

    def write(self, item: WorkItem, rows: list[Made], done: Finished) -> None:
        """Write an item's files, each whole or not at all.

        Args:
            item: whose last batch has been processed.
            rows: of its batches, in the item's order; none if no sample can be used.
            done: to be written into the last file; a job may count further skipped samples in it.

        Raises:
            UserError: a file cannot be written.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class PassOptions:
    """How a pass runs: batches, loader processes, and what Lightning's Trainer calls by the same names.

    Attributes:
        batch_size: samples that are processed at once.
        workers: loader processes per device.
        devices: per node, or "auto".
        precision: of the networks' arithmetic.
    """

    batch_size: int = 64
    workers: int = 2
    devices: str = "1"
    num_nodes: int = 1
    accelerator: str = "auto"
    precision: str = "32-true"


@dataclass(frozen=True)
class PassReport:
    """What is done, by this pass and those before.

    Attributes:
        counts: samples of the items that are done.
        done: items.
        items: in all.
        unreached: addresses of items that could not be read; another pass tries again.
    """

    counts: Counts
    done: int
    items: int
    unreached: list[str]


def run_pass(job: Job[One, Many, Made], items: Sequence[WorkItem], options: PassOptions) -> PassReport | None:
    """Do what is not done yet, with a progress bar.

    Args:
        job: what is made of the items.
        items: all of them, in the same order in every process.
        options: how.

    Returns:
        The report on the first process, None on all others.

    Raises:
        UserError: results of another fingerprint, a device that is not there, files that cannot be written.
    """
    job.check(items)
    quiet_lightning()
    torch.set_float32_matmul_precision("high")
    for folder in {item.target.parent for item in items}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {folder}: cannot be made: {error.strerror}") from None
    alone = options.devices == "1" and options.num_nodes == 1
    with trainer_options(f"--devices {options.devices}"):
        trainer = Trainer(
            accelerator=options.accelerator, devices=options.devices, num_nodes=options.num_nodes,
            precision=options.precision, strategy="auto" if alone else DDPStrategy(timeout=LONGEST_WAIT),
            callbacks=[_Bar(job.task)], logger=False, enable_progress_bar=False, enable_checkpointing=False,
            enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
    keep_freed_memory(trainer.strategy.root_device)
    if trainer.is_global_zero:
        for line in describe(items):
            print_line(f"data: {as_utf8(line)}")
    with fail_together(trainer):
        trainer.predict(_Pass(job, items, options), return_predictions=False)
    trainer.strategy.barrier()
    return report_of(job, items) if trainer.is_global_zero else None


def report_of(job: Job[One, Many, Made], items: Sequence[WorkItem]) -> PassReport:
    """Return what the items' last files say was read and skipped, and which items have none."""
    counts, unreached = Counts(), []
    for item in items:
        done = job.finished(item)
        if done is None:
            unreached.append(item.address)
        else:
            counts.add(done.counts)
    return PassReport(counts, len(items) - len(unreached), len(items), unreached)


def is_done(job: Job[One, Many, Made], item: WorkItem, fingerprint: Fingerprint) -> bool:
    """Return whether an item's files are all there.

    Raises:
        UserError: its last file has results of another fingerprint: it is not overwritten.
    """
    done = job.finished(item)
    if done is None:
        return False
    files = job.files(item)
    for what, ours in fingerprint.items():
        if done.fingerprint.get(what) != ours:
            raise UserError(f"{files[-1]}: has {job.results} of another {what}; take another --out, or delete it")
    return done.content == item.content() and all(path.exists() for path in files)


# ------------------------------------------------------------------------------------------------------------ reading


class ItemBatch(NamedTuple, Generic[Many]):
    """A batch on its way to the device. Behind an item's last one comes one without a batch, with its counts.

    Attributes:
        item: index among all items.
        size: samples in the batch.
        batch: of the job's preparation, or None.
        counts: what was read of the item and skipped, or None.
    """

    item: int
    size: int = 0
    batch: Many | None = None
    counts: Counts | None = None


class _Reader(IterableDataset):
    """The prepared samples of some items, batch by batch. Every loader process has items of its own."""

    def __init__(self, items: dict[int, WorkItem], preparation: Preparation[One, Many], batch_size: int) -> None:
        self.items, self.preparation, self.batch_size = items, preparation, batch_size

    def __iter__(self) -> Iterator[ItemBatch[Many]]:
        process = get_worker_info()
        mine = list(self.items.items())
        for index, item in mine[process.id :: process.num_workers] if process else mine:
            yield from self.read(index, item)

    def read(self, index: int, item: WorkItem) -> Iterator[ItemBatch[Many]]:
        """Yield the batches of an item and its counts."""
        counts, seen, samples = Counts(), set(), []
        for sample in item.samples():
            counts.read += 1
            try:
                if isinstance(sample, SkippedSample):
                    raise sample
                if sample.key in seen:
                    raise SkippedSample(DUPLICATE, sample.key)
                seen.add(sample.key)
                samples.append(self.preparation.prepare(sample))
                caption = caption_of(sample)
                counts.caption(caption.problem or caption.place, as_utf8(sample.key))
            except SkippedSample as problem:
                counts.skip(SkippedSample(problem.reason, as_utf8(problem.key)))
                continue
            if len(samples) == self.batch_size:
                yield ItemBatch(index, len(samples), self.preparation.collate(samples))
                samples = []
        if samples:
            yield ItemBatch(index, len(samples), self.preparation.collate(samples))
        yield ItemBatch(index, counts=counts)


# ---------------------------------------------------------------------------------------------------------- Lightning


class _Pass(LightningModule):
    """A job as Lightning's Trainer runs it: `predict_step` for every batch of this process's items."""

    def __init__(self, job: Job[One, Many, Made], items: Sequence[WorkItem], options: PassOptions) -> None:
        super().__init__()
        self.job, self.items, self.options = job, items, options
        self.rows: dict[int, list[Made]] = {}  # of the items that this process is at

    def predict_dataloader(self) -> DataLoader:
        """Return this process's share of what is not done. The first process looks; the others may see more already."""
        left: list[int] | str = []
        if self.trainer.is_global_zero:
            fingerprint = self.job.fingerprint(str(self.trainer.precision))
            try:
                left = [i for i, item in enumerate(self.items) if not is_done(self.job, item, fingerprint)]
            except UserError as error:
                left = str(error)  # for the others, too: they would wait
        left = self.trainer.strategy.broadcast(left)
        if isinstance(left, str):
            raise UserError(left)
        mine = {index: self.items[index] for index in left[self.global_rank :: self.trainer.world_size]}
        return DataLoader(
            _Reader(mine, self.job.preparation, self.options.batch_size),
            batch_size=None,  # the readers make whole batches
            num_workers=min(self.options.workers, len(mine)),
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=leave_signals_to_parent,
        )

    def predict_step(self, batch: ItemBatch[Many], batch_idx: int) -> int:
        """Process a batch, or write the files of an item whose last one it was. Returns the number of samples."""
        if batch.counts is not None:
            self.write(batch.item, batch.counts)
        if batch.batch is not None:
            self.rows.setdefault(batch.item, []).append(self.job.process(batch.batch))
        return batch.size

    def write(self, index: int, counts: Counts) -> None:
        """Write an item's files; an item that could not be reached is left for another time."""
        item, rows = self.items[index], self.rows.pop(index, [])
        if UNREACHABLE in counts.skipped or (item.is_remote and BROKEN in counts.skipped):
            return
        self.job.write(item, rows, Finished(self.job.fingerprint(str(self.trainer.precision)), item.content(), counts))


class _Bar(Callback):
    """A progress bar of samples, with samples per second over all processes, on the first one."""

    def __init__(self, task: str) -> None:
        self.task = task
        self.bar = Bar(task, "image", shown=False)  # until it begins
        self.samples = self.items = 0

    def on_predict_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.bar = Bar(self.task, "image", shown=trainer.is_global_zero)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        outputs: int,
        batch: ItemBatch[Many],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.samples += outputs
        self.items += batch.counts is not None
        self.bar.set_postfix(shards=self.items * trainer.world_size, refresh=False)
        self.bar.advance(self.samples * trainer.world_size)

    def on_predict_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.bar.close()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self.bar.close()
