"""Reading without end: the batches of one rank, each with the position that its reader has after it.

Reader r of the run (r = rank x loader processes + process) makes whole batches out of its own share of the data; a
rank's loader processes take turns. So a rank's next batch follows from its readers' positions and whose turn it is.
"""

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ldm_lab.data.order import Order, Position
from ldm_lab.data.source import DUPLICATE, LeftOut, Skip, Source
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Batch, ReaderState

CHECK_AFTER = 500  # samples that a rank reads before the share of skipped ones is judged
# A reader that finds nothing usable has to end, too. It gives up after this many unusable samples in a row if it has
# skipped more than the allowed share so far, after ten times as many if it has not (a server that went down).
BARREN = 1000
BARREN_SHARD = 100  # what an unreadable shard counts as there
BARREN_PASS = 200  # likewise a whole pass without a usable sample; more than one, as some readers have a single shard
BARREN_RULE = 0.1  # likewise a sample that a rule leaves out
EXAMPLES = 3  # keys kept per reason


class Counts:
    """How many samples were read, how many of them skipped for which reason, and how many filtered out by which rule.

    Attributes:
        read: samples, the skipped and filtered ones included; a broken shard counts as one.
        skipped: reason -> samples.
        examples: reason or rule -> the first few keys.
        filtered: rule -> samples; a sample that breaks several counts for the first.
    """

    def __init__(
        self,
        read: int = 0,
        skipped: dict[str, int] | None = None,
        examples: dict | None = None,
        filtered: dict[str, int] | None = None,
    ):
        self.read, self.skipped, self.examples = read, dict(skipped or {}), dict(examples or {})
        self.filtered = dict(filtered or {})

    def skip(self, problem: Skip) -> None:
        one = {problem.reason: 1}
        examples = {problem.reason: [problem.key]}
        self.add(Counts(0, {}, examples, one) if isinstance(problem, LeftOut) else Counts(0, one, examples))

    def add(self, other: "Counts") -> None:
        self.read += other.read
        for total, more in ((self.skipped, other.skipped), (self.filtered, other.filtered)):
            for reason, count in more.items():
                total[reason] = total.get(reason, 0) + count
                keys = self.examples.get(reason, []) + other.examples[reason]
                self.examples[reason] = list(dict.fromkeys(keys))[:EXAMPLES]  # each epoch meets them again

    def state(self) -> dict[str, Any]:
        """Return plain values: the constructor's arguments."""
        rules = {"filtered": dict(self.filtered)} if self.filtered else {}
        return {"read": self.read, "skipped": dict(self.skipped), "examples": dict(self.examples), **rules}

    def reader_state(self, position: Position) -> ReaderState:
        """Return these counts with the position of the reader that they are of."""
        return ReaderState(
            position, read=self.read, skipped=self.skipped, filtered=self.filtered, examples=self.examples
        )

    @property
    def share(self) -> float:
        """The share of skipped samples among the wanted ones, in [0, 1]."""
        return sum(self.skipped.values()) / max(self.wanted, 1)

    @property
    def wanted(self) -> int:
        """Samples that no rule left out."""
        return self.read - sum(self.filtered.values())

    def __str__(self) -> str:
        skipped, filtered = sum(self.skipped.values()), sum(self.filtered.values())
        text = f"{self.read:,} samples read, "
        if filtered:
            share = filtered / max(self.read, 1)
            text += f"{filtered:,} left out by rules ({share:.1%}): {self._reasons(self.filtered)}; "
        return text + (
            f"{skipped:,} skipped ({self.share:.1%}): {self._reasons(self.skipped)}" if skipped else "none skipped"
        )

    def _reasons(self, counts: dict[str, int]) -> str:
        return "; ".join(
            f"{reason} {count:,} (e.g. {', '.join(self.examples[reason])})"
            for reason, count in sorted(counts.items(), key=lambda pair: -pair[1])
        )


def read(
    source: Source, seed: int, reader: int, readers: int, position: Position, epochs: int | None = None
) -> Iterator[Batch]:
    """Yield one reader's batches from a position on, without end or for `epochs` passes (counted from the very start).

    The state of each is the position after it, with counts since the one before. After the last pass, a batch that may
    be without samples counts what was skipped since the last one.

    Raises:
        UserError: nothing could be used in a long time.
    """
    samples, counts = [], Counts()
    total, stretch, barren = Counts(), Counts(), 0  # ever; since the last usable sample; the same weighted

    def hopeless() -> bool:
        return barren >= BARREN * (1 if total.share > source.max_skipped else 10)

    for epoch in itertools.count(position.epoch) if epochs is None else range(position.epoch, epochs):
        order = Order(seed, epoch, reader, readers)
        usable = False
        for after, item in walk(source, order, position):
            for tally in (counts, total, stretch):
                tally.read += 1
            try:
                if isinstance(item, Skip):
                    raise item
                samples.append(source.decode(item, order))
            except Skip as problem:
                for tally in (counts, total, stretch):
                    tally.skip(problem)
                if isinstance(problem, LeftOut):
                    barren += BARREN_RULE
                else:
                    barren += BARREN_SHARD if problem is item and problem.reason != DUPLICATE else 1
                if hopeless():
                    break
                continue
            usable, stretch, barren = True, Counts(), 0
            if len(samples) == source.batch_size:
                yield replace(source.collate(samples), state=counts.reader_state(after))
                samples, counts = [], Counts()
        barren += 0 if usable else BARREN_PASS
        if hopeless():
            raise UserError(f"no usable sample in a long time: {stretch}")
        position = Position(epoch + 1)
    batch = source.collate(samples) if samples else Batch(key=[], text=[])
    yield replace(batch, state=counts.reader_state(position))


def walk(source: Source, order: Order, position: Position) -> Iterator[tuple[Position, Any]]:
    """Yield (position after it, item) of what a reader still has to read of an epoch."""
    start, offset = position.start, 0
    for anchor, item in source.items(order, position.start):
        offset = offset + 1 if anchor == start else 1
        start = anchor
        after = Position(order.epoch, start, offset)
        if after > position:
            yield after, item


class Progress:
    """Where a rank stands: what its trained-on batches took from the data.

    Attributes:
        positions: of the rank's readers, one per loader process.
        turn: the loader process that gives the next batch.
        counts: of what was read for these batches.
    """

    def __init__(self, positions: list[Position], turn: int = 0, counts: Counts | None = None):
        self.positions, self.turn, self.counts = positions, turn, counts or Counts()

    def copy(self) -> "Progress":
        return Progress(list(self.positions), self.turn, Counts(**self.counts.state()))

    def advance(self, batch: Batch) -> None:
        """Go on to behind a batch."""
        state = batch.state
        if state is None:
            raise ValueError("this batch does not say where its reader stands")
        self.positions[state.reader] = Position(*state.position)
        self.turn = (state.reader + 1) % len(self.positions)
        self.counts.add(Counts(state.read, state.skipped, state.examples, state.filtered))


class Loader:
    """An iterable over the batches of one rank.

    Args:
        source: opened.
        seed: of the order.
        rank, world_size: this process among those of the run.
        progress: every iteration goes on from where it stands; whoever uses a batch advances it.
        epochs: passes over the data; None is without end.

    Raises:
        UserError: while iterating, when more than the allowed share of samples had to be skipped.
    """

    def __init__(
        self, source: Source, *, seed: int, rank: int, world_size: int, progress: Progress, epochs: int | None = None
    ):
        self.source, self.seed, self.rank, self.world_size = source, seed, rank, world_size
        self.progress, self.epochs = progress, epochs

    def __iter__(self) -> Iterator[Batch]:
        ahead = self.progress.copy()
        loader = DataLoader(
            _Readers(self, ahead.copy()),
            batch_size=None,  # the readers make whole batches
            num_workers=self.source.workers,
            collate_fn=_as_it_is,
            worker_init_fn=_mind_signals,
            generator=torch.Generator(),  # else it draws from the global one, which belongs to the training
        )
        for batch in loader:
            if isinstance(batch, _Failure):
                raise UserError(batch.message)
            ahead.advance(batch)
            if ahead.counts.wanted >= CHECK_AFTER and ahead.counts.share > self.source.max_skipped:
                allowed = f"data.max_skipped allows {self.source.max_skipped:.1%}"
                raise UserError(f"too many unusable samples: {ahead.counts}. {allowed}")
            if len(batch):
                yield self.source.to_device_format(batch)
            else:
                self.progress.advance(batch)


@dataclass
class _Failure:
    """What a loader process delivers in place of a UserError: raised there, it would come with a traceback in it."""

    message: str


class _Readers(IterableDataset):
    """The readers of a rank as the data set of a DataLoader: each of its processes iterates over one of them."""

    def __init__(self, loader: Loader, progress: Progress):
        self.loader, self.progress = loader, progress

    def __iter__(self) -> Iterator[Batch | _Failure]:
        loader, process = self.loader, get_worker_info()
        workers = len(self.progress.positions)
        # DataLoader always begins with its process 0, so that one takes over the reader whose turn it is.
        mine = ((process.id if process else 0) + self.progress.turn) % workers
        readers = workers * loader.world_size
        position = self.progress.positions[mine]
        reader = loader.rank * workers + mine
        try:
            for batch in read(loader.source, loader.seed, reader, readers, position, loader.epochs):
                batch.state.reader = mine
                yield batch
        except UserError as error:
            yield _Failure(str(error))


def _as_it_is(delivered: Batch | _Failure) -> Batch | _Failure:
    return delivered


def _mind_signals(process: int) -> None:
    """Leave it to the training process to act on Ctrl-C and SIGTERM, which may reach the whole process group.

    It saves a checkpoint then, for which its loader processes have to live on, and stops them itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def _obey_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        continue
    os._exit(0)
