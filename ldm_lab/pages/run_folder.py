"""What lies in a run's folder: its log, its events, its pictures, its config. All of it is read with distrust."""

import errno
import json
import os
import re
import stat
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import yaml

from ldm_lab.io.json_files import Fields, JsonObject, parse_json

METRICS, GUARD, EVENTS, CONFIG, PAGE = "metrics.csv", "guard.jsonl", "events.jsonl", "config.yaml", "index.html"
PICTURE = re.compile(r"step=(\d{1,15})\.png")
SHOWN = 200  # events of a kind that a page has
READ = 2**22  # bytes of the end of a file of events, and of a config
# What the guard calls what it has seen, in words.
SEEN = {
    "loss": "loss not finite",
    "gradient": "gradient not finite",
    "spike": "loss leaps",
    "scale": "gradient overflows in fp16 at any scale",
    "weights": "weights not finite",
}


@dataclass(frozen=True)
class Event:
    """Something that happened in a run.

    Attributes:
        step: optimizer steps done, counted from 1; None where nobody knows.
        kind: "started", "resumed", "ended", ...; of the guard "left out", "rolled back", "stopped".
        text: what happened, in words.
        time: when, as a clock on the wall says it; "" where nobody knows.
        details: further lines, such as what has changed on resume.
    """

    step: int | None
    kind: str
    text: str
    time: str = ""
    details: tuple[str, ...] = ()

    def line(self) -> bytes:
        """Return it as a line of the file of events."""
        own = JsonObject(time=self.time, step=self.step, event=self.kind, text=self.text, details=[*self.details])
        return json.dumps(own).encode() + b"\n"


@dataclass(frozen=True)
class Events:
    """The newest events of a run, in the order of their steps, and how many there were of each kind.

    Attributes:
        shown: at most `SHOWN` of the run's own and of the guard's.
        counts: kind -> how many, those that are not shown included.
        torn: lines that could not be read.
        unread: files that could not be read, and why.
    """

    shown: list[Event] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    torn: int = 0
    unread: list[str] = field(default_factory=list)


def now() -> str:
    """Return the time, to the second, with its zone."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run's."""
    return (folder / METRICS).is_file()


def read_events(folder: Path) -> Events:
    """Return what has happened in a run, as its files tell; a file that cannot be read is told."""
    found = Events()
    torn = 0
    for name, event_of in ((EVENTS, _own), (GUARD, _of_guard)):
        events: list[Event] = []
        try:
            lines = _last_lines(folder / name)
        except OSError as error:
            found.unread.append(f"{name} cannot be read: {error.strerror}")
            continue
        for line in lines:
            event = event_of(Fields(parse_json(line)))
            if event is None:
                torn += 1
            else:
                events.append(event)
        found.counts.update(event.kind for event in events)
        found.shown.extend(events[-SHOWN:])
    found.shown.sort(key=lambda event: -1 if event.step is None else event.step)
    return Events(found.shown, found.counts, torn, found.unread)


def _opened(path: Path) -> BinaryIO:
    """Return a file to be read. Raises OSError: it cannot be, or it is none, such as a pipe that nobody writes to."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    return open(path, "rb")


def _last_lines(path: Path) -> list[bytes]:
    """Return the lines of a file, of a long one those at its end. Raises OSError for one that cannot be read."""
    try:
        with _opened(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - READ, 0))
            if size > READ:
                file.readline()
            return [line for line in file.read(READ).splitlines() if line.strip()]
    except FileNotFoundError:
        return []


def _own(line: Fields) -> Event | None:
    kind, text = line.text("event"), line.text("text")
    if kind is None or text is None:
        return None
    details = line.sequence("details")
    return Event(line.count("step"), kind[:40], text[:1000], (line.text("time") or "")[:40], tuple(details[:SHOWN]))


def _of_guard(line: Fields) -> Event | None:
    seen, done, step = line.text("kind"), line.text("done"), line.count("step")
    if seen is None or done is None or step is None:
        return None
    kind = "rolled back" if done.startswith("back to") else done if done in ("left out", "stopped") else "guard"
    what = SEEN.get(seen, seen[:100])
    numbers = [f"{name} {value:.4g}" for name in ("loss", "limit", "norm") if (value := line.number(name)) is not None]
    text = f"{what} ({', '.join(numbers)}): {done[:300]}" if numbers else f"{what}: {done[:300]}"
    keys = line.sequence("keys")
    return Event(step, kind, text, details=(f"samples: {', '.join(keys[:20])}",) if keys else ())


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
        with _opened(folder / CONFIG) as file:
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
