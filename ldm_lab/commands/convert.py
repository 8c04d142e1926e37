"""Convert weights to safetensors with their config inside, or an autoencoder to a folder of diffusers'.

    python -m ldm_lab convert kl-f8 checkpoints/kl-f8.safetensors
    python -m ldm_lab convert cloob/vit_b_16_laion400m_16e checkpoints/cloob.safetensors
    python -m ldm_lab convert ViT-B-32.pt checkpoints/clip.safetensors model=ViT-B-32 pretrained=openai
    python -m ldm_lab convert runs/mine/last.ckpt mine.safetensors --half
    python -m ldm_lab convert dogGLIDE.pt dogs.safetensors preset=dogglide
    python -m ldm_lab convert other.pt other.safetensors head_width=32 norm_groups=16 timesteps=500 betas=linear
    python -m ldm_lab convert base.safetensors merged.safetensors --lora runs/style/lora.safetensors:0.8
    python -m ldm_lab convert runs/mine/autoencoder.safetensors mine_vae --format diffusers

Takes whatever `python -m ldm_lab inspect` knows. The result is what `weights:` (a part), `sample.py --checkpoint` or
`init_from` (a model) take. Values are stored in float32, single numbers such as the latent scale always. Of a training
checkpoint the averaged weights are taken.
"""

import argparse
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm_lab.checkpoints.files import GAP_PREFIX
from ldm_lab.checkpoints.formats import diffusers_vae
from ldm_lab.checkpoints.importer import DetectedFile, Section, config_problems, detect_format
from ldm_lab.checkpoints.lora import MERGED, WeightedLora, add_all
from ldm_lab.checkpoints.native import LATENT_STATISTICS, NOT_FACTS, listed, part_config, save_model, save_part
from ldm_lab.checkpoints.parts import build_for, build_on_meta, check_strictly, load_module, load_strictly
from ldm_lab.commands._arguments import add_imports_argument
from ldm_lab.config import part_class, signature_options
from ldm_lab.config.overrides import values
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Autoencoder
from ldm_lab.io.atomic import sha256
from ldm_lab.sampling.loras import read_loras
from ldm_lab.sampling.names import model_name

ROLES = ("autoencoder", "conditioner")


@dataclass(frozen=True)
class Part:
    """A part out of a file.

    Attributes:
        module: with its weights in place.
        config: its name and options.
        facts: text that is stored beside it.
    """

    module: nn.Module
    config: Section
    facts: dict[str, str] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_imports_argument(parser)
    add = parser.add_argument
    add("source", metavar="IN", help="a file of weights, a folder of diffusers', or a released name")
    add("out", metavar="OUT", help="NAME.safetensors, or with --format diffusers a folder")
    add("--format", choices=("safetensors", "diffusers"), default="safetensors", help="what to write (%(default)s)")
    add("--half", action="store_true", help="store in float16, at half the size")
    add("--raw", action="store_true", help="of a training checkpoint, the weights as trained instead of their average")
    add("--part", choices=ROLES, help="of a training checkpoint of cloob-latent-diffusion, a frozen part inside it")
    add("--scale", type=float, metavar="X", help="latent scale of an autoencoder: what raw latents are divided by")
    add(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:X]",
        help="merge a LoRA into the model; may be given again",
    )
    add("--force", action="store_true", help="replace OUT if it is there")
    add("overrides", nargs="*", metavar="key=value", help="what the file does not say, such as image_heads=12")


def run(args: argparse.Namespace) -> None:
    """Convert, and say what was written."""
    out = Path(args.out).expanduser()
    _check_out(args, out)
    found = detect_format(args.source)
    _check_source(args, found)
    dtype = torch.float16 if args.half else torch.float32
    part = _part(args, found)
    if part is not None and args.lora:
        raise UserError(f"--lora: is merged into models, {args.source} has the {part.module.part_role} alone")
    if part is not None:
        _write_part(args, found, part, out, dtype)
        return
    if args.format == "diffusers" or args.scale is not None:
        option = "--scale" if args.scale is not None else "--format diffusers"
        raise UserError(f"{option}: is for autoencoders, {args.source} is {found.title}")
    count = _write_model(args, found, out, dtype)
    print(f"{out}: a model of {count:,} parameters, from {found.title}")


def _check_source(args: argparse.Namespace, found: DetectedFile) -> None:
    """Raise UserError if nothing in the file can be converted, or options do not go with it."""
    importer = found.importer
    if importer.used_by:
        raise UserError(f"{args.source}: is {found.title}, which {importer.used_by} takes as it is")
    if not (importer.holds_model or importer.parts or found.kind == "part"):
        raise UserError(f"{args.source}: holds {found.title}: nothing that could be converted")
    if args.raw and not importer.has_average:
        raise UserError(f"--raw: is for training checkpoints, {args.source} is {found.title}")
    if args.part is not None and not (importer.holds_model and args.part in importer.parts):
        raise UserError(f"--part: is for training checkpoints of cloob-latent-diffusion, not {found.title}")
    if args.overrides and importer.holds_model and not importer.takes_overrides and args.part is None:
        where = "files with a part or a network of GLIDE's in them"
        raise UserError(f"{args.overrides[0]}: is for {where}, {args.source} is {found.title}")


def _write_part(args: argparse.Namespace, found: DetectedFile, part: Part, out: Path, dtype: torch.dtype) -> None:
    """Write a part, and say so."""
    module, role, name = part.module, part.module.part_role, part.config["name"]
    if args.scale is not None:
        if not isinstance(module, Autoencoder):
            raise UserError(f"--scale: is for autoencoders, {args.source} has the {role} {name}")
        module.latent_std.fill_(args.scale)
    if args.format == "diffusers":
        if name != "kl_f8":
            raise UserError(f"--format diffusers: is for autoencoders of kl_f8's kind, this is a {role}")
        defaults = {key: known.default for key, known in signature_options(type(module)).items()}
        diffusers_vae.write(out, _in(dtype, module.state_dict()), Section({**defaults, **part.config}))
    else:
        save_part(out, module, part.config, part.facts, dtype)
    count = sum(value.numel() for value in module.parameters())
    print(f"{out}: the {role} {name} of {count:,} parameters, from {found.title}")
    if isinstance(module, Autoencoder):
        unset = bool((module.latent_std == 1).all())
        hint = "; `python -m ldm_lab scale` measures it, --scale X sets it" if unset else ""
        mean = f", mean {listed(module.latent_mean)}" if bool((module.latent_mean != 0).any()) else ""
        print(f"latent std {listed(module.latent_std)}{mean}{hint}")


def _check_out(args: argparse.Namespace, out: Path) -> None:
    """Raise UserError if OUT cannot be what is to be written, or would replace something that must stay."""
    if args.scale is not None and not (math.isfinite(args.scale) and args.scale > 0):
        raise UserError(f"--scale: a number above 0 is needed, not {args.scale}")
    if out.resolve() == Path(args.source).expanduser().resolve():
        raise UserError(f"{out}: IN and OUT are the same")
    if args.format == "safetensors":
        if out.suffix != ".safetensors":
            raise UserError(f"{out}: a safetensors file is written, so its name has to end in .safetensors")
        if out.is_dir():
            raise UserError(f"{out}: is a folder")
        if out.exists() and not args.force:
            raise UserError(f"{out}: is there already; --force replaces it")
        return
    if out.is_file() or out.suffix == ".safetensors":
        raise UserError(f"{out}: --format diffusers writes a folder, and this is the name of a file")
    if out.is_dir():
        entries = sorted(path.name for path in out.iterdir())
        strange = [name for name in entries if not name.startswith((diffusers_vae.WEIGHTS, diffusers_vae.CONFIG))]
        if strange:
            raise UserError(f"{out}: is a folder with other things in it ({strange[0]}); name one that is new")
        if entries and not args.force:
            raise UserError(f"{out}: is there already; --force replaces it")


def _part(args: argparse.Namespace, found: DetectedFile) -> Part | None:
    """Return the part in a file; None if the file holds a model."""
    overrides, importer = Section(values(args.overrides, "image_heads=12")), found.importer
    if found.kind == "part":
        role, config = part_config(found.path, found.file.metadata)
        facts = {key: text for key, text in found.file.metadata.items() if key not in NOT_FACTS}
        if args.scale is not None:
            facts.pop("scale_images", None)
        return Part(*load_module(role, {**overrides, "name": config.get("name")}, found), facts)
    if found.kind == "run":
        return _trained_part(args, found)
    role = args.part if importer.holds_model else next(iter(importer.parts))
    if role is None:
        return None
    if importer.unsaid and not overrides:
        raise UserError(f"{args.source}: does not say {importer.unsaid}")
    return Part(*load_module(role, {**overrides, "name": importer.parts[role]}, found))


def _trained_part(args: argparse.Namespace, found: DetectedFile) -> Part | None:
    """Return the part that a run trained; None if it trained a diffusion model."""
    config, state, extra = found.importer.read_model(found.file, not args.raw, Section())
    role = part_class("task", {"name": config.get("task", "diffusion")}).PART
    if role is None:
        return None
    module = build_for(state, found.path, role, Section(config.get(role)))
    load_strictly(module, state, found.path)
    return Part(module, Section(config.get(role)), {"step": extra["step"]})


def _write_model(args: argparse.Namespace, found: DetectedFile, out: Path, dtype: torch.dtype) -> int:
    """Write a diffusion model; return its number of parameters."""
    overrides = Section(values(args.overrides, "image_heads=12"))
    config, state, extra = found.importer.read_model(found.file, not args.raw, overrides)
    problems = config_problems(config)
    if problems:
        raise UserError(f"{found.path}: {problems[0]}")
    shape = found.importer.denoiser_shape(found.file, not args.raw)
    if shape is not None:
        network = build_on_meta(found.path, "denoiser", config["denoiser"], *shape)
        check_strictly(network.state_dict(), state, found.path)
    if loras := read_loras(args.lora):
        state, extra = _merged(loras, state, config, extra)
    save_model(out, _in(dtype, state), config, extra)
    return sum(value.numel() for value in state.values())


def _merged(
    loras: list[WeightedLora], state: dict[str, Tensor], config: Section, facts: dict[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return weights in float32 with LoRAs added, and the facts with their names. Raises UserError."""
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    names = {role: config[role]["name"] for role in ("denoiser", "objective")}
    for line in add_all(state, loras, names):
        print(f"lora: {line}", file=sys.stderr)
    told = [f"{model_name(lora.path)}:{weight:g} (sha256 {sha256(lora.path)})" for lora, weight in loras]
    return state, {**facts, MERGED: "; ".join([*filter(None, [facts.get(MERGED)]), *told])}


def _in(dtype: torch.dtype, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights in another type, but single numbers, whole ones and means as they are."""
    return {name: value.to(dtype) if _is_weight(name, value) else value for name, value in state.items()}


def _is_weight(name: str, value: Tensor) -> bool:
    statistic = name in LATENT_STATISTICS or name.startswith(GAP_PREFIX)
    return bool(value.ndim) and value.is_floating_point() and not statistic
