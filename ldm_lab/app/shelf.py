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

from ldm_lab.checkpoints.importer import detect_format
from ldm_lab.checkpoints.lora import FILE as LORA_FILE
from ldm_lab.checkpoints.lora import ROLE as LORA_ROLE
from ldm_lab.condition_sources import build_sources
from ldm_lab.errors import UserError, unknown
from ldm_lab.sampling.loading import MODEL_FILE
from ldm_lab.sampling.names import RUN_CONFIG, FileRecord, checksum, model_name

log = logging.getLogger(__name__)

ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
OF_RUNS = (MODEL_FILE, LORA_FILE)  # of a run's folder these alone are offered
DEEPEST, MOST = 3, 1000  # folders below the folder, files in all


class Kind(enum.Enum):
    """What a file is taken for."""

    MODEL = "model"
    UPSAMPLER = "upsampler"
    LORA = "LoRA"
    OTHER = "file"  # of other weights, such as rating embeddings


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

    def offered(self) -> list[Offered]:
        """Return what is there now."""
        named: dict[str, Path] = {}
        for path in self.given:
            named.setdefault(_free(model_name(path), named), _file_of(path))
        known = {path.resolve() for path in named.values()}
        for name, path in self._in_folder():
            if path.resolve() not in known:
                named.setdefault(_free(name, named), path)
        found = [(name, path, kind_of(path)) for name, path in named.items()]
        return [Offered(name, path, kind) for name, path, kind in found if kind is not None]

    def names(self, kind: Kind) -> list[str]:
        """Return the names of one kind."""
        return [offered.name for offered in self.offered() if offered.kind is kind]

    def path(self, kind: Kind, name: str) -> Path:
        """Return the file that is offered under a name. Raises UserError for any other name."""
        found = {offered.name: offered.path for offered in self.offered() if offered.kind is kind}
        if name not in found:
            raise UserError(unknown(kind.value, name[:100], found))
        return found[name]

    def find(self, kind: Kind, record: FileRecord) -> str | None:
        """Return the name of the file that a picture was made with; None if it is not offered."""
        same = [offered for offered in self.offered() if offered.kind is kind and _is_called(offered, record.name)]
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
            is_run = RUN_CONFIG in files
            for file in sorted(files):
                if not file.endswith(ENDINGS) or file.startswith(".") or (is_run and file not in OF_RUNS):
                    continue
                count += 1
                if count > MOST:
                    _say_once(f"{self.folder}: more than {MOST} files of weights; the others are not offered")
                    return
                path = place / file
                in_run = is_run and place != self.folder
                yield (place if in_run else path).relative_to(self.folder).as_posix(), path


def kind_of(path: Path) -> Kind | None:
    """Return what a file is, None if it cannot be offered; why is said once."""
    try:
        now = path.stat()
        return _kind_of(path, now.st_mtime_ns, now.st_size)
    except OSError as error:
        _say_once(f"{path}: not offered: {error.strerror}")
        return None


@functools.lru_cache(maxsize=2 * MOST)
def _kind_of(path: Path, changed: int, size: int) -> Kind | None:
    try:
        found = detect_format(path)
        if found.kind == LORA_ROLE:
            return Kind.LORA
        if not found.importer.holds_model:
            return Kind.OTHER
        sections = found.importer.config(found.file).get("condition_sources")
        sources = build_sources(sections if isinstance(sections, dict) else {})
    except UserError as error:
        _say_once(f"{path.name}: not offered: {error}")
        return None
    return Kind.UPSAMPLER if any("low_res" in source.spec for source in sources.values()) else Kind.MODEL


def _is_called(offered: Offered, name: str) -> bool:
    return name in (model_name(offered.path), offered.name, offered.path.name)


def _file_of(path: Path) -> Path:
    """Return the file that a path of the command line stands for: of a run's folder its model, or its LoRA."""
    if not path.is_dir():
        return path
    return next((path / name for name in OF_RUNS if (path / name).is_file()), path / MODEL_FILE)


def _free(name: str, taken: dict[str, Path]) -> str:
    """Return a name that is not taken: itself, or with a number."""
    number, free = 2, name
    while free in taken:
        free, number = f"{name} ({number})", number + 1
    return free


@functools.cache
def _say_once(line: str) -> None:
    log.warning("%s", line)
