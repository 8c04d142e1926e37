"""How often an inpainting GLIDE paints into a picture what the prompt says, and whether the rest stays as it was.

    python benchmarks/glide_inpainting.py --checkpoint runs/glide_quickstart_inpaint/ema.safetensors

48 pictures, drawn afresh, each with another prompt: the shape is to be another one in another color, on the background
that is there. Masks: a box around the shape with 2 pixels to spare, and the shape itself made 2 pixels wider.
`ldm_lab.evaluation.shapes_checker` judges; pixels outside of the mask that differ from the picture's are counted.
Sampler and guidance are those of OpenAI's inpainting notebook.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from quickstart_accuracy import Names, kinds, say, shares

from ldm_lab.data.shape_wordings import WORDINGS
from ldm_lab.data.shapes import draw
from ldm_lab.errors import run_program
from ldm_lab.evaluation.shapes_checker import check
from ldm_lab.io.images import grid, save_png
from ldm_lab.prompts import Prompt
from ldm_lab.sampling import Pipeline, SamplingOptions

COUNT = 48
VARIETY = 0.25  # of the drawings: that of configs/glide_quickstart.yaml
TRAINED = 4  # wordings: those of its captions
SPARE = 2  # pixels around the shape that are painted, too
MASKS = ("box", "shape")


def drawings(size: int) -> Iterator[tuple[Image.Image, Names, Names]]:
    """Yield pictures with what is to be painted into them and what they show: color, shape, background."""
    wanted = itertools.cycle((color, shape) for color, shape, _ in kinds()[:COUNT])
    for i in range(COUNT):
        color, shape = next(wanted)
        for further in itertools.count():  # of another shape and color, on a background that the color shows on
            picture, (its_color, its_shape, background, *_) = draw(f"glide_inpainting/{i}/{further}", size, VARIETY)
            if its_shape != shape and color not in (its_color, background):
                yield picture, (color, shape, background), (its_color, its_shape, background)
                break


def mask_of(picture: Image.Image, kind: str) -> Image.Image:
    """Return what is painted anew of a drawing, white on black."""
    pixels = np.asarray(picture).astype(int)  # [H, W, 3]
    drawn = np.abs(pixels - pixels[0, 0]).max(2) > 8  # [H, W]; the corner is background
    mask = Image.fromarray((drawn * 255).astype(np.uint8)).filter(ImageFilter.MaxFilter(2 * SPARE + 1))
    if kind == "shape":
        return mask
    mask.paste(255, mask.getbbox())
    return mask


def main() -> None:
    """Parse the command line, paint, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    default = "runs/glide_quickstart_inpaint/ema.safetensors"
    add("--checkpoint", default=default, metavar="FILE", help="default: %(default)s")
    add("--guidance", type=float, default=5.0, metavar="W", help="default: %(default)s")
    add("--sampler", default="ddpm", metavar="NAME", help="default: %(default)s")
    add("--steps", type=int, default=25, metavar="N", help="default: %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="of the first picture; default: %(default)s")
    add("--only", choices=MASKS, metavar="MASK", help="this mask alone: box or shape")
    add("--grids", metavar="DIR", help="write there: pictures, what is masked of them, and what came of it")
    args = parser.parse_args()
    pipeline = Pipeline.from_checkpoint(args.checkpoint)
    sampler = {"name": args.sampler, "steps": args.steps}
    options = SamplingOptions(guidance=args.guidance, sampler=sampler, seed=args.seed)
    drawn = list(drawings(pipeline.model.image_size[0]))
    heads = ("color", "shape", "background", "all three", "masked", "changed outside", "seconds")
    print(f"{'share right':16}" + "".join(f"{head:>{len(head) + 4}}" for head in heads))
    for kind in [args.only] if args.only else MASKS:
        rows = [[], [], []]  # what is known, what came of it, the drawings
        wanted, outside, share, began = [], 0, 0.0, time.perf_counter()
        for i, (picture, names, _) in enumerate(drawn):
            text, mask = say(names, WORDINGS[i % TRAINED]), mask_of(picture, kind)
            given = replace(options, init_image=picture, mask=mask, seed=options.seed + i)
            (painted,) = pipeline([Prompt(text)], given)
            kept = np.asarray(mask) == 0  # [H, W]
            outside += int((np.asarray(painted)[kept] != np.asarray(picture)[kept]).any(-1).sum())
            share += 1 - kept.mean()
            wanted.append(names)
            for row, image in zip(rows, (Image.composite(Image.new("RGB", picture.size, "grey"), picture, mask),
                                         painted, picture), strict=True):  # fmt: skip
                row.append(image)
        seconds = (time.perf_counter() - began) / COUNT
        cells = shares([tuple(check(image)) for image in rows[1]], wanted)
        numbers = [*(f"{cell:.1%}" for cell in cells), f"{share / COUNT:.1%}", f"{outside}", f"{seconds:.2f}"]
        print(f"{kind:16}" + "".join(f"{n:>{len(h) + 4}}" for n, h in zip(numbers, heads)), flush=True)
        if args.grids:
            save_png(
                Path(args.grids) / f"{kind}.png", grid([image for row in rows for image in row], columns=COUNT // 2)
            )


if __name__ == "__main__":
    run_program(main)
