"""Train a model as a YAML describes it.

    python train.py --config configs/quickstart.yaml
    python train.py --config configs/yfcc_cfg.yaml data.shards='/data/yfcc/{00000..09999}.tar' trainer.devices=8
    python train.py --config configs/yfcc_cfg.yaml resume.checkpoint=last resume.lr=3e-6 trainer.precision=32-true
    python train.py --config configs/quickstart.yaml --check

Any key of the YAML can be overridden as key.path=value. `--parts` lists all parts with their options.
"""

import argparse
import re
import sys
from collections.abc import Sequence

from ldm_lab.commands._arguments import Parser, add_imports_argument
from ldm_lab.config import describe_parts, load
from ldm_lab.errors import UserError

FLAGS = ("--config", "--parts", "--check", "--imports", "--help")
NAMES = {  # what is meant here -> what it is called elsewhere
    "--check": ("dry_run", "dryrun", "fast_dev_run", "test"),
    "optim.lr": ("lr", "learning_rate"),
    "trainer.max_steps": ("max_steps", "max_train_steps", "steps", "num_steps", "epochs", "max_epochs", "num_epochs"),
    "data.batch_size": ("batch_size", "train_batch_size", "bs"),
    "data.path": ("data", "data_dir", "train_data_dir", "dataset", "instance_data_dir"),
    "data.image_size": ("resolution", "size", "image_size"),
    "resume.checkpoint": ("resume", "resume_from", "resume_from_checkpoint", "resume_ckpt"),
    "init_from": ("init", "pretrained", "pretrained_model_name_or_path", "checkpoint", "ckpt"),
    "trainer.precision": ("precision", "mixed_precision", "fp16", "bf16"),
    "trainer.devices": ("gpus", "devices", "num_gpus"),
    "run": ("name", "run", "output_dir", "out", "outdir"),
    "seed": ("seed",),
}


def main(words: Sequence[str] | None = None) -> int:
    """Parse the command line and run. Returns the exit code."""
    words = list(sys.argv[1:] if words is None else words)
    refuse_unknown_flags(words)
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
    args = parser.parse_intermixed_args(words)
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


def refuse_unknown_flags(words: Sequence[str]) -> None:
    """Raise UserError for flags of other programs, with what is meant by them here."""
    for word in words:
        match = re.fullmatch(r"(--[a-zA-Z][\w-]*)(?:=(.*))?", word, re.S)
        if match is None or match[1] in FLAGS:
            continue
        flag, value = match[1], match[2]
        key = next((key for key in NAMES if flag[2:].replace("-", "_").lower() in NAMES[key]), None)
        if key == "--check":
            raise UserError(f"{flag}: no such flag; --check makes one step and one picture, and writes nothing")
        example = f"{key or 'optim.lr'}={value or '...'}"
        raise UserError(
            f"{flag}: no such flag; keys of the config are written key=value: {example} (--parts lists all)"
        )
