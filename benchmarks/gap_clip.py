"""A small CLIP with a gap between its texts and images, for `gap.py`, trained with InfoNCE on the built-in shapes.

    python benchmarks/gap_clip.py --out runs/gap/clip.safetensors

What leaves a gap (Liang et al. 2022, arXiv 2203.02053): towers that begin in two narrow cones, and a low temperature,
at which the loss is content as soon as a pair is a little nearer than all others. Both are chosen here: the cones begin
on opposite sides, and nothing pushes the clouds apart during training.

The image tower is the quickstart's, moved into its cone, and stays so (locked-image tuning, Zhai et al. 2022, arXiv
2111.07991); the text tower begins with random weights. So it tells a network as much of an image as CLOOB does, and
rows of the benchmark differ in the gap alone. One that begins with random weights, too, tells colors apart, and shapes
hardly (docs/measured.md).
"""

import argparse
import random
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from quickstart_accuracy import EVERY, say

from ldm_lab.checkpoints.native import save_part
from ldm_lab.checkpoints.parts import load_part
from ldm_lab.conditioners.cloob import CLOOB
from ldm_lab.config import PartConfig, load
from ldm_lab.data.shape_wordings import WORDINGS
from ldm_lab.data.shapes import draw, random_caption
from ldm_lab.errors import run_program
from ldm_lab.io.images import to_tensor
from ldm_lab.progress import Bar
from ldm_lab.training.cloob import agreement

IMAGE_TOWER = "configs/quickstart.yaml"  # whose conditioner's image tower is begun with
CONFIG = "configs/quickstart_cloob_text.yaml"  # of the towers
OPTIONS = ("conditioner.text_size=20",)  # the usual wordings have at most 17 tokens
IMAGES_APART = 2.1  # length of what is added to the image tower's outputs, of their own mean length
TEXTS_APART = 20.0  # the same of the text tower, whose first outputs have a length of about 1
INV_TAU = 35.0  # inverse temperature: the lower the temperature, the less there is to gain by closing the gap
SEED = "gap_clip"  # of the drawings
BATCH, VARIETY, PAIRS, STEPS, RATE = 128, 0.5, 20_000, 2400, 2e-3
ROOT = Path(__file__).resolve().parents[1]


class Drawings(NamedTuple):
    """Drawings with their captions: uint8 [N, 3, S, S], N texts."""

    images: Tensor
    texts: list[str]


def drawings(count: int, seed: str, size: int) -> Drawings:
    """Return drawings that no data set of the quickstart has."""
    images, texts = [], []
    for i in range(count):
        rng = random.Random(f"{SEED}/{seed}/{i}")
        image, attributes = draw(rng, size, VARIETY)
        images.append(((to_tensor(image) + 1) * 127.5).round().to(torch.uint8))
        texts.append(random_caption(attributes, rng))
    return Drawings(torch.stack(images), texts)


def as_floats(images: Tensor) -> Tensor:
    """Return images uint8 [B, 3, S, S] in [-1, 1]."""
    return images.float() / 127.5 - 1


def section() -> PartConfig:
    """Return the section of the towers."""
    return load(ROOT / CONFIG, OPTIONS)["conditioner"]


@torch.no_grad()
def begun(images: Tensor) -> CLOOB:
    """Return towers in cones of their own, the image tower the quickstart's, the text tower with random weights.

    Args:
        images: some, [n, 3, H, W] in [-1, 1], by which the cone of images is told.
    """
    good: CLOOB = load_part("conditioner", load(ROOT / IMAGE_TOWER)["conditioner"])
    model: CLOOB = section().build()
    model.image_encoder.load_state_dict(good.image_encoder.state_dict())
    length = model.encode_pixels(images).norm(dim=1).mean()  # []
    direction = F.normalize(torch.randn(model.embed_dim), dim=0)  # [D]
    model.image_encoder.proj.bias += IMAGES_APART * length * direction
    model.text_encoder.proj.bias -= TEXTS_APART * direction
    return model


def train(data: Drawings, steps: int, lr: float) -> CLOOB:
    """Return the towers, the text tower trained with InfoNCE on pairs (Radford et al. 2021, arXiv 2103.00020)."""
    model = begun(as_floats(data.images[:500]))
    tower = model.text_encoder
    with torch.no_grad():
        images = torch.cat([model.encode_image(as_floats(some)) for some in data.images.split(500)])  # [N, D]
    decayed = [p for p in tower.parameters() if p.ndim > 1]
    rest = [p for p in tower.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.05)
    tokens = model.tokenize(data.texts)  # [N, L]
    with Bar("train", "step", steps) as bar:
        for step in range(steps):
            rows = torch.randint(len(tokens), (BATCH,))  # [B]
            text = F.normalize(model.encode_tokens(tokens[rows]), dim=-1)  # [B, D]
            logits = INV_TAU * images[rows] @ text.T  # [B, B]
            same = torch.arange(BATCH)  # [B]
            loss = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.advance(step + 1)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def judge(model: CLOOB, count: int = 1000) -> dict[str, float]:
    """Return what fresh drawings say of the towers: cosines of pairs, and the share read right among 336 captions."""
    fresh = drawings(count, "fresh", 64)
    image = model.encode_image(as_floats(fresh.images))  # [N, D]
    text = model.encode_text(fresh.texts)  # [N, D]
    said = model.encode_text([say(names, WORDINGS[0]) for names in EVERY])  # [336, D]
    best = [EVERY[i] for i in (image @ said.T).argmax(1).tolist()]
    right = sum(
        all(name in text.split() or f"{name}," in text for name in names) for names, text in zip(best, fresh.texts)
    )
    found = {key: float(value) for key, value in agreement(image, text).items()}
    return {"read right": right / count, **found}


def trained_clip(path: Path, steps: int) -> Path:
    """Return the file of a trained one, training it if it is not there."""
    if not path.exists():
        torch.manual_seed(0)
        model = train(drawings(PAIRS, "pairs", 64), steps, RATE)
        for name, value in judge(model).items():
            print(f"{name:16} {value:.3f}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_part(path, model, section().to_dict())
    return path


def main() -> None:
    """Parse the command line, train, judge, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", default="runs/gap/clip.safetensors", metavar="FILE", help="default: %(default)s")
    add("--steps", type=int, default=STEPS, metavar="N", help="optimizer steps; default: %(default)s")
    args = parser.parse_args()
    trained_clip(Path(args.out), args.steps)


if __name__ == "__main__":
    run_program(main)
