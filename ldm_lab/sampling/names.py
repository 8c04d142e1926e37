"""What files are called where others read it: names and checksums, never where they lie on this machine."""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ldm_lab.errors import UserError
from ldm_lab.io.atomic import sha256
from ldm_lab.pretrained.catalogue import catalogue
from ldm_lab.pretrained.hub_folder import MODEL, HubFolder
from ldm_lab.pretrained.resolve import HUB

RUN_CONFIG = "config.yaml"  # in the folder of a run
MODELS_OF_RUNS = re.compile(r"(ema|lora)\.safetensors|last\.ckpt|step=.*\.ckpt")


@dataclass(frozen=True)
class FileRecord:
    """A file that a picture was made with.

    Attributes:
        name: without folders; of a web address without what comes after a question mark.
        sha256: of its content; None if that is not known.
    """

    name: str
    sha256: str | None = None

    @classmethod
    def of(cls, path: str | Path) -> "FileRecord":
        """Return the record of a local file, or of a name or an address."""
        local = Path(path).expanduser()
        return cls(public_name(path), sha256(local) if "://" not in str(path) and local.is_file() else None)

    def __str__(self) -> str:
        return self.name if self.sha256 is None else f"{self.name} (sha256 {self.sha256[:12]}...)"

    def is_content_of(self, path: str | Path) -> bool:
        """Return whether a local file has the recorded content, as far as that is known."""
        return self.sha256 is None or not Path(path).expanduser().is_file() or sha256(path) == self.sha256

    def find(self, folders: Iterable[Path]) -> Path | None:
        """Return the file of this name and content in one of some folders; None if it is in none of them."""
        return next((file for file in self.namesakes(folders) if self.sha256 and sha256(file) == self.sha256), None)

    def namesakes(self, folders: Iterable[Path]) -> list[Path]:
        """Return the files of this name in some folders; of a run, or of a shared model, its weights."""
        name = last_part(self.name)
        paths = [folder / name for folder in folders] if name.strip(".") else []
        of_run = ("ema.safetensors", "lora.safetensors", "last.ckpt", MODEL)
        found = [file for path in paths for file in (path, *(path / its for its in of_run))]
        return [file for file in found if file.is_file()]


def checksum(path: Path) -> str:
    """Return a file's SHA-256; of one that has not changed since it was last asked for, without reading it again."""
    now = path.stat()
    return _checksum(path, now.st_mtime_ns, now.st_size)


@functools.lru_cache(maxsize=256)
def _checksum(path: Path, changed: int, size: int) -> str:
    return sha256(path)


def public_name(path: str | Path) -> str:
    """Return what a file may be called in front of others.

    A released name and an address on the Hugging Face Hub stay as they are; of a web address the host and the path are
    kept, of a path its last part.
    """
    text = str(path)
    if text in catalogue() or text.startswith(HUB):
        return text
    if "://" in text:
        address = urlsplit(text)
        return f"{address.scheme}://{address.hostname or ''}{address.path}"
    return last_part(text)


def model_name(path: str | Path) -> str:
    """Return what a model may be called: of a run, or of a shared model, that of its folder."""
    local = Path(path).expanduser()
    if str(path) in catalogue() or "://" in str(path):
        return public_name(path)
    if local.is_dir():
        return local.resolve().name
    in_run = MODELS_OF_RUNS.fullmatch(local.name) and (local.parent / RUN_CONFIG).is_file()
    return local.resolve().parent.name if in_run or is_shared_model(local) else last_part(local.name)


def is_shared_model(file: Path) -> bool:
    """Return whether a file is the model of a shared folder, which its config.json names; not one that enlarges."""
    try:
        shared = HubFolder.read(file.parent) if file.suffix == ".safetensors" else None
    except (UserError, OSError):  # told where it is loaded
        return False
    return shared is not None and shared.model == file.name


def last_part(text: str) -> str:
    """Return what follows the last separator of folders, of any system."""
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1]
