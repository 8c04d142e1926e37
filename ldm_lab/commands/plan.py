"""What a training run will need: memory, largest batches, days on a list of GPUs, disk; before anything is paid for.

    python -m ldm_lab plan --config configs/yfcc_fast.yaml data.shards='/data/yfcc/{00000..09999}.tar'
    python -m ldm_lab plan --config configs/own_images_24gb.yaml data.path=photos --gpu 'RTX 4090' --gpu A100 --mfu 0.3
    python -m ldm_lab plan --table docs/recipes.md    the table of recipes by the size of the GPU, counted anew

Everything is counted from the config: no weights are read, nothing is trained, no GPU is needed. `python train.py
--check` makes one step and one picture on the machine that it runs on. Speeds are computed: what a card can do at most
by its maker's data sheet, times the share of it that training makes use of (MFU). The released U-Net reached 41 to 47 %
on an H200 (docs/performance.md); cards whose memory is fast beside their arithmetic reach more, small networks less.
"""

import argparse
import json
from dataclasses import asdict

from ldm_lab.commands._arguments import add_config_arguments, share
from ldm_lab.config import load
from ldm_lab.errors import UserError

GPUS = ("RTX 3060", "RTX 3090", "RTX 4090", "RTX 5090", "L40S", "A100", "H100")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_config_arguments(parser, "of a run that train.py could start", required=False)
    add = parser.add_argument
    add("--gpu", action="append", metavar="NAME", help=f"may be given again (default: {', '.join(GPUS)})")
    add("--mfu", type=share, default=0.35, metavar="SHARE", help="of a card's peak that is made use of (%(default)s)")
    add("--table", metavar="FILE", help="count the table of recipes in a Markdown file anew (docs/recipes.md has one)")
    add("--json", action="store_true", help="print the numbers as JSON")


def run(args: argparse.Namespace) -> None:
    """Count and print."""
    from ldm_lab.estimate import peak_flops  # not before: torch takes seconds, and --help needs none
    from ldm_lab.training.plan_table import write_table
    from ldm_lab.training.planning import in_words, plan

    if args.table is not None:
        if args.config or args.overrides or args.gpu or args.json:
            raise UserError("--table: the file says which configs and GPUs; --mfu alone goes with it")
        write_table(args.table, args.mfu)
        print(f"written: the table in {args.table}")
        return
    if args.config is None:
        raise UserError("--config: the YAML of a run is needed (or --table FILE)")
    found = plan(load(args.config, args.overrides))
    cards = args.gpu or [gpu for gpu in GPUS if peak_flops(gpu, found.precision, found.tf32)]
    speeds = found.speeds(cards, args.mfu)
    if args.json:
        tables = {"fits": [asdict(fit) for fit in found.fits()], "speeds": [asdict(speed) for speed in speeds]}
        print(json.dumps({**asdict(found), "mfu": args.mfu, **tables}, indent=2))
    else:
        print(in_words(found, speeds, args.mfu))
