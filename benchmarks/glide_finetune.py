"""Whether fine-tuning the quickstart GLIDE for a tenth of its steps adapts it to pictures of other colors.

    python benchmarks/glide_finetune.py --checkpoint runs/glide_quickstart/ema.safetensors

The other pictures are the built-in shapes with their channels swapped under the same captions, so that what is called
red is green there, and so on round the wheel; black and white stay. `train.py` does the fine-tuning, with `init_from`:
once of all parts, once with the text transformer frozen, and once with the U-Net frozen, where what is frozen has to be
left bit for bit as it was. Columns: the share of 48 prompts that come out as on the other pictures.
"""

import argparse
import io
import itertools
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from quickstart_accuracy import Names, kinds, say, shares

from ldm_lab.data.shape_wordings import WORDINGS
from ldm_lab.data.shapes import draw, random_caption
from ldm_lab.data.tar import write_shard
from ldm_lab.errors import UserError, run_program
from ldm_lab.evaluation.shapes_checker import check
from ldm_lab.sampling import Pipeline, SamplingOptions

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "glide_quickstart.yaml"
COUNT, SHARDS, PER_SHARD = 48, 4, 500
SIZE, VARIETY, TRAINED = 32, 0.25, 4  # pixels, variety and wordings of CONFIG
TURN = {"red": "green", "green": "blue", "blue": "red", "yellow": "cyan", "cyan": "magenta", "magenta": "yellow"}
FROZEN = {"all parts": [], "text transformer frozen": ["text_transformer"], "U-Net frozen": ["unet"]}
TEXT = ("token_embedding", "positional_", "padding_", "transformer.", "final_ln", "transformer_proj")


def turned(names: Names) -> Names:
    """Return what the pictures of a caption with these names show in the shifted set."""
    color, shape, background = names
    return TURN.get(color, color), shape, TURN.get(background, background)


def samples(shard: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the samples of a shard of the shifted set."""
    for i in range(PER_SHARD):
        rng = random.Random(f"shifted/{shard}/{i}")
        image, attributes = draw(rng, SIZE, VARIETY)
        red, green, blue = image.split()
        encoded = io.BytesIO()
        Image.merge("RGB", (blue, red, green)).save(encoded, "PNG")
        yield f"{shard:05}{i:04}", {"png": encoded.getvalue(), "txt": random_caption(attributes, rng, TRAINED).encode()}


def part_of(tensor: str) -> str | None:
    """Return which freeze group a tensor of the denoiser is in, as `GlideUNet.freeze_groups` has them."""
    if tensor.startswith(TEXT):
        return "text_transformer"
    return None if ".encoder_kv." in tensor else "unet"


def measure(checkpoint: Path) -> list[float]:
    """Return the shares of color, shape, background, and all three that are right by the shifted set."""
    wanted = kinds()[:COUNT]
    texts = [say(names, wording) for names, wording in zip(wanted, itertools.cycle(WORDINGS[:TRAINED]))]
    options = SamplingOptions(sampler={"name": "ddim", "steps": 25}, batch_size=COUNT)
    pictures = Pipeline.from_checkpoint(checkpoint)(texts, options)
    return shares([tuple(check(picture)) for picture in pictures], map(turned, wanted))


def main() -> None:
    """Parse the command line, write the shifted set, fine-tune, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--checkpoint", default="runs/glide_quickstart/ema.safetensors", metavar="FILE", help="default: %(default)s")
    add("--steps", type=int, default=300, metavar="N", help="optimizer steps; default: %(default)s, a tenth")
    add("--lr", default="5e-4", metavar="X", help="learning rate; default: %(default)s")
    add("--folder", default="data/shapes_shifted", metavar="DIR", help="of the shifted set; default: %(default)s")
    args = parser.parse_args()
    folder, checkpoint = Path(args.folder), Path(args.checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(SHARDS):
        write_shard(folder / f"{shard:05}.tar", samples(shard))
    before = load_file(checkpoint)
    print(f"{'share right, shifted':28}{'color':>10}{'shape':>10}{'background':>12}{'all three':>11}")

    def row(name: str, path: Path) -> None:
        color, shape, background, everything = measure(path)
        print(f"{name:28}{color:10.1%}{shape:10.1%}{background:12.1%}{everything:11.1%}", flush=True)

    row("before", checkpoint)
    for name, parts in FROZEN.items():
        run = "glide_shifted_" + (parts[0] if parts else "all")
        shutil.rmtree(Path("runs") / run, ignore_errors=True)  # of an earlier measurement
        command = [
            *(sys.executable, str(ROOT / "train.py"), "--config", str(CONFIG), f"run={run}", f"init_from={checkpoint}"),
            *("data.name=webdataset", f"data.shards={folder}/*.tar", f"optim.freeze=[{','.join(parts)}]"),
            *(f"trainer.max_steps={args.steps}", f"optim.lr={args.lr}", "optim.warmup_steps=20", "demo=null"),
            *("ema.from_step=[0,100]", "ema.decay=[0.9,0.98]"),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{run}: {done.stderr.strip().splitlines()[-1]}")
        path = Path("runs") / run / "ema.safetensors"
        row(name, path)
        after = load_file(path)
        changed = [key for key in before if not torch.equal(before[key], after[key])]
        print(f"    {len(changed)} of {len(before)} tensors changed")
        for part in parts:
            moved = [key for key in changed if part_of(key) == part]
            print(f"    {part}: " + (f"NOT as it was: {', '.join(moved[:3])}" if moved else "bit for bit as it was"))


if __name__ == "__main__":
    run_program(main)
