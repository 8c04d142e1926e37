"""How many rows have which score, per bucket and collection, and which ones to show of each bucket."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ibis

from ldm_lab.curation.metadata.inputs import Files
from ldm_lab.curation.metadata.tables import TableRow
from ldm_lab.errors import UserError

CANDIDATES = 20  # rows looked at for one that is shown, as far as there are so many


class Buckets(NamedTuple):
    """Half-open buckets [low, low + width), ... up to `high`."""

    low: float = 0.0
    high: float = 10.0
    width: float = 1.0

    @property
    def edges(self) -> list[float]:
        """The lower ends of the buckets, and the upper end of the last."""
        count = round((self.high - self.low) / self.width)
        return [round(self.low + i * self.width, 9) for i in range(count + 1)]

    @property
    def names(self) -> list[str]:
        """Such as "0-1", in the order of the buckets."""
        return [f"{low:g}-{high:g}" for low, high in zip(self.edges, self.edges[1:])]

    def check(self) -> None:
        """Raise UserError for what makes no sense."""
        finite = all(map(math.isfinite, self))
        whole = finite and self.width > 0 and abs((self.high - self.low) / self.width - len(self.edges) + 1) < 1e-6
        if not whole or not 1 <= len(self.edges) - 1 <= 1000:
            raise UserError(f"buckets: {self.low:g} to {self.high:g} is not 1 to 1000 times a width of {self.width:g}")

    def place(self, score: Any) -> Any:
        """Return how many edges a score has reached: 0 is below all buckets, k is in bucket k - 1, the number of edges
        above all of them. Takes a number or an expression."""
        if isinstance(score, int | float):
            return sum(score >= edge for edge in self.edges)
        place = ibis.literal(0, "int64")
        for edge in self.edges:
            place = place + ibis.ifelse(score >= edge, ibis.literal(1, "int64"), ibis.literal(0, "int64"))
        return place


class Shown(NamedTuple):
    """A row to show: `image` is an address, or a data: address with the image in it."""

    score: float
    image: str
    caption: str


@dataclass
class Histogram:
    """Of one collection.

    Attributes:
        buckets: name -> rows, all names.
        below, above: rows outside the buckets.
        missing: rows without a score: null, NaN, not there.
        shown: bucket -> rows to show.
    """

    buckets: dict[str, int]
    below: int = 0
    above: int = 0
    missing: int = 0
    shown: dict[str, list[Shown]] = field(default_factory=dict)

    @classmethod
    def of(cls, buckets: Buckets, counts: dict[int | None, int]) -> "Histogram":
        """Return the histogram of {place or None: rows}."""
        names = buckets.names
        return cls(
            {name: counts.get(place, 0) for place, name in enumerate(names, 1)},
            below=counts.get(0, 0),
            above=counts.get(len(names) + 1, 0),
            missing=counts.get(None, 0),
        )

    @property
    def rows(self) -> int:
        return sum(self.buckets.values()) + self.below + self.above + self.missing

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        rest = {"below": self.below, "above": self.above, "missing": self.missing, "rows": self.rows}
        return {"buckets": self.buckets, **rest}


def histogram_of(engine: Any, files: Files, quantity: str, buckets: Buckets, shown: int, seed: int = 0) -> Histogram:
    """Return the histogram of a table.

    Args:
        engine: opened.
        quantity: such as "aesthetic".
        shown: rows to draw per bucket, by a hash of seed and url.
    """
    row = TableRow(engine.read(files), files.columns, where=files.paths[0])
    score = row.number(quantity)
    place = ibis.ifelse(score.isnull(), ibis.null("int64"), buckets.place(score))
    counted = row.table.select(place=place).group_by("place").agg(count=ibis._.count())
    counts = {entry["place"]: int(entry["count"]) for entry in engine.rows(counted)}
    histogram = Histogram.of(buckets, {None if place is None else int(place): n for place, n in counts.items()})
    if shown and row.name("url"):
        caption = row.text("caption") if row.name("caption") else ibis.literal("")
        key = (ibis.literal(f"{seed} ") + row.text("url")).hash()
        table = row.table.select(
            place=place, score=score, image=row.text("url"), caption=caption.fill_null(""), key=key
        ).filter(~ibis._.image.isnull())
        scale = 2**20  # a share of the rows goes into the draw, so that the draw needs no room
        share = ((table.key % scale) + scale) % scale
        chances = [
            (table.place == number) & (share <= scale * shown * CANDIDATES // count)
            for number, count in enumerate(histogram.buckets.values(), 1)
            if count
        ]
        if chances:
            some = table.filter(ibis.or_(*chances))
            order = ibis.row_number().over(ibis.window(group_by=some.place, order_by=[some.key, some.image]))
            drawn = engine.rows(some.mutate(order=order).filter(ibis._.order < shown).order_by("place", "order"))
            for entry in drawn:
                name = buckets.names[int(entry["place"]) - 1]
                one = Shown(float(entry["score"]), entry["image"], entry["caption"])
                histogram.shown.setdefault(name, []).append(one)
    return histogram


def summed(histograms: Iterable[Histogram]) -> Histogram:
    """Return the counts of several collections together."""
    total, below, above, missing = Counter[str](), 0, 0, 0
    for one in histograms:
        for name, count in one.buckets.items():
            total[name] += count
        below, above, missing = below + one.below, above + one.above, missing + one.missing
    return Histogram(dict(total), below, above, missing)


def short(count: int) -> str:
    """Return a count as LAION writes it, such as "26.99M"."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            return f"{count / unit:.2f}{letter}"
    return str(count)
