"""Scores by hash, in the key-value files that LAION released beside its collections: build one, look up, count.

    python -m ldm_lab scores build data/scores/*.parquet --out data/aesthetic-tags-kv
    python -m ldm_lab scores get data/aesthetic-tags-kv --hash 3082764456607306529 -1611138363492971532
    python -m ldm_lab scores get data/aesthetic-tags-kv --url https://example.com/a.jpg --text "a red star"
    python -m ldm_lab scores get data/aesthetic-tags-kv --table data/laion.parquet --out data/laion_scored.parquet
    python -m ldm_lab scores stats data/aesthetic-tags-kv

A store has 10 bytes per image (a hash of url and text, a half float), is never loaded into memory, and answers
millions of hashes a second from a warm disk cache.
"""

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from ldm_lab.commands._arguments import whole_number
from ldm_lab.errors import UserError

if TYPE_CHECKING:
    from ldm_lab.curation.store.statistics import ScoreStatistics

BUILD = """Build a store from tables (Parquet, TSV, CSV, JSON lines) with a hash, or url and text, and a score.

The tables may be larger than memory: they are sorted in --memory and spilled beyond it. Rows without a hash or a score
are left out and counted. The result appears when all of it is written."""
GET = """Look up scores by hash, by url and text, or for all rows of a table.

With --hash, or --url and --text, prints a line for each: the hash, a tab, the score or "absent"; the exit code is 1 if
one is absent. With --table writes a copy of the table with a column of scores, null where there is none."""
STATS = """Read a store from end to end: check its order, count entries, and draw the histogram of its scores."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    declare = {"build": _build_arguments, "get": _get_arguments, "stats": _stats_arguments}
    for name, text in (("build", BUILD), ("get", GET), ("stats", STATS)):
        action = actions.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        declare[name](action)


def run(args: argparse.Namespace) -> int | None:
    """Do what the action says."""
    return {"build": _build, "get": _get, "stats": _stats}[args.action](args)


def _build_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("tables", nargs="+", metavar="TABLE", help="files, globs, folders")
    add("--out", required=True, metavar="FILE", help="the store")
    _column_arguments(parser)
    add("--score", nargs="+", metavar="COLUMN", help="one column per score of an entry (default: the aesthetic score)")
    add("--unique", action="store_true", help="of repeated hashes keep the first; else all stay, the first answers")
    add("--memory", default="512MB", metavar="SIZE", help="held while sorting (default: %(default)s)")
    add("--threads", type=whole_number(1), metavar="N", help="default: one per core")
    add("--temporary", metavar="DIR", help="spill there, about 30 bytes per row (default: beside --out)")
    _quiet_argument(parser)


def _get_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("store", metavar="STORE", help="the store")
    _scores_argument(parser)
    add("--hash", nargs="+", type=int, metavar="N", help="look up these hashes")
    add("--table", metavar="FILE", help="look up all rows of a .parquet, .csv or .tsv")
    add("--out", metavar="FILE", help="with --table: the Parquet file to write")
    add("--name", nargs="+", metavar="COLUMN", help="with --table: of the scores (default: aesthetic)")
    add("--url", metavar="URL", help="look up this url with --text; with --table the column of urls")
    add("--text", metavar="TEXT", help="caption of that url; with --table the column of texts")
    add("--key", metavar="COLUMN", help="with --table: the column of hashes (default: hash)")
    _quiet_argument(parser)


def _stats_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("store", metavar="STORE", help="the store")
    _scores_argument(parser)
    add("--json", action="store_true", help="print JSON instead of text")
    _quiet_argument(parser)


def _column_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--key", metavar="COLUMN", help="of hashes (default: hash; without such a column url and text are hashed)")
    add("--url", metavar="COLUMN", help="of urls, hashed together with the text (default: url, in any case)")
    add("--text", metavar="COLUMN", help="of texts (default: text or caption, in any case)")


def _scores_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scores",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="per entry: 2 in stores of pwatermark and punsafe (default: 1)",
    )


def _quiet_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="without progress bars")


def _build(args: argparse.Namespace) -> None:
    from ldm_lab.curation.metadata.text_files import BadLines
    from ldm_lab.curation.store.build import build_store

    bad = BadLines()
    built = build_store(
        args.tables,
        args.out,
        bad=bad,
        key=args.key,
        url=args.url,
        text=args.text,
        scores=args.score or [None],
        unique=args.unique,
        memory=args.memory,
        threads=args.threads,
        temporary=args.temporary,
        progress=not args.quiet,
    )
    print(f"{args.out}: {built.entries:,} entries of {built.rows:,} rows")
    for count, what in (
        (built.no_key, "rows without a hash left out"),
        (built.no_score, "rows without a score left out"),
        (built.repeated, "repeated hashes " + ("left out" if args.unique else "kept; look-ups answer the first")),
        (built.nan, "scores are NaN"),
    ):
        if count:
            print(f"  {count:,} {what}")
    for note in bad.notes():
        print(f"note: {note}")


def _get(args: argparse.Namespace) -> int | None:
    single = args.hash is not None or (args.table is None and args.url is not None)
    if single == (args.table is not None):
        raise UserError("scores get: give --hash, or --url and --text, or --table and --out; one of these")
    if single and args.hash is not None and (args.url is not None or args.text is not None):
        raise UserError("scores get: --hash looks up a hash, --url and --text make one: give one of these")
    if single and (args.out is not None or args.name is not None or args.key is not None):
        raise UserError("scores get: --out, --name and --key are for --table")
    if args.table is not None and args.out is None:
        raise UserError("scores get: --table needs --out, the Parquet file to write")
    if single:
        return _get_keys(args)
    _get_table(args)
    return None


def _get_keys(args: argparse.Namespace) -> int | None:
    """Print the scores of some hashes. Returns 1 if one is absent."""
    from ldm_lab.curation.store.format import ScoreStore, hash_of, signed

    store = ScoreStore(args.store, args.scores)
    absent = 0
    for key in args.hash if args.hash is not None else [hash_of(args.url, args.text)]:
        try:
            scores = store[signed(key)]
        except KeyError:
            absent += 1
            print(f"{key}\tabsent")
        else:
            print(key, *(scores if isinstance(scores, tuple) else (scores,)), sep="\t")
    return 1 if absent else None


def _get_table(args: argparse.Namespace) -> None:
    """Write a table with a column of scores."""
    from ldm_lab.curation.metadata.text_files import BadLines
    from ldm_lab.curation.store.format import ScoreStore
    from ldm_lab.curation.store.lookup import add_scores

    bad = BadLines()
    rows, found = add_scores(
        ScoreStore(args.store, args.scores),
        args.table,
        args.out,
        bad=bad,
        names=args.name or (["aesthetic"] if args.scores == 1 else [f"score{n}" for n in range(args.scores)]),
        key=args.key,
        url=args.url,
        text=args.text,
        progress=not args.quiet,
    )
    for note in bad.notes():
        print(f"note: {note}")
    print(f"{args.out}: {rows:,} rows, {found:,} with a score, {rows - found:,} absent from the store")


def _stats(args: argparse.Namespace) -> None:
    from ldm_lab.curation.store.format import ScoreStore
    from ldm_lab.curation.store.statistics import store_statistics

    stats = store_statistics(ScoreStore(args.store, args.scores), progress=not args.quiet)
    if args.json:
        json.dump(asdict(stats), sys.stdout, indent=2)
        print()
        return
    print(f"{args.store}: {stats.count:,} entries of {stats.entry_bytes} bytes, {stats.repeated:,} repeated hashes")
    if stats.count:
        print(f"hashes from {stats.first_key} to {stats.last_key}")
    for number, score in enumerate(stats.scores):
        if args.scores > 1:
            print(f"score {number}:")
        _print_histogram(score, stats.count)


def _print_histogram(score: "ScoreStatistics", entries: int) -> None:
    """Print a score's extremes and mean, and a bar for each bucket."""
    if score.mean is not None:
        print(f"{score.min:g} ... {score.max:g}, mean {score.mean:.4f}")
    rows = {"below 0": score.below, **score.histogram, "10 and above": score.above, "NaN": score.nan}
    widest = max([*rows.values(), 1])
    for name, count in rows.items():
        if count or name in score.histogram:
            share, bar = 100 * count / max(entries, 1), "#" * round(40 * count / widest)
            print(f"{name:>12} {count:14,} {share:6.2f} %  {bar}")
