"""Histograms for people: a plot, and a page with sample images of each bucket."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ldm_lab.curation.metadata.histogram import Histogram, Shown, short
from ldm_lab.pages import Page


@dataclass(frozen=True)
class Bucket:
    """A bucket with the rows to show of it, the best first."""

    heading: str
    shown: Sequence[Shown]


@dataclass(frozen=True)
class Collection:
    """A collection: its buckets from the best on, and in words what is in none."""

    name: str
    rows: int
    outside: str
    buckets: Sequence[Bucket]


@dataclass(frozen=True, kw_only=True)
class SamplesPage(Page):
    """Per collection and bucket the number of rows, their share, and images."""

    template: ClassVar[str] = "samples.html"
    remote_images: ClassVar[bool] = True
    collections: Sequence[Collection]


def plot(histograms: dict[str, Histogram], quantity: str) -> bytes:
    """Return a PNG: rows per bucket, a bar for each collection. The scale is logarithmic, for the rare high scores."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    names = list(next(iter(histograms.values())).buckets)
    figure = Figure(figsize=(max(7.0, 0.8 * len(names)), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.8 / len(histograms)
    for number, (collection, histogram) in enumerate(histograms.items()):
        places = [i - 0.4 + width * (number + 0.5) for i in range(len(names))]
        counts = list(histogram.buckets.values())
        bars = axes.bar(places, counts, width, label=f"{collection} ({short(histogram.rows)} rows)")
        if len(histograms) <= 3:
            labels = [short(count) if count else "" for count in counts]
            axes.bar_label(bars, labels, fontsize=7 if len(histograms) == 1 else 5, padding=2)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel(f"{quantity} score")
    axes.set_ylabel("rows")
    if any(count for histogram in histograms.values() for count in histogram.buckets.values()):
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.8)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda count, _: short(int(count)) if count >= 1 else ""))
    figure.legend(loc="outside upper center", ncols=min(len(histograms), 3))
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def samples_page(histograms: dict[str, Histogram], quantity: str) -> SamplesPage:
    """Return the page of these histograms."""
    collections = [_collection(name, histogram) for name, histogram in histograms.items()]
    return SamplesPage(title=f"{quantity} scores: {', '.join(histograms)}", collections=collections)


def _collection(name: str, histogram: Histogram) -> Collection:
    outside = f"below {histogram.below:,}, above {histogram.above:,}, without a score {histogram.missing:,}"
    buckets = []
    for bucket, count in reversed(histogram.buckets.items()):
        share = count / histogram.rows if histogram.rows else 0
        shown = sorted(histogram.shown.get(bucket, []), key=lambda one: -one.score)
        buckets.append(Bucket(f"{bucket}: {short(count)} rows ({share:.2%})", shown))
    return Collection(name, histogram.rows, outside, buckets)
