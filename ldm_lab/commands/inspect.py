"""Say what a file of weights is, without executing anything in it.

    python -m ldm_lab inspect runs/quickstart/ema.safetensors
    python -m ldm_lab inspect kl-f8 --json

Models, parts and checkpoints of this program, and what others released: checkpoints of cloob-latent-diffusion,
networks of GLIDE and its noised CLIP, CompVis's autoencoders (also zipped), VAEs of diffusers (a file or a folder),
CLOOB's pickle, CLIP of open_clip and OpenAI. Prints the number of parameters, the step, the config, the frozen parts'
checksums and the file's own.
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from ldm_lab.checkpoints.files import FORMAT
from ldm_lab.checkpoints.formats import cloob_pickle, compvis, diffusers_vae
from ldm_lab.checkpoints.importer import KINDS, Found, TensorInfo, config_problems, part_config, recognise
from ldm_lab.checkpoints.models import read_model
from ldm_lab.checkpoints.third_party import part_of
from ldm_lab.config import check_section
from ldm_lab.errors import UserError
from ldm_lab.io.atomic import sha256

NOT_PARAMETERS = ("latent_mean", "latent_std", "autoencoder_scale")  # buffers with the statistics of latents
TRAINING = {"run": ("model_ema.", "model."), "ccld_training": ("model_ema.", "model.")}  # prefixes, the first is used


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("file", metavar="FILE", help="a file of weights, a folder of diffusers', or a released name")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> None:
    """Print the report. Raises UserError if the file cannot be read, or if what it says of itself makes no sense."""
    found = recognise(args.file)
    report, problems = describe(found)
    print(json.dumps(report, indent=2) if args.json else as_text(args.file, report))
    if problems:
        raise UserError(f"{args.file}: {problems[0]}")


def describe(found: Found) -> tuple[dict[str, Any], list[str]]:
    """Return the report of a file, as plain data, and what is wrong with its config."""
    config, problems = _config(found)
    own = _own_tensors(found)
    groups = Counter[str]()
    for name, info in found.tensors.items():
        groups[name.partition(".")[0]] += math.prod(info.shape)
    held = found.rest.get(FORMAT) if found.kind == "run" else None
    is_ours = found.metadata.get("format") == FORMAT
    frozen = held.get("frozen") if isinstance(held, dict) else None
    if found.kind == "model":
        frozen = {role: found.metadata[role] for role in ("autoencoder", "conditioner") if role in found.metadata}
    report = {
        "kind": found.kind,
        "what": KINDS[found.kind],
        "file": str(found.path),
        "bytes": found.path.stat().st_size,
        "sha256": sha256(found.path),
        "parameters": sum(math.prod(info.shape) for name, info in own.items() if name not in NOT_PARAMETERS),
        "tensors": len(found.tensors),
        "dtypes": dict(Counter(info.dtype for info in found.tensors.values())),
        "holds": dict(groups) if len(own) < len(found.tensors) else {},
        "step": found.metadata.get("step") if is_ours else found.rest.get("global_step"),
        "frozen": frozen if isinstance(frozen, dict) else {},
        "metadata": {key: text for key, text in found.metadata.items() if not (is_ours and key == "config")},
        "config": config,
    }
    kept = {key: value for key, value in report.items() if value not in (None, {}, [])}
    return json.loads(json.dumps(kept, default=str)), problems


def _own_tensors(found: Found) -> dict[str, TensorInfo]:
    """Return the tensors of the network that the file is about, without what was stored beside it."""
    for prefix in TRAINING.get(found.kind, ()):
        if inner := part_of(found.tensors, prefix):
            return inner
    if found.kind == "compvis":
        return compvis.own(found.tensors)
    return found.tensors


def _config(found: Found) -> tuple[Any, list[str]]:
    """Return what is known of the network's config, and what is wrong with it."""
    if found.kind == "part":
        role, config = part_config(found.path, found.metadata)
        return {role: config}, check_section(role, config, "config")
    if found.kind == "model":
        try:
            config = json.loads(found.metadata["config"])
        except (KeyError, ValueError, RecursionError):
            raise UserError(f"{found.path}: its config is not readable") from None
        return config, config_problems(config)
    if found.kind in ("run", "ccld", "ccld_training", "glide"):
        config = read_model(found.path)[0]
        return config, config_problems(config)
    try:
        if found.kind == "compvis":
            return {"autoencoder": {"name": "kl_f8", **compvis.infer_config(compvis.own(found.tensors))}}, []
        if found.kind == "diffusers":
            theirs = diffusers_vae.read_config(found.path)
            ours = diffusers_vae.infer_config(found.tensors)
            return {"autoencoder": {"name": "kl_f8", **ours}, **({"diffusers": theirs} if theirs else {})}, []
        if found.kind == "cloob_pickle":
            return {"conditioner": {"name": "cloob", **cloob_pickle.infer_config(found.tensors)}}, []
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{found.path}: not complete ({error} is missing or misshapen)") from None
    return {}, []


def as_text(name: str | Path, report: dict[str, Any]) -> str:
    """Return a report for people. Whatever comes out of the file is quoted: it may hold codes for a terminal."""
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in report.get("dtypes", {}).items())
    lines = [
        f"{name}: {report['what']}",
        f"  size        {report['bytes']:,} bytes",
        f"  sha256      {report['sha256']}",
        f"  parameters  {report['parameters']:,}; the file has {report['tensors']} tensors ({dtypes})",
    ]
    if "step" in report:
        lines.append(f"  step        {_quoted(report['step'])}")
    for title in ("holds", "frozen", "metadata"):
        entries = report.get(title, {}).items()
        lines += [f"  {title}"] * bool(entries)
        lines += [f"    {_quoted(k)}: {f'{v:,}' if isinstance(v, int) else _quoted(v)}" for k, v in entries]
    if report.get("config"):
        text = yaml.safe_dump(report["config"], sort_keys=False, default_flow_style=None, allow_unicode=False)
        lines += ["  config", *(f"    {line}" for line in text.rstrip().splitlines())]
    return "\n".join(lines)


def _quoted(value: Any) -> str:
    text = str(value)
    return text if text.isascii() and text.isprintable() else json.dumps(text)
