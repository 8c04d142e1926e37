"""Importer and exporter of diffusers' `AutoencoderKL`: the VAEs of Stable Diffusion, FLUX.1 and their kin.

The network is CompVis's under other names: `KLAutoencoder`'s levels and blocks are counted from the other end in the
decoder, and the projections of attention are matrices instead of 1x1 convolutions.
"""

import json
import math
import re
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from ldm_lab.checkpoints.files import write_safetensors
from ldm_lab.checkpoints.formats.compvis import latent_sizes
from ldm_lab.checkpoints.importer import Importer, LoadedPart, Section, register_importer, say_once
from ldm_lab.checkpoints.opened import OpenedFile, Shapes
from ldm_lab.errors import UserError
from ldm_lab.io.atomic import replaced_folder
from ldm_lab.io.json_files import Json

CLASS = "AutoencoderKL"
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model"
# Of WEIGHTS, in order of preference; an index stands for several files.
SUFFIXES = (
    *(".safetensors", ".safetensors.index.json", ".fp16.safetensors", ".safetensors.index.fp16.json"),
    *(".bin", ".bin.index.json", ".fp16.bin"),
)
MARK = "encoder.down_blocks.0.resnets.0.conv1.weight"  # a name that such a file has
RESOLUTION = 256  # only gives names to the levels with attention
LARGEST_CONFIG = 1 << 20  # bytes

# diffusers' options whose other values are other networks -> the values that ours stands for.
FIXED: dict[str, tuple[Json, ...]] = {
    "_class_name": (CLASS,),
    "in_channels": (3,),
    "out_channels": (3,),
    "act_fn": ("silu", "swish"),
    "mid_block_add_attention": (True,),
}
# What is read below, and what says nothing about the network: the size it was trained at, how it is best computed.
STATISTICS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
QUANT = ("use_quant_conv", "use_post_quant_conv")
READ = ("block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups", *STATISTICS, *QUANT)
BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}  # or Attn in front
QUIET = ("sample_size", "force_upcast")

# Part of a name, ours -> diffusers', below a level or the middle; each is the only one of its kind.
MATRIX = re.compile(r"\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight$")  # of attention; 1x1 convolutions here
INNER = [("nin_shortcut", "conv_shortcut"), ("downsample", "downsamplers.0"), ("upsample", "upsamplers.0")]
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.15


@register_importer
class DiffusersVAE(Importer):
    """A folder with `config.json` and `diffusion_pytorch_model.safetensors` (`.fp16.safetensors`, `.bin`), or a file.

    Large ones are in several files with an index, `diffusion_pytorch_model.safetensors.index.json`.

    Of a file in such a folder the folder's config is taken.
    """

    kind = "diffusers"
    title = "a VAE of diffusers'"
    parts = {"autoencoder": "kl_f8"}
    folder_files = tuple(f"{WEIGHTS}{suffix}" for suffix in SUFFIXES)

    def matches(self, file: OpenedFile) -> bool:
        """Return whether the tensors are named as diffusers names those of a VAE."""
        return MARK in file.tensors

    def infer_config(self, tensors: Shapes) -> Section:
        """Return the keyword arguments of `KLAutoencoder`."""
        return infer_config(tensors)

    def config(self, file: OpenedFile) -> Section:
        """Return our config, and diffusers' own where there is one."""
        loaded = read_config(file.path)
        return Section({**super().config(file), **({"diffusers": loaded} if loaded else {})})

    def read(self, file: OpenedFile, role: str) -> LoadedPart:
        """Return the autoencoder; see `vae`."""
        return vae(file.read(), file.path)


def vae(tensors: dict[str, Tensor], path: Path) -> LoadedPart:
    """Return the autoencoder under `KLAutoencoder`'s names, with its `latent_std`.

    diffusers multiplies by its scaling_factor, we divide: latent_mean is shift_factor, latent_std 1 / scaling_factor.
    A file without a config does not say them; 0 and 1 are taken then, and that is said (0.18215 is the factor of Stable
    Diffusion 1.x and 2.x, 0.13025 that of XL).

    Args:
        tensors: by diffusers' names.
        path: where they are from; a config beside it is read.

    Raises:
        UserError: not a whole VAE, or one with options that `KLAutoencoder` does not have.
    """
    loaded = read_config(path)
    tensors = {_modern(name): value for name, value in tensors.items()}
    try:
        config = infer_config(tensors)
    except ValueError as error:
        raise UserError(f"{path}: not supported: {error}") from None
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{path}: not a complete VAE of diffusers' ({error} is missing or misshapen)") from None
    config = Section({**config, **_checked(loaded, config, path.parent / CONFIG)})
    levels = len(config["ch_mult"])
    names = {diffusers_name(name, levels): name for name in _our_names(tensors, levels)}
    state = {names.get(name, name): value for name, value in tensors.items()}
    for name, value in state.items():
        if MATRIX.search(name) and value.ndim == 2:
            state[name] = value[:, :, None, None]  # [c, c, 1, 1]
    if not loaded:
        say_once(
            f"{path}: without {CONFIG} of diffusers', norm_groups 32, latent_mean 0 and latent_std 1 are taken unless "
            "the config says otherwise"
        )
    state |= _statistics(loaded, config["embed_dim"], path.parent / CONFIG)
    return LoadedPart(state, Section(name="kl_f8", **config))


def read_config(weights: Path) -> Section:
    """Return the config beside a weights file that is called as diffusers calls it; {} if there is none.

    Raises:
        UserError: it is not readable.
    """
    path = weights.parent / CONFIG
    if not weights.name.startswith(WEIGHTS) or not path.is_file():
        return Section()
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise ValueError("it is larger than a mebibyte")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON and of UTF-8, too
        raise UserError(f"{path}: not a readable config: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: a config is a JSON object, this is a {type(config).__name__}")
    return Section(config)


def infer_config(tensors: Shapes) -> Section:
    """Return the keyword arguments of `KLAutoencoder` that follow from the shapes of diffusers' tensors.

    Args:
        tensors: anything with a shape, by diffusers' names.

    Raises:
        KeyError, IndexError, ValueError, ZeroDivisionError: tensors that are missing or misshapen.
    """
    ch = tensors["encoder.conv_in.weight"].shape[0]
    levels = _count(tensors, "encoder.down_blocks.{}.resnets.0.conv1.weight")
    widths = [tensors[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)]
    attended = [i for i in range(levels) if f"encoder.down_blocks.{i}.attentions.0.group_norm.weight" in tensors]
    if any(width % ch for width in widths):
        raise ValueError(f"levels {widths} wide, which are no multiples of the first")
    return Section(
        ch=ch,
        ch_mult=[width // ch for width in widths],
        num_res_blocks=_count(tensors, "encoder.down_blocks.0.resnets.{}.conv1.weight"),
        **latent_sizes(tensors),
        attn_resolutions=[RESOLUTION // 2**i for i in attended],
        resolution=RESOLUTION,
    )


def _checked(loaded: Section, config: Section, path: Path) -> Section:
    """Return what diffusers' config says beyond the shapes. Raises UserError for options that we do not have."""
    for key, allowed in FIXED.items():
        if key in loaded and loaded[key] not in allowed:
            raise UserError(f"{path}: {key}: only {allowed[0]!r} is supported, not {str(loaded[key])[:100]}")
    for key, kind in BLOCKS.items():
        for name in _list(loaded, key, str, path):
            if name not in (kind, f"Attn{kind}"):
                raise UserError(f"{path}: {key}: only {kind} and Attn{kind} are supported, not {name[:100]!r}")
    known = {*FIXED, *READ, *BLOCKS, *QUIET}
    strange = [key for key, value in loaded.items() if key not in known and not key.startswith("_") and value]
    if strange:
        raise UserError(f"{path}: {strange[0][:100]!r} is not known, and may make it another network")
    widths = [config["ch"] * multiplier for multiplier in config["ch_mult"]]
    stated = {
        "block_out_channels": (_list(loaded, "block_out_channels", int, path) or widths, widths),
        "layers_per_block": (loaded.get("layers_per_block", config["num_res_blocks"]), config["num_res_blocks"]),
        "latent_channels": (loaded.get("latent_channels", config["embed_dim"]), config["embed_dim"]),
        **{key: (loaded.get(key, True), config.get(key, True)) for key in QUANT if loaded},
    }
    for key, (in_config, in_weights) in stated.items():
        if in_config != in_weights:
            raise UserError(f"{path}: {key} is {str(in_config)[:100]}, but the weights beside it have {in_weights}")
    groups = loaded.get("norm_num_groups", 32)
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
        raise UserError(f"{path}: norm_num_groups has to be a whole number from 1 on, not {str(groups)[:100]}")
    return Section(norm_groups=groups) if loaded else Section()  # no shape says it


def _statistics(loaded: Section, channels: int, path: Path) -> dict[str, Tensor]:
    """Return latent_mean and latent_std of diffusers' config, [] or [C] each.

    Raises:
        UserError: numbers that make no sense, or of which it is not known how they go together.
    """
    scale = _number(loaded, "scaling_factor", 1.0, path)
    if scale <= 0:
        raise UserError(f"{path}: scaling_factor has to be a number above 0, not {scale}")
    shift, means, stds = (
        _number(loaded, "shift_factor", 0.0, path),
        loaded.get("latents_mean"),
        loaded.get("latents_std"),
    )
    if means is None and stds is None:
        return {"latent_mean": torch.tensor(shift), "latent_std": torch.tensor(1.0 / scale)}  # [] each
    for key, values in (("latents_mean", means), ("latents_std", stds)):
        listed = values if isinstance(values, list) else []
        numbers = [value for value in listed if _is_number(value)]
        right = len(numbers) == len(listed) == channels
        if not right or (key == "latents_std" and min(numbers) <= 0):
            raise UserError(f"{path}: {key} has to be a list of {channels} numbers, not {str(values)[:100]}")
    if shift:
        raise UserError(f"{path}: shift_factor: {shift} beside latents_mean is not supported")
    return {"latent_mean": torch.tensor(means), "latent_std": torch.tensor(stds) / scale}  # [C] each


def _number(loaded: Section, key: str, default: float, path: Path) -> float:
    """Return a number of diffusers' config, `default` if it is not there or null."""
    value = loaded.get(key)
    if value is not None and not _is_number(value):
        raise UserError(f"{path}: {key} has to be a number{' above 0' * (default > 0)}, not {str(value)[:100]}")
    return default if value is None else float(value)


def _is_number(value: Json) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _list(loaded: Section, key: str, kind: type, path: Path) -> list:
    values = loaded.get(key, [])
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise UserError(f"{path}: {key} has to be a list, not {str(values)[:100]}")
    return values


# ------------------------------------------------------------------------------------------------------------- names


def diffusers_name(name: str, levels: int) -> str:
    """Return diffusers' name of one of `KLAutoencoder`'s tensors, in a network of so many levels."""
    name = re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.", name)
    name = re.sub(r"\.mid\.block_([12])\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", name)
    name = name.replace(".mid.attn_1.", ".mid_block.attentions.0.")
    name = re.sub(r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1.", name)
    name = re.sub(r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.", name)
    name = re.sub(r"(_blocks\.\d+)\.block\.", r"\1.resnets.", name)
    name = re.sub(r"(_blocks\.\d+)\.attn\.", r"\1.attentions.", name)
    name = re.sub(r"(\.attentions\.\d+)\.(\w+)\.", lambda m: f"{m[1]}.{ATTENTION.get(m[2], m[2])}.", name)
    for ours, other in INNER:
        name = name.replace(f".{ours}.", f".{other}.")
    return name


def _our_names(tensors: Shapes, levels: int) -> list[str]:
    """Return our names of the tensors that a network with these of diffusers' has; a superset does no harm."""
    blocks = 1 + max((int(m[1]) for name in tensors if (m := re.search(r"\.resnets\.(\d{1,3})\.", name))), default=0)
    layers = [f"{layer}.{kind}" for layer in ("norm1", "conv1", "norm2", "conv2", "nin_shortcut") for kind in _KINDS]
    attention = [f"{layer}.{kind}" for layer in ATTENTION for kind in _KINDS]
    stages = [
        *(f"block.{j}.{layer}" for j in range(blocks) for layer in layers),
        *(f"attn.{j}.{layer}" for j in range(blocks) for layer in attention),
    ]
    names = []
    for side, level, sampling in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        names += [f"{side}.{level}.{i}.{rest}" for i in range(levels) for rest in stages]
        names += [f"{side}.{level}.{i}.{sampling}.conv.{kind}" for i in range(levels) for kind in _KINDS]
        names += [f"{side}.mid.block_{j}.{layer}" for j in (1, 2) for layer in layers]
        names += [f"{side}.mid.attn_1.{layer}" for layer in attention]
        names += [f"{side}.norm_out.{kind}" for kind in _KINDS]
    return names


_KINDS = ("weight", "bias")


def _modern(name: str) -> str:
    """Return today's name of a tensor that may have an attention name of diffusers before 0.15."""
    return re.sub(
        rf"(\.attentions\.\d+)\.({'|'.join(OLD_ATTENTION)})\.", lambda m: f"{m[1]}.{OLD_ATTENTION[m[2]]}.", name
    )


def _count(tensors: Shapes, pattern: str) -> int:
    count = 0
    while pattern.format(count) in tensors:
        count += 1
    return count


# ------------------------------------------------------------------------------------------------------------ export


def write(path: str | Path, state: dict[str, Tensor], config: Section) -> None:
    """Write an autoencoder as a folder that diffusers' `AutoencoderKL.from_pretrained` loads; it appears whole.

    Args:
        path: the folder; one that is there is replaced.
        state: `KLAutoencoder`'s state dict, `latent_mean` and `latent_std` included; its dtype is kept.
        config: all of its keyword arguments.

    Raises:
        UserError: an architecture that diffusers cannot express, or a folder that cannot be written.
    """
    exported = Section({**export_config(config), **_export_statistics(state["latent_mean"], state["latent_std"])})
    levels = len(config["ch_mult"])
    tensors = {}
    for name, value in state.items():
        if name in ("latent_mean", "latent_std"):
            continue
        is_matrix = MATRIX.search(name)
        tensors[diffusers_name(name, levels)] = value[:, :, 0, 0] if is_matrix else value  # [c, c] of [c, c, 1, 1]
    with replaced_folder(path) as folder:
        write_safetensors(folder / f"{WEIGHTS}.safetensors", tensors, {"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(exported, indent=2) + "\n", encoding="utf-8")


def _export_statistics(mean: Tensor, std: Tensor) -> Section:
    """Return the keys of diffusers' config for latent mean and std, [] or [C] each."""
    if mean.ndim or std.ndim:
        means, stds = torch.broadcast_tensors(mean, std)  # [C] each
        return Section(scaling_factor=1.0, latents_mean=means.tolist(), latents_std=stds.tolist())
    shift = {"shift_factor": float(mean)} if float(mean) else {}
    return Section(scaling_factor=1.0 / float(std), **shift)


def export_config(config: Section) -> Section:
    """Return diffusers' config for all of `KLAutoencoder`'s keyword arguments, without the statistics of latents.

    Raises:
        UserError: an architecture that diffusers cannot express.
    """
    multipliers = list(config["ch_mult"])
    if multipliers[0] != 1:
        raise UserError(f"ch_mult: diffusers' first level is as wide as ch, ours is {multipliers[0]} times that")
    if config["z_channels"] != config["embed_dim"]:
        raise UserError(
            f"embed_dim: diffusers has one number for z_channels and embed_dim, ours are {config['z_channels']} and "
            f"{config['embed_dim']}"
        )
    has_attention = [config["resolution"] // 2**i in config["attn_resolutions"] for i in range(len(multipliers))]
    down, up = (
        [f"Attn{kind}" if attended else kind for attended in order]
        for kind, order in zip(BLOCKS.values(), (has_attention, has_attention[::-1]))
    )
    return Section(
        {
            "_class_name": CLASS,
            **{"in_channels": 3, "out_channels": 3, "act_fn": "silu", "sample_size": config["resolution"]},
            **{"down_block_types": down, "up_block_types": up},
            "block_out_channels": [config["ch"] * multiplier for multiplier in multipliers],
            "layers_per_block": config["num_res_blocks"],
            "latent_channels": config["embed_dim"],
            "norm_num_groups": config["norm_groups"],
            **{key: False for key in QUANT if not config.get(key, True)},
        }
    )
