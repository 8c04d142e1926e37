"""How often the quickstart cascade's pictures show what the prompt says, before and after super-resolution.

    python benchmarks/imagen_cascade.py                 both stages of configs/imagen_quickstart_*.yaml, as trained
    python benchmarks/imagen_cascade.py --costs         what a training step costs, and both stages' training in all,
                                                        beside configs/glide_quickstart.yaml and its upsampler

48 prompts, 8 colors x 6 shapes, each with one background, in wordings of the training captions; judged by
`ldm_lab.evaluation.shapes_checker`. The first row is the checker on fresh drawings of the base's size: no more than
that can be reached. "Keeps to it" is the mean difference, in levels of 255, between a small picture and the large one
made of it, made small again. With --grid rows of guidance and thresholding go to a labeled PNG.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from quickstart_accuracy import Names, kinds, say, shares

from ldm_lab.config import load
from ldm_lab.data.shape_wordings import WORDINGS
from ldm_lab.data.shapes import draw
from ldm_lab.ema import Pairs, averaged_copy
from ldm_lab.errors import run_program
from ldm_lab.evaluation.shapes_checker import check
from ldm_lab.io.images import grid, save_png
from ldm_lab.sampling import ModelOptions, Pipeline, SamplingOptions, Stage, Stages
from ldm_lab.training.cost import example_batch

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CASCADES = (("imagen_quickstart_base", "imagen_quickstart_sr"), ("glide_quickstart", "glide_quickstart_upsampler"))
COUNT = 48
VARIETY = 0.25  # of the fresh drawings: that of configs/imagen_quickstart_base.yaml
TRAINED = 4  # wordings: those of its captions
GUIDANCE = (1.0, 1.5, 2.0, 3.0, 7.0)
SHOWN = (0, 9, 18, 27, 36, 45)  # prompts of the grid: another color and another shape each


def main() -> None:
    """Parse the command line; measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--base", default="runs/imagen_quickstart_base", metavar="MODEL", help="default: %(default)s")
    add("--sr", default="runs/imagen_quickstart_sr", metavar="MODEL", help="default: %(default)s")
    add("--steps", type=int, default=15, metavar="N", help="of the base; default: %(default)s")
    add("--sr-steps", type=int, default=5, metavar="N", help="default: %(default)s")
    add("--sr-temperature", type=float, default=0.8, metavar="T", help="default: %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="of the first picture; default: %(default)s")
    add("--first", type=int, default=0, metavar="N", help="of all kinds of pictures; default: %(default)s")
    add("--guidance", type=float, nargs="+", default=GUIDANCE, metavar="W", help="default: %(default)s")
    add("--device", metavar="NAME", help="default: the GPU if there is one")
    add("--grid", metavar="PNG", help="write pictures by guidance and thresholding there")
    add("--costs", action="store_true", help="measure training steps instead")
    add("--rounds", type=int, default=5, metavar="N", help="of --costs; default: %(default)s")
    args = parser.parse_args()
    costs(args.rounds) if args.costs else accuracy(args)


def accuracy(args: argparse.Namespace) -> None:
    """Print a row for each guidance and way of thresholding; write the grid."""
    where = ModelOptions(device=args.device)
    base = Pipeline.from_checkpoint(args.base, where)
    sr = Pipeline.from_checkpoint(args.sr, where, [base])
    small = base.model.image_size[0]
    drawn = [draw(f"imagen_cascade/{i}", small, VARIETY) for i in range(1000)]
    right = shares([tuple(check(image)) for image, _ in drawn], [attributes[:3] for _, attributes in drawn])
    print(f"the checker on 1,000 fresh drawings of {small} px: {right[3]:.1%} right", flush=True)
    wanted = kinds()[args.first : args.first + COUNT]
    texts = [say(names, wording) for names, wording in zip(wanted, itertools.cycle(WORDINGS[:TRAINED]))]
    print(f"{'guidance':>8} {'thresholding':>12} {'base':>7} {'enlarged':>9} {'keeps to it':>12} {'at most':>8}")
    cells, labels = list[Image.Image](), list[str]()
    for guidance, thresholding in itertools.product(args.guidance, ("static", "dynamic")):
        sampler = {"name": "ddim", "steps": args.steps}
        options = SamplingOptions(
            guidance=guidance, thresholding=thresholding, sampler=sampler, seed=args.seed, batch_size=COUNT
        )
        enlarging = SamplingOptions(
            sampler={**sampler, "steps": args.sr_steps},
            thresholding="static",
            temperature=args.sr_temperature,
            batch_size=COUNT,
        )  # dynamic thresholding moves colors, and a stage without guidance has no need of it
        pairs = Stages([Stage(base, options), Stage(sr, enlarging)])(texts)
        shown = [[small for small, _ in pairs], [large for _, large in pairs]]
        before, after = (right_share(pictures, wanted) for pictures in shown)
        apart = [distance(*pair) for pair in pairs]
        print(
            f"{guidance:8g} {thresholding:>12} {before:7.1%} {after:9.1%} {np.mean(apart):12.2f} {max(apart):8.2f}",
            flush=True,
        )
        cells += [pairs[i][1] for i in SHOWN]
        labels += [f"guidance {guidance:g}, {thresholding}" for _ in SHOWN]
    if args.grid:
        page = grid(cells, columns=len(SHOWN), captions=labels)
        half = page.resize((page.width // 2, page.height // 2), Image.Resampling.LANCZOS)
        save_png(Path(args.grid), half.quantize(64).convert("RGB"))


def right_share(pictures: Sequence[Image.Image], wanted: Sequence[Names]) -> float:
    """Return the share of pictures that are right in color, shape and background."""
    return shares([tuple(check(picture)) for picture in pictures], wanted)[3]


def distance(small: Image.Image, large: Image.Image) -> float:
    """Return the mean difference of a small picture and a large one made small, in levels of 255."""
    again = large.resize(small.size, Image.Resampling.BICUBIC)
    return float(np.abs(np.asarray(again, dtype=float) - np.asarray(small, dtype=float)).mean())


def costs(rounds: int) -> None:
    """Print the CPU seconds of a training step of each stage, and of both stages' training in all, in turns."""
    torch.set_num_threads(1)
    names = [name for cascade in CASCADES for name in cascade]
    steps = {name: TrainingStep(name) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn, name in itertools.product(range(rounds + 1), names):
        began = time.process_time()
        steps[name].make()
        if turn:  # the first one warms up
            seconds[name].append(time.process_time() - began)
    took = {name: float(np.median(its)) for name, its in seconds.items()}
    for name in names:
        print(f"{name:28} {took[name]:.3f} s a step, {took[name] * steps[name].count / 60:5.1f} min for all")
    ours, theirs = (sum(took[name] * steps[name].count for name in cascade) for cascade in CASCADES)
    print(f"both stages of the first cascade cost {ours / theirs:.2f} times what those of the second do")


class TrainingStep:
    """A training step of a recipe on pictures and texts without content: they cost the same.

    Attributes:
        count: how many the recipe makes.
    """

    def __init__(self, name: str) -> None:
        config = load(CONFIGS / f"{name}.yaml")
        self.task = config.task_class()(config, read_weights=False)
        self.batch = example_batch(self.task, config["data"]["image_size"])
        self.optimizer = self.task.optim.optimizer(self.task.model)
        self.pairs = Pairs(averaged_copy(self.task.model), self.task.model)
        self.count = config["trainer"]["max_steps"]

    def make(self) -> None:
        """Make one: loss, gradient, optimizer, average."""
        self.task.rehearse(self.batch).backward()
        torch.nn.utils.clip_grad_norm_(self.task.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.pairs.update(0.99, None)


if __name__ == "__main__":
    run_program(main)
