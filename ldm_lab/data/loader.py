"""Reading without end: the batches of one rank, each with the position that its reader has after it.

Reader r of the run (r = rank x loader processes + process) makes whole batches out of its own share of the data; a
rank's loader processes take turns. So a rank's next batch follows from its readers' positions and whose turn it is.
"""

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ldm_lab.data.order import Order, Position
from ldm_lab.data.source import DUPLICATE, LeftOut, Skip, Source
from ldm_lab.errors import UserError

CHECK_AFTER = 500  # samples that a rank reads before the share of skipped ones is judged
# A reader that finds nothing usable has to end, too. It gives up after this many unusable samples in a row if it has
# skipped more than the allowed share so far, after ten times as many if it has not (a server that went down).
BARREN = 1000
BARREN_SHARD = 100  # what an unreadable shard counts as there
BARREN_PASS = 200  # likewise a whole pass without a usable sample; more than one, as some readers have a single shard
BARREN_RULE = 0.1  # likewise a sample that a rule leaves out
EXAMPLES = 3  # keys kept per reason


class Counts:
    """How many samples were read, how many of them skipped for which reason, and how many left out by which rule.

    Attributes:
        read: samples, the skipped and left out ones included; a broken shard counts as one.
        skipped: reason -> samples.
        examples: reason or rule -> the first few keys.
        left_out: rule -> samples; a sample that breaks several counts for the first.
    """

    def __init__(
        self,
        read: int = 0,
        skipped: dict[str, int] | None = None,
        examples: dict | None = None,
        left_out: dict[str, int] | None = None,
    ):
        self.read, self.skipped, self.examples = read, dict(skipped or {}), dict(examples or {})
        self.left_out = dict(left_out or {})

    def skip(self, problem: Skip) -> None:
        one = {problem.reason: 1}
        examples = {problem.reason: [problem.key]}
        self.add(Counts(0, {}, examples, one) if isinstance(problem, LeftOut) else Counts(0, one, examples))

    def add(self, other: "Counts") -> None:
        self.read += other.read
        for mine, theirs in ((self.skipped, other.skipped), (self.left_out, other.left_out)):
            for reason, count in theirs.items():
                mine[reason] = mine.get(reason, 0) + count
                keys = self.examples.get(reason, []) + other.examples[reason]
                self.examples[reason] = list(dict.fromkeys(keys))[:EXAMPLES]  # each epoch meets them again

    def state(self) -> dict[str, Any]:
        """Return plain values: the constructor's arguments."""
        rules = {"left_out": dict(self.left_out)} if self.left_out else {}
        return {"read": self.read, "skipped": dict(self.skipped), "examples": dict(self.examples), **rules}

    @property
    def share(self) -> float:
        """The share of skipped samples among the wanted ones, in [0, 1]."""
        return sum(self.skipped.values()) / max(self.wanted, 1)

    @property
    def wanted(self) -> int:
        """Samples that no rule left out."""
        return self.read - sum(self.left_out.values())

    def __str__(self) -> str:
        skipped, left_out = sum(self.skipped.values()), sum(self.left_out.values())
        text = f"{self.read:,} samples read, "
        if left_out:
            share = left_out / max(self.read, 1)
            text += f"{left_out:,} left out by rules ({share:.1%}): {self._reasons(self.left_out)}; "
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
) -> Iterator[dict[str, Any]]:
    """Yield one reader's batches from a position on, without end or for `epochs` passes (counted from the very start).

    Each batch has "state": {"position": after it, **counts since the one before}. Where nothing can be used, a last
    {"error": message} comes instead. After the last pass, a {"state": ...} without samples counts what was skipped
    since the last batch.
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
                yield {**source.collate(samples), "state": {"position": list(after), **counts.state()}}
                samples, counts = [], Counts()
        barren += 0 if usable else BARREN_PASS
        if hopeless():
            yield {"error": f"no usable sample in a long time: {stretch}"}
            return
        position = Position(epoch + 1)
    batch = source.collate(samples) if samples else {}
    yield {**batch, "state": {"position": list(position), **counts.state()}}


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

    def advance(self, state: dict[str, Any]) -> None:
        """Go on to behind the batch that carries this state."""
        self.positions[state["process"]] = Position(*state["position"])
        self.turn = (state["process"] + 1) % len(self.positions)
        self.counts.add(Counts(state["read"], state["skipped"], state["examples"], state.get("left_out")))


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

    def __iter__(self) -> Iterator[dict[str, Any]]:
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
            if "error" in batch:
                raise UserError(batch["error"])
            ahead.advance(batch["state"])
            if ahead.counts.wanted >= CHECK_AFTER and ahead.counts.share > self.source.max_skipped:
                allowed = f"data.max_skipped allows {self.source.max_skipped:.1%}"
                raise UserError(f"too many unusable samples: {ahead.counts}. {allowed}")
            if "key" in batch:
                yield self.source.finish(batch)
            else:
                self.progress.advance(batch["state"])


class _Readers(IterableDataset):
    """The readers of a rank as the data set of a DataLoader: each of its processes iterates over one of them."""

    def __init__(self, loader: Loader, progress: Progress):
        self.loader, self.progress = loader, progress

    def __iter__(self) -> Iterator[dict[str, Any]]:
        loader, process = self.loader, get_worker_info()
        workers = len(self.progress.positions)
        # DataLoader always begins with its process 0, so that one takes over the reader whose turn it is.
        mine = ((process.id if process else 0) + self.progress.turn) % workers
        readers = workers * loader.world_size
        position = self.progress.positions[mine]
        for batch in read(loader.source, loader.seed, loader.rank * workers + mine, readers, position, loader.epochs):
            if "state" in batch:
                batch["state"]["process"] = mine
            yield batch


def _as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


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
