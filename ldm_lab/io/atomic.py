"""Files and folders that appear whole or not at all, and what else is common to all files."""

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from ldm_lab.errors import UserError
from ldm_lab.io.near import meant, near_paths

PARTIAL = ".part"  # suffix of what is being written, beside a leading dot


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file that appears at `path` only when all of it is on the disk; a failure leaves what was there.

    Written to a temporary file in the target's folder (a rename across file systems would not be atomic), fsynced,
    renamed. Raises UserError when the disk is full or the folder is not writable.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError about its zip file while it handles the OSError of a failed write.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, KeyboardInterrupt):  # in the midst of a write, likewise
            raise cause from None
        if not isinstance(cause, OSError):
            raise
        hint = "; free some space (the file that was there before is untouched)" if cause.errno == errno.ENOSPC else ""
        raise UserError(f"{path}: cannot be written: {cause.strerror or cause}{hint}") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def writable_folder(path: str | Path, flag: str) -> Path:
    """Return a folder, made if it is not there, that files can be written to.

    Raises:
        UserError: a file, or no folder that can be written to, with the flag that names it.
    """
    folder = Path(path).expanduser()
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{flag} {folder}: this is a file, not a folder")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{flag} {folder}: no folder that can be written to: {error.strerror or error}") from None
    return folder


@contextlib.contextmanager
def replaced_folder(path: str | Path) -> Iterator[Path]:
    """Hand out a new folder that appears at `path` when all of it is written; a failure leaves what was there.

    A folder that is there is replaced with all that is in it. Raises UserError when it cannot be written.
    """
    path = Path(path)
    temporary = old = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL))
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        if path.exists():  # a folder with files in it cannot be renamed onto
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
            os.replace(path, old / path.name)
        try:
            os.replace(temporary, path)
        except OSError:
            if old is not None:
                os.replace(old / path.name, path)
            raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        for folder in (temporary, old):
            if folder is not None and folder.exists():
                shutil.rmtree(folder)


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Hand out a folder that appears at `path` when all of it is written, unless another process was quicker.

    Then the other one's stays. Raises UserError when it cannot be written.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL))
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        os.rename(temporary, path)
    except OSError as error:
        if not (path.is_dir() and any(path.iterdir())):
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary)


def remove_leftovers(path: Path) -> None:
    """Delete what killed processes left half written of a folder at `path`; nobody may be writing it."""
    for rest in sorted(path.parent.glob(f".{path.name}.*{PARTIAL}")):
        shutil.rmtree(rest) if rest.is_dir() and not rest.is_symlink() else rest.unlink()


def move_into_place(source: Path, path: Path) -> None:
    """Rename a finished file of the same folder, already fsynced, to what it is to be called; one there is replaced."""
    os.replace(source, path)


def remove_partial(folder: Path) -> None:
    """Delete what killed processes left half written in a folder and below; nobody may be writing there."""
    for rest in sorted(folder.rglob(f".*{PARTIAL}")):
        if rest.is_dir():
            shutil.rmtree(rest)
        else:
            rest.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256(path: str | Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(pieces: Iterable[bytes]) -> str:
    """Return the SHA-256 of bytes in a row, in hexadecimal."""
    total = hashlib.sha256()
    for piece in pieces:
        total.update(piece)
    return total.hexdigest()


def existing_file(path: str | Path, what: str) -> Path:
    """Return the path of a file that is there. Raises UserError that names what is missing."""
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path}: no such file ({what}){meant(near_paths(path))}")
    if not path.is_file():
        raise UserError(f"{path}: not a file ({what})")
    return path
