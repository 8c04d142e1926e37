"""Report what img2dataset managed to download: the share of successes, the errors, the worst shards.

    python -m ldm_lab downloads data/cc12m
    python -m ldm_lab downloads data/cc12m --json > cc12m_downloads.json

Reads the NNNNN_stats.json files beside the shards; a shard without one was not finished.
"""

import argparse
import json

from ldm_lab.commands._arguments import whole_number
from ldm_lab.curation.metadata.downloads import read_stats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("folder", metavar="DIR", help="img2dataset's output")
    add("--json", action="store_true", help="print JSON, with every shard, instead of text")
    add("--worst", type=whole_number(0), default=10, metavar="N", help="shards to list (default: 10)")
    add("--batch-size", type=whole_number(1), metavar="N", help="also say how many whole batches there are")


def run(args: argparse.Namespace) -> None:
    """Print the report."""
    downloads = read_stats(args.folder)
    if args.json:
        print(json.dumps(downloads.as_dict(), indent=2, ensure_ascii=False))
    else:
        print(downloads.as_text(args.worst, args.batch_size))
