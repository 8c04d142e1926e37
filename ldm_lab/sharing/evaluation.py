"""The results of `python -m ldm_lab evaluate` for a model card: its JSON, read again."""

import getpass
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ldm_lab.errors import UserError
from ldm_lab.evaluation.metrics import Value
from ldm_lab.io.atomic import existing_file
from ldm_lab.io.json_files import Fields, parse_json
from ldm_lab.metrics import METRICS
from ldm_lab.pretrained.catalogue import catalogue
from ldm_lab.pretrained.resolve import HUB
from ldm_lab.sampling.names import public_name

LARGEST = 16 << 20  # bytes
ANYBODY = ("root", "user", "home", "localhost", "ubuntu")  # names that tell nothing


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a model.

    Attributes:
        rows: (what, how much), for people.
        notes: what the numbers are of, a line each.
    """

    rows: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """An `evaluation.json`, read.

    Attributes:
        path: of the file.
        content: of it.
        rows: what was measured, of each model and way of asking it.
    """

    path: Path
    content: Fields
    rows: list[Fields]

    @classmethod
    def read(cls, path: Path) -> "Measured":
        """Return it; `path` is of the file, or of the folder with it.

        Raises:
            UserError: no such file, or another program's.
        """
        path = existing_file(path / "evaluation.json" if path.is_dir() else path, "--evaluation")
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path}: not an evaluation: it is larger than {LARGEST:,} bytes")
        content = Fields(parse_json(path.read_bytes()))
        rows = content.listed("rows")
        if not rows or any(row.text("model") is None or row.named("values") is None for row in rows):
            raise UserError(f"{path}: not an evaluation: evaluation.json of `python -m ldm_lab evaluate` is needed")
        return cls(path, content, rows)

    def of(self, checksum: str, identity: Callable[[], str]) -> Evaluation:
        """Return what is said of a model, known by its weights, whatever it is called there.

        Args:
            checksum: SHA-256 of its file.
            identity: gives that of all weights that it is sampled with (`Models.identity`).

        Raises:
            UserError: it is about other models, or does not say which weights it is about.
        """
        models = list(dict.fromkeys(str(row.text("model")) for row in self.rows))
        facts = self.content.inside("facts") or Fields({})
        files, whole = dict(facts.words("weights_sha256")), dict(facts.words("identity_sha256"))
        if not any(name in files and name in whole for name in models):
            raise UserError(f"{self.path}: does not say which weights it is about; evaluate the model again")
        named = [name for name in models if files.get(name) == checksum]
        if not named:
            raise UserError(f"{self.path}: is about other weights ({', '.join(models)}), and not about this model's")
        wanted = identity()
        named = [name for name in named if whole.get(name) == wanted]
        if not named:
            raise UserError(f"{self.path}: is about this model with another autoencoder, conditioner or LoRA")
        rows = [row for row in self.rows if row.text("model") in named]
        told = dict(self.content.words("facts"))
        return Evaluation(_shown(rows), (*self._facts(told), *_meanings(rows), *self._remarks()))

    def _facts(self, facts: dict[str, str]) -> list[str]:
        """Return the facts that name nothing of this machine."""
        shown = {key: " ".join(_public(word) for word in text.split()) for key, text in facts.items()}
        lines = [f"{key}: {text}" for key, text in shown.items() if key != "weights"]  # of others, too
        kept = [line for line in lines if not _is_private(line)]
        self._say(len(lines) - len(kept), "facts stay")
        return kept

    def _remarks(self) -> list[str]:
        remarks = self.content.sequence("remarks")
        kept = [line for line in remarks if not re.search(r"[/\\~]", line) and not _is_private(line)]
        self._say(len(remarks) - len(kept), "remarks stay")
        return kept

    def _say(self, count: int, what: str) -> None:
        if count:
            print(f"{self.path}: {count} {what} out of the card, as they name files or this machine", file=sys.stderr)


def _shown(rows: list[Fields]) -> tuple[tuple[str, str], ...]:
    """Return the numbers of rows, for people."""
    return tuple(
        (f"{name}{_asked(row)}", str(Value(number, value.number("margin"))))
        for row in rows
        for name, value in (row.named("values") or {}).items()
        if (number := value.number("value")) is not None
    )


def _meanings(rows: list[Fields]) -> list[str]:
    """Return what the metrics of rows mean."""
    names = dict.fromkeys(name for row in rows for name in row.named("values") or {})
    return [f"{name}: {METRICS[name].meaning}" for name in names if name in METRICS]


def _asked(row: Fields) -> str:
    """Return how a model was asked, in a few words."""
    guidance, sampler, steps = row.number("guidance"), row.text("sampler"), row.count("steps")
    if guidance is None or sampler is None or steps is None:
        return ""
    return f" (guidance {guidance:g}, {sampler} {steps}, {row.count('pictures') or 0:,} pictures)"


def _public(word: str) -> str:
    """Return a word without the folders of a path, wherever it begins in it."""
    word = word.removeprefix("file:")
    if word in catalogue() or word.startswith((HUB, "https://")) or re.fullmatch(r"\w+/s\W?", word):
        return word
    found = re.fullmatch(r"(.*?[=(\[\"'])?([^=(\[\"']*[/\\~].*)", word)
    return word if found is None else (found[1] or "") + public_name(found[2])


def _is_private(line: str) -> bool:
    """Return whether a line still has a path in it, or a name of this machine or its user."""
    if re.search(r"[\\~]|(?:^|[\s=(\"'])/", line):
        return True
    names = {_user(), Path.home().name, platform.node().split(".")[0]} - {"", *ANYBODY}
    words = set(re.findall(r"[\w.-]+", line.lower()))
    return any(name.lower() in words for name in names)


def _user() -> str:
    """Return the user's name, "" if nobody knows it."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""
