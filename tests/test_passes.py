"""Passes once over shards: their loader processes."""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from ldm_lab.data.counts import Counts
from ldm_lab.data.jobs import Finished, Job, PassOptions
from ldm_lab.data.passes import run_pass
from ldm_lab.data.samples import Judged, SkippedSample
from ldm_lab.data.source import Source
from ldm_lab.data.work_items import Seen, SourceItems, WorkItem


class Masks(NamedTuple):
    """Which signals the threads of a loader process block: `SigBlk` of each in /proc."""

    blocked: list[int]
    key: str = "sample"
    caption_place: str = ""


class LookAtThreads:
    """A preparation that notes them."""

    unique_keys = False

    def prepare(self, sample: str) -> Masks:
        statuses = [path.read_text() for path in Path("/proc/self/task").glob("*/status")]
        return Masks([int(text.partition("SigBlk:")[2].split()[0], 16) for text in statuses])

    def collate(self, samples: list[Masks]) -> tuple[list[int]]:
        return (samples[0].blocked,)


@dataclass(frozen=True)
class One(WorkItem):
    """A work item of one sample."""

    address = "one"

    def content(self):
        return 1

    def samples(self):
        yield "sample"


class Note(Job):
    """Keeps what was noted."""

    task, results = "look", "masks"
    preparation = LookAtThreads()

    def describe(self, items):
        return []

    def fingerprint(self, precision):
        return {}

    def files(self, item):
        return []

    def finished(self, item):
        return None

    def process(self, batch):
        return batch[0]

    def write(self, item, rows, done):
        self.masks = rows[0]


def _look(folder: Path, pipe) -> None:
    """A stand-in for a program that makes a pass."""
    # As OpenBLAS does: a thread in the new process before anything of ours runs there, which takes signals, too.
    os.register_at_fork(after_in_child=lambda: threading.Thread(target=time.sleep, args=(60,), daemon=True).start())
    job = Note()
    run_pass(job, [One(folder / "out")], PassOptions(workers=1, accelerator="cpu"))
    pipe.send(job.masks)


@pytest.mark.skipif(sys.platform != "linux", reason="the loader processes mind SIGTERM on Linux only")
def test_every_thread_of_a_loader_process_leaves_sigterm_to_the_program(tmp_path):
    """It reaches the whole process group, and a thread that took it would end the process."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    program = context.Process(target=_look, args=(tmp_path, theirs))
    program.start()
    theirs.close()
    masks = ours.recv()
    program.join(60)
    assert program.exitcode == 0
    taking = [mask for mask in masks if not mask >> (signal.SIGTERM - 1) & 1]
    assert len(masks) > 2 and len(taking) == 1, "the thread that waits for the program's own"


class Numbers(Source):
    """Units of some numbers of samples, of which those below 0 cannot be used."""

    shuffle_buffer = 1

    def __init__(self, units: list[list[int]]) -> None:
        super().__init__(batch_size=1)
        self.units, self.count = units, len(units)

    def items(self, unit):
        yield Judged(3)
        yield from self.units[unit]
        yield Judged(1)


class Number(NamedTuple):
    number: int
    key: str = ""
    caption_place: str = ""


class Usable:
    unique_keys = False

    def prepare(self, sample):
        if sample < 0:
            raise SkippedSample("below 0", str(sample))
        return Number(sample)

    def collate(self, samples):
        return ([sample.number for sample in samples],)


class Keep(Job):
    """Keeps numbers in files, and what was there at the end."""

    task, results = "keep", "numbers"
    preparation = Usable()

    def describe(self, items):
        return []

    def fingerprint(self, precision):
        return {}

    def files(self, item):
        return [item.file(".json")]

    def finished(self, item):
        if not item.file(".json").exists():
            return None
        _, content, counts = json.loads(item.file(".json").read_text())
        return Finished({}, content, Counts(**counts))

    def process(self, batch):
        return batch[0]

    def write(self, item, rows, done):
        told = [[number for row in rows for number in row], done.content, asdict(done.counts)]
        item.file(".json").write_text(json.dumps(told))

    def finish(self, items, report):
        self.kept = [number for item in items for number in json.loads(item.file(".json").read_text())[0]]
        self.read = report.counts.read


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ([2, 20], 10, 10),
        ([20, 2], 10, 10),
        ([1, 1, 1, 30, 1], 20, 20),
        ([0, 0, 7], 2, 2),
        ([3, 0, 4, 50, 6, 9], 40, 40),
        ([5, 5], 100, 10),
        ([1, 9, 1, 1, 1, 1], 3, 3),
        ([4, 4], 8, 8),
        ([0, 0], 5, 0),
    ],
    ids=["few-first", "few-last", "one-large", "empty-first", "mixed", "too-few", "less-than-units", "all", "none"],
)
def test_a_limit_is_reached_whatever_the_sizes_of_shards(tmp_path, sizes, limit, expected):
    units = [[100 * unit + i for i in range(size)] for unit, size in enumerate(sizes)]
    source, job = Numbers(units), Keep()
    items = SourceItems(source, tmp_path, limit)
    options = PassOptions(batch_size=3, workers=0, accelerator="cpu")
    report = run_pass(job, items, options)
    assert report.counts.used == len(job.kept) == len({*job.kept}) == expected
    for unit, numbers in enumerate(units):  # of each the first ones
        kept = [number for number in job.kept if number // 100 == unit]
        assert sorted(kept) == numbers[: len(kept)]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = Keep()
    run_pass(again, SourceItems(source, tmp_path, limit), options)  # nothing is done twice
    assert again.kept == job.kept and before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_a_limit_is_reached_where_many_samples_cannot_be_used(tmp_path):
    units = [[-1, -2, 0, -3, 1, 2], [-4] * 9 + [3], [4, 5, -6, 6, 7, 8]]
    job = Keep()
    run_pass(job, SourceItems(Numbers(units), tmp_path, 9), PassOptions(batch_size=2, workers=0, accelerator="cpu"))
    assert sorted(job.kept) == list(range(9))
    kept = Keep()
    run_pass(kept, SourceItems(Numbers(units), tmp_path / "few", 5), PassOptions(workers=0, accelerator="cpu"))
    assert len(kept.kept) == 5 and {3} < {*kept.kept}


def test_what_cannot_be_reached_is_left_for_another_time(tmp_path):
    items = SourceItems(Numbers([[0], [1, 2, 3], [4, 5, 6]]), tmp_path, 6)
    assert items.rest([Seen(1, 1), None, Seen(2, 2)]) == []
    rest = items.rest([Seen(1, 1), Seen(2, 2), Seen(2, 2)])
    assert [(item.first, item.most, item.behind, item.target.name) for item in rest] == [(2, 1, 2, "00002-0000002")]
    assert SourceItems(Numbers([[0]]), tmp_path).rest([Seen(1, 1)]) == []
