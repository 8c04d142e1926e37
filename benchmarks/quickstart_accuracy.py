"""How often the quickstart's pictures show what the prompt says: color, shape and background, judged by a checker.

    python benchmarks/quickstart_accuracy.py --checkpoint runs/quickstart/ema.safetensors

Two sets of 96 prompts, 8 colors x 6 shapes x 2 backgrounds each: in wordings of CLOOB's training captions, and in
wordings that it never saw. The other rows tell where mistakes come from: the checker on freshly drawn images (its own
accuracy), the checker on the autoencoder's reconstructions of them (all that sampling can reach), and CLOOB on them:
the most alike of the 336 captions.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from ldm_lab.data.shapes import COLORS, HELD_OUT_WORDINGS, SHAPES, WORDINGS, Attributes, caption, draw
from ldm_lab.errors import run_program
from ldm_lab.evaluation.shapes_checker import check
from ldm_lab.io.images import grid, save_png, to_tensor
from ldm_lab.progress import Bar
from ldm_lab.prompts import Prompt
from ldm_lab.sampling import Model, Pipeline, SamplingOptions
from ldm_lab.sampling.decode import decode

VARIETY = 0.5  # of the fresh drawings: that of configs/quickstart.yaml
FRESH = "quickstart_accuracy"  # seeds of the fresh drawings begin with this, those of data sets with a number
BACKGROUNDS = (3, 5)  # a color's two backgrounds, as places further on in COLORS
CHUNK = 50  # drawings that go through a network at once

Names = tuple[str, str, str]  # color, shape, background


def kinds() -> list[Names]:
    """Return color, shape and background of the 96 prompts."""
    names = list(COLORS)
    return [
        (color, shape, names[(i + further) % len(names)])
        for further in BACKGROUNDS
        for shape in SHAPES
        for i, color in enumerate(names)
    ]


def prompts(wordings: Sequence[str]) -> list[str]:
    """Return the 96 prompts, the wordings used in turn."""
    return [say(names, wording) for names, wording in zip(kinds(), itertools.cycle(wordings))]


def say(names: Names, wording: str) -> str:
    """Return the caption of these names in a wording."""
    return caption(Attributes(*names, extent=0.65, x=0.5, y=0.5, angle=0.0), wording)


def shares(read: Iterable[Names], true: Iterable[Names]) -> list[float]:
    """Return the shares that are right in color, in shape, in background, and in all three."""
    right = [[a == b for a, b in zip(r, t)] for r, t in zip(read, true)]
    return [sum(column) / len(right) for column in zip(*([*row, all(row)] for row in right))]


@torch.no_grad()
def reconstruct(model: Model, images: list[Image.Image]) -> list[Image.Image]:
    """Return the images after a way through the autoencoder."""
    return [
        picture.image
        for chunk in _chunks(images)
        for picture in decode(model, model.autoencoder.encode(_batch(chunk).to(model.device)), range(len(chunk)), None)
    ]


@torch.no_grad()
def classify(model: Model, images: list[Image.Image]) -> list[Names]:
    """Return for each image the names whose caption, in the first training wording, CLOOB finds most alike."""
    every = [(c, s, b) for c, s, b in itertools.product(COLORS, SHAPES, COLORS) if c != b]
    texts = model.conditioner.encode_text([say(names, WORDINGS[0]) for names in every])  # [336, D]
    best = [
        (model.conditioner.encode_image(_batch(chunk).to(model.device)) @ texts.T).argmax(1)  # [chunk]
        for chunk in _chunks(images)
    ]
    return [every[i] for i in torch.cat(best).tolist()]


def _chunks(images: list[Image.Image]) -> list[list[Image.Image]]:
    return [images[i : i + CHUNK] for i in range(0, len(images), CHUNK)]


def _batch(images: list[Image.Image]) -> Tensor:
    return torch.stack([to_tensor(image) for image in images])  # [B, 3, H, W]


def measure(
    pipeline: Pipeline,
    options: SamplingOptions,
    drawings: int,
    show: Callable[[str, list[Image.Image], list[str]], None] = lambda *_: None,
) -> dict[str, list[float]]:
    """Return {row: [color, shape, background, all three]}, shares in [0, 1].

    Args:
        pipeline: of the model.
        options: how pictures are made.
        drawings: fresh ones, at the size of training.
        show: called as `show(row, pictures, prompts)` for the two sets of pictures.
    """
    model = pipeline.model
    drawn = [draw(f"{FRESH}/{i}", model.image_size[0], VARIETY) for i in range(drawings)]
    images, true = [image for image, _ in drawn], [attributes[:3] for _, attributes in drawn]
    rows = {
        "drawn afresh": shares(map(check, images), true),
        "reconstructed": shares(map(check, reconstruct(model, images)), true),
        "read by CLOOB": shares(classify(model, images), true),
    }
    for row, wordings in (("prompts", WORDINGS), ("prompts, other wordings", HELD_OUT_WORDINGS)):
        texts = prompts(wordings)
        with Bar(row, "step") as bar:

            def progress(done: int, total: int, bar: Bar = bar) -> None:
                bar.total = total
                bar.advance(done)

            as_they_are = [Prompt(text) for text in texts]  # a colon is no weight
            pictures = pipeline(as_they_are, options, progress=progress)
        rows[row] = shares(map(check, pictures), kinds())
        show(row, pictures, texts)
    return rows


def main() -> None:
    """Parse the command line, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", default="runs/quickstart/ema.safetensors", metavar="FILE", help="default: %(default)s")
    add("--guidance", type=float, default=3.0, metavar="W", help="default: %(default)s")
    add("--sampler", default="plms", metavar="NAME", help="default: %(default)s")
    add("--steps", type=int, default=50, metavar="N", help="default: %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="of the first picture; default: %(default)s")
    add("--batch-size", type=int, default=48, metavar="N", help="pictures at once; default: %(default)s")
    add("--drawings", type=int, default=1000, metavar="N", help="fresh ones; default: %(default)s")
    add("--grids", metavar="DIR", help="write the pictures there, labeled with their prompts")
    args = parser.parse_args()

    def show(row: str, pictures: list[Image.Image], texts: list[str]) -> None:
        if args.grids:
            path = Path(args.grids) / f"{row.replace(',', '').replace(' ', '_')}.png"
            save_png(path, grid(pictures, columns=12, captions=texts))

    rows = measure(
        Pipeline.from_checkpoint(args.checkpoint),
        SamplingOptions(
            guidance=args.guidance,
            sampler={"name": args.sampler, "steps": args.steps},
            seed=args.seed,
            batch_size=args.batch_size,
        ),
        args.drawings,
        show,
    )
    print(f"{'share right':24}{'color':>10}{'shape':>10}{'background':>12}{'all three':>11}{'of':>7}")
    for row, (color, shape, background, everything) in rows.items():
        count = len(kinds()) if row.startswith("prompts") else args.drawings
        print(f"{row:24}{color:10.1%}{shape:10.1%}{background:12.1%}{everything:11.1%}{count:7}")


if __name__ == "__main__":
    run_program(main)
