"""Count scores: a histogram per collection as JSON, a plot, and a page of sample images per bucket.

    python -m ldm_lab statistics 2B-en='laion2B-en-aesthetic/*.parquet' nolang='nolang/*.parquet' --out stats
    python -m ldm_lab statistics --shards 'data/cc12m/*.tar' --scores .scores.parquet --out stats
    python -m ldm_lab statistics meta.parquet --quantity punsafe --high 1 --width 0.1 --out unsafe

Writes histogram.json, histogram.png and samples.html. Buckets are half-open: 5-6 holds 5 and not 6; scores below and
above all buckets and rows without one are counted apart. Images are shown by their address, those of shards as
thumbnails.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_lab.commands._arguments import add_imports_argument, whole_number
from ldm_lab.config import build
from ldm_lab.config.overrides import split_name
from ldm_lab.errors import UserError
from ldm_lab.io.atomic import atomic_write

if TYPE_CHECKING:
    from ldm_lab.curation.buckets import Buckets
    from ldm_lab.curation.metadata.histogram import Histogram
    from ldm_lab.rules.names import Names

QUANTITIES = ("aesthetic", "punsafe", "pwatermark", "similarity")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_imports_argument(parser)
    add = parser.add_argument
    add(
        "tables",
        nargs="*",
        metavar="[NAME=]FILES",
        help="a collection: Parquet, TSV, CSV, JSON lines, a folder, a glob",
    )
    add("--shards", nargs="+", default=[], metavar="TAR", help="shards, scored in their json")
    add("--scores", metavar="ENDING", help="of Parquet files beside the shards, in the place of .tar")
    add("--out", required=True, metavar="DIR", help="folder for what is written")
    add("--quantity", default=QUANTITIES[0], choices=QUANTITIES, help="what is counted (%(default)s)")
    add(
        "--names",
        nargs="+",
        default=[],
        metavar="QUANTITY=COLUMN",
        help="which column holds it, where a table has several or one of another name",
    )
    add("--low", type=float, default=0.0, help="lower end of the first bucket (default: 0)")
    add("--high", type=float, default=10.0, help="upper end of the last bucket (default: 10)")
    add("--width", type=float, default=1.0, help="of a bucket (default: 1)")
    add("--samples", type=whole_number(0), default=20, metavar="N", help="images per bucket (default: 20)")
    add("--seed", type=int, default=0, help="of the choice of images")
    add("--memory-limit", default="2GB", metavar="SIZE", help="of DuckDB (default: 2GB)")
    add("--spark", metavar="MASTER", help="count with Spark instead, such as local[*]")


def run(args: argparse.Namespace) -> None:
    """Count, write, print."""
    from ldm_lab.curation.buckets import Buckets
    from ldm_lab.curation.metadata.histogram import short, summed
    from ldm_lab.curation.metadata.pages import plot, samples_page
    from ldm_lab.pages import render

    buckets = Buckets(args.low, args.high, args.width)
    buckets.check()
    if not args.tables and not args.shards:
        raise UserError("nothing to count: tables or --shards are needed")
    out = Path(args.out).expanduser()
    histograms = {**table_histograms(args, buckets), **shard_histograms(args, buckets)}
    total = summed(histograms.values())
    if total.rows == 0 or total.rows == total.missing:
        raise UserError(f"none of {total.rows:,} rows has a score '{args.quantity}'; nothing was written")
    report = {"quantity": args.quantity, "collections": {name: one.as_dict() for name, one in histograms.items()}}
    written = {
        "histogram.json": json.dumps(report, indent=2).encode(),
        "histogram.png": plot(histograms, args.quantity),
        "samples.html": render(samples_page(histograms, args.quantity)).encode(errors="replace"),
    }
    for name, content in written.items():
        with atomic_write(out / name) as file:
            file.write(content)
    for name, one in histograms.items():
        if one.column is not None:
            table = f"{one.table}, by its columns; " if one.table else ""
            print(f"table: {name}: {table}{args.quantity} is {one.column}")
        print(f"{name}: { {bucket: short(count) for bucket, count in one.buckets.items()} }")
        print(f"  below {one.below:,}, above {one.above:,}, without a score {one.missing:,}, rows {one.rows:,}")
    print(f"written: {', '.join(str(out / name) for name in written)}")


def names_of(args: argparse.Namespace) -> "Names":
    """Return the names that --names gives. Raises UserError."""
    from ldm_lab.rules.names import Names, check_names

    pairs = dict(map(split_name, args.names))
    if problems := check_names(pairs):
        raise UserError(f"--{problems[0]}".replace(".", " ", 1))
    return Names.of(pairs, "--names {quantity}={column}")


def table_histograms(args: argparse.Namespace, buckets: "Buckets") -> "dict[str, Histogram]":
    """Return the histograms of the collections of tables, by name."""
    from ldm_lab.curation.metadata.histogram import histogram_of
    from ldm_lab.curation.metadata.inputs import find_files, table_notes
    from ldm_lab.curation.metadata.text_files import BadLines, as_parquet

    tables = {}
    for given in args.tables:
        name, files = split_name(given)
        name = name or Path(files).stem
        if name in tables:
            raise UserError(f"two collections are called {name!r}; write NAME=FILES")
        tables[name] = find_files(files, name)
    if not tables:
        return {}
    spark = {"name": "spark", "master": args.spark}
    section = spark if args.spark else {"name": "duckdb", "memory_limit": args.memory_limit}
    with tempfile.TemporaryDirectory() as spill, build("engine", section).open(spill) as engine:
        for number, (name, files) in enumerate(list(tables.items())):
            bad = BadLines()
            tables[name] = as_parquet(files, Path(spill) / f"text{number}", bad, name)
            for note in (*bad.notes(), *table_notes(tables[name])):
                print(f"note: {name}: {note}")
        return {
            name: histogram_of(engine, files, args.quantity, buckets, args.samples, args.seed, names_of(args))
            for name, files in tables.items()
        }


def shard_histograms(args: argparse.Namespace, buckets: "Buckets") -> "dict[str, Histogram]":
    """Return the histogram of the shards, if there are any, under the name "shards"; say what is not usable."""
    from ldm_lab.curation.shard_histogram import histogram_of_shards

    if not args.shards:
        return {}
    histogram, skipped = histogram_of_shards(
        args.shards, args.quantity, buckets, args.samples, args.scores, args.seed, names_of(args)
    )
    if skipped:
        print("not usable: " + ", ".join(f"{reason} {count:,}" for reason, count in skipped.most_common()))
    return {"shards": histogram}
