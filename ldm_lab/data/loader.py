"""Reading without end: the batches of one rank, each with the position that its reader has after it.

Reader r of the run (r = rank x loader processes + process) makes whole batches out of its own share of the data; a
rank's loader processes take turns. So a rank's next batch follows from what its readers have left and whose turn it is.
"""

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ldm_lab.data.counts import Counts
from ldm_lab.data.loader_processes import (
    PREFETCH,
    Piped,
    SharedSignalsLoader,
    Whereabouts,
    death,
    free_shared_memory,
    lack_of_shared_memory,
    leave_signals_to_parent,
    ready_to_send,
)
from ldm_lab.data.order import Order, shuffled
from ldm_lab.data.samples import OF_SHARDS, FilteredOut, Judged, Sample, SkippedSample
from ldm_lab.data.shares import Stretch, share, stretches
from ldm_lab.data.source import Item, Source, Unusable
from ldm_lab.data.waiting import ReadingError, Wait, WaitingEnded
from ldm_lab.errors import UserError, first_line
from ldm_lab.interfaces import Batch, ReaderState
from ldm_lab.progress import print_line

# A reader that finds nothing usable has to end, too. It gives up after this many unusable samples in a row if it has
# skipped more than the allowed share so far, after ten times as many if it has not (a server that went down).
CONSECUTIVE_FAILURES = 1000
SHARD_FAILURE = 100  # what an unreadable shard counts as there
PASS_FAILURE = 200  # likewise a whole pass without a usable sample; more than one, as some readers have a single shard
FILTERED_FAILURE = 0.1  # likewise a sample that is left out as asked

PAST = (FilteredOut, Judged)  # what goes past the shuffle buffer
GROUP = 4  # units are shuffled together until they have this many times the shuffle buffer


class FailureWatch:
    """Tells when a reader should give up, because nothing it finds can be used.

    Args:
        max_skipped: the share of skipped samples that is allowed.

    Attributes:
        total: of the reader.
        since_usable: of the samples behind the last usable one.
    """

    def __init__(self, max_skipped: float):
        self.max_skipped = max_skipped
        self.total, self.since_usable = Counts(), Counts()
        self.consecutive_failures = 0.0  # behind the last usable sample, weighted

    def read(self, number: int = 1) -> None:
        """Note that samples were met, or a shard that cannot be read."""
        self.total.read += number
        self.since_usable.read += number

    def usable(self) -> None:
        """Note that it can be used."""
        self.since_usable, self.consecutive_failures = Counts(), 0.0

    def skip(self, problem: SkippedSample) -> None:
        """Note that it cannot."""
        self.total.skip(problem)
        self.since_usable.skip(problem)
        if isinstance(problem, FilteredOut):
            self.consecutive_failures += FILTERED_FAILURE
        else:
            self.consecutive_failures += SHARD_FAILURE if problem.reason in OF_SHARDS else 1

    @property
    def gives_up(self) -> bool:
        """Whether it is enough."""
        patience = 1 if self.total.share > self.max_skipped else 10
        return self.consecutive_failures >= CONSECUTIVE_FAILURES * patience


def read(
    source: Source, seed: int, reader: int, readers: int, left: list[Stretch], epochs: int | None = None
) -> Iterator[Batch]:
    """Yield one reader's batches of what it has left, without end or for `epochs` passes (counted from the very start).

    The state of each is the position after it, with counts since the one before. After the last pass, a batch that may
    be without samples counts what was skipped since the last one.

    Raises:
        UserError: nothing could be used in a long time.
    """
    samples: list[Sample] = []
    counts, watch = Counts(), FailureWatch(source.max_skipped)
    count = source.count or 0
    for behind, stretch in stretches(left, reader, readers, count, epochs):
        order = Order(seed, stretch.epoch)
        usable = stretch != share(stretch.epoch, reader, readers, count)  # what is left of a pass may be nothing
        for after, item in walk(source, order, stretch):
            if isinstance(item, Judged):
                counts.judged += item.count
                continue
            number = item.samples if isinstance(item, SkippedSample) else 1
            counts.read += number
            watch.read(number)
            try:
                if isinstance(item, SkippedSample):
                    raise item
                sample = source.decode(item, order)
                source.accept(sample)
                samples.append(sample)
            except SkippedSample as problem:
                counts.skip(problem)
                watch.skip(problem)
                if watch.gives_up:
                    break
                continue
            usable = True
            watch.usable()
            counts.caption(samples[-1].caption_place, samples[-1].key)
            if len(samples) == source.batch_size:
                yield replace(source.collate(samples), state=reader_state(after, behind, counts))
                samples, counts = [], Counts()
        if not usable:
            watch.consecutive_failures += PASS_FAILURE
        if watch.gives_up:
            raise UserError(f"no usable sample in a long time: {watch.since_usable}")
    batch = source.collate(samples) if samples else Batch(key=[], text=[])
    yield replace(batch, state=reader_state(share(epochs or 0, reader, readers, count), 0, counts))


def reader_state(position: Stretch, behind: int, counts: Counts) -> ReaderState:
    """Return where a reader stands, with what it read since its last batch."""
    return ReaderState(
        position, behind=behind, read=counts.read, skipped=counts.skipped, filtered=counts.filtered,
        examples=counts.examples, judged=counts.judged, captions=counts.captions,
    )  # fmt: skip


def walk(source: Source, order: Order, stretch: Stretch) -> Iterator[tuple[Stretch, Item | Unusable]]:
    """Yield (what is left after it, item) of a stretch.

    Units of several items are shuffled in groups, so that resuming reads at most one group again.
    """
    places, epoch, stop, step = stretch.places, stretch.epoch, stretch.stop, stretch.step
    units = order.permutation(source.count or 0).units(places)
    if source.shuffle_buffer is None:
        for place, unit in zip(places, units):
            yield Stretch(epoch, place + step, stop, step), unit
        return
    done = stretch.offset
    while places:
        group, first = Group(source, units), places.start
        items = shuffled(group, source.shuffle_buffer, order.random("group", first), PAST)
        for number, item in enumerate(items, 1):
            if number > done:
                yield Stretch(epoch, first, stop, step, group.begun, number), item
        places, done = places[group.begun :], 0


class Group:
    """The items of units that are shuffled together: of as many as it takes to fill the shuffle buffer GROUP times.

    Args:
        source: what they are read from.
        units: those that are left; each is taken when it is needed.

    Attributes:
        begun: units taken so far.
    """

    def __init__(self, source: Source, units: Iterator[int]):
        self.source, self.units, self.begun = source, units, 0

    def __iter__(self) -> Iterator[Item | Unusable]:
        items, enough = 0, GROUP * (self.source.shuffle_buffer or 0)
        for unit in self.units:
            self.begun += 1
            for item in self.source.items(unit):
                items += not isinstance(item, PAST)
                yield item
            if items >= enough:
                return


class Progress:
    """Where a rank stands: what its trained-on batches took from the data.

    Attributes:
        left: what the rank's readers, one per loader process, have to read before their next whole epoch.
        turn: the loader process that gives the next batch.
        counts: of what was read for these batches.
    """

    def __init__(self, left: list[list[Stretch]], turn: int = 0, counts: Counts | None = None):
        self.left, self.turn, self.counts = left, turn, counts or Counts()

    def copy(self) -> "Progress":
        return Progress(list(self.left), self.turn, Counts.of(self.counts.state()))

    def advance(self, batch: Batch) -> None:
        """Go on to behind a batch."""
        state = batch.state
        if state is None:
            raise ValueError("this batch does not say where its reader stands")
        before = self.left[state.reader]
        self.left[state.reader] = [Stretch(*state.position), *before[len(before) - state.behind :]]
        self.turn = (state.reader + 1) % len(self.left)
        self.counts.add(Counts.of(state))


class Loader:
    """An iterable over the batches of one rank.

    Args:
        source: opened.
        seed: of the order.
        rank, world_size: this process among those of the run.
        progress: every iteration goes on from where it stands; whoever uses a batch advances it.
        epochs: passes over the data; None is without end.
        told_to_stop: whether the run is to end, so that it is no use to wait long for another batch.
        as_made: whether batches come as the readers make them; else as the model gets them (`to_device_format`).
        pinned: whether their tensors lie in memory that a GPU reads by itself.

    Attributes:
        waited: seconds spent waiting for batches.
        lost: how reading ended the first time, in words, when it had to begin anew; None if it did not.

    Raises:
        ReadingError: while iterating, when more than the allowed share of samples had to be skipped, a loader process
            was killed or crashed, or no batch came for a long time.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        rank: int,
        world_size: int,
        progress: Progress,
        epochs: int | None = None,
        told_to_stop: Callable[[], bool] = lambda: False,
        as_made: bool = False,
        pinned: bool = False,
    ):
        self.source, self.seed, self.rank, self.world_size = source, seed, rank, world_size
        self.as_made, self.pinned = as_made, pinned
        self.progress, self.epochs, self.told_to_stop = progress, epochs, told_to_stop
        self.waited = 0.0
        self.lost: str | None = None

    def __iter__(self) -> Iterator[Batch]:
        ahead = self.progress.copy()
        for batch in self.delivered_again(ahead):
            ahead.advance(batch)
            if ahead.counts.wanted >= self.source.judged_after and ahead.counts.share > self.source.max_skipped:
                allowed = f"data.max_skipped allows {self.source.max_skipped:.1%}"
                raise ReadingError(f"too many unusable samples: {ahead.counts}. {allowed}")
            if len(batch):
                yield batch if self.as_made else self.source.to_device_format(batch)
            else:
                self.progress.advance(batch)

    def delivered_again(self, ahead: Progress) -> Iterator[Batch]:
        """Yield the batches behind `ahead`, which whoever takes them advances.

        With several processes reading begins anew once after a loader process has died: the others are in the midst of
        a step, and all have to come to its end before anything can be saved.
        """
        while True:
            try:
                yield from self.delivered(ahead.copy())
                return
            except ReadingError as error:
                if self.world_size == 1 or not error.may_pass or self.lost is not None or self.told_to_stop():
                    raise
                self.lost = str(error)
                print_line(f"data: {error}; reading begins anew once, so that all processes can save")

    def delivered(self, progress: Progress) -> Iterator[Batch]:
        """Yield the batches as the readers make them, from where `progress` stands."""
        workers = self.source.workers
        whereabouts = Whereabouts(workers)
        loader = SharedSignalsLoader(
            _Readers(self, progress, whereabouts),
            batch_size=None,  # the readers make whole batches
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=leave_signals_to_parent,
            prefetch_factor=PREFETCH if workers else None,
            pin_memory=self.pinned,
            generator=torch.Generator(),  # else it draws from the global one, which belongs to the training
        )
        free = free_shared_memory()
        with _without_interruption():
            batches = iter(loader)
        processes = batches._workers if isinstance(batches, _MultiProcessingDataLoaderIter) else []
        wait = Wait(
            at=lambda: str(whereabouts),
            died=lambda: death(processes, whereabouts),
            told_to_stop=self.told_to_stop,
            timeout=self.source.timeout,
        )
        told = not workers
        try:
            while True:
                try:
                    began = time.monotonic()
                    with wait:
                        batch = next(batches, None)
                    self.waited += time.monotonic() - began
                except WaitingEnded as ended:
                    raise ReadingError(str(ended), may_pass=True) from None
                except (RuntimeError, OSError, EOFError) as error:  # what DataLoader raises for a process that has left
                    said = death(processes, whereabouts, patience=2.0) or f"batches stopped coming: {first_line(error)}"
                    raise ReadingError(said, may_pass=True) from None
                if batch is None:
                    return
                if isinstance(batch, _Failure):
                    raise ReadingError(batch.message, batch.may_pass)
                batch = batch.unpack() if isinstance(batch, Piped) else batch
                if not told and (lack := lack_of_shared_memory(batch, workers, free)):
                    print_line(lack)
                told = True
                yield batch
        finally:
            for process in processes:  # one that is stuck in a pipe would be waited for
                process.terminate()


@contextmanager
def _without_interruption() -> Iterator[None]:
    """Undo what DataLoader installs in it: a SIGCHLD handler that raises in the midst of whatever is being done."""
    if threading.current_thread() is not threading.main_thread() or os.name != "posix":
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)


@dataclass
class _Failure:
    """What a reader delivers in place of an exception: raised there, it would come with a traceback in it."""

    message: str
    may_pass: bool = False


class _Readers(IterableDataset):
    """The readers of a rank as the data set of a DataLoader: each of its processes iterates over one of them."""

    def __init__(self, loader: Loader, progress: Progress, whereabouts: Whereabouts):
        self.source, self.seed, self.epochs = loader.source, loader.seed, loader.epochs
        self.rank, self.world_size = loader.rank, loader.world_size
        self.progress, self.whereabouts = progress, whereabouts

    def __iter__(self) -> Iterator[Batch | Piped | _Failure]:
        process = get_worker_info()
        number = process.id if process else 0
        self.source.note = partial(self.whereabouts.note, number)
        workers = len(self.progress.left)
        # DataLoader always begins with its process 0, so that one takes over the reader whose turn it is.
        mine = (number + self.progress.turn) % workers
        reader, readers = self.rank * workers + mine, workers * self.world_size
        try:
            for batch in read(self.source, self.seed, reader, readers, self.progress.left[mine], self.epochs):
                batch.state.reader = mine
                yield ready_to_send(batch) if process else batch
        except UserError as error:
            yield _Failure(str(error))
        except Exception as error:
            yield describe_failure(error, f"loader process {number} of {workers}" if process else "reading the data")


def describe_failure(error: Exception, who: str) -> _Failure:
    """Return what is said of an exception that a reader did not expect: what it is and where it came from."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{place.filename}:{place.lineno}, in {place.name}"
    if isinstance(error, MemoryError):
        return _Failure(f"{who} ran out of memory ({where}); fewer data.workers need less", may_pass=True)
    return _Failure(f"{who} failed with {type(error).__name__}: {first_line(error)} ({where})")


def _as_it_is(delivered: Batch | Piped | _Failure) -> Batch | Piped | _Failure:
    return delivered
