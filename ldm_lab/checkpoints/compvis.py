"""Importer of the autoencoders of CompVis/latent-diffusion and of what was finetuned from them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_lab.checkpoints.foreign import part_of, read_state_dict
from ldm_lab.errors import UserError

OURS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
PREFIXES = ("", "first_stage_model.", "ae_model.")  # alone; in a latent diffusion model; in a CCLD training checkpoint
RESOLUTION = 256  # the file does not say it; it only gives names to the levels with attention


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Return `(state_dict, config, extra)` of a KL autoencoder.

    Args:
        path: a Lightning checkpoint, or a flat dict of its tensors. The autoencoder's names may have the prefix
            `first_stage_model.` (Stable Diffusion and the like) or `ae_model.` (training checkpoints of CCLD). The
            training loss (`loss.*`) and an average of the weights are left aside.

    Returns:
        The tensors under CompVis's names, and `scale`: the latent scale if the file holds one, else 1. The keyword
        arguments of `KLAutoencoder`, read off the shapes. Extra: `scale_known`, whether the file held the scale.

    Raises:
        UserError: missing or damaged file, or not such an autoencoder.
    """
    tensors, _ = read_state_dict(path, "autoencoder")
    prefix = next((p for p in PREFIXES if f"{p}encoder.conv_in.weight" in tensors), None)
    if prefix is None:
        raise UserError(f"{path}: not a CompVis autoencoder: 'encoder.conv_in.weight' is not in it")
    state = {name: value for name, value in part_of(tensors, prefix).items() if name.startswith(OURS)}
    try:
        config = infer_config(state)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise UserError(
            f"{path}: not a complete KL autoencoder of CompVis's ({error} is missing or misshapen)"
        ) from None
    factor = tensors.get("scale_factor") if prefix else None
    if factor is not None and factor.numel() != 1:
        raise UserError(f"{path}: its scale_factor is no number but a tensor of {list(factor.shape)}")
    scale = 1.0 if factor is None else float(factor)
    # CompVis's latent diffusion multiplies by its scale_factor, CCLD divides.
    state["scale"] = torch.tensor(1 / scale if prefix == "first_stage_model." else scale)  # []
    return state, config, {"scale_known": factor is not None}


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


def config_of(ddconfig: dict[str, Any], embed_dim: int) -> dict[str, Any]:
    """Return the keyword arguments of `KLAutoencoder` for the `ddconfig` of a released YAML.

    Raises:
        UserError: it describes another kind of autoencoder.
    """
    fixed = {"double_z": True, "in_channels": 3, "out_ch": 3}
    for key, value in fixed.items():
        if ddconfig.get(key, value) != value:
            raise UserError(f"ddconfig.{key}: only {value} is supported, not {ddconfig[key]!r}")
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
