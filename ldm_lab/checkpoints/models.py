"""A trained diffusion model: `ema.safetensors` (all that sampling needs) and `last.ckpt` (all that training needs)."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_lab.checkpoints.files import existing_file, is_safetensors, read_pickled, read_safetensors, write_safetensors
from ldm_lab.checkpoints.parts import FORMAT
from ldm_lab.errors import UserError

# What a config inside a model file must not bring along: a data section may hold shell commands (`pipe:`), and the
# rest concerns the run alone.
RUN_SECTIONS = ("data", "resume", "init_from", "logging", "trainer", "checkpoint", "demo")


def save_model(path: str | Path, state: dict[str, Tensor], config: dict[str, Any], extra: dict[str, str]) -> None:
    """Write a model's weights with the part of the config that rebuilds it."""
    kept = {key: value for key, value in config.items() if key not in RUN_SECTIONS}
    write_safetensors(path, state, {"format": FORMAT, "role": "model", "config": json.dumps(kept), **extra})


def read_model(path: str | Path, ema: bool = True) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Return `(config, state_dict, extra)` of a trained model.

    Args:
        path: our `ema.safetensors`, or a `.ckpt` of a run.
        ema: of a `.ckpt`, take the averaged weights; else the raw ones.

    Returns:
        The config as plain data (its run sections are left out), the denoiser's weights under its own names, and
        text such as the step and the checksums of the frozen parts.

    Raises:
        UserError: missing, damaged or foreign file.
    """
    path = existing_file(path, "checkpoint")
    if is_safetensors(path):
        state, metadata = read_safetensors(path)
        if metadata.get("format") != FORMAT or metadata.get("role") != "model":
            holds = f"a {metadata['role']}" if metadata.get("format") == FORMAT else "no config"
            raise UserError(f"{path}: not a trained model of ldm_lab's: it holds {holds}")
        try:
            config = json.loads(metadata.pop("config"))
        except (KeyError, json.JSONDecodeError):
            raise UserError(f"{path}: its config is not readable") from None
        return config, state, {k: v for k, v in metadata.items() if k not in ("format", "role")}
    content = read_pickled(path, mmap=True)
    run = content.get(FORMAT)
    if not isinstance(run, dict) or not isinstance(run.get("config"), dict):
        raise UserError(f"{path}: not a checkpoint of ldm_lab's (it holds no config)")
    averaged = ema and any(name.startswith("model_ema.") for name in content["state_dict"])
    prefix = "model_ema." if averaged else "model."
    state = {n.removeprefix(prefix): v for n, v in content["state_dict"].items() if n.startswith(prefix)}
    config = {key: value for key, value in run["config"].items() if key not in RUN_SECTIONS}
    extra = {"step": str(content.get("global_step")), **run.get("frozen", {})}
    size = (run["config"].get("data") or {}).get("image_size")
    return config, state, {**extra, "image_size": str(size)} if size else extra
