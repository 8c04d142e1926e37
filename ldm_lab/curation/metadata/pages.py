"""Histograms for people: a plot, and a page with sample images of each bucket."""

import html
import io

from ldm_lab.curation.metadata.histogram import Histogram, Shown, short

STYLE = """
body { font: 15px/1.4 sans-serif; margin: 2em; color: #222 }
nav a { margin-right: 1em }
.images { display: flex; flex-wrap: wrap; gap: 8px }
figure { margin: 0; width: 160px }
figure img { width: 160px; height: 160px; object-fit: cover; background: #eee }
figcaption { font-size: 11px; overflow-wrap: anywhere; max-height: 4.2em; overflow: hidden }
""".strip()


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


def page(histograms: dict[str, Histogram], quantity: str) -> str:
    """Return an HTML page: per collection and bucket the number of rows, their share, and images, the best first."""
    title = f"{quantity} scores: {', '.join(histograms)}"
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>",
        f"<style>{STYLE}</style>",
        "</head>",
        "<body>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    if len(histograms) > 1:
        links = [f'<a href="#c{i}">{html.escape(name)}</a>' for i, name in enumerate(histograms)]
        lines.append(f"<nav>{''.join(links)}</nav>")
    for number, (collection, histogram) in enumerate(histograms.items()):
        outside = f"below {histogram.below:,}, above {histogram.above:,}, without a score {histogram.missing:,}"
        lines.append(f'<h2 id="c{number}">{html.escape(collection)}</h2>')
        lines.append(f"<p>{histogram.rows:,} rows; {outside}</p>")
        for name, count in reversed(histogram.buckets.items()):
            share = count / histogram.rows if histogram.rows else 0
            lines.append(f"<h3>{name}: {short(count)} rows ({share:.2%})</h3>")
            shown = sorted(histogram.shown.get(name, []), key=lambda one: -one.score)
            lines.append(f'<div class="images">{"".join(map(_figure, shown))}</div>')
    return "\n".join([*lines, "</body>", "</html>", ""])


def _figure(shown: Shown) -> str:
    """Return an image with its score and caption. Only http, https and embedded images are linked."""
    caption = html.escape(shown.caption[:300])
    text = f"<figcaption>{shown.score:.2f} {caption}</figcaption>"
    if not shown.image.lower().startswith(("http://", "https://", "data:image/jpeg;base64,")):
        return f"<figure>{text}</figure>"
    alt = html.escape(shown.caption[:100])
    source = html.escape(shown.image)
    image = f'<img src="{source}" alt="{alt}" loading="lazy" referrerpolicy="no-referrer">'
    return f"<figure>{image}{text}</figure>"
