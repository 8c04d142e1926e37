"""What lies in a run's folder: its log, its pictures, its config. All of it is read with distrust."""

import errno
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import yaml

from ldm_lab.io.json_files import Fields

METRICS, CONFIG, PAGE = "metrics.csv", "config.yaml", "index.html"
PICTURE = re.compile(r"step=(\d{1,15})\.png")
READ = 2**22  # bytes of a config


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run's."""
    return os.path.isfile(folder / METRICS)  # False where it cannot be looked at


def opened(path: Path) -> BinaryIO:
    """Return a file to be read. Raises OSError: it cannot be, or it is none, such as a pipe that nobody writes to."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    return open(path, "rb")


@dataclass(frozen=True)
class Pictures:
    """The grids of one kind, in the order of their steps.

    Attributes:
        name: of their folder.
        steps: optimizer steps.
        files: names in that folder.
    """

    name: str
    steps: list[int]
    files: list[str]


def find_pictures(folder: Path) -> list[Pictures]:
    """Return the grids in the folders of a run's folder, the demo's first."""
    found = []
    names = [entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    for name in sorted(names, key=lambda its: (its != "demo", its)):
        files = [its for entry in os.scandir(folder / name) if (its := PICTURE.fullmatch(entry.name))]
        files.sort(key=lambda its: int(its[1]))
        if files:
            found.append(Pictures(name, [int(its[1]) for its in files], [its[0] for its in files]))
    return found


class _Loader(yaml.SafeLoader):
    """Plain values alone; aliases, by which a few lines may stand for billions, are refused."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)


@dataclass(frozen=True)
class ConfigText:
    """A run's config.

    Attributes:
        text: as it was written; "" without one.
        flat: key path -> value, as a YAML has it; empty if it cannot be read.
        unread: why it could not be read, a line; none if it could.
        max_steps: of the run; None without end, or where it is not known.
    """

    text: str = ""
    flat: dict[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()

    @property
    def max_steps(self) -> int | None:
        said = self.flat.get("trainer.max_steps", "")
        return int(said) if said.isdecimal() else None


def read_config(folder: Path) -> ConfigText:
    """Return a run's config; nothing of it is built or imported, and a file that cannot be read is told."""
    try:
        with opened(folder / CONFIG) as file:
            text = file.read(READ).decode("utf-8", "replace")
    except FileNotFoundError:
        return ConfigText()
    except OSError as error:
        return ConfigText(unread=(f"{CONFIG} cannot be read: {error.strerror}",))
    try:
        loaded = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return ConfigText(text)
    return ConfigText(text, dict(Fields(loaded).flat()))
