"""Importer of the autoencoders of CompVis/latent-diffusion (kl-f4, f8, f16, f32) and of their finetunes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ldm_lab.checkpoints.released_zip import is_release, opened
from ldm_lab.checkpoints.third_party import part_of, read_state_dict
from ldm_lab.errors import UserError, first_line

OURS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
PREFIXES = ("", "first_stage_model.", "ae_model.")  # alone; in a latent diffusion model; in a CCLD training checkpoint
RESOLUTION = 256  # the file does not say it; it only gives names to the levels with attention
MARK = "encoder.down.0.block.0.conv1.weight"  # a name that such an autoencoder has
LARGEST_YAML = 1 << 20  # bytes


def is_one(names: Iterable[str]) -> bool:
    """Return whether a file's tensors are named as CompVis names those of an autoencoder, alone or within a model."""
    return any(f"{prefix}{MARK}" in names for prefix in PREFIXES)


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Return `(state_dict, config, extra)` of a KL autoencoder.

    Args:
        path: a Lightning checkpoint, or a flat dict of its tensors, or the released zip with the former (and its YAML)
            in it. The autoencoder's names may have the prefix `first_stage_model.` (Stable Diffusion and the like) or
            `ae_model.` (training checkpoints of CCLD). The training loss (`loss.*`) and an average of the weights are
            left aside.

    Returns:
        The tensors under CompVis's names, `latent_mean`, and `latent_std` if the file holds one, else 1. The keyword
        arguments of `KLAutoencoder`, read off the shapes. Extra: `scale_known`, whether the file held the scale.
        A YAML of the same name beside the file, or with it in the zip, is compared with what the shapes say.

    Raises:
        UserError: missing or damaged file, or not such an autoencoder, or one that its YAML describes otherwise.
    """
    path = Path(path).expanduser()
    if path.is_file() and is_release(path):
        with opened(path) as weights:
            state, config, extra = _read(weights, str(path))
            # The tensors are mapped from a file that goes away.
            return {name: value.clone() for name, value in state.items()}, config, extra
    return _read(path, str(path))


def _read(path: Path, shown: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Return what `read` does, of a file that is no zip of a release; `shown` is its name in messages."""
    try:
        tensors, _ = read_state_dict(path, "autoencoder")
    except UserError as error:
        raise UserError(str(error).replace(str(path), shown)) from None
    prefix = _prefix(tensors)
    if prefix is None:
        raise UserError(f"{shown}: not a CompVis autoencoder: 'encoder.conv_in.weight' is not in it")
    state = own(tensors)
    try:
        config = infer_config(state)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise UserError(
            f"{shown}: not a complete KL autoencoder of CompVis's ({error} is missing or misshapen)"
        ) from None
    _compare(config, path.with_suffix(".yaml"), shown)
    factor = tensors.get("scale_factor") if prefix else None
    if factor is not None and factor.numel() != 1:
        raise UserError(f"{shown}: its scale_factor is no number but a tensor of {list(factor.shape)}")
    scale = 1.0 if factor is None else float(factor)
    # CompVis's latent diffusion multiplies by its scale_factor, CCLD divides.
    state["latent_std"] = torch.tensor(1 / scale if prefix == "first_stage_model." else scale)  # []
    state["latent_mean"] = torch.tensor(0.0)  # []
    return state, config, {"scale_known": factor is not None}


def own(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return the autoencoder's tensors among those of a file, under their names in the autoencoder."""
    prefix = _prefix(tensors)
    inner = {} if prefix is None else part_of(tensors, prefix)
    return {name: value for name, value in inner.items() if name.startswith(OURS)}


def _prefix(tensors: dict[str, Any]) -> str | None:
    return next((prefix for prefix in PREFIXES if f"{prefix}encoder.conv_in.weight" in tensors), None)


def infer_config(state: dict[str, Tensor]) -> dict[str, Any]:
    """Return the keyword arguments of `KLAutoencoder` for CompVis's tensors, as far as their shapes tell them."""
    ch = state["encoder.conv_in.weight"].shape[0]
    levels = _count(state, "encoder.down.{}.block.0.conv1.weight")
    quant = state["quant_conv.weight"].shape
    return {
        "ch": ch,
        "ch_mult": [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // ch for i in range(levels)],
        "num_res_blocks": _count(state, "encoder.down.0.block.{}.conv1.weight"),
        "z_channels": quant[1] // 2,
        "embed_dim": quant[0] // 2,
        "attn_resolutions": [RESOLUTION // 2**i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in state],
        "resolution": RESOLUTION,
    }


def _compare(config: dict[str, Any], path: Path, shown: str) -> None:
    """Raise UserError if the YAML at `path`, where there is one, has a ddconfig of another network."""
    if not path.is_file():
        return
    try:
        if path.stat().st_size > LARGEST_YAML:
            raise ValueError("it is larger than a mebibyte")
        text = path.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError("it has aliases")  # a few lines of them can stand for gigabytes
        node = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{shown}: the {path.name} beside it is not a readable YAML ({first_line(error)})") from None
    for key in ("model", "params", "first_stage_config", "params"):  # the third is in diffusion models alone
        node = node.get(key, node) if isinstance(node, dict) else None
    if not isinstance(node, dict) or not isinstance(node.get("ddconfig"), dict):
        return  # a YAML about something else
    told = config_of(node["ddconfig"], node.get("embed_dim"))
    told["attn_resolutions"] = _levels(told)
    for key, held in {**config, "attn_resolutions": _levels(config)}.items():
        if key != "resolution" and told[key] != held:
            what = "the levels with attention" if key == "attn_resolutions" else key
            raise UserError(f"{shown}: its {path.name} says {what} {str(told[key])[:100]}, the weights have {held}")


def _levels(config: dict[str, Any]) -> list[int]:
    """Return which levels have attention, counted from the full size."""
    resolution, attended = config["resolution"], config["attn_resolutions"]
    if not isinstance(resolution, int) or not isinstance(attended, list) or not isinstance(config["ch_mult"], list):
        return []
    return [i for i in range(len(config["ch_mult"])) if resolution // 2**i in attended]


def config_of(ddconfig: dict[str, Any], embed_dim: int) -> dict[str, Any]:
    """Return the keyword arguments of `KLAutoencoder` for the `ddconfig` of a released YAML.

    Raises:
        UserError: it describes another kind of autoencoder.
    """
    fixed = {"double_z": True, "in_channels": 3, "out_ch": 3}
    for key, value in fixed.items():
        if ddconfig.get(key, value) != value:
            raise UserError(f"ddconfig.{key}: only {value} is supported, not {str(ddconfig[key])[:100]}")
    keys = ("ch", "ch_mult", "num_res_blocks", "z_channels", "attn_resolutions", "resolution")
    missing = [key for key in keys if key not in ddconfig]
    if missing:
        raise UserError(f"ddconfig: {', '.join(missing)} missing")
    # `dropout` acts in training only, and is 0 in all that was released.
    return {"embed_dim": embed_dim, **{key: ddconfig[key] for key in keys}}


def _count(state: dict[str, Tensor], pattern: str) -> int:
    count = 0
    while pattern.format(count) in state:
        count += 1
    return count
