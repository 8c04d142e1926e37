"""One process of a run at a time, and no rest of a killed one: two would write the same files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from ldm_lab.errors import UserError
from ldm_lab.io.atomic import remove_partial


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder while it trains (on the first rank), and clear it of files that a killed process left half.

    Raises:
        UserError: another process trains this run.
    """
    if rank_zero_only.rank != 0:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder}: another process trains this run now; run=NAME starts another one") from None
    try:
        remove_partial(folder)
        yield
    finally:
        lock.release()
