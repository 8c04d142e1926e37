"""How many rows have which score, per bucket and collection, and which ones to show of each bucket."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import ibis
import ibis.expr.types as ir

from ldm_lab.curation.buckets import Buckets
from ldm_lab.curation.metadata.engine import Engine
from ldm_lab.curation.metadata.inputs import Files
from ldm_lab.curation.metadata.tables import TableRow
from ldm_lab.rules.known_tables import known_as
from ldm_lab.rules.names import QUANTITIES, Names

CANDIDATES = 20  # rows looked at for one that is shown, as far as there are so many


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
        column: of the scores; None for shards, whose samples have a json each.
        table: which public table it is, by its columns; None for one that is not known.
    """

    buckets: dict[str, int]
    below: int = 0
    above: int = 0
    missing: int = 0
    shown: dict[str, list[Shown]] = field(default_factory=dict)
    column: str | None = None
    table: str | None = None

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

    def as_dict(self) -> dict[str, int | dict[str, int]]:
        """Return JSON values."""
        rest = {"below": self.below, "above": self.above, "missing": self.missing, "rows": self.rows}
        return {"buckets": self.buckets, **rest}


def histogram_of(
    engine: Engine, files: Files, quantity: str, buckets: Buckets, shown: int, seed: int = 0, names: Names | None = None
) -> Histogram:
    """Return the histogram of a table.

    Args:
        engine: opened.
        quantity: such as "aesthetic".
        shown: rows to draw per bucket, by a hash of seed and url.
        names: which column holds which quantity, where a doubt may be.
    """
    table = engine.read(files)
    row = TableRow(table, files.columns or {one: one for one in table.columns}, names=names, where=files.given[0])
    row.names.check_there(row.columns, QUANTITIES, row.where)
    score = row.number(quantity)
    place = ibis.ifelse(score.isnull(), ibis.null("int64"), place_of(score, buckets))
    counted = row.table.select(place=place).group_by("place").agg(count=ibis._.count())
    counts = {entry["place"]: int(entry["count"]) for entry in engine.rows(counted)}
    histogram = Histogram.of(buckets, {None if place is None else int(place): n for place, n in counts.items()})
    histogram.column, histogram.table = row.name(quantity), known_as(row.columns)
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


def place_of(score: ir.NumericValue, buckets: Buckets) -> ir.IntegerValue:
    """Return the place among some buckets of a score that is a number, as an expression; see `Buckets`."""
    place = ibis.literal(0, "int64")
    for edge in buckets.edges:
        place = place + ibis.ifelse(score >= edge, ibis.literal(1, "int64"), ibis.literal(0, "int64"))
    return place


def summed(histograms: Iterable[Histogram]) -> Histogram:
    """Return the counts of several collections together."""
    total, below, above, missing = Counter[str](), 0, 0, 0
    for one in histograms:
        for name, count in one.buckets.items():
            total[name] += count
        below, above, missing = below + one.below, above + one.above, missing + one.missing
    return Histogram(dict(total), below, above, missing)


def short(count: int) -> str:
    """Return a count as LAION writes it, such as "26.99M" and "0.02M"; one below 10,000 as it is."""
    for least, unit, letter in ((10**9, 10**9, "B"), (10**4, 10**6, "M")):
        if count >= least:
            return f"{count / unit:.2f}{letter}"
    return str(count)
