"""Passes once over shards: their loader processes."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from ldm_lab.data.jobs import Job, PassOptions
from ldm_lab.data.passes import run_pass
from ldm_lab.data.work_items import WorkItem


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
