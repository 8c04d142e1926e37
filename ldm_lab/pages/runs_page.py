"""A page of several runs: their curves over one another, a table of what they came to, how their configs differ."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote

from ldm_lab.pages.charts import Chart, Charts, Line, Section, best_of, groups, odd_words
from ldm_lab.pages.engine import Page
from ldm_lab.pages.run_folder import PAGE
from ldm_lab.pages.run_log import MOST
from ldm_lab.pages.run_page import RunReader
from ldm_lab.pages.thinned import Extreme, Points, Thinned

BUCKETS = 60_000  # of all lines of a page
FEWEST = 40  # of a line
MOST_KEYS = 200  # keys of the table of differences
UNTOLD = ("run",)  # keys by which runs differ always
MISSING = "–"
MEASURED = ("held_out/loss", "evaluate/")  # what the columns of the table begin with, beside the loss


@dataclass(frozen=True)
class NamedRun:
    """A run with the name that it has on the page."""

    name: str
    reader: RunReader


@dataclass(frozen=True)
class Cell:
    """A cell of the table: a text, and the number that it is sorted by."""

    text: str
    number: float | None = None


@dataclass(frozen=True)
class Row:
    """A run: its name and address, the number of its color, its cells."""

    name: str
    address: str
    color: int
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Difference:
    """A key of the configs, and its value in each run."""

    key: str
    values: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class RunsPage(Page):
    """The page of several runs.

    Attributes:
        heads: of the columns behind the name.
        rows: a run each.
        differences: keys that are not the same in all configs.
        notes: what is not shown, or was not readable.
    """

    template: ClassVar[str] = "runs.html"
    styles: ClassVar[Sequence[str]] = ("charts.css", "run.css", "runs.css")
    scripts: ClassVar[Sequence[str]] = ("charts.js", "runs.js")
    heads: Sequence[str]
    rows: Sequence[Row]
    differences: Sequence[Difference]
    notes: Sequence[str]


def runs_page(runs: Sequence[NamedRun], folder: Path, title: str) -> RunsPage:
    """Return the page of runs that have been read.

    Args:
        runs: two or more, or one.
        folder: that the page will lie in; links to the runs' own pages are relative to it.
        title: of the page.
    """
    columns = {run.name: run.reader.log.columns for run in runs}
    names = list(dict.fromkeys(name for own in columns.values() for name in own))
    measured = [name for name in names if name.startswith(MEASURED) and "_t" not in name.partition("/")[2]]
    lines = sum(len(own) for own in columns.values())
    most = max(FEWEST, min(MOST, BUCKETS // max(lines, 1)))
    rows = [
        Row(run.name, _address(run.reader.folder, folder), number, cells(run, measured))
        for number, run in enumerate(runs)
    ]
    differences = config_differences(runs)
    notes = [f"{run.name}: {note}" for run in runs for note in run.reader.notes()]
    if len(differences) > MOST_KEYS:
        notes.append(f"{len(differences) - MOST_KEYS:,} more keys differ than the {MOST_KEYS} that are shown")
    return RunsPage(
        title=title,
        heads=["steps", "loss", *(f"{name}, best" for name in measured), "state"],
        rows=rows,
        differences=differences[:MOST_KEYS],
        notes=notes,
        data={
            "charts": Charts(
                sections=sections(columns, names),
                curves=curves(columns, most),
                marks=[],
                steps=max([1, *(run.reader.log.last_step for run in runs)]),
            )
        },
    )


def _address(run: Path, folder: Path) -> str:
    """Return the address of a run's page on a page in some folder."""
    page = run.resolve() / PAGE
    try:
        return quote(os.fsencode(os.path.relpath(page, folder.resolve()).replace(os.sep, "/")))
    except ValueError:  # of another drive
        return page.as_uri()


def cells(run: NamedRun, measured: Sequence[str]) -> list[Cell]:
    """Return a run's cells: steps, last loss, the best value of what was measured, its state."""
    log, columns, most = run.reader.log, run.reader.log.columns, run.reader.config.max_steps
    of = f" of {most:,}" if most is not None else ""
    loss = columns["train/loss"].last if "train/loss" in columns else None
    found = [Cell(f"{log.last_step:,}{of}", log.last_step), _cell(loss, with_step=False)]
    found += [_cell(best_of(columns[name], name) if name in columns else None) for name in measured]
    return [*found, Cell(run.reader.state or MISSING)]


def _cell(extreme: Extreme | None, with_step: bool = True) -> Cell:
    if extreme is None:
        return Cell(MISSING)
    at = f" at {extreme.step:,}" if with_step else ""
    return Cell(f"{extreme.value:.5g}{at}", extreme.value)


def config_differences(runs: Sequence[NamedRun]) -> list[Difference]:
    """Return the keys that are not the same in the configs of all runs, those in order of the first config."""
    flats = [run.reader.config.flat for run in runs]
    keys = dict.fromkeys(key for flat in flats for key in flat if key not in UNTOLD)
    found = [Difference(key, [flat.get(key, MISSING) for flat in flats]) for key in keys]
    return [its for its in found if len(set(its.values)) > 1]


def sections(columns: Mapping[str, Mapping[str, Thinned]], names: Sequence[str]) -> list[Section]:
    """Return the charts: one for each column, with a line for each run; what belongs together in one run is folded."""
    found: list[Section] = []
    for group in groups(names):
        single = [plot for plot in group.plots if len(plot.columns) == 1]
        if single:
            charts = [_chart(columns, plot.title, plot.columns[0][1]) for plot in single]
            found.append(Section(group.title, charts))
        for plot in group.plots:
            if len(plot.columns) > 1:
                charts = [_chart(columns, label, name) for label, name in plot.columns]
                found.append(Section(f"{group.title}: {plot.title}", charts, folded=True))
    return found


def _chart(columns: Mapping[str, Mapping[str, Thinned]], title: str, name: str) -> Chart:
    lines = [
        Line(run, f"{number} {name}", number, run) for number, (run, own) in enumerate(columns.items()) if name in own
    ]
    return Chart(title, lines, "", odd_words((run, own[name]) for run, own in columns.items() if name in own))


def curves(columns: Mapping[str, Mapping[str, Thinned]], most: int) -> dict[str, Points]:
    """Return all lines' points, in at most so many buckets each."""
    return {
        f"{number} {name}": column.coarsened(most).points()
        for number, own in enumerate(columns.values())
        for name, column in own.items()
    }
