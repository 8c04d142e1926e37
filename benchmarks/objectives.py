"""What the objective and the average do to the quickstart: optimizer steps until nine of ten pictures are right.

    python benchmarks/objectives.py --out runs/objectives

Trains the quickstart once for each variant, on the same images, seed and learning rates, and draws the same 48 prompts
at every checkpoint with the averaged weights; a checker judges color, shape and background. Then the last weights under
post-hoc averages of several widths (`python -m ldm_lab ema`). A variant that is done is not trained again.
"""

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from quickstart_accuracy import kinds, prompts

from ldm_lab.data.shape_wordings import WORDINGS
from ldm_lab.errors import run_program
from ldm_lab.evaluation.shapes_checker import check
from ldm_lab.progress import Bar
from ldm_lab.prompts import Prompt
from ldm_lab.sampling import Pipeline, SamplingOptions

VARIANTS = {  # name -> settings of the command line
    "v, uniform": ["objective={name: v_cosine}"],
    "v, min_snr": ["objective={name: v_cosine, weighting: min_snr}"],
    "v, soft_min_snr": ["objective={name: v_cosine, weighting: soft_min_snr}"],
    "flow matching": ["objective={name: flow_matching}"],
    "flow matching, even times": ["objective={name: flow_matching, logit_std: null}"],
}
WIDTHS = (0.02, 0.05, 0.1, 0.15, 0.2)  # of post-hoc averages
RIGHT = 0.9
DRAWN = 48  # prompts


def train(folder: Path, variant: str, settings: list[str], steps: int, every: int) -> Path:
    """Train a variant if that has not been done; return its run's folder."""
    run = folder / "runs" / variant.replace(", ", "_").replace(" ", "_")
    root = Path(__file__).resolve().parents[1]
    if not (run / f"step={steps:08d}.ckpt").exists():
        command = [sys.executable, "train.py", "--config", "configs/quickstart.yaml", f"run={run.resolve()}"]
        saving = [f"checkpoint={{every: {every}, keep_every: {every}, keep: 1000}}", f"trainer.max_steps={steps}"]
        rest = [f"demo.every={10 * steps}", f"ema_snapshots.every={every}", "resume.checkpoint=null", *settings]
        subprocess.run([*command, *saving, *rest], check=True, cwd=root)
    return run


def share_right(checkpoint: Path) -> float:
    """Return the share of 48 prompts whose picture is right in color, shape and background."""
    options = SamplingOptions(guidance=3.0, sampler={"name": "unipc", "steps": 20}, batch_size=DRAWN)
    texts, wanted = prompts(WORDINGS)[:DRAWN], kinds()[:DRAWN]
    pictures = Pipeline.from_checkpoint(str(checkpoint))([Prompt(text) for text in texts], options)
    return sum(check(picture) == names for picture, names in zip(pictures, wanted)) / DRAWN


def main() -> None:
    """Parse the command line, train, measure, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", default="runs/objectives", metavar="DIR", help="of the runs; default: %(default)s")
    add("--steps", type=int, default=2400, metavar="N", help="optimizer steps; default: %(default)s")
    add("--every", type=int, default=200, metavar="N", help="steps between checkpoints; default: %(default)s")
    add("--variants", nargs="*", default=[*VARIANTS], choices=[*VARIANTS], metavar="NAME", help="default: all")
    args = parser.parse_args()
    at = [*range(args.every, args.steps + 1, args.every)]
    print("share right".ljust(28) + "".join(f"{step:>7}" for step in at) + "   first at 90 %", flush=True)
    for variant in args.variants:
        run = train(Path(args.out), variant, VARIANTS[variant], args.steps, args.every)
        with Bar(variant, "checkpoint", total=len(at)) as bar:
            shares = []
            for step in at:
                shares.append(share_right(run / f"step={step:08d}.ckpt"))
                bar.advance(len(shares))
        first = next((step for step, share in zip(at, shares) if share >= RIGHT), None)
        print(variant.ljust(28) + "".join(f"{share:7.0%}" for share in shares) + f"   {first}", flush=True)
    run = train(Path(args.out), args.variants[0], VARIANTS[args.variants[0]], args.steps, args.every)
    for width in WIDTHS:
        made = run / f"width={width}.safetensors"
        command = [sys.executable, "-m", "ldm_lab", "ema", str(run), "--width", str(width), "--out", str(made)]
        subprocess.run(command, check=True, cwd=Path(__file__).resolve().parents[1])
        print(f"{args.variants[0]}, post-hoc average of width {width}: {share_right(made):.0%}", flush=True)


if __name__ == "__main__":
    run_program(main)
