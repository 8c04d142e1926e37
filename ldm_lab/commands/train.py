"""Train a model as a YAML describes it.

    python train.py --config configs/quickstart.yaml
    python train.py --config configs/yfcc_cfg.yaml data.shards='/data/yfcc/{00000..09999}.tar' trainer.devices=8
    python train.py --config configs/yfcc_cfg.yaml resume.checkpoint=last resume.lr=3e-6 trainer.precision=32-true
    python train.py --config configs/quickstart.yaml --check

Any key of the YAML can be overridden as key.path=value. `--parts` lists all parts with their options.
"""

import argparse
import sys
from collections.abc import Sequence

from ldm_lab.commands._arguments import Parser, add_imports_argument
from ldm_lab.config import describe_parts, load
from ldm_lab.errors import UserError


def main(words: Sequence[str] | None = None) -> int:
    """Parse the command line and run. Returns the exit code."""
    parser = Parser(
        prog="train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="YAML", help="the run's description, e.g. configs/quickstart.yaml")
    parser.add_argument("--parts", action="store_true", help="list all parts and their options, then leave")
    parser.add_argument(
        "--check",
        action="store_true",
        help="build all, make one step and one picture, say what it takes; write nothing. `python -m ldm_lab plan` "
        "counts instead, and runs nothing",
    )
    add_imports_argument(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the YAML's")
    args = parser.parse_intermixed_args(sys.argv[1:] if words is None else words)
    if args.parts:
        print(describe_parts())
        return 0
    if args.config is None:
        raise UserError("--config is needed, e.g. --config configs/quickstart.yaml (--parts lists all options)")
    config = load(args.config, args.overrides)

    if args.check:
        from ldm_lab.training.check import check

        return check(config)

    from ldm_lab.training.runner import run  # after the config is known to be right: importing torch takes seconds

    return run(config)
