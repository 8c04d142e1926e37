"""Loader processes as the training process sees them: what each is reading, how it ended, how batches come from it."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawArray

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from ldm_lab.interfaces import Batch

SHARED_MEMORY = "/dev/shm"  # where Linux keeps what processes share; containers often have 64 MB of it
PREFETCH = 2  # batches that each loader process prepares ahead, as DataLoader has it
LONGEST_NAME = 400  # bytes of what a process is reading
LOOK_EVERY = 1.0  # seconds between a loader process's looks whether its parent lives
BATCH_TENSORS = ("image", "mean", "logvar")


# ------------------------------------------------------------------------------------------------ what is being read


class Whereabouts:
    """What each of a rank's loader processes is reading, told across processes."""

    def __init__(self, processes: int) -> None:
        self.names = [RawArray("c", LONGEST_NAME) for _ in range(max(processes, 1))]

    def note(self, process: int, name: str) -> None:
        """Tell what a process is about to read, such as the address of a shard."""
        self.names[process].value = name.encode(errors="backslashreplace")[: LONGEST_NAME - 1]

    def of(self, process: int) -> str:
        """Return what a process was reading last; "" if it has not told."""
        return bytes(self.names[process].value).decode(errors="replace")

    def __str__(self) -> str:
        told = dict.fromkeys(filter(None, map(self.of, range(len(self.names)))))
        return ", ".join(told)


# ------------------------------------------------------------------------------------------------- how a process ends


def death(processes: Sequence[BaseProcess], whereabouts: Whereabouts, patience: float = 0.0) -> str | None:
    """Return how the first loader process that did not leave by itself ended, in words; None if all is well.

    Args:
        processes: all of them.
        whereabouts: of these.
        patience: seconds for one that is about to end; its connections may break before it is seen to.
    """
    deadline = time.monotonic() + patience
    while not any(process.exitcode for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    for number, process in enumerate(processes):
        if process.exitcode:
            at = whereabouts.of(number)
            return (
                f"loader process {number} of {len(processes)} {how_it_ended(process.exitcode)}"
                + (f" while it read {at}" if at else "")
                + "; with too little memory, fewer data.workers or a smaller data.shuffle_buffer help"
            )
    return None


def how_it_ended(code: int) -> str:
    """Return what an exit code says, in words: a negative one is that of a signal."""
    if code >= 0:
        return f"ended with status {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    if -code == signal.SIGKILL:
        return f"was killed ({name}: by the system if memory has run out)"
    return f"crashed ({name})" if -code in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT) else f"was ended by {name}"


@contextmanager
def born_without_sigterm() -> Iterator[None]:
    """Have processes that are made here begin with SIGTERM blocked, in every thread of theirs.

    Libraries such as OpenBLAS start threads in a new process before `leave_signals_to_parent` runs there. One of them
    would take the signal that reaches the whole group, and with it the process. It waits for this one meanwhile.
    """
    if sys.platform != "linux":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class SharedSignalsLoader(DataLoader):
    """A DataLoader whose processes leave it to this one to act on SIGTERM from their first moment on.

    What they leave it to do later is for `leave_signals_to_parent` to say, its worker_init_fn.
    """

    def __iter__(self) -> _BaseDataLoaderIter:
        """Start the processes."""
        with born_without_sigterm():
            return super().__iter__()


def leave_signals_to_parent(process: int) -> None:
    """Leave it to the training process to act on Ctrl-C and SIGTERM, which may reach the whole process group.

    It saves a checkpoint then, for which its loader processes have to live on, and stops them itself. Whatever ends it
    ends them, too, also when they wait for a reader that gives nothing.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # macOS has no sigwaitinfo
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()
    threading.Thread(target=_follow_parent, args=(os.getppid(),), daemon=True).start()


def _obey_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        continue
    os._exit(0)


def _follow_parent(parent: int) -> None:
    trainer = multiprocessing.parent_process()
    while os.getppid() == parent and (trainer is None or trainer.is_alive()):
        time.sleep(LOOK_EVERY)
    os._exit(1)


# -------------------------------------------------------------------------------------------------- how batches come


@dataclass
class Piped:
    """A batch on its way through a pipe, as shared memory has no room for it.

    Attributes:
        batch: without its tensors.
        arrays: name -> its tensors, those of its conditions too.
    """

    batch: Batch
    arrays: dict[str, np.ndarray]

    def unpack(self) -> Batch:
        """Return the batch as it was."""
        tensors = {name: torch.from_numpy(array) for name, array in self.arrays.items()}  # [B, ...] each
        own = {name: tensors.pop(name) for name in BATCH_TENSORS if name in tensors}  # [B, ...] each
        return replace(self.batch, **own, conditions=tensors)


def ready_to_send(batch: Batch) -> Batch | Piped:
    """Return a batch with its tensors in shared memory, or to be piped if that is full.

    Left to DataLoader, a batch that finds no room is lost in a thread of its queue, and the training waits for ever.
    """
    tensors = batch_tensors(batch)
    try:
        for tensor in tensors.values():
            tensor.share_memory_()
    except RuntimeError:
        bare = replace(batch, **dict.fromkeys(BATCH_TENSORS), conditions={})
        return Piped(bare, {name: tensor.numpy().copy() for name, tensor in tensors.items()})
    return batch


def batch_tensors(batch: Batch) -> dict[str, Tensor]:
    """Return all tensors of a batch, [B, ...] each; no condition has the name of one of its own."""
    own = {"image": batch.image, "mean": batch.mean, "logvar": batch.logvar}
    return {name: tensor for name, tensor in {**own, **batch.conditions}.items() if tensor is not None}


def free_shared_memory() -> int | None:
    """Return the bytes that are free in shared memory; None where there is no telling."""
    try:
        stats = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return stats.f_bavail * stats.f_frsize


def lack_of_shared_memory(batch: Batch, processes: int, free: int | None) -> str | None:
    """Return a line if the batches that loader processes prepare do not fit into shared memory together.

    Args:
        batch: one of them.
        processes: that prepare batches.
        free: bytes, before the first one came.
    """
    size = sum(tensor.nbytes for tensor in batch_tensors(batch).values())
    count = PREFETCH * processes + 1  # and the one that is trained on
    if free is None or size * count <= free:
        return None
    return (
        f"data: {SHARED_MEMORY} has {free / 1e6:,.0f} MB free, and {count} batches of {size / 1e6:,.1f} MB may "
        f"lie there ({processes} loader processes); those that find no room go through a pipe, which is slower. "
        "More room (docker run --shm-size=2g, or --ipc=host) or fewer data.workers help"
    )
