"""How often the quickstart GLIDE's pictures show what the prompt says, by sampler and variance, and enlarged.

    python benchmarks/glide_quickstart.py --checkpoint runs/glide_quickstart/ema.safetensors \\
        --upsampler runs/glide_quickstart_upsampler/ema.safetensors

48 prompts, 8 colors x 6 shapes, each with one background, in wordings of the training captions; judged by
`ldm_lab.evaluation.shapes_checker`. Rows: ancestral steps with the learned variance and with the two fixed ones, DDIM,
and what the upsampler makes of the first. The last column is the time per picture.
"""

import argparse
import itertools
import sys
import time
from dataclasses import replace
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from quickstart_accuracy import kinds, say, shares

from ldm_lab.data.shape_wordings import WORDINGS
from ldm_lab.data.shapes import draw
from ldm_lab.errors import run_program
from ldm_lab.evaluation.shapes_checker import check
from ldm_lab.io.images import grid, save_png
from ldm_lab.sampling import Pipeline, SamplingOptions, Stage, Stages

COUNT = 48
VARIETY = 0.25  # of the fresh drawings: that of configs/glide_quickstart.yaml
TRAINED = 4  # wordings: those of its captions


def main() -> None:
    """Parse the command line, sample, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--checkpoint", default="runs/glide_quickstart/ema.safetensors", metavar="FILE", help="default: %(default)s")
    add("--upsampler", metavar="FILE", help="also enlarge the pictures")
    add("--guidance", type=float, default=3.0, metavar="W", help="default: %(default)s")
    add("--steps", type=int, default=25, metavar="N", help="default: %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="of the first picture; default: %(default)s")
    add("--only", metavar="ROW", help="this row alone, such as 'ddpm learned'")
    add("--grids", metavar="DIR", help="write the pictures there, labeled with their prompts")
    args = parser.parse_args()
    base = Pipeline.from_checkpoint(args.checkpoint)
    options = SamplingOptions(guidance=args.guidance, seed=args.seed, batch_size=COUNT)
    wanted = kinds()[:COUNT]
    texts = [say(names, wording) for names, wording in zip(wanted, itertools.cycle(WORDINGS[:TRAINED]))]

    print(f"{'share right':24}{'color':>10}{'shape':>10}{'background':>12}{'all three':>11}{'seconds':>10}")

    def row(name: str, pictures: list[Image.Image], true: list, seconds: float = 0.0) -> None:
        cells = shares([tuple(check(picture)) for picture in pictures], true)
        print(
            f"{name:24}{cells[0]:10.1%}{cells[1]:10.1%}{cells[2]:12.1%}{cells[3]:11.1%}{seconds / COUNT:10.2f}",
            flush=True,
        )
        if args.grids and true is wanted:
            save_png(Path(args.grids) / f"{name.replace(' ', '_')}.png", grid(pictures, columns=8, captions=texts))

    drawn = [draw(f"glide_quickstart/{i}", base.model.image_size[0], VARIETY) for i in range(1000)]
    row("drawn afresh", [image for image, _ in drawn], [attributes[:3] for _, attributes in drawn])
    ways = {f"ddpm {variance}": {"name": "ddpm", "variance": variance} for variance in ("learned", "posterior", "beta")}
    for name, way in {**ways, "ddim": {"name": "ddim"}}.items():
        if args.only in (None, name):
            began = time.perf_counter()
            pictures = base(texts, replace(options, sampler={**way, "steps": args.steps}))
            row(name, pictures, wanted, time.perf_counter() - began)
    if args.upsampler:
        of_base = replace(options, sampler={"name": "ddpm", "steps": args.steps})
        upsampler = Pipeline.from_checkpoint(args.upsampler)
        began = time.perf_counter()
        pairs = Stages([Stage(base, of_base), Stage(upsampler, SamplingOptions(batch_size=COUNT))])(texts)
        row("ddpm learned, enlarged", [large for _, large in pairs], wanted, time.perf_counter() - began)


if __name__ == "__main__":
    run_program(main)
