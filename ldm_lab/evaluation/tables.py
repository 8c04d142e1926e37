"""The table of an evaluation: as JSON, CSV and Markdown, and as a plot."""

import csv
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ldm_lab.evaluation.metrics import METRICS, Value
from ldm_lab.io.atomic import atomic_write

STEM = "evaluation"  # of the files' names
ENDINGS = (".json", ".csv", ".md", ".png")
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
    """

    model: str
    guidance: float | None = None
    sampler: str | None = None
    steps: int | None = None
    seeds: tuple[int, ...] = ()
    pictures: int = 0
    values: dict[str, Value] = field(default_factory=dict)

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
    """

    rows: list[Row]
    facts: dict[str, str]
    remarks: list[str] = field(default_factory=list)

    @property
    def columns(self) -> list[str]:
        """The names of values, in their order."""
        return list(dict.fromkeys(name for row in self.rows for name in row.values))

    def best(self, column: str) -> float | None:
        """Return the best value of a column, by which way is better; None if only one row has it."""
        values = [row.values[column].value for row in self.rows if column in row.values]
        return None if len(values) < 2 else max(values) if is_higher_better(column) else min(values)

    def to_json(self) -> str:
        """Return all of it."""
        rows = [asdict(row) for row in self.rows]
        better = {name: "higher" if is_higher_better(name) else "lower" for name in self.columns}
        content = {"facts": self.facts, "remarks": self.remarks, "better": better, "rows": rows}
        return json.dumps(content, indent=2) + "\n"

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
        told = [f"- {name}: {text}" for name, text in self.facts.items()]
        told += [f"- {name}: {METRICS[name].meaning}" for name in self.columns if name in METRICS]
        return "\n".join([table, "", *told, *(f"- {remark}" for remark in self.remarks)]) + "\n"

    def _shown(self, row: Row, column: str) -> str:
        value = row.values.get(column)
        if value is None:
            return ""
        return f"**{value}**" if value.value == self.best(column) else str(value)

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


def is_higher_better(column: str) -> bool:
    """Return whether larger values of a column are better: those of a metric, or of one of its parts."""
    return METRICS[column].higher_is_better if column in METRICS else "_to_" in column


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
    figure = Figure(figsize=(2 + 2.6 * len(columns), 1.2 + 0.3 * len(rows)), dpi=100)
    planes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for plane, column in zip(planes, columns, strict=True):
        for place, row in enumerate(rows):
            if (value := row.values.get(column)) is None:
                continue
            color = COLORS[models.index(row.model) % len(COLORS)]
            plane.errorbar(value.value, place, xerr=value.margin, fmt="o", ms=5, capsize=3, color=color)
        plane.set_title(f"{column} ({'higher' if is_higher_better(column) else 'lower'} is better)", fontsize=9)
        plane.set_yticks(range(len(rows)), [row.label() for row in rows], fontsize=8)
        plane.tick_params(axis="x", labelsize=8)
        plane.set_ylim(len(rows) - 0.5, -0.5)
        plane.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    canvas = FigureCanvasAgg(figure)
    with atomic_write(path) as file:
        canvas.print_png(file)
