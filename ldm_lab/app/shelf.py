"""What is offered: models, upsamplers and LoRAs, named on the command line or found in a folder, looked for each time.

Requests name files by these names alone; no other file is opened for them.
"""

import enum
import functools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ldm_lab.app.folders import without_folders
from ldm_lab.checkpoints.files import FORMAT
from ldm_lab.checkpoints.importer import DetectedFile, detect_format
from ldm_lab.checkpoints.lora import FILE as LORA_FILE
from ldm_lab.checkpoints.lora import ROLE as LORA_ROLE
from ldm_lab.condition_sources import build_sources
from ldm_lab.errors import UserError, unknown
from ldm_lab.pretrained.hub_folder import MODEL as SHARED_MODEL
from ldm_lab.sampling.aesthetic import ROLE as RATINGS_ROLE
from ldm_lab.sampling.aesthetic import RatingEmbeddings
from ldm_lab.sampling.loading import MODEL_FILE
from ldm_lab.sampling.names import RUN_CONFIG, FileRecord, checksum, is_shared_model, model_name

log = logging.getLogger(__name__)

ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
OF_RUNS = (MODEL_FILE, LORA_FILE)  # of a run's folder these alone are offered
RATINGS_OF_LAION = "rating0.npy"  # in a folder of rating embeddings
LARGEST_RATING = 2**20  # bytes of one
DEEPEST, MOST = 3, 1000  # folders below the folder, files in all
MOST_NAMED = 20  # names in a message


class Kind(enum.Enum):
    """What a file is taken for."""

    MODEL = "model"
    UPSAMPLER = "upsampler"
    LORA = "LoRA"
    RATINGS = "set of rating embeddings"


class Looked(NamedTuple):
    """What was seen of a file.

    Attributes:
        kind: what it is; None if it cannot be offered.
        reason: why it cannot.
        is_other: whether it is in order, and for something else; what is not is said where the program runs, too.
    """

    kind: Kind | None
    reason: str = ""
    is_other: bool = False


@dataclass(frozen=True)
class Offered:
    """A file that is offered.

    Attributes:
        name: what requests call it.
        path: where it lies.
        kind: what it is.
    """

    name: str
    path: Path
    kind: Kind


@dataclass(frozen=True)
class Contents:
    """What a shelf holds at one time.

    Attributes:
        offered: files of all kinds.
        left_out: name -> why it is not offered.
    """

    offered: list[Offered]
    left_out: dict[str, str]

    def names(self, kind: Kind) -> list[str]:
        """Return the names of one kind."""
        return [offered.name for offered in self.offered if offered.kind is kind]


class Shelf:
    """The files that are offered: those of the command line first, then those of the folder."""

    def __init__(self, given: Sequence[Path] = (), folder: Path | None = None) -> None:
        """Take what is given; nothing is read yet.

        Args:
            given: model files, or folders of runs.
            folder: where more lie, at any time.

        Raises:
            UserError: no such folder.
        """
        self.given, self.folder = list(given), folder
        if folder is not None and not folder.is_dir():
            raise UserError(f"--models {folder}: no such folder")

    def contents(self) -> Contents:
        """Return what is there now; what is damaged is said once."""
        named: dict[str, Path] = {}
        for path in self.given:
            named.setdefault(_free(model_name(path), named), _file_of(path))
        known = {path.resolve() for path in named.values()}
        for name, path in self._in_folder():
            if path.resolve() not in known:
                named.setdefault(_free(name, named), path)
        contents = Contents([], {})
        for name, path in named.items():
            looked = look_at(path)
            if looked.kind is None:
                contents.left_out[name] = without_folders(looked.reason)
                if not looked.is_other:
                    _say_once(path, f"{name}: not offered: {looked.reason}")
            else:
                contents.offered.append(Offered(name, path, looked.kind))
        return contents

    def names(self, kind: Kind) -> list[str]:
        """Return the names of one kind."""
        return self.contents().names(kind)

    def path(self, kind: Kind, name: str) -> Path:
        """Return the file that is offered under a name. Raises UserError for any other name."""
        contents = self.contents()
        found = {offered.name: offered.path for offered in contents.offered if offered.kind is kind}
        if name in found:
            return found[name]
        if name in contents.left_out:
            raise UserError(f"{name}: not offered: {contents.left_out[name]}")
        said = unknown(kind.value, name[:100], found)
        if len(found) > MOST_NAMED:
            said = f"{said.partition(' Known:')[0]} {len(found)} are offered"
        raise UserError(said)

    def find(self, kind: Kind, record: FileRecord) -> str | None:
        """Return the name of the file that a picture was made with; None if it is not offered."""
        same = [
            offered for offered in self.contents().offered if offered.kind is kind and _is_called(offered, record.name)
        ]
        for offered in same:
            if record.sha256 is None or checksum(offered.path) == record.sha256:
                return offered.name
        return None

    def _in_folder(self) -> Iterator[tuple[str, Path]]:
        """Yield the name and path of each file of weights in the folder, those of runs under the names of the runs."""
        if self.folder is None:
            return
        count = 0
        for here, folders, files in os.walk(self.folder):
            place = Path(here)
            folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
            if len(place.relative_to(self.folder).parts) >= DEEPEST:
                folders.clear()
            if RATINGS_OF_LAION in files and place != self.folder:
                yield place.relative_to(self.folder).as_posix(), place
                count += 1
            is_run = RUN_CONFIG in files
            for file in sorted(files):
                if not file.endswith(ENDINGS) or file.startswith(".") or (is_run and file not in OF_RUNS):
                    continue
                count += 1
                if count > MOST:
                    _say_once(
                        self.folder, f"{self.folder}: more than {MOST} files of weights; the others are not offered"
                    )
                    return
                path = place / file
                is_only = (is_run or is_shared_model(path)) and place != self.folder
                yield (place if is_only else path).relative_to(self.folder).as_posix(), path


def look_at(path: Path) -> Looked:
    """Return what a file is, told from names and shapes in it; no weights are read."""
    try:
        now = path.stat()
    except OSError as error:
        return Looked(None, f"{error.strerror}")
    if path.is_dir():
        files = sorted(path.glob("rating[0-9].npy"))
        return _look_at_ratings(path, tuple((file.name, *_changed(file)) for file in files))
    return _look_at(path, now.st_mtime_ns, now.st_size)


@functools.lru_cache(maxsize=2 * MOST)
def _look_at(path: Path, changed: int, size: int) -> Looked:
    try:
        found = detect_format(path)
        if found.kind == LORA_ROLE:
            return Looked(Kind.LORA)
        role = found.file.metadata.get("role") if found.file.metadata.get("format") == FORMAT else None
        if role == RATINGS_ROLE:
            return Looked(Kind.RATINGS)
        if not found.importer.holds_model:
            what = found.title if role is None else f"{role[:60].replace('_', ' ')} of ldm_lab's"
            return Looked(None, f"no model of pictures: {what}", is_other=True)
        is_upsampler = _enlarges(found)
    except UserError as error:
        return Looked(None, str(error).removeprefix(f"{path}: "))
    return Looked(Kind.UPSAMPLER if is_upsampler else Kind.MODEL)


@functools.lru_cache(maxsize=2 * MOST)
def _look_at_ratings(path: Path, files: tuple[tuple[str, int, int], ...]) -> Looked:
    """Return what a folder of LAION's rating embeddings is: it is read, as they are small, once until they change."""
    if large := [name for name, _, size in files if size > LARGEST_RATING]:
        return Looked(None, f"{large[0]}: too large for an embedding")
    try:
        RatingEmbeddings.load(path)
    except UserError as error:
        return Looked(None, str(error).removeprefix(f"{path}: ").replace(f"{path}{os.sep}", ""))
    return Looked(Kind.RATINGS)


def _changed(file: Path) -> tuple[int, int]:
    """Return when a file was changed, and its bytes; nothing of one that is gone, or a link to nowhere."""
    try:
        found = file.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def _enlarges(found: DetectedFile) -> bool:
    """Return whether a model is told of a smaller picture."""
    shape = found.importer.denoiser_shape(found.file, True)
    if shape is not None:
        return "low_res" in shape.conditions
    sections = found.importer.config(found.file).get("condition_sources")
    return any("low_res" in its.spec for its in build_sources(sections if isinstance(sections, dict) else {}).values())


def _is_called(offered: Offered, name: str) -> bool:
    return name in (model_name(offered.path), offered.name, offered.path.name)


def _file_of(path: Path) -> Path:
    """Return the file that a path of the command line stands for: of a run's folder its model, or its LoRA.

    Of a shared folder it is the model.
    """
    if not path.is_dir():
        return path
    if is_shared_model(path / SHARED_MODEL):
        return path / SHARED_MODEL
    return next((path / name for name in OF_RUNS if (path / name).is_file()), path / MODEL_FILE)


def _free(name: str, taken: dict[str, Path]) -> str:
    """Return a name that is not taken: itself, or with a number."""
    number, free = 2, name
    while free in taken:
        free, number = f"{name} ({number})", number + 1
    return free


@functools.cache
def _say_once(path: Path, line: str) -> None:
    log.warning("%s", line)
