"""The folder of a shared model, as `python -m ldm_lab export` writes it: what its config.json says lies there.

Such a folder comes from strangers. Names in it are those of files in it; nothing that they say leads out of it.
"""

import functools
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ldm_lab.errors import UserError
from ldm_lab.io.atomic import sha256
from ldm_lab.io.json_files import Fields, parse_json, write_json
from ldm_lab.pretrained.catalogue import SAFE_PART

NAME = "config.json"
CARD = "README.md"
FORMAT, VERSION = "ldm_lab", 1
MODEL, UPSAMPLER = "model.safetensors", "upsampler_{}.safetensors"
LARGEST = 1 << 20  # bytes of a config.json
FILE = re.compile(rf"(?:{SAFE_PART}/)?{SAFE_PART}")
PAGE = re.compile(r"https://[\w.-]+(?:/[\w./-]*)?")
LONGEST = 200  # characters of a text about where a file is from


@dataclass(frozen=True)
class Origin:
    """Where weights are from, as far as that is known.

    Attributes:
        what: in a word or two; "" if nobody knows.
        license: as its publisher says; "" if nobody knows.
        page: its address, or "".
    """

    what: str = ""
    license: str = ""
    page: str = ""

    @classmethod
    def read(cls, fields: Fields) -> "Origin":
        """Return what a config.json says of a file; an address that is none, and long texts, are nothing."""
        what, license, page = (fields.text(key) or "" for key in ("what", "license", "page"))
        known = page if len(page) <= LONGEST and PAGE.fullmatch(page) else ""
        return cls(what if len(what) <= LONGEST else "", license if len(license) <= LONGEST else "", known)


@dataclass(frozen=True)
class HubFolder:
    """A shared model.

    Attributes:
        path: the folder.
        model: name of the (base) model's file.
        upsamplers: names of the files of what enlarges its pictures, in order.
        files: name of each file that sampling needs -> its sha256.
        origins: name of a file, or of a folder with some -> where it is from, as whoever shares it says.
    """

    path: Path
    model: str
    upsamplers: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "HubFolder | None":
        """Return what a folder says of itself; None for one that is no shared model of ldm_lab's.

        Raises:
            UserError: it is one of another version, damaged, or names files outside of it.
        """
        config = path / NAME
        if not config.is_file():
            return None
        if config.stat().st_size > LARGEST:
            raise UserError(f"{config}: refused: it is larger than {LARGEST:,} bytes, which no model's is")
        fields = Fields(parse_json(config.read_bytes()))
        if fields.text("format") != FORMAT:
            return None
        if (version := fields.count("version")) != VERSION:
            raise UserError(f"{config}: of version {version}, and this program reads version {VERSION}")
        files = dict(fields.words("files"))
        model, upsamplers = fields.text("model") or "", tuple(fields.sequence("upsamplers"))
        for name in (model, *upsamplers, *files):
            if not FILE.fullmatch(name):
                raise UserError(f"{config}: refused: {name[:100]!r} is no name of a file in this folder")
        if lost := [name for name in (model, *upsamplers) if name not in files]:
            raise UserError(f"{config}: damaged: {lost[0]!r} is not among its files")
        origins = {name: Origin.read(its) for name, its in (fields.named("origins") or {}).items()}
        return cls(path, model, upsamplers, files, origins)

    def check(self) -> None:
        """Raise UserError if a file is missing, or is a link to somewhere else."""
        for name in self.files:
            file = self.path / name
            if not file.is_file():
                raise UserError(f"{file}: {NAME} beside it names it, and it is not there: the folder is not whole")
            self.check_inside(file)

    def check_content(self, network: str) -> None:
        """Raise UserError if a file that a network is loaded from is another one than config.json says.

        Args:
            network: name of its file; the other networks' are not looked at. A file is read once, until it changes.
        """
        self.check()
        others = {self.model, *self.upsamplers} - {network}
        for name, wanted in self.files.items():
            file = self.path / name
            if name not in others and (found := checksum(file)) != wanted.lower():
                raise UserError(f"{file}: damaged or replaced: its sha256 is {found}, in {NAME} it is {wanted[:64]}")

    def check_inside(self, file: Path) -> None:
        """Raise UserError for a link that leads out of the folder; those of the Hub's cache lead to its own files."""
        check_inside(self.path, file)

    def write(self) -> None:
        """Write config.json."""
        named = {"model": self.model, "upsamplers": list(self.upsamplers), "files": dict(self.files)}
        origins = {name: asdict(its) for name, its in self.origins.items()}
        write_json(self.path / NAME, {"format": FORMAT, "version": VERSION, **named, "origins": origins})


def checksum(path: Path) -> str:
    """Return a file's SHA-256; of one that has not changed since it was last asked for, without reading it again."""
    now = path.stat()
    return _checksum(path.absolute(), now.st_mtime_ns, now.st_size)


@functools.lru_cache(maxsize=256)
def _checksum(path: Path, changed: int, size: int) -> str:
    return sha256(path)


def fetched_folder(folder: Path) -> Path | None:
    """Return the top of what was fetched from the Hub, if a folder is in it: in its cache, or by `hf download`."""
    for parent in (here := folder.absolute(), *here.parents):
        in_cache = parent.parent.name == "snapshots" and parent.parent.parent.name.startswith("models--")
        if in_cache or ((parent / ".cache" / "huggingface").is_dir() and parent != Path.home()):
            return parent
    return None


def leads_out(folder: Path, file: Path) -> bool:
    """Return whether a link leads out of a folder; those of the Hub's cache lead to its own files."""
    real, home = file.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    return not (real.is_relative_to(home) or real.is_relative_to(blobs))


def check_inside(folder: Path, file: Path) -> None:
    """Raise UserError for a link that leads out of a folder; those of the Hub's cache lead to its own files."""
    if leads_out(folder, file):
        to = os.readlink(file)[:200] if file.is_symlink() else file.resolve()
        raise UserError(f"{file}: refused: a link to {to}")
