"""One pass over shards or image files: each sample once, on any number of devices and nodes, restartable.

A *work item* (`work_items`) is done as a whole or not at all: a shard, or a batch of image files. A `Job` says what is
made of one: scores, embeddings, latents, statistics. The engine (`run_pass`) deals whole items out to the processes,
reads them in loader processes, hands their batches to the job (a batch never mixes two items, so an item's files do
not depend on how many processes there were), has it write an item's files behind the last batch, and counts what was
read and skipped. An item is done when its last file is there, which the job writes whole; whoever begins anew goes on
with the items that are not done. Lightning's Trainer predicts, so its devices, nodes, torchrun and SLURM work.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Generic, NamedTuple

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ldm_lab.data.counts import Counts
from ldm_lab.data.jobs import (
    Fingerprint,
    Finished,
    Job,
    Made,
    Many,
    One,
    PassOptions,
    PassReport,
    Preparation,
    Raw,
)  # fmt: skip
from ldm_lab.data.loader_processes import SharedSignalsLoader, leave_signals_to_parent
from ldm_lab.data.samples import BROKEN, DUPLICATE, UNREACHABLE, FilteredOut, Judged, SkippedSample, as_utf8
from ldm_lab.data.source import CHECK_AFTER
from ldm_lab.data.work_items import Seen, SourceItems, WorkItem
from ldm_lab.errors import UserError
from ldm_lab.processes import fail_together, keep_freed_memory, quiet_lightning, trainer_options
from ldm_lab.progress import Bar, print_line

LONGEST_WAIT = timedelta(days=30)  # of one process for another one that has more to do


def run_pass(job: Job[Raw, One, Many, Made], items: Sequence[WorkItem[Raw]], options: PassOptions) -> PassReport | None:
    """Do what is not done yet, with a progress bar.

    Args:
        job: what is made of the items.
        items: all of them, in the same order in every process. Where so many samples are wanted of all together and
            some have too few, others are added to the list, of where there is more.
        options: how.

    Returns:
        The report on the first process, None on all others.

    Raises:
        UserError: results of another fingerprint, a device that is not there, files that cannot be written.
    """
    job.check(items)
    quiet_lightning()
    torch.set_float32_matmul_precision("high")
    is_told, is_whole, report = False, False, None
    while not is_whole:
        make_folders(items)
        trainer = trainer_of(job, options)
        if trainer.is_global_zero and not is_told:
            for line in job.describe(items):
                print_line(f"data: {as_utf8(line)}")
        is_told = True
        with fail_together(trainer.strategy.launcher):
            try:
                trainer.predict(_Pass(job, items, options), return_predictions=False)
            except SystemExit:  # Lightning's, in place of Ctrl-C
                raise KeyboardInterrupt from None
            trainer.strategy.barrier()
            is_whole = True
            if isinstance(items, SourceItems) and items.limit is not None:
                there = seen(job, items) if trainer.is_global_zero else []
                rest = items.rest(trainer.strategy.broadcast(there))
                items += rest
                is_whole = not rest
            if trainer.is_global_zero and is_whole:
                report = report_of(job, items)
                check_share(report.counts, options.max_skipped)
                job.finish(items, report)
        trainer.strategy.barrier()
    return report


def make_folders(items: Sequence[WorkItem[Raw]]) -> None:
    """Make the folders of the items' results. Raises UserError if that cannot be."""
    for folder in {item.target.parent for item in items}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {folder}: cannot be made: {error.strerror}") from None


def trainer_of(job: Job[Raw, One, Many, Made], options: PassOptions) -> Trainer:
    """Return what runs a pass. Raises UserError for a device that is not there."""
    alone = options.devices == "1" and options.num_nodes == 1
    with trainer_options(f"--devices {options.devices}"):
        trainer = Trainer(
            accelerator=options.accelerator, devices=options.devices, num_nodes=options.num_nodes,
            precision=options.precision, strategy="auto" if alone else DDPStrategy(timeout=LONGEST_WAIT),
            callbacks=[_Bar(job.task, job.unit)], logger=False, enable_progress_bar=False, enable_checkpointing=False,
            enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
    keep_freed_memory(trainer.strategy.root_device)
    return trainer


def seen(job: Job[Raw, One, Many, Made], items: Sequence[WorkItem[Raw]]) -> list[Seen | None]:
    """Return how many samples of each item were read and used; None of one that is not done."""
    finished = [job.finished(item) for item in items]
    return [None if done is None else Seen(done.counts.read, done.counts.used) for done in finished]


def report_of(job: Job[Raw, One, Many, Made], items: Sequence[WorkItem[Raw]]) -> PassReport:
    """Return what the items' last files say was read and skipped, and which items have none."""
    counts, unreached = Counts(), []
    for item in items:
        done = job.finished(item)
        if done is None:
            unreached.append(item.address)
        else:
            counts.add(done.counts)
    return PassReport(counts, len(items) - len(unreached), len(items), unreached)


def check_share(counts: Counts, allowed: float) -> None:
    """Raise UserError if more than an allowed share of samples was skipped, once there are enough to judge."""
    if counts.wanted >= CHECK_AFTER and counts.share > allowed:
        raise UserError(f"too many unusable samples: {counts}. data.max_skipped allows {allowed:.1%}")


def is_done(job: Job[Raw, One, Many, Made], item: WorkItem[Raw], fingerprint: Fingerprint) -> bool:
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


class _Reader(IterableDataset, Generic[Raw, One, Many]):
    """The prepared samples of some items, batch by batch. Every loader process has items of its own."""

    def __init__(
        self, items: dict[int, WorkItem[Raw]], preparation: Preparation[Raw, One, Many], batch_size: int
    ) -> None:
        self.items, self.preparation, self.batch_size = items, preparation, batch_size

    def __iter__(self) -> Iterator[ItemBatch[Many]]:
        process = get_worker_info()
        mine = list(self.items.items())
        for index, item in mine[process.id :: process.num_workers] if process else mine:
            yield from self.read(index, item)

    def read(self, index: int, item: WorkItem[Raw]) -> Iterator[ItemBatch[Many]]:
        """Yield the batches of an item and its counts."""
        counts, seen, samples = Counts(), set[str](), list[One]()
        for sample in item.samples():
            if isinstance(sample, Judged):
                counts.judged += sample.count
                continue
            counts.read += 1
            try:
                if isinstance(sample, SkippedSample):
                    raise sample
                prepared = self.preparation.prepare(sample)
                if self.preparation.unique_keys and prepared.key in seen:
                    raise SkippedSample(DUPLICATE, prepared.key)
            except SkippedSample as problem:
                counts.skip(in_utf8(problem))
                continue
            seen.add(prepared.key)
            samples.append(prepared)
            counts.caption(prepared.caption_place, as_utf8(prepared.key))
            if len(samples) == self.batch_size:
                yield ItemBatch(index, len(samples), self.preparation.collate(samples))
                samples = []
            if counts.used == item.limit:
                break
        if samples:
            yield ItemBatch(index, len(samples), self.preparation.collate(samples))
        yield ItemBatch(index, counts=counts)


def in_utf8(problem: SkippedSample) -> SkippedSample:
    """Return the same problem of a key that can be written."""
    if isinstance(problem, FilteredOut):
        return FilteredOut(problem.reason, as_utf8(problem.key), problem.judged)
    return SkippedSample(problem.reason, as_utf8(problem.key))


# ---------------------------------------------------------------------------------------------------------- Lightning


@dataclass
class _Left:
    """What the first process finds is left to do.

    Attributes:
        items: indices.
        counts: of what is done.
        problem: what it had to complain about.
    """

    items: list[int] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    problem: str | None = None


class _Pass(LightningModule):
    """A job as Lightning's Trainer runs it: `predict_step` for every batch of this process's items."""

    def __init__(self, job: Job[Raw, One, Many, Made], items: Sequence[WorkItem[Raw]], options: PassOptions) -> None:
        super().__init__()
        self.job, self.items, self.options = job, items, options
        self.rows: dict[int, list[Made]] = {}  # of the items that this process is at
        self.counts = Counts()  # of what was done before, and of this process's items

    def predict_dataloader(self) -> DataLoader:
        """Return this process's share of what is not done. The first process looks; the others may see more already."""
        left = _Left()
        if self.trainer.is_global_zero:
            fingerprint = self.job.fingerprint(str(self.trainer.precision))
            try:
                left.items = [i for i, item in enumerate(self.items) if not is_done(self.job, item, fingerprint)]
                left.counts = report_of(self.job, self.items).counts
            except UserError as error:
                left.problem = str(error)  # for the others, too: they would wait
        left = self.trainer.strategy.broadcast(left)
        if left.problem is not None:
            raise UserError(left.problem)
        self.counts = left.counts
        mine = {index: self.items[index] for index in left.items[self.global_rank :: self.trainer.world_size]}
        return SharedSignalsLoader(
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
            self.job.leave(rows)
            return
        self.counts.add(counts)
        check_share(self.counts, self.options.max_skipped)
        finished = Finished(self.job.fingerprint(str(self.trainer.precision)), item.content(), counts)
        with torch.autocast("cpu", enabled=False):  # rows are joined there, in whatever precision they are kept
            self.job.write(item, rows, finished)


class _Bar(Callback):
    """A progress bar of samples, with samples per second over all processes, on the first one."""

    def __init__(self, task: str, unit: str) -> None:
        self.task, self.unit = task, unit
        self.bar = Bar(task, unit, shown=False)  # until it begins
        self.samples = self.items = 0

    def on_predict_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.bar = Bar(self.task, self.unit, shown=trainer.is_global_zero)

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
