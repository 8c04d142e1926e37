"""Make a moving average of any width, after the training, of the snapshots that it left.

    python -m ldm_lab ema runs/yfcc_cfg --width 0.12 --out yfcc-0.12.safetensors

The run needs a section `ema_snapshots`. The width is the standard deviation of the average's profile as a share of the
training, 0 to 0.28: a wide one is smooth and behind, a narrow one sharp and noisy. Which one is best cannot be known
before (Karras et al. 2024, arXiv 2312.02696): make a few, and compare what they sample. The file is a model as
`sample.py --checkpoint` and `init_from` take it.
"""

import argparse
from pathlib import Path

from ldm_lab.commands._arguments import number, safetensors_file, whole_number
from ldm_lab.ema import WIDEST, PowerAverage, combination
from ldm_lab.errors import UserError

FAR = 0.1  # distance of the profiles from which on it is said


def width(text: str) -> float:
    """Return the width of an average."""
    return number(text, lambda value: 0 < value <= WIDEST, f"a width above 0, at most {WIDEST},")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("run", type=Path, metavar="FOLDER", help="the run's folder")
    add("--width", type=width, required=True, metavar="SHARE", help="of the average, as a share of the training")
    add("--step", type=whole_number(1), metavar="N", help="as of this optimizer step (default: the last snapshot)")
    add("--out", type=safetensors_file, required=True, metavar="FILE", help="the model (.safetensors)")


def run(args: argparse.Namespace) -> None:
    """Put the average together, and write it."""
    from ldm_lab.checkpoints.snapshots import found_snapshots, put_together

    snapshots = found_snapshots(args.run)
    last = max(one.updates for one in snapshots.values())
    wanted = PowerAverage(args.width, args.step or last)
    if wanted.updates > last:
        raise UserError(f"--step: the last snapshot in {args.run} is of step {last}, not {wanted.updates}")
    used = {path: one for path, one in snapshots.items() if one.updates <= wanted.updates}
    if not used:
        first = min(one.updates for one in snapshots.values())
        raise UserError(f"--step: the first snapshot in {args.run} is of step {first}, not {wanted.updates}")
    factors, missing = combination(list(used.values()), wanted)
    put_together(dict(zip(used, factors)), wanted, Path(args.out))
    print(f"{args.out}: width {args.width:g} as of step {wanted.updates}, of {len(used)} snapshots")
    if missing > FAR:
        print(
            f"the profile is {missing:.0%} off: with these snapshots a width nearer to "
            f"{', '.join(f'{w:g}' for w in sorted({one.width for one in used.values()}))} is put together better"
        )
