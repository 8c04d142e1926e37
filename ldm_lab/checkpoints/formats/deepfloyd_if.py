"""Importers of DeepFloyd IF's U-Nets, stages I, II and III: the files of its own loader, and diffusers' folders.

Its own are `pytorch_model.bin` with `config.yml` beside it; diffusers' a folder with `config.json` and
`diffusion_pytorch_model.safetensors`. Sizes are read off the shapes; what no shape tells comes from the config, or is
assumed, and that is said.
"""

import json
import math
from pathlib import Path

import yaml
from torch import Tensor

from ldm_lab.checkpoints.if_layouts import (
    POOLED,
    infer_config,
    infer_shape,
    is_diffusers_if,
    is_if,
    our_shapes,
    our_tensors,
)
from ldm_lab.checkpoints.importer import DenoiserShape, Importer, LoadedModel, Section, register_importer, say_once
from ldm_lab.checkpoints.opened import OpenedFile, Shapes, TensorInfo
from ldm_lab.errors import UserError, unknown

OWN, DIFFUSERS = "config.yml", "config.json"
LARGEST_CONFIG = 1 << 20  # bytes
DENOISER = ("head_width", "pool_heads", "norm_groups", "efficient")  # what no shape tells, of the network
ASSUMED = {"head_width": 64, "pool_heads": 64, "norm_groups": 32, "text_size": 77}  # as all that was released has it
IMAGE_SIZE, SCALE_FACTOR = 64, 4
LEVEL = 0.25  # of stage II's small image in sampling; III takes 0
DROPOUT = 0.1  # share of texts that training drops
TEXT_MODELS = {4096: "DeepFloyd/t5-v1_1-xxl", 384: "minilm"}  # by the width of their states
# Options of the two configs whose other values are other networks -> the values that ours stands for.
OWN_FIXED = {
    **{"activation": ["gelu"], "use_scale_shift_norm": [True], "resblock_updown": [True], "dims": [2]},
    **{"num_classes": [None], "interpolate_mode": ["bilinear", "nearest"]},
}
DIFFUSERS_FIXED = {
    **{"_class_name": ["UNet2DConditionModel"], "act_fn": ["gelu"], "addition_embed_type": ["text"]},
    **{"encoder_hid_dim_type": [None, "text_proj"], "cross_attention_norm": ["group_norm"], "norm_eps": [1e-5]},
    **{"resnet_time_scale_shift": ["scale_shift"], "class_embed_type": [None, "timestep"]},
    **{"mid_block_type": ["UNetMidBlock2DSimpleCrossAttn"], "time_embedding_type": ["positional"]},
    **{"flip_sin_to_cos": [True], "freq_shift": [0], "center_input_sample": [False], "timestep_post_act": [None]},
    **{"time_cond_proj_dim": [None], "class_embeddings_concat": [False], "conv_in_kernel": [3]},
    **{"conv_out_kernel": [3], "dual_cross_attention": [False]},
}
BLOCKS = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
}
EFFICIENT_SCALE = 1 / 0.7071  # of diffusers' resnet_out_scale_factor


# ---------------------------------------------------------------------------------------------- configs beside weights


def read_config(path: Path, name: str) -> Section:
    """Return the config of a name beside a file of weights; {} if there is none. Raises UserError: not readable."""
    config = path.parent / name
    if not config.is_file():
        return Section()
    try:
        if config.stat().st_size > LARGEST_CONFIG:
            raise ValueError("it is larger than a mebibyte")
        text = config.read_text(encoding="utf-8")
        if name == OWN and any(
            isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)
        ):
            raise ValueError("it has aliases")  # a few lines of them can stand for gigabytes
        content = yaml.safe_load(text) if name == OWN else json.loads(text)
    except (ValueError, RecursionError, OSError, yaml.YAMLError) as error:
        raise UserError(f"{config}: not a readable config: {str(error)[:200]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{config}: a config is a mapping, this is a {type(content).__name__}")
    return Section(content)


def of_own_config(path: Path) -> Section:
    """Return what IF's own config says that no shape tells. Raises UserError for another network."""
    found, where = read_config(path, OWN).get("params") or {}, path.parent / OWN
    if not isinstance(found, dict):
        raise UserError(f"{where}: params: a mapping is needed, not {str(found)[:100]}")
    params = Section(found)
    _check_fixed(params, Section(OWN_FIXED), where)
    flags = [bool(params.get(key)) for key in ("efficient_activation", "scale_skip_connection")]
    if flags[0] != flags[1]:
        raise UserError(f"{where}: efficient_activation and scale_skip_connection go together, not {flags}")
    said = Section({"efficient": flags[0]} if params else {})
    keys = {"num_head_channels": "head_width", "att_pool_heads": "pool_heads", "image_size": "image_size"}
    for theirs, ours in keys.items():
        if theirs in params:
            said[ours] = _whole(params, theirs, where)
    if "interpolate_mode" in params:
        said["enlarge"] = params["interpolate_mode"]
    return said


def of_diffusers_config(path: Path) -> Section:
    """Return what diffusers' config says that no shape tells. Raises UserError for another network."""
    config, where = read_config(path, DIFFUSERS), path.parent / DIFFUSERS
    if not config:
        return Section()
    _check_fixed(config, Section(DIFFUSERS_FIXED), where)
    for key, known in BLOCKS.items():
        names = config.get(key, [])
        if not isinstance(names, list) or any(name not in known for name in names):
            raise UserError(f"{where}: {key}: only {' and '.join(known)} are supported, not {str(names)[:200]}")
    efficient = bool(config.get("resnet_skip_time_act", False))
    scale = EFFICIENT_SCALE if efficient else 1.0
    for key in ("resnet_out_scale_factor", "mid_block_scale_factor"):
        value = config.get(key, 1.0)
        if not isinstance(value, int | float) or not math.isclose(value, scale, rel_tol=1e-4):
            raise UserError(f"{where}: {key}: {scale:g} goes with the rest, not {str(value)[:100]}")
    if config.get("time_embedding_act_fn") != ("gelu" if efficient else None):
        raise UserError(f"{where}: time_embedding_act_fn: goes with resnet_skip_time_act, as gelu, or neither")
    said = Section(efficient=efficient)
    keys = {
        **{"attention_head_dim": "head_width", "addition_embed_type_num_heads": "pool_heads"},
        **{"norm_num_groups": "norm_groups", "sample_size": "image_size"},
    }
    for theirs, ours in keys.items():
        if config.get(theirs) is not None:
            said[ours] = _whole(config, theirs, where)
    return said


def _check_fixed(config: Section, fixed: Section, where: Path) -> None:
    for key, allowed in fixed.items():
        if key in config and isinstance(allowed, list) and config[key] not in allowed:
            raise UserError(f"{where}: {key}: only {allowed[-1]!r} is supported, not {str(config[key])[:100]}")


def _whole(config: Section, key: str, where: Path) -> int:
    """Return a positive whole number of a config."""
    value = config[key]
    if isinstance(value, list) and len(set(map(str, value))) == 1:
        value = value[0]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where}: {key}: a positive whole number is needed, not {str(value)[:100]}")
    return value


# ----------------------------------------------------------------------------------------------------------- the model


def settled(shapes: Shapes, config: Section, overrides: Section) -> Section:
    """Return what no shape tells: as it is given, as the config says, or as all that was released has it.

    Raises:
        UserError: overrides that are none of those.
    """
    enlarges = "aug_proj.0.weight" in shapes
    width = shapes[POOLED].shape[1] if POOLED in shapes and len(shapes[POOLED].shape) == 2 else 0
    assumed = Section({**ASSUMED, "efficient": enlarges, "image_size": IMAGE_SIZE * (SCALE_FACTOR if enlarges else 1)})
    assumed["model"] = TEXT_MODELS.get(width, "")
    if enlarges:
        assumed |= {"scale_factor": SCALE_FACTOR, "enlarge": "bilinear"}
    for key, value in overrides.items():
        if key not in assumed:
            raise UserError(f"{key}: {unknown('key', key, assumed)}")
        if key == "model" and isinstance(value, str) and value:
            continue
        if type(value) is not type(assumed[key]) or (type(value) is int and value < 1):
            kind = {int: "a positive whole number", bool: "true or false", str: "text"}
            raise UserError(f"{key}: {kind[type(assumed[key])]} is needed, not {value!r}")
    if overrides.get("enlarge", "bilinear") not in ("bilinear", "nearest"):
        raise UserError(f"enlarge: bilinear or nearest is needed, not {overrides['enlarge']!r}")
    config = Section({key: value for key, value in config.items() if key in assumed})
    return Section({**assumed, **config, **overrides})


def model(state: dict[str, Tensor], path: Path, said: Section) -> LoadedModel:
    """Return the model that a network of IF is.

    Args:
        state: by our names.
        path: where it is from.
        said: what no shape tells (`settled`).

    Raises:
        UserError: not a whole one.
    """
    options, shape = _sizes(state, path, said)
    odd = next((name for name, value in state.items() if not value.is_floating_point()), None)
    if odd is not None:
        raise UserError(f"{path}: {odd} is {state[odd].dtype}: not a weight of a U-Net of IF")
    named = Section(model=said["model"]) if said["model"] else Section()
    upsampler = "low_res" in shape.conditions
    denoiser = {key: said[key] for key in DENOISER if key in said}
    config = Section(
        task="diffusion",
        autoencoder={"name": "identity"},
        conditioner={
            "name": "t5",
            **named,
            "text_size": said["text_size"],
            "padding": "read",
            "lowercase": True,
            "dropout": DROPOUT,
        },
        denoiser={"name": "if_unet", **options, **denoiser},
        objective={"name": "eps_hybrid", "betas": "squaredcos_cap_v2", "timesteps": 1000},
    )
    if upsampler:
        sizes = {"scale_factor": said["scale_factor"], "enlarge": said["enlarge"]}
        config["condition_sources"] = {"if_low_res": {**sizes, "level": LEVEL if said["image_size"] <= 256 else 0.0}}
    extra = {"image_size": str(said["image_size"])}
    return LoadedModel(config, {name: value.float() for name, value in state.items()}, extra)


def _sizes(state: Shapes, path: Path, said: Section) -> tuple[Section, DenoiserShape]:
    """Return the network's options and what it is constructed with beside them. Raises UserError: not a whole one."""
    try:
        return infer_config(state), infer_shape(state, said.get("scale_factor", SCALE_FACTOR), said["text_size"])
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path}: not a complete U-Net of IF ({error} is missing or misshapen)") from None


def _say_assumed(path: Path, config: Section, said: Section, overrides: Section) -> None:
    """Print what had to be assumed of a file, and the way out."""
    left = {key: value for key, value in said.items() if key not in (*config, *overrides) and value != ""}
    if config:  # which was written with the network; of what it leaves out there is but one form
        left = {key: value for key, value in left.items() if key in ("scale_factor", "model", "text_size")}
    if left:
        shown = " ".join(f"{key}={str(value).lower()}" for key, value in left.items())
        say_once(
            f"{path}: read as a U-Net of DeepFloyd IF's; not in the file, and assumed: {shown}; where one is another: "
            f"python -m ldm_lab convert {path} OUT.safetensors KEY=VALUE ..., then take OUT.safetensors"
        )


@register_importer
class DeepFloydIF(Importer):
    """A U-Net of IF as its own loader has it: a flat state dict, with `config.yml` beside it."""

    kind = "deepfloyd-if"
    title = "a U-Net of DeepFloyd IF's"
    precedence = 2
    holds_model = True
    takes_overrides = True

    def matches(self, file: OpenedFile) -> bool:
        """Return whether the tensors are named as IF's own loader names them."""
        return is_if(file.tensors)

    def read_model(self, file: OpenedFile, ema: bool, overrides: Section) -> LoadedModel:
        """Return the model; a file holds one set of weights. What is assumed is said."""
        config = of_own_config(file.path)
        said = settled(file.tensors, config, overrides)
        loaded = model(file.read(), file.path, said)
        _say_assumed(file.path, config, said, overrides)
        return loaded

    def denoiser_shape(self, file: OpenedFile, ema: bool) -> DenoiserShape:
        """Return channels and conditions."""
        return _sizes(file.tensors, file.path, settled(file.tensors, of_own_config(file.path), Section()))[1]


@register_importer
class DiffusersIF(Importer):
    """A U-Net of IF as diffusers has it: a folder with `config.json`, or a file in one."""

    kind = "diffusers-if"
    title = "a U-Net of DeepFloyd IF's, of diffusers"
    precedence = 2
    holds_model = True
    takes_overrides = True

    def matches(self, file: OpenedFile) -> bool:
        """Return whether the tensors are named as diffusers names them."""
        return is_diffusers_if(file.tensors)

    def read_model(self, file: OpenedFile, ema: bool, overrides: Section) -> LoadedModel:
        """Return the model; see `DeepFloydIF`."""
        config = of_diffusers_config(file.path)
        said = settled(self._shapes(file), config, overrides)
        try:
            state = our_tensors(file.read(), said["head_width"])
        except ValueError as error:
            raise UserError(f"{file.path}: not a complete U-Net of IF ({error})") from None
        loaded = model(state, file.path, said)
        _say_assumed(file.path, config, said, overrides)
        return loaded

    def denoiser_shape(self, file: OpenedFile, ema: bool) -> DenoiserShape:
        """Return channels and conditions."""
        shapes = self._shapes(file)
        return _sizes(shapes, file.path, settled(shapes, of_diffusers_config(file.path), Section()))[1]

    def _shapes(self, file: OpenedFile) -> dict[str, TensorInfo]:
        return {name: TensorInfo(shape, "") for name, shape in our_shapes(file.tensors).items()}
