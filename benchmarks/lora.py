"""What LoRA adapts, by how many parameters, and what it leaves as it was, on the two quickstart models.

    python benchmarks/lora.py                       both, about 20 minutes on two cores
    python benchmarks/lora.py --only glide
    python benchmarks/lora.py --only ccld

glide   the quickstart GLIDE, on pictures of the same captions with their channels swapped (`glide_finetune.py`): the
        share of 48 prompts that come out as on those. The U-Net alone is added to, and what it reads the text by.
ccld    the quickstart U-Net, which sees no captions, on shapes that always lie up and to the left. That is no more than
        they vary anyway, and CLOOB hardly tells: the cosine of the embeddings of a picture and the same one with its
        shape moved is printed first. Then the share of pictures with the shape there, and those of color, shape and
        background as `quickstart_accuracy.py` has them, before and after.

`train.py` trains; the last row of each is the base model with the LoRA given and its weight 0, whose pictures have to
be the base model's byte for byte.
"""

import argparse
import io
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

import glide_finetune
from quickstart_accuracy import VARIETY, kinds, prompts, shares

from ldm_lab.checkpoints.lora import read_lora
from ldm_lab.checkpoints.models import read_model
from ldm_lab.data.shape_wordings import WORDINGS
from ldm_lab.data.shapes import COLORS, JITTER, MARGIN, Attributes, draw, render
from ldm_lab.data.tar import write_shard
from ldm_lab.errors import UserError, run_program
from ldm_lab.evaluation.shapes_checker import check
from ldm_lab.io.images import to_tensor
from ldm_lab.prompts import Prompt
from ldm_lab.sampling import ModelOptions, Pipeline, SamplingOptions

ROOT = Path(__file__).resolve().parents[1]
SHARDS, PER_SHARD, SIZE = 4, 500, 64
FARTHEST = (0.7, 1.0)  # of the way that a shape's place varies, up and to the left
THERE = 0.4  # of that way: a shape that is at least so far up and to the left is there
PAIRS = 200  # whose embeddings are compared


def way(box: float) -> float:
    """Return how far a shape's middle may be off the image's in the quickstart's data, as a share of the side.

    Args:
        box: width or height of its bounding box, as a share of the image's side.
    """
    return VARIETY * (0.5 - MARGIN - box / 2)


def moved(attributes: Attributes, image: Image.Image, rng: random.Random) -> Attributes:
    """Return the attributes of a picture with the shape up and to the left."""
    left, top, right, bottom = bounding_box(image)
    low, high = FARTHEST
    x, y = (
        0.5 - way(box) * (low + (high - low) * rng.random()) for box in ((right - left) / SIZE, (bottom - top) / SIZE)
    )
    return attributes._replace(x=x, y=y)


def bounding_box(image: Image.Image) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of what is not background, pixels."""
    pixels = np.asarray(image.convert("RGB")).astype(float)  # [H, W, 3]
    frame = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)])  # [2 * 2 * W, 3]
    distance = np.linalg.norm(pixels - np.median(frame, axis=0), axis=-1)  # [H, W]
    inside = distance > 0.5 * np.quantile(distance, 0.95)  # [H, W]
    rows, columns = (np.flatnonzero(inside.sum(axis) >= 2) for axis in (1, 0))
    if not len(rows) or not len(columns):
        return 0, 0, image.width, image.height
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def is_there(image: Image.Image) -> bool:
    """Return whether a picture has its shape up and to the left."""
    left, top, right, bottom = (side / image.width for side in bounding_box(image))
    x, y = (left + right) / 2, (top + bottom) / 2
    return 0.5 - x >= THERE * way(right - left) and 0.5 - y >= THERE * way(bottom - top)


def drawn(seed: str) -> tuple[Image.Image, Image.Image]:
    """Return a drawing, and the same with its shape moved."""
    rng = random.Random(seed)
    image, attributes = draw(rng, SIZE, VARIETY)
    shades = [
        tuple(min(max(round(level + VARIETY * JITTER * (2 * rng.random() - 1)), 0), 255) for level in COLORS[name])
        for name in (attributes.color, attributes.background)
    ]
    return render(attributes, SIZE, *shades), render(moved(attributes, image, rng), SIZE, *shades)


def samples(shard: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the samples of a shard of moved shapes, without captions."""
    for i in range(PER_SHARD):
        encoded = io.BytesIO()
        drawn(f"moved/{shard}/{i}")[1].save(encoded, "PNG")
        yield f"{shard:05}{i:04}", {"png": encoded.getvalue()}


def train(config: str, run: str, base: Path, words: list[str]) -> Path:
    """Train a LoRA by the quickstart's YAML with other words; return its file."""
    shutil.rmtree(Path("runs") / run, ignore_errors=True)  # of an earlier measurement
    command = [
        *(sys.executable, str(ROOT / "train.py"), "--config", str(ROOT / "configs" / config), f"run={run}"),
        *(f"init_from={base}", "demo=null", "ema.from_step=[0,50,200]", "ema.decay=[0.9,0.98,0.99]", *words),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{run}: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}")
    return Path("runs") / run / "lora.safetensors"


def size_of(path: Path, base: Path) -> str:
    """Return what a LoRA has of parameters and bytes, in words."""
    added = sum(a.numel() + b.numel() for a, b in read_lora(path).layers.values())
    total = sum(value.numel() for value in read_model(base).state.values())
    return f"{added:,} parameters, {added / total:.1%} of {total:,}; {path.stat().st_size / 1000:,.0f} kB"


def same(one: list[Image.Image], other: list[Image.Image]) -> str:
    """Return whether two lists of pictures are the same byte for byte, in words."""
    equal = sum(a.tobytes() == b.tobytes() for a, b in zip(one, other))
    return f"{equal} of {len(one)} pictures byte for byte the base model's"


def glide(args: argparse.Namespace) -> None:
    """Measure the LoRA of the GLIDE."""
    base, folder = Path(args.glide), Path("data/shapes_shifted")
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(glide_finetune.SHARDS):
        write_shard(folder / f"{shard:05}.tar", glide_finetune.samples(shard))
    words = ["data.name=webdataset", f"data.shards={folder}/*.tar", f"trainer.max_steps={args.steps}"]
    words += [f"lora.rank={args.rank}", f"optim.lr={args.lr}", "optim.warmup_steps=20", *args.words]
    words += [] if any("lora.targets" in word for word in args.words) else ["lora.targets=[unet,encoder_kv]"]
    path = train("glide_quickstart.yaml", "glide_lora", base, words)
    wanted = kinds()[: glide_finetune.COUNT]
    trained = WORDINGS[: glide_finetune.TRAINED]
    texts = [Prompt(text) for text in prompts(trained)[: glide_finetune.COUNT]]
    options = SamplingOptions(sampler={"name": "ddim", "steps": 25}, batch_size=glide_finetune.COUNT)
    print(f"glide, rank {args.rank}, {args.steps} steps: {size_of(path, base)}")
    print(f"{'share right, swapped':24}{'color':>10}{'shape':>10}{'background':>12}{'all three':>11}")
    pictures = {}
    for row, weight in (("base model", None), ("with the LoRA", 1.0), ("with its weight 0", 0.0)):
        loras = [] if weight is None else [f"{path}:{weight}"]
        pictures[row] = Pipeline.from_checkpoint(base, ModelOptions(lora=loras))(texts, options)
        read = [tuple(check(picture)) for picture in pictures[row]]
        right = shares(read, map(glide_finetune.turned, wanted))
        print(f"{row:24}{right[0]:10.1%}{right[1]:10.1%}{right[2]:12.1%}{right[3]:11.1%}", flush=True)
    print(same(pictures["base model"], pictures["with its weight 0"]))


def ccld(args: argparse.Namespace) -> None:
    """Measure the LoRA of the U-Net without captions."""
    base, folder = Path(args.ccld), Path("data/shapes_moved")
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(SHARDS):
        write_shard(folder / f"{shard:05}.tar", samples(shard))
    compare_embeddings(base)
    shown = f"name: webdataset, shards: '{folder}/*.tar', image_size: {SIZE}, batch_size: 32, workers: 1"
    words = [f"data={{{shown}}}"]
    words += [f"trainer.max_steps={args.steps}", "cache.folder=data/shapes_moved_cache"]
    words += [f"lora.rank={args.rank}", f"optim.lr={args.lr}", "optim.warmup_steps=20", *args.words]
    path = train("quickstart.yaml", "quickstart_lora", base, words)
    texts = [Prompt(text) for text in prompts(WORDINGS)]
    options = SamplingOptions(guidance=3.0, sampler={"name": "plms", "steps": 50}, batch_size=48)
    print(f"ccld, rank {args.rank}, {args.steps} steps: {size_of(path, base)}")
    print(f"{'share':24}{'up, left':>10}{'color':>10}{'shape':>10}{'background':>12}{'all three':>11}")
    pictures = {}
    for row, weight in (("base model", None), ("with the LoRA", 1.0), ("with its weight 0", 0.0)):
        loras = [] if weight is None else [f"{path}:{weight}"]
        pictures[row] = Pipeline.from_checkpoint(base, ModelOptions(lora=loras))(texts, options)
        right = shares([tuple(check(picture)) for picture in pictures[row]], kinds())
        there = sum(map(is_there, pictures[row])) / len(texts)
        print(f"{row:24}{there:10.1%}{right[0]:10.1%}{right[1]:10.1%}{right[2]:12.1%}{right[3]:11.1%}", flush=True)
    print(same(pictures["base model"], pictures["with its weight 0"]))


@torch.no_grad()
def compare_embeddings(base: Path) -> None:
    """Print how alike CLOOB finds a picture and the same one with its shape moved."""
    cloob = Pipeline.from_checkpoint(base).model.conditioner
    pairs = [drawn(f"pair/{i}") for i in range(PAIRS)]
    before, after = (cloob.encode_image(torch.stack([to_tensor(p[i]) for p in pairs])) for i in (0, 1))  # [n, D] each
    cosines = (before * after).sum(1)  # [n]
    there = sum(is_there(after) for _, after in pairs), sum(is_there(before) for before, _ in pairs)
    print(f"drawings with the shape up and to the left, by the checker: {there[0]} of the {PAIRS} moved, {there[1]} of "
          f"the {PAIRS} others")  # fmt: skip
    print(f"cosine of the two: mean {cosines.mean():.3f}, above 0.95 for {(cosines > 0.95).float().mean():.0%}, least "
          f"{cosines.min():.3f}", flush=True)  # fmt: skip


def main() -> None:
    """Parse the command line, measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--only", choices=("glide", "ccld"), help="one of the two")
    add("--glide", default="runs/glide_quickstart/ema.safetensors", metavar="FILE", help="default: %(default)s")
    add("--ccld", default="runs/quickstart/ema.safetensors", metavar="FILE", help="default: %(default)s")
    add("--steps", type=int, metavar="N", help="optimizer steps; default: 450 of glide, 300 of ccld")
    add("--rank", type=int, default=4, metavar="N", help="default: %(default)s")
    add("--lr", metavar="X", help="learning rate; default: 5e-3 of glide, 2e-3 of ccld")
    add("words", nargs="*", metavar="KEY=VALUE", help="further words for train.py")
    args = parser.parse_args()
    for name, measure, steps, lr in (("glide", glide, 450, "5e-3"), ("ccld", ccld, 300, "2e-3")):
        if args.only in (None, name):
            measure(argparse.Namespace(**{**vars(args), "steps": args.steps or steps, "lr": args.lr or lr}))


if __name__ == "__main__":
    run_program(main)
