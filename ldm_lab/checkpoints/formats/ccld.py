"""Importer of JD-P/cloob-latent-diffusion: the U-Nets in its sampling and training checkpoints, and the CLOOB in the
latter."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_lab.checkpoints.formats import cloob_pickle
from ldm_lab.checkpoints.third_party import part_of, read_state_dict
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Embedding

MAPPING_FEATURES, PIXEL_FEATURES = 128, 16  # Fourier features of t beside the embedding, and beside the latent
FIRST = "net.0.main.0.weight"
RAW, AVERAGED = "model.", "model_ema."  # prefixes in a training checkpoint
FROZEN = {"autoencoder": "ae_model.", "conditioner": "cloob."}  # role -> prefix there
IMAGE_SIZE, DROPOUT = 256, 0.2  # fixed in the original's programs


def read(path: str | Path, ema: bool = True) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Return `(state_dict, config, extra)` of a CCLD U-Net.

    Args:
        path: a flat state dict (what the original samples from), or a Lightning checkpoint of its training.
        ema: of a training checkpoint, take the averaged weights (`model_ema.`); else the raw ones (`model.`).

    Returns:
        The tensors that `CCLDUNet` loads strictly. Its keyword arguments, read off the shapes, but for `head_width`,
        of which nothing else than 64 was ever used. Extra: `latent_std`, of the autoencoder with which the U-Net was
        trained, or None; `channels` and `conditions`, the positional arguments.

    Raises:
        UserError: missing or damaged file, or not such a U-Net.
    """
    return unet(read_state_dict(path, "CCLD checkpoint")[0], path, ema)


def is_one(tensors: dict[str, Tensor]) -> bool:
    """Return whether a file's tensors are named as the original names them."""
    return any(prefix + FIRST in tensors for prefix in ("", RAW, AVERAGED))


def unet(
    tensors: dict[str, Tensor], path: str | Path, ema: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Return what `read` does, of the tensors in the file at `path`."""
    wanted = AVERAGED if ema else RAW
    if FIRST in tensors:
        state = dict(tensors)
    elif wanted + FIRST in tensors:
        state = part_of(tensors, wanted)
    else:
        raise UserError(f"{path}: not a CCLD U-Net: neither {FIRST!r} nor {wanted + FIRST!r} is in it")
    scale = state.pop("autoencoder_scale", tensors.get("scale_factor"))
    try:
        config = infer_config(state)
        channels = state[FIRST].shape[1] - PIXEL_FEATURES
        embed_dim = state["mapping.0.main.0.weight"].shape[1] - MAPPING_FEATURES
    except (KeyError, IndexError) as error:
        raise UserError(f"{path}: not a complete CCLD U-Net ({error} is missing or misshapen)") from None
    if scale is not None and scale.numel() != 1:
        raise UserError(f"{path}: its autoencoder_scale is no number but a tensor of {list(scale.shape)}")
    extra = {
        "latent_std": None if scale is None else float(scale),
        "channels": channels,
        "conditions": {"embed": Embedding(embed_dim)},
    }
    return state, config, extra


def model(
    tensors: dict[str, Tensor], path: str | Path, ema: bool = True, given: dict[str, Any] | None = None
) -> tuple[dict, dict[str, Tensor], dict]:
    """Return `(config, state_dict, extra)` of a CCLD checkpoint as `ldm_lab.checkpoints.models.read_model` does.

    A sampling checkpoint does not say what its autoencoder and its CLOOB were: these sections lack `weights`. A
    training checkpoint holds both, so that their `weights` are the file itself.
    """
    state, architecture, facts = unet(tensors, path, ema)
    within = {role: any(n.startswith(prefix) for n in tensors) for role, prefix in FROZEN.items()}
    weights = {role: {"weights": str(path)} if there else {} for role, there in within.items()}
    latents = {} if facts["latent_std"] is None else {"latent_std": facts["latent_std"]}
    config = {
        "task": "diffusion",
        "autoencoder": {"name": "kl_f8", **weights["autoencoder"], **latents},
        "conditioner": {"name": "cloob", **weights["conditioner"], "dropout": DROPOUT},
        "denoiser": {"name": "ccld_unet", **architecture},
        "objective": {"name": "v_cosine"},
    }
    return config, state, {"image_size": str(IMAGE_SIZE)}


def read_cloob(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Return `(state_dict, config, extra)` of the CLOOB inside a training checkpoint.

    Raises:
        UserError: missing or damaged file, or no such model in it.
    """
    state = part_of(read_state_dict(path, "CCLD checkpoint")[0], FROZEN["conditioner"])
    try:
        return state, cloob_pickle.infer_config(state), {}
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{path}: no complete CLOOB in it ({error} is missing or misshapen)") from None


def infer_config(state: dict[str, Tensor]) -> dict[str, Any]:
    """Return the keyword arguments of `CCLDUNet` that follow from the shapes.

    Only the products of base_channels and multipliers are in a file; 4 is divided out, as the original has it.
    """
    blocks = sum(f"net.{i}.main.4.weight" in state for i in range(_top_entries(state))) // 2
    widths = [state["net.0.main.4.weight"].shape[0]]
    prefix = f"net.{blocks}.main."
    while f"{prefix}1.main.4.weight" in state:
        widths.append(state[f"{prefix}1.main.4.weight"].shape[0])
        prefix += f"{2 * blocks + 1}.main."  # after the pooling and the blocks on the way down
    common = math.gcd(*widths)
    base = common // 4 if common % 4 == 0 else common
    return {
        "base_channels": base,
        "multipliers": [width // base for width in widths],
        "blocks_per_level": blocks,
        "mapping_width": state["mapping.0.main.0.weight"].shape[0],
    }


def _top_entries(state: dict[str, Tensor]) -> int:
    return 1 + max(
        int(name.split(".")[1]) for name in state if name.startswith("net.") and name.split(".")[1].isdigit()
    )
