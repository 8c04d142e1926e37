"""Make pictures with a trained model.

    python sample.py --checkpoint runs/quickstart/ema.safetensors "a red star on a blue background"
    python sample.py --checkpoint F "a lighthouse:3" "watercolor:1.5" "blurry:-0.5" -n 16   one mix of three, 16 times
    python sample.py --checkpoint F --prompts configs/demo_prompts.txt                      a picture for each line
    python sample.py --checkpoint F "in the snow" --images fox.jpg:2 --sampler ddim --steps 100 --eta 0.5
    python sample.py --checkpoint F --images fox.jpg -n 9                                   variations of a picture
    python sample.py --checkpoint F "a fox" --init-image dog.jpg --strength 0.6             image to image
    python sample.py --checkpoint F "a hat" --init-image dog.jpg --mask hat.png             inpainting
    python sample.py --checkpoint F "a fox" "a dog" --interpolate 16                        from one to the other
    python sample.py --checkpoint F "a fox" --upsampler G                                   small pictures, then large

Prompts on the command line, texts and images alike, are mixed with each other. The lines of a --prompts file are
pictures of their own; prompts on the command line are then mixed into each of them.

A prompt may have a weight, written text:weight; without one it has that of --guidance. Weight 1 is the plain model,
more exaggerates, less than 0 leads away. What follows the last colon is a weight if it is a finite number; a backslash
before the colon makes it text, as in "meet at 12\\:30". A model without a conditioner takes "" with --guidance 1.

Picture i has the seed SEED + i and depends on that, its own prompts and the settings alone, not on the batch size. It
is written as 00000.png, 00001.png, ... with its settings as metadata; samples.json lists them all, grid.png shows them.
In a folder that has pictures already, numbers and list go on, and the grid is named after its first picture: nothing is
overwritten. With an --upsampler each picture is kept at both sizes, as 00000_base.png and 00000.png.
"""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

from ldm_lab.errors import UserError, first_line, run_program

GRID_LIMIT = 400  # pictures; of more the grid shows the first ones
SAMPLER = "unipc"  # nearest to the converged picture for its model calls (docs/measured.md)
SAMPLERS = "ddim, ddim_extrapolated, ddpm, dpmpp_2m, dpmpp_2m_sde, euler, heun, iplms, pie, plms, plms2, prk, unipc"
INTERVAL = "guide between these two times only; 0 is the finished picture, 1 is noise (default: 0 1)"
RESCALE = "bring the spread of guided predictions back, against burnt colours: 0 to 1 (default: 0)"
STEPS = "; of a model with timesteps also fast27, ddim50, 10,10,3,2,2, ..."
CLAMP = "keep clean estimates within [-1, 1], or not (default: for models of pixels)"
CLIP = "make pictures more like their texts in the eyes of a noised CLIP: factor of its gradient (GLIDE's: 3)"
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SAMPLER_KEYS = ("steps", "eta", "spacing", "variance", "variant")
UPSAMPLER_KEYS = ("upsampler_sampler", "upsampler_steps", "upsample_temp", "upsampler_guidance")
STRENGTH, GUIDANCE, TEMPERATURE = 0.7, 3.0, 0.997


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
    add("--guidance", type=finite, metavar="W", help="weight of prompts without one (default: 3; with a CLIP's: 1)")
    add("--negative", metavar="TEXT", help="what guidance leads away from; by default: from no prompt at all")
    add("--guidance-interval", nargs=2, type=finite, default=[0.0, 1.0], metavar="T", help=INTERVAL)
    add("--guidance-rescale", type=finite, default=0.0, metavar="X", help=RESCALE)
    add("--autoguidance", metavar="FILE", help="guide away from this worse checkpoint instead, such as an earlier one")
    add("--aesthetic", type=natural, metavar="K", help="lead texts to the images of rating K, such as 9 of 0 to 9")
    add("--aesthetic-weight", type=finite, metavar="W", help="how strongly; negative leads away (default: 0.5)")
    add(
        "--aesthetic-embeddings", metavar="FILE", help="of `rating-embeddings`, a folder of LAION's, or a released name"
    )
    add("--sampler", default=SAMPLER, metavar="NAME", help=f"{SAMPLERS} (default: %(default)s)")
    add("--steps", type=steps, metavar="N", help=f"steps of the sampler (default: its own; unipc 20, plms 50){STEPS}")
    add("--spacing", metavar="NAME", help="how the steps are spread: log_snr, karras, uniform, ... (most samplers)")
    add("--eta", type=finite, metavar="X", help="of ddim, dpmpp_2m_sde: fresh noise in each step, from 0 to 1")
    add("--variance", metavar="NAME", help="of ddpm: learned (default), posterior, beta")
    add("--variant", metavar="NAME", help="of plms, prk: pndm (default), or glide, as the programs around GLIDE walk")
    add("--clamp", action=argparse.BooleanOptionalAction, help=CLAMP)
    add("--init-image", metavar="IMAGE", help="begin with this picture instead of noise alone")
    add(
        "--strength",
        type=finite,
        metavar="X",
        help="share of the steps that it goes through: 0 to 1 (default: 0.7; 1 with --mask)",
    )
    add("--mask", metavar="IMAGE", help="of the --init-image's size: only what is white here is painted anew")
    add(
        "--interpolate",
        type=positive,
        metavar="N",
        help="N pictures on the way from each PROMPT to the next; strip.png, film.gif",
    )
    add(
        "--rerank",
        type=positive,
        default=1,
        metavar="K",
        help="make K pictures for each, keep the one most like its prompts",
    )
    add("--upsampler", metavar="FILE", help="enlarge the pictures with this model; both sizes are kept")
    add("--upsampler-sampler", metavar="NAME", help="how (default: ddim)")
    add("--upsampler-steps", type=steps, metavar="N", help=f"its steps (default: fast27, or 27){STEPS}")
    add("--upsample-temp", type=finite, metavar="X", help="factor of the noise that it starts from (default: 0.997)")
    add("--upsampler-guidance", type=finite, metavar="W", help="weight of its prompts (default: 1, no guidance)")
    add("--clip-guidance", type=finite, metavar="X", help=CLIP)
    add("--noised-clip", nargs=2, metavar="FILE", help="its image and its text tower (default: GLIDE's, released)")
    add("--seed", type=natural, default=0, metavar="SEED", help="seed of the first picture (default: 0)")
    add("--size", metavar="PIXELS", help="256, or 384x256 for width x height (default: as trained)")
    add("--out", default="samples", metavar="DIR", help="where the pictures go (default: samples)")
    add("--batch-size", type=positive, default=16, metavar="N", help="pictures at once (default: 16)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps, ... (default: the accelerator, if there is one)")
    add("--precision", choices=list(PRECISIONS), default="fp32", help="of the denoiser's arithmetic (default: fp32)")
    add("--compile", action="store_true", help="compile the denoiser: slow to start, faster for many pictures")
    add("--low-memory", action="store_true", help="keep each part on the device only while it works")
    add("--tile", type=positive, metavar="PIXELS", help="decode larger pictures in overlapping tiles of this side")
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


def steps(written: str) -> int | str:
    """Return a number of steps, or a respacing (`ldm_lab.schedules.respacing`), which the sampler checks."""
    return int(written) if written.isascii() and written.isdigit() and len(written) < 10 else written


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

    from ldm_lab.io.images import grid, open_image, parse_size  # not before: these import torch, which takes seconds
    from ldm_lab.prompts import parse_image_prompt, parse_prompt, read_prompts

    size = parse_size(args.size) if args.size else None
    folder = Folder(Path(args.out))
    common = [parse_prompt(text) for text in args.texts] + [parse_image_prompt(image) for image in args.images]
    if args.interpolate:
        mixes, each = stations(args, common), 1
    elif args.prompts:
        each = args.n or 1
        mixes = [[parse_prompt(line), *common] for line in read_prompts(args.prompts) for _ in range(each)]
    elif common:
        each = args.n or 4
        mixes = [common] * each
    else:
        raise UserError("no prompt: give a text, --images IMAGE or --prompts FILE (--help explains)")
    check_together(args)
    if args.guidance is None:
        args.guidance = GUIDANCE if args.clip_guidance is None else 1.0
    if (args.mask or args.strength is not None) and not args.init_image:
        raise UserError("--mask and --strength belong to an --init-image")
    if args.aesthetic is None and (args.aesthetic_weight is not None or args.aesthetic_embeddings):
        raise UserError("--aesthetic-weight and --aesthetic-embeddings belong to an --aesthetic")

    import torch
    from tqdm import tqdm

    from ldm_lab.config import build
    from ldm_lab.io.atomic import sha256
    from ldm_lab.pretrained.resolve import resolve_weights
    from ldm_lab.sampling import Cascade, Sampler, Start

    start = None
    if args.init_image:
        strength = (1.0 if args.mask else STRENGTH) if args.strength is None else args.strength
        start = Start(open_image(args.init_image), strength, open_image(args.mask) if args.mask else None)
    device = pick_device(args.device)
    given = {key: getattr(args, key) for key in SAMPLER_KEYS if getattr(args, key) is not None}
    section = {"name": args.sampler, **given}
    count = build("sampler", section).steps
    checkpoint = resolve_weights(args.checkpoint, "checkpoint")
    how = {
        "device": device,
        "dtype": getattr(torch, PRECISIONS[args.precision]),
        "low_memory": args.low_memory,
        "compiled": args.compile,
    }
    model = Sampler.from_checkpoint(
        checkpoint, autoencoder=args.autoencoder, conditioner=args.conditioner, weak=args.autoguidance, **how
    )
    aesthetic = None if args.aesthetic is None else aesthetic_of(args, model)
    cascade = None
    if args.upsampler:
        larger = resolve_weights(args.upsampler, "upsampler")
        cascade = Cascade(model, Sampler.from_checkpoint(larger, **how))
    settings = {
        "sampler": args.sampler,
        **given,
        "steps": given.get("steps", count),
        "guidance": args.guidance,
        **described(args, start),
        "checkpoint": args.checkpoint,
        "checkpoint_sha256": sha256(checkpoint),
        **({} if cascade is None else {"upsampler_sha256": sha256(larger)}),
    }
    images, captions = [], [" + ".join(map(str, mix)) for mix in mixes]
    bars: list[tqdm] = []  # none before the first step: a request that is refused shows no bar

    def progress(done: int, total: int) -> None:
        bars or bars.append(tqdm(desc=f"{args.interpolate or len(mixes)} pictures", unit="step", total=total))
        bars[0].update(done - bars[0].n)
        if done == total:
            bars[0].close()

    common_options = {
        "guidance": args.guidance,
        "interval": tuple(args.guidance_interval),
        "rescale": args.guidance_rescale,
        "sampler": section,
        "size": size,
        "aesthetic": aesthetic,
        "batch_size": args.batch_size,
        "tile": args.tile,
        "progress": progress,
    }
    try:
        if args.interpolate:
            film = model.film(mixes, args.interpolate, seed=args.seed, **common_options)
            for i, image in enumerate(film):
                way = {"prompts": [describe(mix[0], args.guidance) for mix in mixes], "frame": i}
                folder.add(image, f"{captions[0]} ... {captions[-1]}, {i}", {**way, **settings})
            folder.write_list()
            strip, gif = folder.add_film(film)
            print(f"{len(film)} pictures from {folder.name(0)} on, {strip.name} and {gif.name} in {folder.path}")
            return 0
        base_options = {
            "negative": args.negative,
            "seeds": range(args.seed, args.seed + len(mixes)),
            "start": start,
            "rerank": args.rerank,
            "clamp": args.clamp,
            "clip_guidance": noised_clip(args, "cpu" if args.low_memory else device),
            **common_options,
        }
        if cascade is None:
            batches = ([(None, image) for image in batch] for batch in model.batches(mixes, **base_options))
        else:
            batches = cascade.batches(mixes, upsampling=upsampling(args), **base_options)
        for batch in batches:
            for small, image in batch:
                i = len(images)
                prompts = [describe(prompt, args.guidance) for prompt in mixes[i]]
                folder.add(image, captions[i], {"prompts": prompts, **image.info, **settings}, small)
                images.append(image)
            folder.write_list()
    except torch.OutOfMemoryError:
        raise UserError(f"{device}: out of memory; try less than --batch-size {args.batch_size}") from None
    columns = each if args.prompts and each > 1 else None  # a row for each line of the file
    shown = slice(GRID_LIMIT)
    path = folder.add_grid(grid(images[shown], columns, captions[shown]))
    print(f"{len(images)} pictures from {folder.name(0)} on and {path.name} in {folder.path}")
    return 0


def check_together(args: argparse.Namespace) -> None:
    """Raise UserError for options without the one that they belong to."""
    for key in UPSAMPLER_KEYS:
        if getattr(args, key) is not None and not args.upsampler:
            raise UserError(f"--{key.replace('_', '-')} belongs to an --upsampler")
    if args.noised_clip and args.clip_guidance is None:
        raise UserError("--noised-clip belongs to --clip-guidance")


def upsampling(args: argparse.Namespace) -> Any:
    """Return how the upsampler is asked for pictures."""
    from ldm_lab.sampling import Upsampling

    section = None
    if args.upsampler_sampler or args.upsampler_steps is not None:
        section = {"name": args.upsampler_sampler or "ddim"}
        section |= {} if args.upsampler_steps is None else {"steps": args.upsampler_steps}
    temperature = TEMPERATURE if args.upsample_temp is None else args.upsample_temp
    return Upsampling(section, temperature, args.upsampler_guidance)


def noised_clip(args: argparse.Namespace, device: Any) -> Any:
    """Return the CLIP guidance that is asked for, or None."""
    if args.clip_guidance is None:
        return None
    from ldm_lab.checkpoints.formats import noised_clip
    from ldm_lab.sampling import ClipGuidance

    return ClipGuidance(noised_clip.load(*(args.noised_clip or noised_clip.RELEASED)).to(device), args.clip_guidance)


def stations(args: argparse.Namespace, prompts: list[Any]) -> list[list[Any]]:
    """Return the stations of an interpolation, a prompt each. Raises UserError for options that make no sense there."""
    from ldm_lab.prompts import parse_prompt, read_prompts

    if args.prompts:
        prompts = [*map(parse_prompt, read_prompts(args.prompts)), *prompts]
    for option in ("n", "init_image", "negative", "upsampler", "clip_guidance"):
        if getattr(args, option):
            raise UserError(
                f"--interpolate does not go with {'-n' if option == 'n' else '--' + option.replace('_', '-')}"
            )
    if args.rerank > 1:
        raise UserError("--interpolate does not go with --rerank")
    return [[prompt] for prompt in prompts]


def aesthetic_of(args: argparse.Namespace, model: Any) -> Any:
    """Return the `Aesthetic` that is asked for; the embeddings are by default those released for the model's CLIP."""
    from ldm_lab.checkpoints.embedders import embedder_of
    from ldm_lab.sampling.aesthetic import WEIGHT, Aesthetic, RatingEmbeddings, released_for

    name = args.aesthetic_embeddings or released_for(embedder_of(model.conditioner_section))
    weight = WEIGHT if args.aesthetic_weight is None else args.aesthetic_weight
    return Aesthetic(RatingEmbeddings.load(name, [args.aesthetic]), args.aesthetic, weight)


def described(args: argparse.Namespace, start: Any) -> dict[str, Any]:
    """Return the settings that are not at their defaults, as they stand in samples.json."""
    settings = {} if start is None else {"init_image": args.init_image, "strength": start.strength}
    settings |= {} if args.guidance_interval == [0.0, 1.0] else {"guidance_interval": args.guidance_interval}
    plain = {"mask": None, "negative": None, "guidance_rescale": 0.0, "autoguidance": None, "rerank": 1}
    plain |= {"precision": "fp32", "tile": None, "clamp": None, "clip_guidance": None, "upsampler": None}
    plain |= {"aesthetic": None, "aesthetic_weight": None, "aesthetic_embeddings": None}
    plain |= dict.fromkeys(UPSAMPLER_KEYS)
    return settings | {key: getattr(args, key) for key, usual in plain.items() if getattr(args, key) != usual}


def pick_device(name: str | None) -> Any:
    """Return the torch device of a name, or the accelerator if there is one. Raises UserError for one not here."""
    import torch

    if name is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {first_line(error)}") from None


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

    def add(self, image: Any, caption: str, entry: dict[str, Any], small: Any = None) -> None:
        """Write the next picture, with its settings as metadata, and remember them for the list.

        `small` is the picture that it was enlarged from, if there was one; it is written beside it.
        """
        from ldm_lab.io.images import save_png

        name = self.name(self.count)
        entry = {"file": name, **entry, "width": image.width, "height": image.height}
        if small is not None:
            entry["base"] = {"file": name.replace(".png", "_base.png"), "width": small.width, "height": small.height}
        text = {"Description": caption, "Software": "ldm_lab", "ldm_lab": json.dumps(entry)}
        if small is not None:
            save_png(self.path / entry["base"]["file"], small, text)
        save_png(self.path / name, image, text)
        self.entries.append(entry)
        self.count += 1

    def write_list(self) -> None:
        """Write samples.json."""
        from ldm_lab.io.atomic import atomic_write

        with atomic_write(self.list_path) as file:
            file.write(json.dumps(self.entries, indent=2, ensure_ascii=False).encode())

    def add_film(self, film: list[Any]) -> tuple[Path, Path]:
        """Write the pictures side by side, and as a film; return both paths."""
        from ldm_lab.io.images import grid, save_png
        from ldm_lab.sampling.interpolate import save_gif

        number = "" if self.first == 0 else f"_{self.first:05d}"
        strip, gif = self.path / f"strip{number}.png", self.path / f"film{number}.gif"
        save_png(strip, grid(film, columns=len(film)), {"Software": "ldm_lab"})
        save_gif(gif, film)
        return strip, gif

    def add_grid(self, picture: Any) -> Path:
        """Write a grid of this run's pictures and return its path."""
        from ldm_lab.io.images import save_png

        free = self.first == 0 and not (self.path / "grid.png").exists()
        path = self.path / ("grid.png" if free else f"grid_{self.first:05d}.png")
        save_png(path, picture, {"Software": "ldm_lab"})
        return path


if __name__ == "__main__":
    run_program(main)
