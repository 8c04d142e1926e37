"""A comparison: the same prompts and seeds through several models, as a page for people and a file for programs."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import ClassVar

from ldm_lab.io.atomic import atomic_write
from ldm_lab.io.json_files import Fields, read_json
from ldm_lab.pages import Data, Page, write_page

FILE = "comparison.json"


@dataclass(frozen=True)
class Cell:
    """A picture.

    Attributes:
        image, thumbnail: files below the comparison's folder; the same one where the picture is small.
        width, height: of the picture, pixels.
        thumbnail_width, thumbnail_height: of the thumbnail.
        score: how like its prompt it is; None is not known.
    """

    image: str
    thumbnail: str
    width: int
    height: int
    thumbnail_width: int
    thumbnail_height: int
    score: float | None = None


@dataclass(frozen=True)
class Row:
    """A prompt and a seed, and a picture of each column; None where it is not made yet."""

    prompt: str
    seed: int
    cells: Sequence[Cell | None]


@dataclass(frozen=True)
class Heading:
    """A column: its name, and its settings in words."""

    label: str
    settings: Mapping[str, str]


@dataclass(frozen=True)
class Setting:
    """A setting that differs: its value in each column, "" where a column has none."""

    name: str
    values: Sequence[str]


@dataclass(frozen=True)
class Score:
    """How like its prompt the picture in a file is."""

    image: str
    score: float


@dataclass(frozen=True)
class Scored:
    """What a scorer, in words, has found."""

    scorer: str
    scores: Sequence[Score]


@dataclass(frozen=True)
class Comparison:
    """All of it.

    Attributes:
        title: of the page.
        columns: the models.
        rows: prompts and seeds.
        scorer: what the scores are, in words; "" without any.
        blind_seed: that columns are shuffled by at first, row by row, where their names are hidden.
        known: all scores that were ever found, those that are not shown as well.
    """

    title: str
    columns: Sequence[Heading]
    rows: Sequence[Row]
    scorer: str = ""
    blind_seed: int = 0
    known: Sequence[Scored] = ()

    @property
    def id(self) -> str:
        """Names what is compared, whatever the scores: votes belong to it, as soon as all pictures are made."""
        asked = [[(one.label, sorted(one.settings.items())) for one in self.columns]]
        text = json.dumps([*asked, [(row.prompt, row.seed) for row in self.rows]])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def made(self) -> int:
        """How many pictures there are."""
        return sum(cell is not None for row in self.rows for cell in row.cells)

    @property
    def is_whole(self) -> bool:
        """Whether all pictures are made; before, not all settings are known, and there is nothing to vote on."""
        return self.made == len(self.rows) * len(self.columns)

    def mean_score(self, column: int) -> float | None:
        """Return the mean score of a column's pictures; None without any."""
        scores = [cell.score for row in self.rows if (cell := row.cells[column]) and cell.score is not None]
        return fmean(scores) if scores else None

    @property
    def ratio(self) -> float:
        """Height of the picture that is tallest for its width, by its width."""
        shown = [cell for row in self.rows for cell in row.cells if cell is not None]
        return max((cell.thumbnail_height / cell.thumbnail_width for cell in shown), default=0.5)

    def common_settings(self) -> dict[str, str]:
        """Return the settings that all columns have in common."""
        first = self.columns[0].settings
        return {
            name: value for name, value in first.items() if all(c.settings.get(name) == value for c in self.columns)
        }

    def differing_settings(self) -> list[Setting]:
        """Return the settings that not all columns have in common."""
        common = self.common_settings()
        names = dict.fromkeys(name for column in self.columns for name in column.settings if name not in common)
        return [Setting(name, [column.settings.get(name, "") for column in self.columns]) for name in names]


@dataclass(frozen=True, kw_only=True)
class CompareData(Data):
    """What the page's scripts read."""

    id: str
    title: str
    seed: int
    columns: Sequence[str]
    seeds: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class ComparePage(Page):
    """The page of a comparison: prompts down, models across."""

    template: ClassVar[str] = "compare.html"
    styles: ClassVar[Sequence[str]] = ("lightbox.css", "compare.css")
    scripts: ClassVar[Sequence[str]] = ("lightbox.js", "filter.js", "compare.js")
    it: Comparison
    is_wide: bool = field(default=False)  # more columns than fit beside each other


WIDE = 8  # columns


def write_comparison(folder: Path, it: Comparison) -> None:
    """Write `index.html` and `comparison.json`. Raises UserError where they cannot be written."""
    with atomic_write(folder / FILE) as file:
        file.write(json.dumps({"id": it.id, **asdict(it)}, indent=1).encode())
    its_data = CompareData(
        id=it.id,
        title=it.title,
        seed=it.blind_seed,
        columns=[column.label for column in it.columns],
        seeds=[row.seed for row in it.rows],
    )
    page = ComparePage(title=it.title, it=it, is_wide=len(it.columns) > WIDE, data={"comparison": its_data})
    write_page(folder / "index.html", page)


def earlier_scores(folder: Path) -> tuple[str, dict[str, dict[str, float]]]:
    """Return in words which scores an earlier `comparison.json` shows, and all that it has: by scorer, by image."""
    earlier = Fields(read_json(folder / FILE))
    found: dict[str, dict[str, float]] = {}
    for one in earlier.listed("known") or []:
        pairs = [(score.text("image"), score.number("score")) for score in one.listed("scores") or []]
        its = {image: score for image, score in pairs if image and score is not None and math.isfinite(score)}
        if scorer := one.text("scorer"):
            found[scorer] = its
    return earlier.text("scorer") or "", found
