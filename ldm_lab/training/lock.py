"""One process of a run at a time, and no rest of a killed one: two would write the same files."""

from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from ldm_lab.errors import UserError
from ldm_lab.io.atomic import remove_partial


class RunLock:
    """The right to write into a run's folder, held until the end of a `with` block by the first rank.

    It is taken when all that can be a mistake of the user's is checked, so that a mistake leaves no file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = FileLock(folder.parent / f".{folder.name}.lock")

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lock.release()

    def acquire(self) -> None:
        """Take the folder, and clear it of what killed processes left half written.

        Raises:
            UserError: another process trains this run.
        """
        if self.lock.is_locked:  # by this run, which goes on
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{self.folder}: another process trains this run now; run=NAME starts another one"
            ) from None
        remove_partial(self.folder)
