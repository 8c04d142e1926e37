"""Importer of the autoencoders of CompVis/latent-diffusion (kl-f4, f8, f16, f32) and of their fine-tunes."""

from collections.abc import Mapping
from typing import TypeVar

import torch
import yaml

from ldm_lab.checkpoints.importer import Importer, LoadedPart, Section, register_importer, say_once
from ldm_lab.checkpoints.opened import LARGEST_TEXT, OpenedFile, Shapes, TensorInfo
from ldm_lab.checkpoints.third_party import strip_prefix
from ldm_lab.errors import UserError, first_line
from ldm_lab.io.json_files import Json

T = TypeVar("T")
OURS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
# Alone; in a latent diffusion model; in a CCLD training checkpoint; in a file of a whole pipeline.
PREFIXES = ("", "first_stage_model.", "ae_model.", "vae.")
# Of a file with a diffusion model in it, a name of its tensors -> shift and scaling factor of its latents, which the
# model's code alone says.
FACTORS = {
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (0.0609, 1.5305),  # Stable Diffusion 3
    "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (0.1159, 0.3611),  # FLUX.1
}
UNSAID = (
    "does not say shift and scale of its latents: latent_mean 0 and latent_std 1 are taken; "
    "FLUX.1's are latent_mean=0.1159 latent_std=2.76932, Stable Diffusion 3's latent_mean=0.0609 latent_std=0.653381"
)
RESOLUTION = 256  # the file does not say it; it only gives names to the levels with attention
MARK = "encoder.down.0.block.0.conv1.weight"  # a name that such an autoencoder has


@register_importer
class CompVisAutoencoder(Importer):
    """An autoencoder of latent-diffusion, alone, in its released zip, or within a diffusion model.

    Its names may have the prefix `first_stage_model.` (Stable Diffusion and the like) or `ae_model.` (training
    checkpoints of CCLD). The training loss (`loss.*`) and an average of the weights are left aside.
    """

    kind = "compvis"
    title = "an autoencoder of CompVis's latent-diffusion"
    parts = {"autoencoder": "kl_f8"}

    def matches(self, file: OpenedFile) -> bool:
        """Return whether the tensors are named as CompVis names them, alone or within a model."""
        return any(f"{prefix}{MARK}" in file.tensors for prefix in PREFIXES)

    def network(self, file: OpenedFile) -> Mapping[str, TensorInfo]:
        """Return the autoencoder's tensors under their names in it."""
        return own(file.tensors)

    def infer_config(self, tensors: Shapes) -> Section:
        """Return the keyword arguments of `KLAutoencoder`."""
        return infer_config(tensors)

    def read(self, file: OpenedFile, role: str) -> LoadedPart:
        """Return the autoencoder."""
        return autoencoder(file)


def autoencoder(file: OpenedFile) -> LoadedPart:
    """Return the autoencoder in a file: the tensors under CompVis's names, and `latent_std`, 1 if it does not say it.

    A YAML of the same name beside the file, or with it in the zip, is compared with what the shapes say.

    Raises:
        UserError: not such an autoencoder, or one that its YAML describes otherwise.
    """
    shown, tensors = str(file.path), file.read()
    prefix = _prefix(tensors)
    if prefix is None:
        raise UserError(f"{shown}: not a CompVis autoencoder: 'encoder.conv_in.weight' is not in it")
    state = own(tensors)
    try:
        config = infer_config(state)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{shown}: not a complete KL autoencoder of CompVis's ({error} is missing or misshapen)"
        ) from None
    _compare(config, file, shown)
    factor = tensors.get("scale_factor") if prefix else None
    if factor is not None and factor.numel() != 1:
        raise UserError(f"{shown}: its scale_factor is no number but a tensor of {list(factor.shape)}")
    scale = 1.0 if factor is None else float(factor)
    # CompVis's latent diffusion multiplies by its scale_factor, CCLD divides.
    std, mean = 1 / scale if prefix in ("first_stage_model.", "vae.") else scale, 0.0
    if not config.get("use_quant_conv", True) and factor is None:
        known = next((FACTORS[name] for name in FACTORS if name in tensors), None)
        if known is None:
            say_once(f"{shown}: {UNSAID}")
        else:
            mean, std = known[0], 1 / known[1]
    state["latent_std"], state["latent_mean"] = torch.tensor(std), torch.tensor(mean)  # [] each
    return LoadedPart(state, Section(name="kl_f8", **config))


def own(tensors: Mapping[str, T]) -> dict[str, T]:
    """Return the autoencoder's tensors among those of a file, under their names in the autoencoder."""
    prefix = _prefix(tensors)
    inner = {} if prefix is None else strip_prefix(tensors, prefix)
    return {name: value for name, value in inner.items() if name.startswith(OURS)}


def _prefix(tensors: Shapes) -> str | None:
    return next((prefix for prefix in PREFIXES if f"{prefix}encoder.conv_in.weight" in tensors), None)


def infer_config(state: Shapes) -> Section:
    """Return the keyword arguments of `KLAutoencoder` for CompVis's tensors, as far as their shapes tell them."""
    ch = state["encoder.conv_in.weight"].shape[0]
    levels = _count(state, "encoder.down.{}.block.0.conv1.weight")
    return Section(
        ch=ch,
        ch_mult=[state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // ch for i in range(levels)],
        num_res_blocks=_count(state, "encoder.down.0.block.{}.conv1.weight"),
        **latent_sizes(state),
        attn_resolutions=[RESOLUTION // 2**i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in state],
        resolution=RESOLUTION,
    )


def latent_sizes(state: Shapes) -> Section:
    """Return the keyword arguments of `KLAutoencoder` about the latents; CompVis's and diffusers' names are the same.

    Raises:
        KeyError, IndexError: tensors that are missing or misshapen.
    """
    has = {side: f"{side}.weight" in state or f"{side}.bias" in state for side in ("quant_conv", "post_quant_conv")}
    z_channels = state["encoder.conv_out.weight"].shape[0] // 2
    embed_dim = z_channels
    if has["quant_conv"]:
        embed_dim = state["quant_conv.weight"].shape[0] // 2
    elif has["post_quant_conv"]:
        embed_dim = state["post_quant_conv.weight"].shape[1]
    without = {f"use_{side}": False for side, there in has.items() if not there}
    return Section(z_channels=z_channels, embed_dim=embed_dim, **without)


def _compare(config: Section, file: OpenedFile, shown: str) -> None:
    """Raise UserError if the YAML beside a file, where there is one, has a ddconfig of another network."""
    if file.yaml is None:
        return
    name = file.path.with_suffix(".yaml").name
    try:
        if len(file.yaml) > LARGEST_TEXT:
            raise ValueError("it is larger than a mebibyte")
        text = file.yaml.decode("utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError("it has aliases")  # a few lines of them can stand for gigabytes
        node = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{shown}: the {name} beside it is not a readable YAML ({first_line(error)})") from None
    for key in ("model", "params", "first_stage_config", "params"):  # the third is in diffusion models alone
        node = node.get(key, node) if isinstance(node, dict) else None
    if not isinstance(node, dict) or not isinstance(node.get("ddconfig"), dict):
        return  # a YAML about something else
    from_yaml = config_of(Section(node["ddconfig"]), node.get("embed_dim"))
    from_yaml["attn_resolutions"] = _levels(from_yaml)
    for key, in_weights in {**{key: config[key] for key in from_yaml}, "attn_resolutions": _levels(config)}.items():
        if key != "resolution" and from_yaml[key] != in_weights:
            what = "the levels with attention" if key == "attn_resolutions" else key
            raise UserError(
                f"{shown}: its {name} says {what} {str(from_yaml[key])[:100]}, the weights have {in_weights}"
            )


def _levels(config: Section) -> list[int]:
    """Return which levels have attention, counted from the full size."""
    resolution, attended = config["resolution"], config["attn_resolutions"]
    if not isinstance(resolution, int) or not isinstance(attended, list) or not isinstance(config["ch_mult"], list):
        return []
    return [i for i in range(len(config["ch_mult"])) if resolution // 2**i in attended]


def config_of(ddconfig: Section, embed_dim: Json) -> Section:
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
    return Section(embed_dim=embed_dim, **{key: ddconfig[key] for key in keys})


def _count(state: Shapes, pattern: str) -> int:
    count = 0
    while pattern.format(count) in state:
        count += 1
    return count
