"""Which charts a log's columns make, and what `charts.js` draws of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ldm_lab.metrics import is_higher_better
from ldm_lab.pages.engine import Data
from ldm_lab.pages.thinned import Extreme, Points, Thinned

TITLES = {
    "train/loss": "Loss",
    "train/lr": "Learning rate",
    "train/grad_norm": "Gradient norm, before clipping",
    "held_out/loss": "Held-out loss",
    "speed/images_per_s": "Images per second",
    "speed/waiting": "Share of the time that went by waiting for data",
    "speed/mfu": "MFU: share of the cards' peak that is made use of",
}
BY_LEVEL = "_t"  # behind "loss": the beginning of a part of the times, 0 data, 1 noise
SECTIONS = {"train": "Training", "held_out": "Held-out images", "evaluate": "Evaluation", "speed": "Speed"}
OPTIMIZER = {"train/lr": "Optimizer", "train/grad_norm": "Optimizer"}
ORDER = ("Training", "Held-out images", "Evaluation", "Optimizer", "Speed")
MOST_COLUMNS = 200  # that a page shows


@dataclass(frozen=True)
class Plot:
    """Columns that are drawn over one another, (label, column) each."""

    title: str
    columns: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Group:
    """Plots under one heading."""

    title: str
    plots: tuple[Plot, ...]


def groups(names: Sequence[str]) -> list[Group]:
    """Return how columns are shown: those that belong together in one plot, all others in one each."""
    found: dict[str, list[Plot]] = {title: [] for title in ORDER}
    together: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        stem, _, level = name.rpartition(BY_LEVEL)
        prefix = name.partition("/")[0]
        section = OPTIMIZER.get(name) or SECTIONS.get(prefix, prefix)
        if stem.endswith("/loss") and level.replace(".", "", 1).isdecimal():
            shared, label = f"{TITLES.get(stem, stem)} by noise level, t from 0 (data) to 1 (noise)", f"t from {level}"
        elif prefix == "speed" and name.endswith("_s") and name not in TITLES:
            shared, label = "Seconds of an optimizer step", name.removeprefix("speed/").removesuffix("_s")
        else:
            found.setdefault(section, []).append(Plot(TITLES.get(name, name), ((label_of(name), name),)))
            continue
        if shared not in together:
            together[shared] = []
            found.setdefault(section, []).append(Plot(shared, ()))
        together[shared].append((label, name))
    filled = {
        title: [Plot(its.title, its.columns or tuple(together[its.title])) for its in plots]
        for title, plots in found.items()
    }
    return [Group(title, tuple(plots)) for title, plots in filled.items() if plots]


def label_of(name: str) -> str:
    """Return a column's name without its section's."""
    return name.partition("/")[2] or name


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: in its legend.
        curve: key of `Charts.curves`.
        color: number of its color.
        hidden_with: what it is hidden with: all lines of one run, or it alone.
    """

    label: str
    curve: str
    color: int
    hidden_with: str


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        title: above it.
        lines: drawn over one another.
        note: of a single line, in words: last, lowest and highest value.
        odd: what is no number, in words; "" for nothing.
    """

    title: str
    lines: list[Line]
    note: str = ""
    odd: str = ""


@dataclass(frozen=True)
class Section:
    """Charts under one heading; folded ones are shown when they are asked for."""

    title: str
    charts: list[Chart]
    folded: bool = False


@dataclass(frozen=True)
class Mark:
    """An event at a step; `kind` says how it is drawn."""

    step: int
    kind: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Charts(Data):
    """All charts of a page.

    Attributes:
        sections: from above.
        curves: what lines are drawn of, by key.
        marks: events.
        steps: the last step of all.
    """

    sections: list[Section]
    curves: dict[str, Points]
    marks: list[Mark]
    steps: int


def best_of(column: Thinned, name: str) -> Extreme | None:
    """Return a column's best value."""
    return column.highest if is_higher_better(name) else column.lowest


def odd_words(named: Iterable[tuple[str, Thinned]]) -> str:
    """Return how much of some columns is no number, in words; "" for nothing."""
    said = []
    for name, column in named:
        counts = column.odd_counts()
        words = [f"{count:,} {kind}" for kind, count in counts.items() if count]
        if words:
            said.append(f"{name}: {', '.join(words)}, first at step {column.first_odd:,}")
    return "; ".join(said)


def note_words(column: Thinned) -> str:
    """Return a column's last, lowest and highest value in words."""
    if column.last is None or column.lowest is None or column.highest is None:
        return "no finite value"
    return f"last {_at(column.last)} · lowest {_at(column.lowest)} · highest {_at(column.highest)}"


def _at(extreme: Extreme) -> str:
    return f"{extreme.value:.4g} at step {extreme.step:,}"
