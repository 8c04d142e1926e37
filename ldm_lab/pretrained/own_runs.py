"""Which folders are of this user's own trainings: their models may name files anywhere on this machine.

A training notes its folder outside of it, so that nothing that a folder says of itself makes it one's own. A folder
counts at the place where it was trained, and as long as it is the same one: file systems give the inode of a folder
that was deleted to the next one, so that a random mark in it, which the note repeats, tells the two apart.
"""

import hashlib
import os
import secrets
import sys
from pathlib import Path

from ldm_lab.errors import UserError
from ldm_lab.io.atomic import atomic_write, sha256
from ldm_lab.io.json_files import read_json, write_json

MARK = ".ldm_lab_run"  # file in a run's folder
MARK_LENGTH = 64  # characters


def state_folder() -> Path:
    """Return the folder of what is known of this machine: $LDM_LAB_STATE, else ldm_lab in the user's state folder."""
    if os.environ.get("LDM_LAB_STATE"):
        return Path(os.environ["LDM_LAB_STATE"]).expanduser().absolute()
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser().absolute() / "ldm_lab"


def note_own(folder: Path) -> None:
    """Note that a folder, which is there, is of a training of this user's; a line says if that cannot be noted."""
    real = folder.resolve()
    mark = secrets.token_hex(MARK_LENGTH // 2)
    try:
        with atomic_write(real / MARK) as file:
            file.write(mark.encode())
        write_json(_note(real), {"folder": str(real), "inode": real.stat().st_ino, "mark": mark})
    except (OSError, UserError) as error:
        print(
            f"{folder}: cannot be noted as a run of yours ({error}), so that its models will not be sampled with parts "
            "from elsewhere that they name; LDM_LAB_STATE=FOLDER is where it is noted",
            file=sys.stderr,
        )


def is_own(file: Path) -> bool:
    """Return whether a file lies in, or below, a folder that was noted; of a link what it leads to counts."""
    return _noted_folder(file) is not None


def note_weights(file: Path) -> None:
    """Note the checksum of weights that a training has written; a line says if that cannot be noted.

    Of a folder that was not noted, which has been told, nothing is.
    """
    folder = _noted_folder(file)
    if folder is None:
        return
    try:
        with _written(folder).open("a", encoding="ascii") as sums:
            sums.write(f"{sha256(file)}\n")
    except OSError as error:
        print(f"{file}: cannot be noted as trained by you ({error}); a card will not say it", file=sys.stderr)


def has_trained(file: Path) -> bool:
    """Return whether a file is in a folder of this user's, and has what the training there has written as weights.

    Others' weights that were put there are not this user's.
    """
    folder = _noted_folder(file)
    if folder is None or not (notes := _written(folder)).is_file():
        return False
    return sha256(file) in notes.read_text(encoding="ascii", errors="replace").split()


def _noted_folder(file: Path) -> Path | None:
    return next((folder for folder in file.resolve().parents if _is_noted(folder)), None)


def _written(folder: Path) -> Path:
    return _note(folder).with_suffix(".sha256")


def _is_noted(folder: Path) -> bool:
    note = _note(folder)
    if not note.is_file():
        return False
    noted, mark = read_json(note), folder / MARK
    if noted.get("folder") != str(folder) or noted.get("inode") != folder.stat().st_ino:
        return False
    if mark.is_symlink() or not mark.is_file():  # a stranger's link may lead to the mark of another run
        return False
    with mark.open("rb") as file:
        return noted.get("mark") == file.read(2 * MARK_LENGTH).decode(errors="replace")


def _note(folder: Path) -> Path:
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]
    return state_folder() / "runs" / f"{name}.json"
