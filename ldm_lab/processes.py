"""The processes of a run: Lightning kept quiet, its errors about devices in one line, none that outlives another."""

import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from pytorch_lightning import Trainer
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm_lab.errors import UserError, first_line


def quiet_lightning() -> None:
    """Silence what Lightning says about itself, and its warnings that do not apply here."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for harmless in (
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated",
        r".*module\(s\) in eval mode at the start of training",  # the average is meant to be
        r".*does not have many workers which may be a bottleneck",  # data.workers is the user's choice
        r".*You have overridden `on_before_batch_transfer` in `LightningModule`",  # the task checks its batches there
        r".*but AMP with fp16 is not supported on CPU",  # said in our own words
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


@contextmanager
def fail_together(trainer: Trainer) -> Iterator[None]:
    """Kill the processes that a Trainer has started when this one fails: they would wait for it for half an hour."""
    try:
        yield
    except BaseException:
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _MultiProcessingLauncher | _SubprocessScriptLauncher):
            launcher.kill(signal.SIGKILL)
        raise
