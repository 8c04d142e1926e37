"""How often the quickstart's pictures show what the prompt says: color, shape and background, judged by a checker.

    python benchmarks/quickstart_accuracy.py --checkpoint runs/quickstart/ema.safetensors
    python benchmarks/quickstart_accuracy.py --checkpoint runs/seed0 runs/seed1 runs/seed2

Four sets of 96 prompts, 8 colors x 6 shapes x 2 backgrounds each: in the usual wordings, which are in CLOOB's captions,
and in the three families that the grammar of its captions does not derive (ldm_lab/data/shape_wordings.py). The
other rows tell where mistakes come from: the checker on freshly drawn images (its own accuracy), the checker on the
autoencoder's reconstructions of them (all that sampling can reach), CLOOB on them (the most alike of the 336 captions),
and CLOOB on texts (the most alike of the 336 plain drawings), every kind of image in every wording of a family.

Of several checkpoints, such as of runs with other seeds, the mean is told, and the least and the most of all three.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from ldm_lab.data.shape_wordings import HELD_OUT_FAMILIES, WORDINGS
from ldm_lab.data.shapes import COLORS, SHAPES, Attributes, caption, draw, render
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

FAMILIES = {"usual wordings": WORDINGS, **HELD_OUT_FAMILIES}

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
    """Return the 96 prompts, the wordings used in turn, and shifted by one each time round: each gets every color."""
    turns = (wordings[(i + i // len(wordings)) % len(wordings)] for i in itertools.count())
    return [say(names, wording) for names, wording in zip(kinds(), turns)]


def say(names: Names, wording: str) -> str:
    """Return the caption of these names in a wording."""
    return caption(_plain(names), wording)


def _plain(names: Names) -> Attributes:
    return Attributes(*names, extent=0.65, x=0.5, y=0.5, angle=0.0)


def shares(read: Iterable[Names], true: Iterable[Names]) -> list[float]:
    """Return the shares that are right in color, in shape, in background, and in all three."""
    right = [[a == b for a, b in zip(r, t)] for r, t in zip(read, true)]
    return [sum(column) / len(right) for column in zip(*([*row, all(row)] for row in right))]


class Row(NamedTuple):
    """How many were looked at, and the shares that are right in color, in shape, in background, and in all three."""

    count: int
    right: list[float]

    @classmethod
    def of(cls, read: Iterable[Names], true: Sequence[Names]) -> "Row":
        """Return the row of some readings, and what would be right."""
        return cls(len(true), shares(read, true))


@torch.no_grad()
def reconstruct(model: Model, images: list[Image.Image]) -> list[Image.Image]:
    """Return the images after a way through the autoencoder."""
    return [
        picture.image
        for chunk in _chunks(images)
        for picture in decode(model, model.autoencoder.encode(_batch(chunk).to(model.device)), range(len(chunk)), None)
    ]


EVERY = [(c, s, b) for c, s, b in itertools.product(COLORS, SHAPES, COLORS) if c != b]  # kind of image: 336


@torch.no_grad()
def classify(model: Model, images: list[Image.Image]) -> list[Names]:
    """Return for each image the names whose caption, in the first training wording, CLOOB finds most alike."""
    texts = model.conditioner.encode_text([say(names, WORDINGS[0]) for names in EVERY])  # [336, D]
    return _most_alike(_embedded(model, images), texts)


@torch.no_grad()
def read_texts(model: Model, wordings: Sequence[str]) -> list[Names]:
    """Return for every kind, wording by wording, the kind whose plain drawing CLOOB finds most alike."""
    drawings = _embedded(model, [render(_plain(names), model.image_size[0]) for names in EVERY])  # [336, D]
    texts = [model.conditioner.encode_text([say(names, wording) for names in EVERY]) for wording in wordings]
    return _most_alike(torch.cat(texts), drawings)


def _embedded(model: Model, images: list[Image.Image]) -> Tensor:
    """Return CLOOB's embeddings of images, [n, D]."""
    return torch.cat([model.conditioner.encode_image(_batch(c).to(model.device)) for c in _chunks(images)])  # [n, D]


def _most_alike(rows: Tensor, kinds: Tensor) -> list[Names]:
    """Return for each row, [n, D], the kind out of EVERY with the most similar one of [336, D]."""
    return [EVERY[i] for i in (rows @ kinds.T).argmax(1).tolist()]


def _chunks(images: list[Image.Image]) -> list[list[Image.Image]]:
    return [images[i : i + CHUNK] for i in range(0, len(images), CHUNK)]


def _batch(images: list[Image.Image]) -> Tensor:
    return torch.stack([to_tensor(image) for image in images])  # [B, 3, H, W]


def measure(
    pipeline: Pipeline,
    options: SamplingOptions,
    drawings: int,
    families: Mapping[str, Sequence[str]] = FAMILIES,
    show: Callable[[str, list[Image.Image], list[str]], None] = lambda *_: None,
) -> dict[str, Row]:
    """Return {row: how many, and which shares of them are right}.

    Args:
        pipeline: of the model.
        options: how pictures are made.
        drawings: fresh ones, at the size of training.
        families: wordings by name.
        show: called as `show(family, pictures, prompts)` for each family.
    """
    model = pipeline.model
    drawn = [draw(f"{FRESH}/{i}", model.image_size[0], VARIETY) for i in range(drawings)]
    images, true = [image for image, _ in drawn], [attributes[:3] for _, attributes in drawn]
    rows = {
        "drawn afresh": Row.of(map(check, images), true),
        "reconstructed": Row.of(map(check, reconstruct(model, images)), true),
        "read by CLOOB": Row.of(classify(model, images), true),
    }
    for family, wordings in families.items():
        rows[f"{family}, read by CLOOB"] = Row.of(read_texts(model, wordings), EVERY * len(wordings))
    for family, wordings in families.items():
        texts = prompts(wordings)
        pictures = draw_prompts(pipeline, options, texts, family)
        rows[family] = Row.of(map(check, pictures), kinds())
        show(family, pictures, texts)
    return rows


def draw_prompts(pipeline: Pipeline, options: SamplingOptions, texts: list[str], title: str) -> list[Image.Image]:
    """Return a picture of each text, with a progress bar."""
    with Bar(title, "step") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.advance(done)

        return pipeline([Prompt(text) for text in texts], options, progress=progress)  # a colon is no weight


def mean_lines(measured: Sequence[dict[str, Row]]) -> Iterator[str]:
    """Yield the table's lines: the means over several checkpoints, and the range of all three."""
    range_title = f"{'least to most':>17}" if len(measured) > 1 else ""
    yield f"{'share right':32}{'color':>8}{'shape':>8}{'background':>12}{'all three':>11}{range_title}{'of':>7}"
    for name, first in measured[0].items():
        every = [rows[name].right for rows in measured]
        color, shape, background, all_three = (sum(column) / len(every) for column in zip(*every))
        spread = f"{min(r[3] for r in every):9.1%}{max(r[3] for r in every):8.1%}" if range_title else ""
        yield f"{name:32}{color:8.1%}{shape:8.1%}{background:12.1%}{all_three:11.1%}{spread}{first.count:7}"


def main() -> None:
    """Parse the command line, measure, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--checkpoint", nargs="+", default=["runs/quickstart/ema.safetensors"], metavar="FILE",
        help="one, or several to take the mean of; default: runs/quickstart/ema.safetensors")  # fmt: skip
    add("--guidance", type=float, default=3.0, metavar="W", help="default: %(default)s")
    add("--sampler", default="plms", metavar="NAME", help="default: %(default)s")
    add("--steps", type=int, default=50, metavar="N", help="default: %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="of the first picture; default: %(default)s")
    add("--batch-size", type=int, default=48, metavar="N", help="pictures at once; default: %(default)s")
    add("--drawings", type=int, default=1000, metavar="N", help="fresh ones; default: %(default)s")
    add("--grids", metavar="DIR", help="write the pictures there, labeled with their prompts")
    args = parser.parse_args()
    options = SamplingOptions(
        guidance=args.guidance,
        sampler={"name": args.sampler, "steps": args.steps},
        seed=args.seed,
        batch_size=args.batch_size,
    )
    measured = []
    for number, checkpoint in enumerate(args.checkpoint):

        def show(family: str, pictures: list[Image.Image], texts: list[str], number: int = number) -> None:
            if args.grids:
                path = Path(args.grids) / f"{number}_{family.replace(' ', '_')}.png"
                save_png(path, grid(pictures, columns=12, captions=texts))

        measured.append(measure(Pipeline.from_checkpoint(checkpoint), options, args.drawings, show=show))
    print("\n".join(mean_lines(measured)))


if __name__ == "__main__":
    run_program(main)
