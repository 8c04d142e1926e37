"""The page of a run: curves, pictures over time, events, config; made of what lies in the run's folder alone."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote

from ldm_lab.pages.charts import (
    MOST_COLUMNS,
    Chart,
    Charts,
    Line,
    Mark,
    Section,
    groups,
    note_words,
    odd_words,
)
from ldm_lab.pages.engine import Data, Page, write_page
from ldm_lab.pages.run_events import Event, EventReader, Events, now
from ldm_lab.pages.run_folder import CONFIG, METRICS, PAGE, ConfigText, find_pictures, read_config
from ldm_lab.pages.run_log import RunLog
from ldm_lab.pages.thinned import Thinned

MOST_MARKS = 400  # events that are drawn into charts
RUNNING = ("started", "resumed")  # last events of a run that goes on, or was killed
GUARD = ("left out", "rolled back", "stopped", "guard")


@dataclass(frozen=True)
class Series:
    """Grids of one kind over time: addresses relative to the page."""

    name: str
    steps: list[int]
    addresses: list[str]


@dataclass(frozen=True, kw_only=True)
class AllPictures(Data):
    """The grids of a page."""

    series: list[Series]


@dataclass(frozen=True)
class Fact:
    """A number of the run with what it is."""

    name: str
    value: str


@dataclass(frozen=True, kw_only=True)
class RunPage(Page):
    """The page of one run.

    Attributes:
        facts: in short what it has come to.
        notes: what is not shown, or was not readable.
        series: grids over time.
        events: the newest last.
        counts: how many events there were, in words.
        config: as it was written; "" without one.
    """

    template: ClassVar[str] = "run.html"
    styles: ClassVar[Sequence[str]] = ("lightbox.css", "charts.css", "run.css")
    scripts: ClassVar[Sequence[str]] = ("lightbox.js", "charts.js", "run.js")
    facts: Sequence[Fact]
    notes: Sequence[str]
    series: Sequence[Series]
    events: Sequence[Event]
    counts: str
    config: str


@dataclass
class RunReader:
    """A run's folder that is read on and on.

    Attributes:
        folder: the run's.
        log: its numbers.
        config, events: as they were when they were read last.
    """

    folder: Path
    log: RunLog = field(init=False)
    config: ConfigText = field(init=False, default_factory=ConfigText)
    events: Events = field(init=False, default_factory=Events)

    def __post_init__(self) -> None:
        self.log = RunLog(self.folder / METRICS)
        self._event_reader = EventReader(self.folder)

    @property
    def name(self) -> str:
        """The run's: its folder's."""
        return self.folder.resolve().name

    @property
    def state(self) -> str:
        """What the newest event says of the run; "" where there is none."""
        newest = self.events.newest
        if newest is None:
            return ""
        if newest.kind in RUNNING:
            return f"{newest.kind} {newest.time}, and has not said that it ended"
        return f"{newest.kind} {newest.time}: {newest.text}"

    def read(self, most: int | None = None) -> bool:
        """Read what has come since. As `RunLog.read`; config and events are taken when all files are at their end."""
        if not self.log.read(most) or not self._event_reader.read(most):
            return False
        self.config, self.events = read_config(self.folder), self._event_reader.events()
        return True

    def write_page(self) -> Path:
        """Write the page into the run's folder; return its path. Raises UserError, OSError: it cannot be written."""
        path = self.folder / PAGE
        write_page(path, self.page())
        return path

    def page(self) -> RunPage:
        """Return the page as of what was read."""
        columns = self.log.columns
        series = [
            Series(its.name, its.steps, [quote(os.fsencode(f"{its.name}/{file}")) for file in its.files])
            for its in find_pictures(self.folder)
        ]
        shown = dict(list(columns.items())[:MOST_COLUMNS])
        counts = [f"{count:,} {kind}" for kind, count in self.events.counts.items()]
        return RunPage(
            title=self.name,
            facts=self.facts(),
            notes=[*self.notes(), *self._hidden(columns)],
            series=series,
            events=self.events.shown,
            counts=", ".join(counts),
            config=self.config.text,
            data={
                "charts": Charts(
                    sections=sections(shown),
                    curves={name: its.points() for name, its in shown.items()},
                    marks=marks(self.events.shown),
                    steps=max(self.log.last_step, 1),
                ),
                "pictures": AllPictures(series=series),
            },
        )

    def facts(self) -> list[Fact]:
        """Return the numbers that are looked at first."""
        columns, most = self.log.columns, self.config.max_steps
        of = f" of {most:,}" if most is not None else ""
        found = [Fact("steps", f"{self.log.last_step:,}{of}")]
        for name, title in (("train/loss", "loss"), ("held_out/loss", "held-out loss"), ("train/lr", "learning rate"),
                            ("speed/images_per_s", "images/s")):  # fmt: skip
            last = columns[name].last if name in columns else None
            if last is not None:
                found.append(Fact(title, f"{last.value:.4g}"))
        if self.state:
            found.append(Fact("state", self.state))
        return [*found, Fact("page written", now())]

    def notes(self) -> list[str]:
        """Return what of the files was not readable."""
        said = []
        if not self.log.rows:
            said.append(f"{METRICS} has no rows yet")
        if self.log.torn:
            said.append(f"{METRICS}: {_many(self.log.torn, 'torn row')}, of a run that broke off, left out")
        if self.events.torn:
            said.append(f"{_many(self.events.torn, 'event')} could not be read, and left out")
        said += [*self.events.unread, *self.config.unread]
        if not self.config.text:
            said += [] if self.config.unread else [f"there is no {CONFIG}"]
        elif not self.config.flat:
            said.append(f"{CONFIG} is no readable YAML, it is shown as it is")
        return said

    @staticmethod
    def _hidden(columns: Mapping[str, Thinned]) -> list[str]:
        left = list(columns)[MOST_COLUMNS:]
        return [f"{len(left):,} more columns of {METRICS} are not drawn: {', '.join(left[:5])}, ..."] if left else []


def sections(columns: Mapping[str, Thinned]) -> list[Section]:
    """Return the charts of one run's columns."""
    found = []
    for group in groups(list(columns)):
        charts = []
        for plot in group.plots:
            lines = [Line(label, name, number, name) for number, (label, name) in enumerate(plot.columns)]
            own = [(label, columns[name]) for label, name in plot.columns]
            note = note_words(own[0][1]) if len(own) == 1 else ""
            charts.append(Chart(plot.title, lines, note, odd_words(own)))
        found.append(Section(group.title, charts))
    return found


def marks(events: Sequence[Event]) -> list[Mark]:
    """Return the events that have a place in charts: where a run went on, and the guard's; the newest of many."""
    found = [
        Mark(event.step, "guard" if event.kind in GUARD else "run", f"{event.kind}: {event.text}"[:200])
        for event in events
        if event.step and (event.kind in GUARD or event.kind == "resumed")
    ]
    return found[-MOST_MARKS:]


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count > 1)}"
