"""A trained diffusion model: `ema.safetensors` (all that sampling needs) and `last.ckpt` (all that training needs)."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_lab.checkpoints.files import write_safetensors
from ldm_lab.checkpoints.formats import ccld, glide
from ldm_lab.checkpoints.parts import FORMAT
from ldm_lab.checkpoints.third_party import part_of, read_state_dict
from ldm_lab.errors import UserError
from ldm_lab.pretrained.resolve import resolve_weights

# What a config inside a model file must not bring along: a data section may hold shell commands (`pipe:`), and the
# rest concerns the run alone.
RUN_SECTIONS = ("data", "resume", "init_from", "logging", "trainer", "checkpoint", "demo", "enlargements")

# Models that other programs trained: `is_one(tensors) -> bool` recognises a file's tensors by their names, and
# `model(tensors, path, ema, given)` returns what `read_model` does.
IMPORTERS = (ccld, glide)


def save_model(path: str | Path, state: dict[str, Tensor], config: dict[str, Any], extra: dict[str, str]) -> None:
    """Write a model's weights with the part of the config that rebuilds it."""
    kept = {key: value for key, value in config.items() if key not in RUN_SECTIONS}
    write_safetensors(path, state, {"format": FORMAT, "role": "model", "config": json.dumps(kept), **extra})


def read_model(
    path: str | Path, ema: bool = True, given: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Return `(config, state_dict, extra)` of a trained model.

    Args:
        path: our `ema.safetensors`, a `.ckpt` of a run, or another program's file; `resolve_weights` finds it.
        ema: of a training checkpoint, take the averaged weights; else the raw ones.
        given: of another program's file, what it does not say of its architecture.

    Returns:
        The config as plain data (its run sections are left out), the denoiser's weights under its own names, and
        text such as the step and the checksums of the frozen parts.

    Raises:
        UserError: missing, damaged or unknown file.
    """
    path = resolve_weights(path, "checkpoint")
    tensors, rest = read_state_dict(path, "checkpoint")
    if rest.get("format") == FORMAT:
        return _exported(path, tensors, rest)
    if FORMAT in rest:
        return _of_run(path, tensors, rest, ema)
    for importer in IMPORTERS:
        if importer.is_one(tensors):
            return importer.model(tensors, path, ema, given or {})
    known = "ldm_lab's, cloob-latent-diffusion's and GLIDE's"
    raise UserError(f"{path}: not a trained model: {known} are known, and this is none of them")


def _exported(
    path: Path, state: dict[str, Tensor], metadata: dict[str, str]
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Return what `read_model` does, of a safetensors file of ours."""
    if metadata.get("role") != "model":
        raise UserError(f"{path}: not a trained model of ldm_lab's: it holds the role {metadata.get('role')}")
    try:
        config = json.loads(metadata["config"])
    except (KeyError, json.JSONDecodeError):
        raise UserError(f"{path}: its config is not readable") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: its config is not readable")
    return config, state, {key: text for key, text in metadata.items() if key not in ("format", "role", "config")}


def _of_run(
    path: Path, tensors: dict[str, Tensor], rest: dict[str, Any], ema: bool
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Return what `read_model` does, of a run's `.ckpt`."""
    run = rest[FORMAT]
    held = run.get("model", run.get("config")) if isinstance(run, dict) else None
    if not isinstance(held, dict):
        raise UserError(f"{path}: not a checkpoint of ldm_lab's (it holds no config)")
    try:
        whole = json.loads(json.dumps(held))
    except (TypeError, ValueError, RecursionError):
        raise UserError(f"{path}: its config is more than plain data") from None
    averaged = ema and any(name.startswith("model_ema.") for name in tensors)
    state = part_of(tensors, "model_ema." if averaged else "model.")
    config = {key: value for key, value in whole.items() if key not in RUN_SECTIONS}
    extra = {"step": str(rest.get("global_step")), **run.get("frozen", {})}
    size = (whole.get("data") or {}).get("image_size")
    return config, state, {**extra, "image_size": str(size)} if size else extra
