"""The processes of a run: Lightning kept quiet, its errors about devices in one line, none that outlives another, and
what they do with memory that they have freed."""

import ctypes
import logging
import platform
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from pytorch_lightning.strategies.launchers.launcher import _Launcher
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.distributed import distributed_c10d
from torch.distributed.constants import default_pg_timeout

from ldm_lab.errors import UserError, first_line

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt, malloc.h
LARGEST = 2**31 - 1  # bytes


def keep_freed_memory(device: torch.device) -> bool:
    """Have this process use large blocks of freed memory again, if it computes on the CPU under glibc.

    Otherwise glibc gives every block of more than 32 MiB back to the system when it is freed, and the next one is
    cleared by the system, page by page: that takes as long as the convolutions that fill it.

    Returns:
        Whether it does.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, LARGEST))


def quiet_lightning() -> None:
    """Silence what Lightning says about itself, and its warnings that do not apply here."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for harmless in (
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated",
        r".*module\(s\) in eval mode at the start of training",  # the average is meant to be
        r".*does not have many workers which may be a bottleneck",  # data.workers is the user's choice
        r".*You have overridden `on_before_batch_transfer` in `LightningModule`",  # the task checks its batches there
        r".*but AMP with fp16 is not supported on CPU",  # said in our own words
        # `train.py --check` saves nothing, so that it needs not know what was the best so far.
        r".*callbacks used to create the checkpoint need to be provided.*\['Checkpointing'\]",
        r".*The `srun` command is available on your system but is not used",
    ):
        warnings.filterwarnings("ignore", harmless)


@contextmanager
def trainer_options(where: str) -> Iterator[None]:
    """Turn what Lightning's Trainer raises about its options into a UserError, "where: reason"."""
    try:
        yield
    except (MisconfigurationException, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"{where}: {first_line(error)}") from None


def leave_process_group() -> None:
    """Leave the process group, if there is one; a process that ends inside it may abort."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def wait_for_each_other(timeout: timedelta = default_pg_timeout) -> None:
    """Set how long the processes of a group, if there is one, wait for each other from here on.

    A program has one group for all that it does: a second one, made behind the first, finds the addresses of the first
    one's connections, which are closed, in the place where processes tell each other theirs.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        with warnings.catch_warnings():  # newer torches call it set_timeout
            warnings.simplefilter("ignore", FutureWarning)
            distributed_c10d._set_pg_timeout(timeout)


@contextmanager
def fail_together(launcher: _Launcher | None) -> Iterator[None]:
    """Kill the processes that a launcher has started when this one fails: they would wait for it for half an hour."""
    try:
        yield
    except BaseException:
        if isinstance(launcher, _MultiProcessingLauncher | _SubprocessScriptLauncher):
            launcher.kill(signal.SIGKILL)
        raise
