"""Convert weights to safetensors with their config inside, or an autoencoder to a folder of diffusers'.

    python -m ldm_lab convert kl-f8 checkpoints/kl-f8.safetensors
    python -m ldm_lab convert cloob/vit_b_16_laion400m_16e checkpoints/cloob.safetensors
    python -m ldm_lab convert ViT-B-32.pt checkpoints/clip.safetensors model=ViT-B-32 pretrained=openai
    python -m ldm_lab convert runs/mine/last.ckpt mine.safetensors --half
    python -m ldm_lab convert dogGLIDE.pt dogs.safetensors preset=dogglide
    python -m ldm_lab convert runs/mine/autoencoder.safetensors mine_vae --format diffusers

Takes whatever `python -m ldm_lab inspect` knows. The result is what `weights:` (a part), `sample.py --checkpoint` or
`init_from` (a model) take. Values are stored in float32, single numbers such as the latent scale always. Of a training
checkpoint the averaged weights are taken.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from ldm_lab.checkpoints.formats import ccld, diffusers_vae, glide
from ldm_lab.checkpoints.importer import KINDS, Found, config_problems, part_config, recognise
from ldm_lab.checkpoints.models import read_model, save_model
from ldm_lab.checkpoints.parts import check_strictly, load_strictly, read_module, save_part
from ldm_lab.config import build, options, part_class
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Autoencoder

ROLES = ("autoencoder", "conditioner")
# kind of file -> the part in it, its name
RELEASED = {
    "compvis": ("autoencoder", "kl_f8"),
    "diffusers": ("autoencoder", "kl_f8"),
    "cloob_pickle": ("conditioner", "cloob"),
    "clip": ("conditioner", "clip"),
    "linear": ("head", "linear"),
    "mlp": ("head", "mlp"),
}
INSIDE = {"autoencoder": "kl_f8", "conditioner": "cloob"}  # of a training checkpoint of cloob-latent-diffusion


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("source", metavar="IN", help="a file of weights, a folder of diffusers', or a released name")
    add("out", metavar="OUT", help="NAME.safetensors, or with --format diffusers a folder")
    add("--format", choices=("safetensors", "diffusers"), default="safetensors", help="what to write (%(default)s)")
    add("--half", action="store_true", help="store in float16, at half the size")
    add("--raw", action="store_true", help="of a training checkpoint, the weights as trained instead of their average")
    add("--part", choices=ROLES, help="of a training checkpoint of cloob-latent-diffusion, a frozen part inside it")
    add("--scale", type=float, metavar="X", help="latent scale of an autoencoder: what raw latents are divided by")
    add("--force", action="store_true", help="replace OUT if it is there")
    add("given", nargs="*", metavar="key=value", help="what the file does not say, such as image_heads=12")


def run(args: argparse.Namespace) -> None:
    """Convert, and say what was written."""
    out = Path(args.out).expanduser()
    _check_out(args, out)
    found = recognise(args.source)
    if found.kind == "unknown":
        raise UserError(f"{args.source}: holds {KINDS['unknown']}: nothing that could be converted")
    if args.raw and found.kind not in ("run", "ccld_training"):
        raise UserError(f"--raw: is for training checkpoints, {args.source} is {KINDS[found.kind]}")
    if args.part is not None and found.kind != "ccld_training":
        raise UserError(f"--part: is for training checkpoints of cloob-latent-diffusion, not {KINDS[found.kind]}")
    if found.kind == "noised_clip":
        raise UserError(f"{args.source}: is {KINDS['noised_clip']}, which CLIP guidance takes as it is")
    if args.given and found.kind not in ("part", "glide", *RELEASED) and args.part is None:
        where = "files with a part or a network of GLIDE's in them"
        raise UserError(f"{args.given[0]}: is for {where}, {args.source} is {KINDS[found.kind]}")
    dtype = torch.float16 if args.half else torch.float32
    part = _part(args, found)
    if part is None:
        if args.format == "diffusers" or args.scale is not None:
            option = "--scale" if args.scale is not None else "--format diffusers"
            raise UserError(f"{option}: is for autoencoders, {args.source} is {KINDS[found.kind]}")
        count = _convert_model(found, out, dtype, ema=not args.raw, given=_given(args.given))
        print(f"{out}: a model of {count:,} parameters, from {KINDS[found.kind]}")
        return
    module, section, facts = part
    if args.scale is not None:
        if not isinstance(module, Autoencoder):
            raise UserError(f"--scale: is for autoencoders, {args.source} has the {module.part_role} {section['name']}")
        module.latent_std.fill_(args.scale)
    if args.format == "diffusers":
        if module.part_name != "kl_f8":
            raise UserError(f"--format diffusers: is for autoencoders of kl_f8's kind, this is a {module.part_role}")
        defaults = {key: known.default for key, known in options(type(module)).items()}
        diffusers_vae.write(out, _in(dtype, module.state_dict()), {**defaults, **section})
    else:
        save_part(out, module, section, facts, dtype)
    count = sum(value.numel() for value in module.parameters())
    print(f"{out}: the {module.part_role} {section['name']} of {count:,} parameters, from {KINDS[found.kind]}")
    if isinstance(module, Autoencoder):
        hint = "" if float(module.latent_std) != 1 else "; `python -m ldm_lab scale` measures it, --scale X sets it"
        print(f"latent std {float(module.latent_std):g}{hint}")


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
        held = sorted(path.name for path in out.iterdir())
        strange = [name for name in held if not name.startswith((diffusers_vae.WEIGHTS, diffusers_vae.CONFIG))]
        if strange:
            raise UserError(f"{out}: is a folder with other things in it ({strange[0]}); name one that is new")
        if held and not args.force:
            raise UserError(f"{out}: is there already; --force replaces it")


def _part(args: argparse.Namespace, found: Found) -> tuple[nn.Module, dict[str, Any], dict[str, str]] | None:
    """Return the part in a file, its section and facts to be stored beside it; None if the file holds a model."""
    given = _given(args.given)
    if found.kind == "part":
        role, config = part_config(found.path, found.metadata)
        module, section = read_module(role, {**given, "name": config.get("name")}, found.path)
        facts = {k: text for k, text in found.metadata.items() if k not in ("format", "role", "config")}
        if args.scale is not None:
            facts.pop("scale_images", None)
        return module, section, facts
    if found.kind == "run":
        config, state, extra = read_model(found.path, ema=not args.raw)
        role = getattr(part_class("task", {"name": config.get("task", "diffusion")}), "PART", None)
        if role is None:
            return None
        section = config.get(role)
        module = build(role, section)
        load_strictly(module, state, found.path)
        return module, section, {"step": extra["step"]}
    if found.kind == "ccld_training" and args.part is not None:
        return *read_module(args.part, {**given, "name": INSIDE[args.part]}, found.path), {}
    if found.kind not in RELEASED:
        return None
    role, name = RELEASED[found.kind]
    if name == "clip" and not given:
        raise UserError(f"{args.source}: does not say its architecture; add model=NAME, such as model=ViT-B-32")
    return *read_module(role, {**given, "name": name}, found.path), {}


def _given(written: list[str]) -> dict[str, Any]:
    """Return the `key=value` of the command line, values read as YAML does."""
    given = {}
    for entry in written:
        key, equals, value = entry.partition("=")
        try:
            given[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals or not key:
            raise UserError(f"{entry!r}: what the file does not say is written key=value, such as image_heads=12")
    return given


def _convert_model(found: Found, out: Path, dtype: torch.dtype, ema: bool, given: dict[str, Any]) -> int:
    """Write a diffusion model; return its number of parameters."""
    config, state, extra = read_model(found.path, ema, given)
    problems = config_problems(config)
    if problems:
        raise UserError(f"{found.path}: {problems[0]}")
    if found.kind in ("ccld", "ccld_training", "glide"):
        facts = (glide.read(found.path, given) if found.kind == "glide" else ccld.read(found.path, ema=ema))[2]
        with torch.device("meta"):
            network = build("denoiser", config["denoiser"], facts["channels"], facts["conditions"])
        check_strictly(network.state_dict(), state, found.path)
    save_model(out, _in(dtype, state), config, extra)
    return sum(value.numel() for value in state.values())


def _in(dtype: torch.dtype, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights in another type, but single numbers and whole ones as they are."""
    return {
        name: value.to(dtype) if value.ndim and value.is_floating_point() else value for name, value in state.items()
    }
