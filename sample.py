"""Make pictures with a trained model.

    python sample.py --checkpoint runs/quickstart/ema.safetensors "a red star on a blue background"
    python sample.py --checkpoint F "a lighthouse:3" "watercolor:1.5" "blurry:-0.5" -n 16   one mix of three, 16 times
    python sample.py --checkpoint F --prompts configs/demo_prompts.txt                      a picture for each line
    python sample.py --checkpoint F "in the snow" --images fox.jpg:2 --sampler ddim --steps 100 --eta 0.5

Prompts on the command line, texts and images alike, are mixed with each other. The lines of a --prompts file are
pictures of their own; prompts on the command line are then mixed into each of them.

A prompt may have a weight, written text:weight; without one it has that of --guidance. Weight 1 is the plain model,
more exaggerates, less than 0 leads away. What follows the last colon is a weight if it is a finite number; a backslash
before the colon makes it text, as in "meet at 12\\:30". A model without a conditioner takes "" with --guidance 1.

Picture i has the seed SEED + i and depends on that, its own prompts and the settings alone, not on the batch size. It
is written as 00000.png, 00001.png, ... with its settings as metadata; samples.json lists them all, grid.png shows them.
In a folder that has pictures already, numbers and list go on, and the grid is named after its first picture: nothing is
overwritten.
"""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

from ldm_lab.errors import UserError, run_program

GRID_LIMIT = 400  # pictures; of more the grid shows the first ones


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> None:
        """Raise UserError."""
        raise UserError(f"{message} (--help explains)")


def parser() -> Parser:
    """Return the command line's description."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("texts", nargs="*", metavar="PROMPT", help="text or text:weight; several are mixed")
    add("--checkpoint", required=True, metavar="FILE", help="a run's ema.safetensors, or one of its .ckpt files")
    add("--prompts", metavar="FILE", help="UTF-8 text, a picture for each line; only blank lines are dropped")
    add(
        "--images", nargs="+", default=[], metavar="IMAGE", help="image prompts: paths, http(s) addresses; also :weight"
    )
    add("-n", type=positive, metavar="N", help="pictures of the mix, or of each line of --prompts (default: 4, or 1)")
    add("--guidance", type=finite, default=3.0, metavar="W", help="weight of prompts without one (default: 3)")
    add("--sampler", default="plms", metavar="NAME", help="ddim, ddpm, iplms, pie, plms, plms2, prk (default: plms)")
    add("--steps", type=positive, default=50, metavar="N", help="steps of the sampler (default: 50)")
    add("--eta", type=finite, metavar="X", help="of ddim: fresh noise in each step, from 0 to 1 (default: 0)")
    add("--seed", type=natural, default=0, metavar="SEED", help="seed of the first picture (default: 0)")
    add("--size", metavar="PIXELS", help="256, or 384x256 for width x height (default: as trained)")
    add("--out", default="samples", metavar="DIR", help="where the pictures go (default: samples)")
    add("--batch-size", type=positive, default=16, metavar="N", help="pictures at once (default: 16)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps, ... (default: the accelerator, if there is one)")
    add("--autoencoder", metavar="FILE", help="its weights, if they are not where the checkpoint says")
    add("--conditioner", metavar="FILE", help="its weights, if they are not where the checkpoint says")
    return p


def natural(written: str) -> int:
    """Return a whole number from 0 on that has room to count on in 64 bits."""
    if not (written.isascii() and written.isdigit() and int(written) < 2**62):
        raise argparse.ArgumentTypeError(f"a whole number from 0 on is needed, not {written!r}")
    return int(written)


def positive(written: str) -> int:
    """Return a whole number from 1 on."""
    if not (written.isascii() and written.isdigit() and 0 < int(written) < 2**31):
        raise argparse.ArgumentTypeError(f"a whole number from 1 on is needed, not {written!r}")
    return int(written)


def finite(written: str) -> float:
    """Return a finite number."""
    try:
        value = float(written)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"a number is needed, not {written!r}")
    return value


def main() -> int:
    """Parse the command line, make the pictures."""
    args = parser().parse_intermixed_args()

    from ldm_lab.images import grid, parse_size  # not before: these import torch, which takes seconds
    from ldm_lab.prompts import parse_image_prompt, parse_prompt, read_prompts

    size = parse_size(args.size) if args.size else None
    folder = Folder(Path(args.out))
    common = [parse_prompt(text) for text in args.texts] + [parse_image_prompt(image) for image in args.images]
    if args.prompts:
        mixes = [[parse_prompt(line), *common] for line in read_prompts(args.prompts)]
    elif common:
        mixes = [common]
    else:
        raise UserError("no prompt: give a text, --images IMAGE or --prompts FILE (--help explains)")
    each = args.n or (1 if args.prompts else 4)
    mixes = [mix for mix in mixes for _ in range(each)]

    import torch
    from tqdm import tqdm

    from ldm_lab.checkpoints.files import sha256
    from ldm_lab.sampling import Sampler

    device = pick_device(args.device)
    section = {"name": args.sampler, "steps": args.steps, **({} if args.eta is None else {"eta": args.eta})}
    model = Sampler.from_checkpoint(
        args.checkpoint, autoencoder=args.autoencoder, conditioner=args.conditioner, device=device
    )
    settings = {
        "sampler": args.sampler,
        **{key: value for key, value in section.items() if key != "name"},
        "guidance": args.guidance,
        "checkpoint": args.checkpoint,
        "checkpoint_sha256": sha256(args.checkpoint),
    }
    images, captions = [], [" + ".join(map(str, mix)) for mix in mixes]
    with tqdm(desc=f"{len(mixes)} pictures", unit="step") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        batches = model.batches(
            mixes,
            seeds=range(args.seed, args.seed + len(mixes)),
            guidance=args.guidance,
            sampler=section,
            size=size,
            batch_size=args.batch_size,
            progress=progress,
        )
        try:
            for batch in batches:
                for image in batch:
                    i = len(images)
                    prompts = [describe(prompt, args.guidance) for prompt in mixes[i]]
                    folder.add(image, captions[i], {"prompts": prompts, "seed": args.seed + i, **settings})
                    images.append(image)
                folder.write_list()
        except torch.OutOfMemoryError:
            raise UserError(f"{device}: out of memory; try less than --batch-size {args.batch_size}") from None
    columns = each if args.prompts and each > 1 else None  # a row for each line of the file
    shown = slice(GRID_LIMIT)
    path = folder.add_grid(grid(images[shown], columns, captions[shown]))
    print(f"{len(images)} pictures from {folder.name(0)} on and {path.name} in {folder.path}")
    return 0


def pick_device(name: str | None) -> Any:
    """Return the torch device of a name, or the accelerator if there is one. Raises UserError for one not here."""
    import torch

    if name is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None


def describe(prompt: Any, guidance: float) -> dict[str, Any]:
    """Return a prompt as it stands in samples.json, with the weight that it really had."""
    kind = "text" if prompt.image is None else "image"
    return {kind: prompt.text, "weight": guidance if prompt.weight is None else prompt.weight}


class Folder:
    """A folder of numbered pictures, the list of their settings, and grids; what is there already stays."""

    def __init__(self, path: Path) -> None:
        """Look for what is there; nothing is written yet. Raises UserError for a list that is none of ours."""
        self.path, self.list_path = path, path / "samples.json"
        self.entries: list[dict[str, Any]] = []
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {path}: this is a file, not a folder")
        if self.list_path.exists():
            try:
                self.entries = json.loads(self.list_path.read_text(encoding="utf-8"))
            except (ValueError, OSError):
                self.entries = None
            if not isinstance(self.entries, list):
                raise UserError(f"{self.list_path}: not a list of samples; move it away, or choose another --out")
        taken = [match for file in path.glob("*.png") if (match := re.fullmatch(r"(?:grid_)?(\d+)\.png", file.name))]
        self.first = max((int(match[1]) + 1 for match in taken), default=0)
        self.count = 0

    def name(self, i: int) -> str:
        """Return the file name of this run's picture i."""
        return f"{self.first + i:05d}.png"

    def add(self, image: Any, caption: str, entry: dict[str, Any]) -> None:
        """Write the next picture, with its settings as metadata, and remember them for the list."""
        from ldm_lab.images import save_png

        name = self.name(self.count)
        entry = {"file": name, **entry, "width": image.width, "height": image.height}
        save_png(self.path / name, image, {"Description": caption, "Software": "ldm_lab", "ldm_lab": json.dumps(entry)})
        self.entries.append(entry)
        self.count += 1

    def write_list(self) -> None:
        """Write samples.json."""
        from ldm_lab.checkpoints.files import atomic_write

        with atomic_write(self.list_path) as file:
            file.write(json.dumps(self.entries, indent=2, ensure_ascii=False).encode())

    def add_grid(self, picture: Any) -> Path:
        """Write a grid of this run's pictures and return its path."""
        from ldm_lab.images import save_png

        free = self.first == 0 and not (self.path / "grid.png").exists()
        path = self.path / ("grid.png" if free else f"grid_{self.first:05d}.png")
        save_png(path, picture, {"Software": "ldm_lab"})
        return path


if __name__ == "__main__":
    run_program(main)
