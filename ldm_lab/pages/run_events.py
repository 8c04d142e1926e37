"""What has happened in a run: its own events and those of the guard, read on as their files grow."""

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from ldm_lab.io.atomic import atomic_write
from ldm_lab.io.json_files import Fields, JsonObject, parse_json
from ldm_lab.pages.run_folder import opened

EVENTS, GUARD = "events.jsonl", "guard.jsonl"
SHOWN = 200  # events of a file that a page has
BLOCK = 2**22  # bytes that are read at once; no event takes as many
TAIL = 256  # bytes before the place that has been read to, which tell whether the file is still the same
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
        counts: kind -> how many in the whole files, those that are not shown included.
        torn: lines that could not be read.
        unread: files that could not be read, and why.
        newest: what the run itself has written last; None if it has written nothing.
    """

    shown: list[Event] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    torn: int = 0
    unread: list[str] = field(default_factory=list)
    newest: Event | None = None


def now() -> str:
    """Return the time, to the second, with its zone."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


class EventFile:
    """A file of events, a line each, of which the newest are kept and all are counted.

    Attributes:
        newest: at most `SHOWN`.
        counts: kind -> how many.
        torn: lines that are no events.
        unread: why the file cannot be read; "" if it can.
    """

    def __init__(self, path: Path, event_of: Callable[[Fields], Event | None]) -> None:
        """Begin; nothing is read yet.

        Args:
            path: of the file; it may not be there yet.
            event_of: from what a line has to the event, None where it is none.
        """
        self.path, self.event_of = path, event_of
        self.unread = ""
        self._begin()

    def _begin(self) -> None:
        self.newest: deque[Event] = deque(maxlen=SHOWN)
        self.counts: Counter[str] = Counter()
        self.torn = self._offset = 0
        self._tail = b""
        self._rest = b""  # a last line without an end, which may still grow
        self._is_inside = False  # of a line that is longer than any event

    def read(self, most: int | None = None) -> bool:
        """Read what has come since the last time, about `most` bytes at most; return whether all was read.

        A file that has been written anew is read from its beginning.
        """
        try:
            file = opened(self.path)
        except FileNotFoundError:
            self._begin()
            self.unread = ""
            return True
        except OSError as error:
            self.unread = f"{self.path.name} cannot be read: {error.strerror}"
            return True
        self.unread = ""
        with file:
            file.seek(self._offset - len(self._tail))
            if file.read(len(self._tail)) != self._tail:
                self._begin()
            end = None if most is None else self._offset + most
            while end is None or self._offset < end:
                file.seek(self._offset)
                block = file.read(BLOCK)
                whole = block.rfind(b"\n") + 1
                self._rest = block[whole:]
                if len(block) == BLOCK and not whole:
                    self.torn += not self._is_inside
                    self._is_inside, self._rest, whole = True, b"", BLOCK
                elif whole:
                    lines = block[:whole].split(b"\n")
                    self._take(lines[1:] if self._is_inside else lines)
                    self._is_inside = False
                self._offset += whole
                self._tail = (self._tail + block[:whole])[-TAIL:]
                if len(block) < BLOCK:
                    return True
        return False

    def _take(self, lines: Iterable[bytes]) -> None:
        """Take whole lines."""
        for line in lines:
            if not line.strip():
                continue
            event = self.event_of(Fields(parse_json(line)))
            if event is None:
                self.torn += 1
            else:
                self.newest.append(event)
                self.counts[event.kind] += 1

    def found(self) -> tuple[list[Event], Counter[str], int]:
        """Return the newest events, counts and torn lines; a last line without an end counts as it is now."""
        ended = EventFile(self.path, self.event_of)
        ended.newest.extend(self.newest)
        ended.counts, ended.torn = self.counts.copy(), self.torn
        ended._take([] if self._is_inside else [self._rest])
        return [*ended.newest], ended.counts, ended.torn


class EventReader:
    """The events of a run's folder, read on and on."""

    def __init__(self, folder: Path) -> None:
        self.files = [EventFile(folder / EVENTS, _own), EventFile(folder / GUARD, _of_guard)]

    def read(self, most: int | None = None) -> bool:
        """Read what has come since, about `most` bytes at once at most; return whether all was read."""
        return all(file.read(most) for file in self.files)

    def events(self) -> Events:
        """Return what was read; a file that cannot be read is told."""
        found = Events(unread=[file.unread for file in self.files if file.unread])
        torn, in_files = 0, [file.found() for file in self.files]
        own = in_files[0][0]
        for newest, counts, its_torn in in_files:
            found.shown.extend(newest)
            found.counts.update(counts)
            torn += its_torn
        found.shown.sort(key=lambda event: -1 if event.step is None else event.step)
        return Events(found.shown, found.counts, torn, found.unread, own[-1] if own else None)


def drop_events(folder: Path, after: int | None) -> None:
    """Remove the events of what a run trains anew, as its log loses their rows: they would count twice.

    The run's own events stay where it goes on: that it broke off, say, has still happened.

    Args:
        folder: the run's.
        after: the optimizer step that it goes on from; None if it begins anew, and no event is its own.

    Raises:
        UserError, OSError: a file that cannot be read, or not be written.
    """
    if after is None:
        for name in (EVENTS, GUARD):
            (folder / name).unlink(missing_ok=True)
        return
    try:
        with opened(folder / GUARD) as file:
            lines = file.readlines()
    except FileNotFoundError:
        return
    kept = [line for line in lines if (Fields(parse_json(line)).count("step") or 0) <= after]
    if len(kept) < len(lines):
        with atomic_write(folder / GUARD) as file:
            file.writelines(kept)


def read_events(folder: Path) -> Events:
    """Return what has happened in a run, as its files tell."""
    reader = EventReader(folder)
    reader.read()
    return reader.events()


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
