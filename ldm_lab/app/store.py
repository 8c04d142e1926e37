"""The folder of what is uploaded and made: how much lies in it, and what a killed program has left of its own."""

import logging
import os
import secrets
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ldm_lab.io.json_files import Json

log = logging.getLogger(__name__)

PREFIX, LOCK = "ldm_lab_app_", ".lock"
LEAST_COUNTED = 65_536  # bytes that a file counts at least: so many small ones fill a disk's index, too


class Store:
    """The files of uploads and pictures; the oldest go when there are too many."""

    def __init__(self, folder: Path, most: int) -> None:
        """Take a folder.

        Args:
            folder: where they lie, at any depth.
            most: bytes, each file counted as 64 KiB at least.
        """
        self.folder, self.most = folder, most
        self.waited_for: Callable[[], Iterable[Path]] = list  # those that requests in a queue name; they stay, too
        self._held: list[Path] = []
        self._door = threading.Lock()

    def make_room(self, coming: int = 0) -> int:
        """Delete the oldest files until `coming` more bytes fit; return how many were deleted."""
        with self._door:
            files = sorted(_files(self.folder), key=lambda file: file.changed)
            held = {path.resolve() for path in (*self._held, *self.waited_for())}
            total, deleted = coming + sum(file.counted for file in files), 0
            for file in files:
                if total <= self.most:
                    break
                if file.path.resolve() in held:
                    continue
                with suppress(OSError):
                    file.path.unlink()
                    total, deleted = total - file.counted, deleted + 1
                with suppress(OSError):  # not empty
                    file.path.parent.rmdir()
        if deleted:
            log.warning("deleted the oldest %d files of uploads and pictures: more than --max-stored", deleted)
        return deleted

    @contextmanager
    def holding(self, paths: Iterable[Path]) -> Iterator[None]:
        """Keep some files for a while: those that a job works on."""
        paths = list(paths)
        with self._door:
            self._held += paths
        try:
            yield
        finally:
            with self._door:
                for path in paths:
                    self._held.remove(path)


def named_files(content: Json) -> Iterator[tuple[str, str]]:
    """Yield (what it is for, path) of each file that a request names."""
    left = [("", content)]
    while left:
        name, value = left.pop()
        if isinstance(value, list):
            left += [(name, entry) for entry in value]
        if not isinstance(value, dict):
            continue
        path = value.get("path")
        if isinstance(path, str):
            yield name, path
        left += [(name or key, entry) for key, entry in value.items()]


@dataclass(frozen=True)
class _File:
    path: Path
    counted: int
    changed: int


def _files(folder: Path) -> Iterator[_File]:
    for here, _, names in os.walk(folder):
        for name in names:
            path = Path(here) / name
            with suppress(OSError):  # gone meanwhile
                found = path.lstat()
                yield _File(path, max(found.st_size, LEAST_COUNTED), found.st_mtime_ns)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a folder for what comes and goes, gone at the end; what killed programs have left of theirs goes now."""
    remove_leftovers()
    folder = Path(tempfile.gettempdir()) / f"{PREFIX}{secrets.token_hex(8)}"
    lock = FileLock(f"{folder}{LOCK}", mode=0o600)
    try:
        with lock:  # before the folder is there: whoever finds it finds it locked
            folder.mkdir(mode=0o700)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)


def remove_leftovers() -> None:
    """Delete the folders of this user's programs that were killed; those that run hold a lock."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        path = Path(f"{folder}{LOCK}")
        if not (_is_own(folder, stat.S_ISDIR) and _is_own(path, stat.S_ISREG)):
            continue
        lock = FileLock(path, mode=0o600)
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):
            continue
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()
        path.unlink(missing_ok=True)
        log.warning("deleted %s, which a program that was killed has left", folder)


def _is_own(path: Path, is_kind: Callable[[int], bool]) -> bool:
    """Return whether a path is of a kind, no link, and of this user's."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return is_kind(found.st_mode) and (os.name == "nt" or found.st_uid == os.getuid())
