"""Ancestral sampling in few steps with the learned variance, and with the two fixed ones, on a model of shapes.

    python benchmarks/learned_variance.py --checkpoint runs/glide_quickstart/ema.safetensors

All rows use one network, the same steps and the same noise. Columns:

    bits     the variational bound of the walk on freshly drawn pictures and their captions, bits per element, without
             the constant term of the prior (Nichol & Dhariwal 2021, arXiv 2102.09672, section 3.1); lower is better
    texture  Frechet distance of the 5x5 patches, less their mean colors, of sampled and of drawn pictures of the same
             prompts, without guidance; lower is better
    right    share of prompts whose color and shape the checker reads off the pictures, with guidance
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from ldm_lab.data.shape_wordings import WORDINGS
from ldm_lab.data.shapes import COLORS, SHAPES, Attributes, caption, draw
from ldm_lab.errors import UserError, run_program
from ldm_lab.evaluation.shapes_checker import check
from ldm_lab.io.images import to_tensor
from ldm_lab.objectives.variational_bound import variational_bound
from ldm_lab.progress import Bar
from ldm_lab.prompts import Prompt
from ldm_lab.sampling import Model, Pipeline, SamplingOptions
from ldm_lab.schedules import Posterior

FRACTIONS = {"learned": None, "posterior": 0.0, "beta": 1.0}  # variance -> of the way from the posterior's to beta
PATCH = 5  # pixels
FRESH = "learned_variance"  # seeds of the drawings begin with this, those of data sets with a number
CHUNK = 64  # drawings that go through the network at once


def drawings(count: int, size: int, variety: float) -> tuple[list[Image.Image], list[Attributes], list[str]]:
    """Return fresh drawings, what they show, and their captions."""
    drawn = [draw(f"{FRESH}/{i}", size, variety) for i in range(count)]
    captions = [caption(shown, wording) for (_, shown), wording in zip(drawn, itertools.cycle(WORDINGS))]
    return [image for image, _ in drawn], [shown for _, shown in drawn], captions


@torch.no_grad()
def bits(model: Model, steps: int, images: list[Image.Image], captions: list[str]) -> dict[str, float]:
    """Return {variance: bound in bits per element} of the walk with so many steps, on pictures and their captions."""
    schedule = model.objective.schedule
    times = schedule.grid(steps)  # [S]
    walk = Posterior.from_times(schedule, times)
    totals = dict.fromkeys(FRACTIONS, 0.0)
    generator = torch.Generator().manual_seed(0)
    bar = Bar("bound", "image", len(images))
    for first in range(0, len(images), CHUNK):
        bar.advance(first)
        x0 = torch.stack([to_tensor(image) for image in images[first : first + CHUNK]])  # [B, 3, H, W]
        cond = model.conditioner.from_prompts(captions[first : first + CHUNK], [])
        for i in range(steps):
            t = times[i].expand(len(x0))  # [B]
            alpha, sigma = (level[:, None, None, None] for level in schedule.alpha_sigma(t))  # [B, 1, 1, 1]
            x = alpha * x0 + sigma * torch.randn(x0.shape, generator=generator)  # [B, 3, H, W]
            prediction = model.objective.predict(model.denoiser, x, t, cond)
            if prediction.variance_fraction is None:
                raise UserError("this model has learned no variance")
            rows = walk.at(torch.full((len(x0),), i))
            last = torch.full((len(x0),), i == steps - 1)  # [B]
            for variance, fixed in FRACTIONS.items():
                learned = prediction.variance_fraction  # [B, 3, H, W]
                fraction = learned if fixed is None else torch.full_like(learned, fixed)  # [B, 3, H, W]
                terms = variational_bound(rows, x0, x, prediction.x0.clamp(-1, 1), fraction, last)  # [B]
                totals[variance] += terms.sum().item()
    bar.advance(len(images))
    bar.close()
    return {variance: total / len(images) for variance, total in totals.items()}


def patches(images: list[Image.Image]) -> Tensor:
    """Return all patches of some pictures, each channel less its mean, float64 [n, 3 * PATCH**2]."""
    pixels = torch.stack([to_tensor(image) for image in images]).double()  # [N, 3, H, W]
    cut = F.unfold(pixels, PATCH).transpose(1, 2).flatten(0, 1).unflatten(1, (3, -1))  # [n, 3, PATCH**2]
    return (cut - cut.mean(2, keepdim=True)).flatten(1)  # [n, 3 * PATCH**2]


def frechet(a: Tensor, b: Tensor) -> float:
    """Return the Frechet distance of the normal distributions with the means and covariances of rows [n, D]."""
    (mean_a, cov_a), (mean_b, cov_b) = ((rows.mean(0), rows.T.cov()) for rows in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)  # [D], [D, D]
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # [D, D]
    product = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()  # []
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * product).item()


def sample(pipeline: Pipeline, captions: list[str], variance: str, steps: int, guidance: float) -> list[Image.Image]:
    """Return a picture for each caption; picture i has the seed i."""
    with Bar(f"{variance}, guidance {guidance:g}", "step") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.advance(done)

        ddpm = {"name": "ddpm", "steps": steps, "variance": variance}
        options = SamplingOptions(sampler=ddpm, guidance=guidance, batch_size=CHUNK)
        return pipeline([Prompt(text) for text in captions], options, progress=progress)


def main() -> None:
    """Parse the command line, measure, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--checkpoint", default="runs/glide_quickstart/ema.safetensors", metavar="FILE", help="default: %(default)s")
    add("--steps", type=int, default=25, metavar="N", help="default: %(default)s")
    add("--guidance", type=float, default=3.0, metavar="W", help="of the column 'right'; default: %(default)s")
    add("--drawings", type=int, default=256, metavar="N", help="default: %(default)s")
    add(
        "--variety",
        type=float,
        default=0.5,
        metavar="X",
        help="of the drawings; default: %(default)s, the quickstart's",
    )
    args = parser.parse_args()

    pipeline = Pipeline.from_checkpoint(args.checkpoint)
    model = pipeline.model
    images, _, captions = drawings(args.drawings, model.image_size[0], args.variety)
    bound = bits(model, args.steps, images, captions)
    names = list(COLORS)
    kinds = [(c, s, names[(i + 3) % len(names)]) for s in SHAPES for i, c in enumerate(names)]  # the 48 prompts
    prompts = [caption(Attributes(*kind, extent=0.65, x=0.5, y=0.5, angle=0.0), WORDINGS[0]) for kind in kinds]
    print(f"{args.steps} ancestral steps, {args.drawings} drawings, {len(prompts)} prompts")
    print(f"{'variance':12}{'bits':>10}{'texture':>10}{'right':>10}")
    for variance in FRACTIONS:
        texture = frechet(patches(sample(pipeline, captions, variance, args.steps, 1.0)), patches(images))
        read = [check(image)[:2] for image in sample(pipeline, prompts, variance, args.steps, args.guidance)]
        right = sum(seen == kind[:2] for seen, kind in zip(read, kinds)) / len(kinds)
        print(f"{variance:12}{bound[variance]:10.3f}{texture:10.4f}{right:10.1%}")


if __name__ == "__main__":
    run_program(main)
