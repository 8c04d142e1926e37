"""Where the parts of a model may lie: beside its file, known by what they are (their checksum), then by their names.

What a model's config names anywhere else is read of one's own runs alone: any other model is a stranger's, who must not
choose which files of this machine are read.
"""

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ldm_lab.checkpoints.files import file_metadata, is_safetensors
from ldm_lab.checkpoints.folders import ENDINGS
from ldm_lab.checkpoints.importer import Section
from ldm_lab.checkpoints.parts import size_key
from ldm_lab.checkpoints.sharded import weights_checksum
from ldm_lab.conditioners.t5_models import MINILM, WIDTHS
from ldm_lab.errors import UserError
from ldm_lab.pretrained.catalogue import catalogue
from ldm_lab.pretrained.hub_folder import HubFolder, check_inside, fetched_folder, leads_out
from ldm_lab.pretrained.own_runs import is_own
from ldm_lab.pretrained.resolve import HUB, REPOSITORY, cached_path, lying
from ldm_lab.progress import Bar
from ldm_lab.sampling.names import MODELS_OF_RUNS, last_part

MOST = 32  # files beside a model that are looked into
LONG = 1 << 28  # bytes that take long enough to be read for a bar
OTHER_PROGRAMS = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".zip")
ASSETS = "assets/"  # of the program's own files


@dataclass(frozen=True)
class ModelPlace:
    """Where a model's file lies, and what its config may therefore name.

    Attributes:
        file: the model's.
        shared: what its folder says of itself; None for one that `export` has not written.
        home: the folder that its config must not lead out of; None for a run of this user's, which may name any file.
    """

    file: Path
    shared: HubFolder | None
    home: Path | None

    @classmethod
    def of(cls, file: Path) -> "ModelPlace":
        """Return the place of a model's file. Raises UserError: its folder's config.json is damaged."""
        shared = HubFolder.read(file.parent)
        fetched = fetched_folder(file.parent)
        if shared is None and fetched is None and is_own(file):
            return cls(file, None, None)
        return cls(file, shared, file.parent if shared is not None or fetched is None else fetched)

    @property
    def folder(self) -> Path:
        """The folder that the model's parts may lie in."""
        return self.file.parent

    def find(self, role: str, config: Section, extra: dict[str, str]) -> Path | None:
        """Return the weights that stand for those that a model's config names; None where the config's name holds.

        The place that the config names counts where the right weights are there, and it may be looked at. Then the file
        beside the model with the checksum counts, whatever it is called, then one that is called as the config says, or
        as the role.

        Args:
            role: of the part.
            config: its section.
            extra: of the checkpoint: under the role the checksum of the weights that it was trained with, under
                `size_key` their size; whatever it does not say counts for nothing.

        Raises:
            UserError: the config names a file that it must not name, and none beside the model takes its place.
        """
        weights = config.get("weights")
        if self.shared is not None:
            self._check_names(role, config)
        if not isinstance(weights, str) or "://" in weights:
            return None  # none, an address, or nothing of the kind
        found = self._find(Wanted.of(role, weights, extra))
        if self.home is None or weights in catalogue():
            return found
        if found is None:
            raise UserError(self._refused(f"{role}.weights", weights, f"--{role} FILE"))
        is_model = found.absolute() == self.file.absolute()  # with its parts inside: the user named it, link or not
        if not (is_model or found.is_relative_to(REPOSITORY / ASSETS)):
            check_inside(self.home, found)
        return found

    def find_text_encoder(self, config: Section) -> Path | None:
        """Return the folder of a language model beside the model's file, which its config names; None for none.

        Raises:
            UserError: it, or a file in it, is a link to somewhere else; or it is a folder that must not be named.
        """
        name = config.get("model")
        if self.home is None or not isinstance(name, str) or config.get("name") != "t5":
            return None
        if name in (MINILM, *WIDTHS):
            return None
        is_bare = name == last_part(name)
        folder = self.folder / name if is_bare else Path(name).absolute()
        if name not in ("", ".", "..", "~") and (is_bare or self._is_inside(name)) and folder.is_dir():
            for path in (folder, *sorted(folder.iterdir())):
                check_inside(self.home, path)
            return folder
        is_of_hub = name.count("/") == 1 and not name.startswith(("/", "~", ".")) and "\\" not in name
        if not is_of_hub or Path(name).is_dir():  # a repository's name is judged where it would be fetched
            raise UserError(self._refused("conditioner.model", name, "--conditioner FOLDER"))
        return None

    def _find(self, wanted: "Wanted") -> Path | None:
        """Return the file that stands for the weights that a config names."""
        weights, checksum = wanted.weights, wanted.checksum
        if weights in catalogue():
            if checksum is None:
                return None if cached_path(weights).exists() else lying(weights, self.folder)
            return None if checksum_of(cached_path(weights)) == checksum else self._by_content(wanted)
        named = self._named(weights)
        if named is not None and checksum in (None, checksum_of(named)):
            return None if self.home is None else named
        if checksum is not None and (found := self._by_content(wanted)) is not None:
            return found
        if named is not None:
            return None if self.home is None else named
        by_name = [self.folder / name for name in wanted.names]
        return next((path for path in by_name if path.is_file()), None)

    def _named(self, weights: str) -> Path | None:
        """Return the file that a config names, if it may be looked at and is there; a bare name is none's place."""
        if weights == last_part(weights):
            return None
        if self.home is None:
            path = Path(weights).expanduser()
            return path if path.exists() else None
        own = (REPOSITORY / weights).resolve()
        if (
            not _steps_aside(weights)
            and weights.startswith(ASSETS)
            and own.is_relative_to(REPOSITORY / ASSETS)
            and own.is_file()
        ):
            return own
        path = Path(weights).absolute()
        return path if self._is_inside(weights) and not leads_out(self.home, path) and path.exists() else None

    def _is_inside(self, text: str) -> bool:
        """Return whether a path, as it is written, stays in the folder that the config must not lead out of."""
        home = self.folder if self.home is None else self.home
        return not _steps_aside(text) and Path(text).absolute().is_relative_to(home.absolute())

    def _by_content(self, wanted: "Wanted") -> Path | None:
        """Return the file beside the model that has the right content, and may be another role's by its name."""
        files = [path for path in self._files(wanted) if wanted.may_be(path)]
        total = sum(path.stat().st_size for path in files)
        with Bar(f"{self.folder}: looking for the {wanted.role}", "B", total, shown=total >= LONG) as bar:
            for path in files:
                if checksum_of(path) == wanted.checksum:
                    return path
                bar.update(path.stat().st_size)
        return None

    def _files(self, wanted: "Wanted") -> Iterator[Path]:
        """Yield the files of weights beside the model's, those of the likeliest names first; no models of runs."""
        files = [path for path in sorted(self.folder.iterdir()) if path.suffix in (*ENDINGS, *OTHER_PROGRAMS)]
        files = [path for path in files if not MODELS_OF_RUNS.fullmatch(path.name) and path.name != self.file.name]
        files = [path for path in files if self.home is None or not leads_out(self.home, path)]  # before it is read
        files.sort(key=lambda path: wanted.names.index(path.name) if path.name in wanted.names else len(wanted.names))
        yield from (path for path in files[:MOST] if path.is_file())

    def _check_names(self, role: str, config: Section) -> None:
        """Raise UserError for a shared model that names weights, or a text encoder, anywhere but in its folder.

        What is of the Hub (OWNER/NAME of a model, an address of weights) is judged where it would be fetched.
        """
        for key in ("weights", "model"):
            text = config.get(key)
            if not isinstance(text, str) or (key == "weights" and (text in catalogue() or text.startswith(HUB))):
                continue
            if text in ("", ".", "..") or "\\" in text or text.startswith(("/", "~", ".")) or (
                "/" in text and (key == "weights" or Path(text).is_dir())
            ):  # fmt: skip
                raise UserError(f"{self.folder}: refused: {role}.{key}: {text[:100]!r} leads out of the folder")
            if (self.folder / text).exists():
                check_inside(self.folder, self.folder / text)

    def _refused(self, key: str, text: str, flag: str) -> str:
        """Return what is said of a name that is not followed. Raises UserError for one that a link leads out with."""
        role = key.partition(".")[0]
        where = f"{role} of the checkpoint: {self.file}"
        if self.home is not None and self._is_inside(text):
            check_inside(self.home, Path(text).absolute())
        if text == last_part(text) or self._is_inside(text):
            return f"{where}: {key}: {text[:100]!r} is not there; put it beside the model, or {flag} says where it is"
        return (
            f"{where}: refused: {key}: {text[:100]!r} leads out of the folder, and no file beside it takes its "
            "place; only models of your own runs, where this machine has trained them, may name files elsewhere. Put "
            f"the {role} beside it, or {flag} names it if you trust it"
        )


@dataclass(frozen=True)
class Wanted:
    """Weights that are looked for.

    Attributes:
        role: of the part.
        weights: what the model's config names.
        checksum: SHA-256 of the weights; None if nobody knows.
        length: of their file, bytes; None if nobody knows.
    """

    role: str
    weights: str
    checksum: str | None = None
    length: int | None = None

    @classmethod
    def of(cls, role: str, weights: str, extra: dict[str, str]) -> "Wanted":
        """Return what a checkpoint says of a part's weights."""
        size = extra.get(size_key(role), "")
        return cls(role, weights, extra.get(role), int(size) if size.isdecimal() else None)

    @property
    def names(self) -> list[str]:
        """What the file is likely to be called, the likeliest first."""
        return [last_part(self.weights), f"{self.role}.safetensors"]

    def may_be(self, path: Path) -> bool:
        """Return whether a file may be the one, without reading all of it: by its size, and what it says it holds."""
        if self.length not in (None, path.stat().st_size):
            return False
        try:
            told = file_metadata(path).get("role") if is_safetensors(path) else None
        except UserError:
            return False
        return told in (None, self.role)


def _steps_aside(text: str) -> bool:
    """Return whether a path has steps upward, a home folder, or another machine in it, on any system."""
    parts = text.replace("\\", "/").split("/")
    return ".." in parts or "\\" in text or "\0" in text or text.startswith(("~", "//"))


def checksum_of(path: Path) -> str | None:
    """Return the checksum of weights, known from before where the file has not changed; None where it has none."""
    try:
        stat = os.stat(path)
        return _checksum(path, stat.st_size, stat.st_mtime_ns) if path.is_file() else None
    except (OSError, UserError):
        return None


@functools.lru_cache(maxsize=64)
def _checksum(path: Path, size: int, modified: int) -> str:
    return weights_checksum(path)
