"""The table of an evaluation: as JSON, CSV and Markdown, and as a plot."""

import csv
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ldm_lab.checkpoints.importer import Section
from ldm_lab.evaluation.metrics import MarginOf, Value
from ldm_lab.evaluation.origin import Origin
from ldm_lab.evaluation.own_files import STEM
from ldm_lab.io.atomic import atomic_write
from ldm_lab.metrics import METRICS, is_higher_better

MISSING = "–"  # a value that a row does not have, as its metric is not for it
STAR = "\\*"  # in Markdown
COLORS = ("#2563a8", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#0e7490")


@dataclass(frozen=True)
class Row:
    """What was measured of one model asked in one way, or of a folder of pictures.

    Attributes:
        model: its name.
        guidance, sampler, steps: how it was asked; None of pictures that were there, or where nothing was sampled.
        seeds: that pictures were made with.
        pictures: of each seed.
        values: column -> number.
        settings: all that pictures were made with but their seeds; empty where none were made.
    """

    model: str
    guidance: float | None = None
    sampler: str | None = None
    steps: int | None = None
    seeds: tuple[int, ...] = ()
    pictures: int = 0
    values: dict[str, Value] = field(default_factory=dict)
    settings: Section = field(default_factory=Section)

    def label(self) -> str:
        """Return what tells it from the others, in a few words."""
        asked = "" if self.guidance is None else f", guidance {self.guidance:g}, {self.sampler} {self.steps}"
        return self.model + asked


@dataclass(frozen=True)
class Table:
    """Rows, and what the numbers are of.

    Attributes:
        rows: one for each model and way of asking it.
        facts: what they were compared with and by, a text each.
        remarks: what has to be known to read them, a line each.
        origin: what the numbers are of, for programs.
    """

    rows: list[Row]
    facts: dict[str, str]
    remarks: list[str] = field(default_factory=list)
    origin: Origin = field(default_factory=Origin)

    @property
    def columns(self) -> list[str]:
        """The names of values, in their order."""
        return list(dict.fromkeys(name for row in self.rows for name in row.values))

    @property
    def values(self) -> list[Value]:
        """All values."""
        return [value for row in self.rows for value in row.values.values()]

    def of_column(self, column: str) -> list[Value]:
        """Return the values of a column, of the rows that have one."""
        return [row.values[column] for row in self.rows if column in row.values]

    @property
    def is_finite(self) -> bool:
        """Whether all values are numbers."""
        return all(value.is_finite for value in self.values)

    def best(self, column: str) -> float | None:
        """Return the best value of a column, by which way is better; None if not at least two rows have one."""
        values = [its.value for its in self.of_column(column) if its.is_finite]
        return None if len(values) < 2 else max(values) if is_higher_better(column) else min(values)

    @property
    def is_mixed(self) -> bool:
        """Whether some margins are of seeds, and others of draws: the latter are marked."""
        return {"seeds", "bootstrap"} <= {value.margin_of for value in self.values}

    def margins(self) -> str:
        """Return what the margins of this table are, and which columns have none; "" for a table without values."""
        counts: dict[MarginOf, set[int]] = {}
        for value in self.values:
            counts.setdefault(value.margin_of, set()).add(value.margin_count)
        words = {
            "seeds": "95 % interval of Student's t over {} seeds",
            "bootstrap": "1.96 standard deviations of {} bootstrap draws of the images",
        }
        told = [
            f"{'± ...' + STAR + ': ' if self.is_mixed and kind == 'bootstrap' else ''}"
            + words[kind].format(" or ".join(map(str, sorted(counts[kind]))))
            for kind in words
            if kind in counts
        ]
        without = [name for name in self.columns if not any(its.margin_of for its in self.of_column(name))]
        told += [f"no margin of {', '.join(without)}"] if without else []
        return "; ".join(told)

    def uneven(self) -> list[str]:
        """Return what has to be said of rows of different numbers of pictures, a line; none where there are none."""
        biased = {name for name, its in METRICS.items() if its.kind == "pictures" and not its.is_unbiased}
        names = [name for name in self.columns if name in biased]
        counts = sorted({row.pictures for row in self.rows if not biased.isdisjoint(row.values)})
        if len(counts) < 2:
            return []
        numbers = f"{counts[0]:,} to {counts[-1]:,} pictures"
        return [f"{', '.join(names)}: rows are of {numbers}, which tells on them; compare rows of equal numbers alone"]

    def told(self) -> dict[str, str]:
        """Return all facts in words."""
        weights = {"weights": self.origin.weights()} if self.origin.identity_sha256 else {}
        margins = self.margins()
        return {**self.facts, **weights, **({"margins": margins} if margins else {})}

    def to_json(self) -> str:
        """Return all of it; what is no number is a text, "nan" or "inf", as JSON has neither."""
        rows = [{**asdict(row), "values": {name: _plain(its) for name, its in row.values.items()}} for row in self.rows]
        content = {
            "facts": {**self.told(), "weights_sha256": self.origin.weights_sha256,
                      "identity_sha256": self.origin.identity_sha256},
            "data": self.origin.data,
            "prompts": self.origin.prompts,
            "remarks": [*self.remarks, *self.uneven()],
            "better": {name: "higher" if is_higher_better(name) else "lower" for name in self.columns},
            "rows": rows,
        }  # fmt: skip
        return json.dumps(content, indent=2, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """Return a line for each row, each value followed by its margin and what that is of."""
        file = io.StringIO(newline="")
        writer = csv.writer(file)
        named = [part for name in self.columns for part in (name, f"{name}_margin", f"{name}_margin_of")]
        writer.writerow(["model", "guidance", "sampler", "steps", "seeds", "pictures", *named])
        for row in self.rows:
            seeds = " ".join(map(str, row.seeds))
            cells = [cell for name in self.columns for cell in _cells(row.values.get(name))]
            writer.writerow([row.model, row.guidance, row.sampler, row.steps, seeds, row.pictures, *cells])
        return file.getvalue()

    def to_markdown(self) -> str:
        """Return a table to be read, the best of each column in bold, and what the numbers are of."""
        arrows = [f"{name} {'↑' if is_higher_better(name) else '↓'}" for name in self.columns]
        lines = [["model", "guidance", "sampler", "steps", "pictures", *arrows]]
        for row in self.rows:
            pictures = f"{row.pictures:,}" + (f" x {len(row.seeds)} seeds" if len(row.seeds) > 1 else "")
            asked = ["" if row.guidance is None else f"{row.guidance:g}", row.sampler or "", str(row.steps or "")]
            cells = [self._shown(row, name) for name in self.columns]
            lines.append([row.model.replace("|", "\\|"), *asked, pictures if row.pictures else "", *cells])
        lines.insert(1, ["---"] * len(lines[0]))
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        told = [f"- {name}: {text}" for name, text in self.told().items()]
        told += [f"- {name}: {METRICS[name].meaning}" for name in self.columns if name in METRICS]
        return "\n".join([table, "", *told, *(f"- {remark}" for remark in [*self.remarks, *self.uneven()])]) + "\n"

    def _shown(self, row: Row, column: str) -> str:
        value = row.values.get(column)
        if value is None:
            return MISSING
        star = STAR if self.is_mixed and value.margin_of == "bootstrap" else ""
        return f"**{value}**{star}" if value.value == self.best(column) else f"{value}{star}"

    def write(self, folder: Path) -> list[Path]:
        """Write all files; return their paths. Raises UserError if one cannot be written."""
        texts = {".json": self.to_json(), ".csv": self.to_csv(), ".md": self.to_markdown()}
        paths = []
        for ending, text in texts.items():
            paths.append(folder / f"{STEM}{ending}")
            with atomic_write(paths[-1]) as file:
                file.write(text.encode())
        paths.append(folder / f"{STEM}.png")
        plot(self, paths[-1])
        return paths


def _plain(value: Value) -> Section:
    """Return a value for JSON."""
    told = Section(asdict(value))
    return told if value.is_finite else Section({**told, "value": str(value.value)})


def _cells(value: Value | None) -> list[str]:
    if value is None:
        return ["", "", ""]
    return [repr(value.value), "" if value.margin is None else repr(value.margin), value.margin_of]


def plot(table: Table, path: Path) -> None:
    """Write a picture (PNG): each column's values with their margins, a line for each row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a second
    from matplotlib.figure import Figure

    columns, rows = table.columns, table.rows
    models = list(dict.fromkeys(row.model for row in rows))
    figure = Figure(figsize=(2 + 2.6 * len(columns), 1.5 + 0.3 * len(rows)), dpi=100)
    planes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for plane, column in zip(planes, columns, strict=True):
        for place, row in enumerate(rows):
            if (value := row.values.get(column)) is None:
                continue
            if not value.is_finite:
                plane.text(0.5, place, "not finite", transform=plane.get_yaxis_transform(), ha="center", va="center")
                continue
            color = COLORS[models.index(row.model) % len(COLORS)]
            sign = "s" if table.is_mixed and value.margin_of == "bootstrap" else "o"
            plane.errorbar(value.value, place, xerr=value.margin, fmt=sign, ms=5, capsize=3, color=color)
        plane.set_title(f"{column} ({'higher' if is_higher_better(column) else 'lower'} is better)", fontsize=9)
        plane.set_yticks(range(len(rows)), [row.label() for row in rows], fontsize=8)
        plane.tick_params(axis="x", labelsize=8)
        plane.set_ylim(len(rows) - 0.5, -0.5)
        plane.grid(axis="x", alpha=0.3)
    if margins := table.margins():
        figure.supxlabel(f"margins: {margins.replace(f'± ...{STAR}', 'squares')}", fontsize=8, wrap=True)
    figure.tight_layout()
    canvas = FigureCanvasAgg(figure)
    with atomic_write(path) as file:
        canvas.print_png(file)
