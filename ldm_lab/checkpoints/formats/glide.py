"""Importer of GLIDE's networks: OpenAI's, laionide's fine-tunes, miniGLIDE's and dogGLIDE's, glide-finetune's own.

All are state dicts under the names of openai/glide-text2im, plain or wrapped by a training program. What a network is
(base, upsampler, inpainting, for latents) and its sizes are read off the shapes.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_lab.checkpoints.third_party import read_state_dict
from ldm_lab.errors import UserError, unknown
from ldm_lab.interfaces import ConditionKind, ConditionSpec, Embedding, ImageCondition, TokenIds

FIRST, LAST, TEXT = "input_blocks.0.0.weight", "out.2.weight", "transformer_proj.weight"
PREFIXES = ("_orig_mod.", "module.")  # of torch.compile, of DistributedDataParallel
# What no shape tells, and what each of the released models has there.
KNOBS = {"head_width": int, "text_heads": int, "timesteps": int}
GLIDE = {"head_width": 64, "text_heads": 8, "timesteps": 1000}
PRESETS = {
    "openai": GLIDE,
    "laionide": GLIDE,
    "miniglide": {"head_width": 32, "text_heads": 8, "timesteps": 100},
    "dogglide": {"head_width": 32, "text_heads": 8, "timesteps": 1000},
}
ZERO_TO_ONE = ("miniglide", "dogglide")  # trained on images in [0, 1]
MINI_CHANNELS = 96  # base channels of miniGLIDE and dogGLIDE
SCALE_FACTOR = 4  # how many times an upsampler enlarges
RGB = 3  # channels of pixels, and of an upsampler's condition
DROPOUT = 0.2  # share of empty captions in the fine-tuning; miniGLIDE had none, but it is sampled as if
LATENT_STD = 1 / 0.18215  # of glide-finetune's latents: Stable Diffusion's


def is_one(tensors: dict[str, Any]) -> bool:
    """Return whether a file's tensors are named as the original names them."""
    names = {_bare(name) for name in tensors}
    return {FIRST, LAST, TEXT} <= names


def read(
    path: str | Path, given: dict[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Return `(state_dict, config, extra)` of a GLIDE network.

    Args:
        path: a flat state dict, or one in a dict under "state_dict", "model" or "weights".
        given: what the file does not say: `head_width`, `text_heads`, `timesteps`, or all of them by `preset`, a key of
            PRESETS. Without it they follow from the width: 96 base channels are miniGLIDE's, or dogGLIDE's if the
            file's name has "dog" in it, others OpenAI's.

    Returns:
        The tensors that `GlideUNet` loads strictly, in float32. Its keyword arguments. Extra: `channels` and
        `conditions`, the positional arguments, and `timesteps` of the noise schedule.

    Raises:
        UserError: missing or damaged file, or not such a network; a `given` that is none of those.
    """
    return unet(read_state_dict(path, "GLIDE checkpoint")[0], path, given)


def unet(
    tensors: dict[str, Tensor], path: str | Path, given: dict[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Return what `read` does, of the tensors in the file at `path`."""
    state = {_bare(name): value for name, value in tensors.items()}
    if not is_one(state):
        raise UserError(f"{path}: not a GLIDE network: {FIRST!r}, {LAST!r} or {TEXT!r} is missing")
    try:
        sizes, conditions = infer_config(state), infer_conditions(state)
    except KeyError as error:
        raise UserError(f"{path}: not a complete GLIDE network ({error} is missing or misshapen)") from None
    except (IndexError, ValueError, ZeroDivisionError):
        raise UserError(f"{path}: not a complete GLIDE network (a tensor has too few or too many dimensions)") from None
    unsaid = _knobs(given or {}, sizes["base_channels"], path)
    extra = {"channels": state[LAST].shape[0] // 2, "conditions": conditions, "timesteps": unsaid.pop("timesteps")}
    # Fine-tuning in half precision leaves files of mixed types; each tensor goes to float32 by itself.
    return {name: value.float() for name, value in state.items()}, {**sizes, **unsaid}, extra


def model(
    tensors: dict[str, Tensor], path: str | Path, ema: bool = True, given: dict[str, Any] | None = None
) -> tuple[dict, dict[str, Tensor], dict]:
    """Return `(config, state_dict, extra)` of a GLIDE network as `ldm_lab.checkpoints.models.read_model` does.

    The noise schedule is in no file: upsamplers were trained with linear betas, glide-finetune's latent form with those
    of latent diffusion, all others with the cosine's. `ema` has no meaning here: a file holds one set of weights.
    """
    state, architecture, facts = unet(tensors, path, given)
    conditions, latent = facts["conditions"], facts["channels"] != RGB
    upsampler, text = "low_res" in conditions, conditions["token_ids"]
    mini = _preset(given or {}, architecture["base_channels"], path) in ZERO_TO_ONE
    pixels = {"name": "identity", **({"zero_to_one": True} if mini else {})}
    vocabulary = {} if text.vocabulary == 50257 else {"vocab_size": text.vocabulary}
    config = {
        "task": "diffusion",
        "autoencoder": {"name": "kl_f8", "latent_std": LATENT_STD} if latent else pixels,
        "conditioner": {
            "name": "glide_text",
            **vocabulary,
            "text_size": text.length,
            "dropout": 0.0 if upsampler else DROPOUT,
        },
        "denoiser": {"name": "glide_unet", **architecture},
        "objective": {
            "name": "eps_hybrid",
            "betas": "linear" if upsampler else "linear_latent" if latent else "squaredcos_cap_v2",
            "timesteps": facts["timesteps"],
        },
    }
    if sources := infer_condition_sources(conditions, facts["channels"]):
        config["condition_sources"] = sources
    side = 2 ** (len(architecture["multipliers"]) + 2)  # the original's own rule: 64 for base, 256 for the upsampler
    return config, state, {"image_size": str(side * 8 if latent else side)}


def infer_conditions(state: dict[str, Any]) -> ConditionSpec:
    """Return the conditions that a network takes, from the shapes."""
    channels = state[LAST].shape[0] // 2  # eps, and as many for the variance
    extra = state[FIRST].shape[1] - channels
    forms = {
        (channels + 1) * inpaint + RGB * upsampler: (inpaint, upsampler) for inpaint in (0, 1) for upsampler in (0, 1)
    }
    if extra not in forms:
        raise KeyError(f"{FIRST}: {extra} channels beside {channels}, which no form of GLIDE has")
    inpaint, upsampler = forms[extra]
    length, _ = state["positional_embedding"].shape
    conditions: dict[str, ConditionKind] = {"token_ids": TokenIds(length, state["token_embedding.weight"].shape[0])}
    if upsampler:
        conditions["low_res"] = ImageCondition(RGB, SCALE_FACTOR)
    if inpaint:
        conditions |= {"inpaint_image": ImageCondition(channels), "inpaint_mask": ImageCondition(1)}
    if "clip_to_xf.weight" in state:
        conditions["clip_embed"] = Embedding(state["clip_to_xf.weight"].shape[1])
    return conditions


def infer_condition_sources(conditions: ConditionSpec, channels: int) -> dict[str, dict[str, Any]]:
    """Return the config section `condition_sources` that goes with a network's conditions."""
    sources: dict[str, dict[str, Any]] = {}
    if "low_res" in conditions:
        sources["low_res"] = {"scale_factor": SCALE_FACTOR}
    if "inpaint_image" in conditions:
        sources["inpaint"] = {} if channels == RGB else {"channels": channels}
    clip = conditions.get("clip_embed")
    if isinstance(clip, Embedding):
        sources["clip_embed"] = {"width": clip.width}
    return sources


def infer_config(state: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of `GlideUNet` that follow from the shapes."""
    base = state["time_embed.0.weight"].shape[1]
    outputs = _count(state, "output_blocks.{}.0.in_layers.0.weight")
    rising = [i for i in range(outputs) if _is_res(state, i, 1) or _is_res(state, i, 2)]
    per_level = rising[0] + 1 if rising else outputs
    levels = len(rising) + 1
    lasts = [level * per_level for level in reversed(range(levels))]  # an output block of each level, the finest first
    widths = [state[f"output_blocks.{i}.0.in_layers.2.weight"].shape[0] for i in lasts]
    attention = [2**level for level, i in enumerate(lasts) if f"output_blocks.{i}.1.qkv.weight" in state]
    _, text_width = state["positional_embedding"].shape
    clip = {}
    if "clip_to_xf.weight" in state:
        clip = {"clip_positions": state["clip_to_xf.weight"].shape[0] // text_width}
    return {
        "base_channels": base,
        "multipliers": [width // base for width in widths],
        "blocks_per_level": per_level - 1,
        "attention": attention,
        "text_width": text_width,
        "text_layers": _count(state, "transformer.resblocks.{}.ln_1.weight"),
        **clip,
    }


def _bare(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _is_res(state: dict[str, Any], block: int, place: int) -> bool:
    return f"output_blocks.{block}.{place}.in_layers.0.weight" in state


def _count(state: dict[str, Any], name: str) -> int:
    """Return how many numbers, from 0 on, give the name of a tensor."""
    count = 0
    while name.format(count) in state:
        count += 1
    return count


def _knobs(given: dict[str, Any], base_channels: int, path: str | Path) -> dict[str, int]:
    """Return what no shape tells."""
    for key, value in given.items():
        if key == "preset" and (not isinstance(value, str) or value not in PRESETS):
            raise UserError(f"preset: {unknown('preset', value, PRESETS)}")
        if key != "preset" and key not in KNOBS:
            raise UserError(f"{key}: {unknown('key', key, ['preset', *KNOBS])}")
        if key in KNOBS and (type(value) is not int or value < 1):
            raise UserError(f"{key}: a positive whole number is needed, not {value!r}")
    preset = _preset(given, base_channels, path)
    return {**PRESETS[preset], **{key: value for key, value in given.items() if key in KNOBS}}


def _preset(given: dict[str, Any], base_channels: int, path: str | Path) -> str:
    """Return which of PRESETS a network is: the one that is given, or by its width and its file's name."""
    mini = "dogglide" if "dog" in Path(path).name.lower() else "miniglide"
    return given.get("preset", mini if base_channels == MINI_CHANNELS else "openai")
