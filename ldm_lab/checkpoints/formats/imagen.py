"""Importer of imagen-pytorch's U-Nets, of its 1.7 to 1.10 (spaceforge's) and of its 2.x: alone, or in its checkpoints.

A checkpoint of its `Imagen` has all stages, `unets.<i>.<name>`; one of its trainer beside them their averages. Sizes
are read off the shapes; the noise schedule and what is predicted are in no file.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar, get_args

from torch import Tensor

from ldm_lab.checkpoints.importer import (
    DenoiserShape,
    Importer,
    LoadedDenoiser,
    LoadedModel,
    Section,
    register_importer,
    say_once,
)
from ldm_lab.checkpoints.opened import OpenedFile, Shapes
from ldm_lab.conditions import ConditionKind, ImageCondition, Level, TokenStates
from ldm_lab.errors import UserError, unknown
from ldm_lab.objectives.targets import Predicted
from ldm_lab.schedules import LogSNRCurve

T = TypeVar("T")
MEMBER = re.compile(r"unets\.(\d{1,4})\.")
NEEDED = ("init_conv.convs.0.weight", "to_time_hiddens.0.weights", "final_conv.weight", "mid_attn.")
ONE_BY_ONE = re.compile(r"layers\.\d+\.1\.\d+\.(g|weight)$")  # of a feed-forward network, as a convolution in 1.x
T5 = {512: "small", 768: "base", 1024: "large", 2048: "xl", 4096: "xxl"}  # google/t5-v1_1-NAME by the width of states
DROPOUT = 0.1  # share of texts that spaceforge's configs and the library's defaults drop
CHOICES = {"curve": get_args(LogSNRCurve), "prediction": get_args(Predicted)}
IMAGE_SIZES = (64, 256, 1024)  # of the stages, where nobody says
SCALE_FACTOR = 4
FIRST_LINEAR = 3  # the first stage whose schedule is linear by the library's default, counted from 1
OLD = "mid_attn.fn.fn."  # in the names of the old layout


def members(names: Mapping[str, T]) -> dict[int, dict[str, T]]:
    """Return the U-Nets of a file by their number, from 1 on; of one alone it is 1. Other tensors are left out."""
    found: dict[int, dict[str, T]] = {}
    for name, value in names.items():
        match = MEMBER.match(name)
        if match:
            found.setdefault(int(match[1]) + 1, {})[name[match.end() :]] = value
    found = found or {1: dict(names)}
    return {number: its for number, its in sorted(found.items()) if is_unet(its)}


def is_unet(names: Mapping[str, T]) -> bool:
    """Return whether tensors are named as a U-Net's of imagen-pytorch."""
    return all(any(name.startswith(needed) for name in names) for needed in NEEDED)


def our_name(name: str) -> str:
    """Return our name of a tensor of either layout: that of 2.x."""
    return name.replace(OLD, "mid_attn.layers.0.0.").replace(".groupnorm.", ".norm.").replace(".fn.", ".")


def unet(tensors: Mapping[str, Tensor], path: str | Path, scale_factor: int = SCALE_FACTOR) -> LoadedDenoiser:
    """Return a U-Net: the tensors that `ImagenUNet` loads strictly, in float32, and its options.

    Args:
        tensors: of one U-Net, by the original's names.
        path: where they are from.
        scale_factor: how many times it enlarges, if it is a super-resolution one.

    Raises:
        UserError: not a whole one; one of the releases in between, whose layout is another.
    """
    _check_layout(tensors, path)
    state = {our_name(name): value for name, value in tensors.items()}
    state = {
        name: (value.flatten(1) if name.endswith("weight") else value.flatten())
        if ONE_BY_ONE.search(name) and value.ndim == 4
        else value
        for name, value in state.items()
    }
    try:
        options, shape = infer_config(state, "group" if _is_old(tensors) else "rms"), infer_shape(state, scale_factor)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path}: not a complete U-Net of Imagen ({error} is missing or misshapen)") from None
    odd = next((name for name, value in state.items() if not value.is_floating_point()), None)
    if odd is not None:
        raise UserError(f"{path}: {odd} is {state[odd].dtype}: not a weight of a U-Net of Imagen")
    return LoadedDenoiser({name: value.float() for name, value in state.items()}, options, shape)


def _is_old(tensors: Shapes) -> bool:
    return any(name.startswith(OLD) for name in tensors)


def _check_layout(tensors: Shapes, path: str | Path) -> None:
    """Raise UserError for the layouts of 1.11 to 1.26, which are between the two that are read."""
    new = any(name.endswith(".block1.norm.gamma") for name in tensors) and not any(".fn." in name for name in tensors)
    sizes = [tensors[name].shape for name in tensors if re.fullmatch(r"downs\.\d+\.[04](\.1)?\.weight", name)]
    strided = all(len(size) == 4 and size[-1] == 4 for size in sizes)
    if not new and not (_is_old(tensors) and strided and not any(name.endswith("q_scale") for name in tensors)):
        raise UserError(
            f"{path}: a U-Net of imagen-pytorch between 1.11 and 1.26, whose layout is not read; those of 1.7 to 1.10 "
            "and of 2.x are"
        )


def infer_shape(state: Shapes, scale_factor: int = SCALE_FACTOR) -> DenoiserShape:
    """Return channels and conditions, from the shapes; they do not tell how much an upsampler enlarges."""
    channels = state["final_conv.weight"].shape[0]
    conditions: dict[str, ConditionKind] = {}
    if "text_to_cond.weight" in state:
        _, length, _ = state["null_text_embed"].shape
        conditions["token_states"] = TokenStates(state["text_to_cond.weight"].shape[1], length)
    extra = state["init_conv.convs.0.weight"].shape[1] - channels
    if extra:
        if "to_lowres_time_cond.0.weight" not in state or extra != channels:
            raise ValueError("init_conv.convs.0.weight: more channels than a low-resolution image has")
        conditions["low_res"] = ImageCondition(channels, scale_factor, enlarged=True)
        conditions["low_res_level"] = Level("linear")
    return DenoiserShape(channels, conditions)


def infer_config(state: Shapes, layout: str) -> Section:
    """Return the keyword arguments of `ImagenUNet` that follow from the shapes of tensors under our names."""
    base = sum(state[f"init_conv.convs.{i}.weight"].shape[0] for i in range(3))
    levels = _count(state, "downs.{}.1.block1.project.weight")
    # The way up ends each level's blocks at its coarser width; its finest level is its last.
    widths = [state[f"ups.{levels - 1 - i}.0.block1.project.weight"].shape[0] for i in range(levels)]
    inner, _ = state["mid_attn.layers.0.0.to_q.weight"].shape
    head_width = state["mid_attn.layers.0.0.null_kv"].shape[1]
    attended = [i for i in range(levels) if f"downs.{i}.3.layers.0.0.to_q.weight" in state]
    blocks = [_count(state, f"downs.{i}.2." + "{}.block1.project.weight") for i in range(levels)]
    options = Section(
        base_channels=base,
        multipliers=[width // base for width in widths],
        blocks_per_level=blocks[:1] if len({*blocks}) == 1 else blocks,
        attention_levels=attended,
        text_levels=[i for i in range(levels) if f"downs.{i}.1.cross_attn.to_q.weight" in state],
        heads=inner // head_width,
        head_width=head_width,
        text_width=state["norm_cond.weight"].shape[0],
        memory_efficient="init_resnet_block.block1.project.weight" in state,
        layout=layout,
    )
    fed = ["mid_attn", *(f"downs.{i}.3" for i in attended)]
    inner_sizes = [state[f"{name}.layers.0.1.1.weight"].shape for name in fed if f"{name}.layers.0.1.1.weight" in state]
    if inner_sizes:
        options["feed_forward"] = inner_sizes[0][0] / inner_sizes[0][1]
    if "attn_pool.latents" in state:
        options["text_latents"] = state["attn_pool.latents"].shape[0]
    return options


def _count(state: Shapes, name: str) -> int:
    """Return how many numbers, from 0 on, give the name of a tensor."""
    count = 0
    while name.format(count) in state:
        count += 1
    return count


def assumable(number: int, upsampler: bool, old: bool) -> Section:
    """Return what no file tells of a stage, as it is by the library's defaults."""
    values = Section(
        unet=number,
        prediction="eps",
        curve="linear" if number >= FIRST_LINEAR else "cosine",
        image_size=IMAGE_SIZES[min(number, len(IMAGE_SIZES)) - 1],
        last_time=0.999 if old else 1.0,
    )
    if upsampler:
        values["scale_factor"] = SCALE_FACTOR
    return values


def _said(overrides: Section, values: Section) -> Section:
    """Return the values with the user's in their place. Raises UserError for others than these."""
    for key, value in overrides.items():
        if key not in values:
            raise UserError(f"{key}: {unknown('key', key, values)}")
        if key in CHOICES and value not in CHOICES[key]:
            raise UserError(f"{key}: {unknown('choice', value, CHOICES[key])}")
        if key == "last_time" and not (type(value) in (int, float) and 0 < value <= 1):
            raise UserError(f"last_time: a number above 0, at most 1, is needed, not {value!r}")
        if key in ("unet", "image_size", "scale_factor") and (type(value) is not int or value < 1):
            raise UserError(f"{key}: a positive whole number is needed, not {value!r}")
    return Section({**values, **overrides})


def model(file: OpenedFile, overrides: Section) -> LoadedModel:
    """Return a stage as the model that it is. Raises UserError for a stage that is not there."""
    found, wanted = members(file.tensors), overrides.get("unet")
    number = next(iter(found)) if wanted is None else wanted
    if number not in found:
        there = ", ".join(map(str, found))
        raise UserError(f"unet: {file.path} has the U-Nets {there}, not {number!r}")
    names = members({name: name for name in file.tensors})[number]
    tensors = file.read()
    its = {name: tensors[stored] for name, stored in names.items()}
    upsampler = "to_lowres_time_cond.0.weight" in its
    said = _said(overrides, assumable(number, upsampler, _is_old(its)))
    state, options, (_, conditions) = unet(its, file.path, said.get("scale_factor", SCALE_FACTOR))
    config = Section(
        task="diffusion",
        autoencoder={"name": "identity"},
        conditioner={"name": "none"},
        denoiser={"name": "imagen_unet", **options},
        objective={
            "name": "continuous",
            "curve": said["curve"],
            "prediction": said["prediction"],
            "last_time": said["last_time"],
        },
    )
    text = conditions.get("token_states")
    if isinstance(text, TokenStates):
        size = T5.get(text.width)
        named = Section() if size is None else Section(model=f"google/t5-v1_1-{size}")
        config["conditioner"] = {"name": "t5", **named, "text_size": text.length, "dropout": DROPOUT}
    if upsampler:
        config["condition_sources"] = {"noised_low_res": {"scale_factor": said["scale_factor"], "resize": "nearest"}}
    _say_assumed(file.path, list(found), said, overrides)
    return LoadedModel(config, state, {"image_size": str(said["image_size"])})


def _say_assumed(path: Path, found: list[int], said: Section, overrides: Section) -> None:
    """Print what was taken of a file and what had to be assumed, and the way out."""
    which = f"U-Net {said['unet']} of {', '.join(map(str, found))}" if len(found) > 1 else "a U-Net of Imagen's"
    assumed = {key: value for key, value in said.items() if key not in ("unet", *overrides)}
    if assumed or (len(found) > 1 and "unet" not in overrides):
        shown = " ".join(f"{key}={value}" for key, value in assumed.items())
        say_once(
            f"{path}: read as {which}; not in the file, and assumed: {shown}; where one is another: "
            f"python -m ldm_lab convert {path} OUT.safetensors unet={said['unet']} KEY=VALUE ..."
        )


@register_importer
class Imagen(Importer):
    """A U-Net of imagen-pytorch's, or one of several in a checkpoint of its own."""

    kind = "imagen"
    title = "a model of imagen-pytorch's"
    precedence = 1
    holds_model = True
    takes_overrides = True

    def matches(self, file: OpenedFile) -> bool:
        """Return whether there is a U-Net by the original's names."""
        return bool(members(file.tensors))

    def read_model(self, file: OpenedFile, ema: bool, overrides: Section) -> LoadedModel:
        """Return the model of a stage, the first one unless `unet` says another, averaged where there is an average."""
        return model(file, overrides)

    def denoiser_shape(self, file: OpenedFile, ema: bool) -> DenoiserShape:
        """Return channels and conditions of the first stage."""
        return infer_shape(next(iter(members(file.tensors).values())))
