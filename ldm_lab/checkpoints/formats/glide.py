"""Importer of GLIDE's networks: OpenAI's, laionide's fine-tunes, miniGLIDE's and dogGLIDE's, glide-finetune's own.

All are state dicts under the names of openai/glide-text2im, plain or wrapped by a training program. What a network is
(base, upsampler, inpainting, for latents) and its sizes are read off the shapes.
"""

from pathlib import Path

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
from ldm_lab.conditions import ConditionKind, ConditionSpec, Embedding, ImageCondition, TokenIds
from ldm_lab.errors import UserError, unknown
from ldm_lab.pretrained.resolve import cache_folder

FIRST, LAST, TEXT = "input_blocks.0.0.weight", "out.2.weight", "transformer_proj.weight"
PREFIXES = ("_orig_mod.", "module.")  # of torch.compile, of DistributedDataParallel
# What no shape tells, and what each of the released models has there.
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


def is_glide(tensors: Shapes) -> bool:
    """Return whether a file's tensors are named as the original names them."""
    names = {_bare(name) for name in tensors}
    return {FIRST, LAST, TEXT} <= names


def unet(tensors: dict[str, Tensor], path: str | Path, overrides: Section | None = None) -> LoadedDenoiser:
    """Return a GLIDE network: the tensors that `GlideUNet` loads strictly, in float32, and its options.

    Args:
        tensors: by the original's names.
        path: where they are from; the file's name may tell which network it is.
        overrides: what the file does not say (see `unsaid`).

    Raises:
        UserError: not such a network; overrides that are none of those.
    """
    state = {_bare(name): value for name, value in tensors.items()}
    if not is_glide(state):
        raise UserError(f"{path}: not a GLIDE network: {FIRST!r}, {LAST!r} or {TEXT!r} is missing")
    try:
        sizes, conditions = infer_config(state), infer_conditions(state)
    except KeyError as error:
        raise UserError(f"{path}: not a complete GLIDE network ({error} is missing or misshapen)") from None
    except (IndexError, ValueError, ZeroDivisionError):
        raise UserError(f"{path}: not a complete GLIDE network (a tensor has too few or too many dimensions)") from None
    said = unsaid(overrides or Section(), sizes["base_channels"], path)
    options = Section({**sizes, "head_width": said["head_width"], "text_heads": said["text_heads"]})
    # Fine-tuning in half precision leaves files of mixed types; each tensor goes to float32 by itself.
    state = {name: value.float() for name, value in state.items()}
    return LoadedDenoiser(state, options, DenoiserShape(state[LAST].shape[0] // 2, conditions))


def model(tensors: dict[str, Tensor], path: str | Path, overrides: Section | None = None) -> LoadedModel:
    """Return the model that a GLIDE network is.

    The noise schedule is in no file: upsamplers were trained with linear betas, glide-finetune's latent form with those
    of latent diffusion, all others with the cosine's.
    """
    state, options, (channels, conditions) = unet(tensors, path, overrides)
    said = unsaid(overrides or Section(), options["base_channels"], path)
    latent, upsampler, text = channels != RGB, "low_res" in conditions, conditions["token_ids"]
    pixels = {"name": "identity", **({"zero_to_one": True} if said["preset"] in ZERO_TO_ONE else {})}
    vocabulary = {} if text.vocabulary == 50257 else {"vocab_size": text.vocabulary}
    config = Section(
        task="diffusion",
        autoencoder={"name": "kl_f8", "latent_std": LATENT_STD} if latent else pixels,
        conditioner={
            "name": "glide_text",
            **vocabulary,
            "text_size": text.length,
            "dropout": 0.0 if upsampler else DROPOUT,
        },
        denoiser={"name": "glide_unet", **options},
        objective={
            "name": "eps_hybrid",
            "betas": "linear" if upsampler else "linear_latent" if latent else "squaredcos_cap_v2",
            "timesteps": said["timesteps"],
        },
    )
    if sources := infer_condition_sources(conditions, channels):
        config["condition_sources"] = sources
    side = 2 ** (len(options["multipliers"]) + 2)  # the original's own rule: 64 for base, 256 for the upsampler
    return LoadedModel(config, state, {"image_size": str(side * 8 if latent else side)})


def infer_conditions(state: Shapes) -> ConditionSpec:
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
        conditions["clip_embed"] = Embedding(state["clip_to_xf.weight"].shape[1], optional=True)
    return conditions


def infer_condition_sources(conditions: ConditionSpec, channels: int) -> Section:
    """Return the config section `condition_sources` that goes with a network's conditions."""
    sources = Section()
    if "low_res" in conditions:
        sources["low_res"] = {"scale_factor": SCALE_FACTOR}
    if "inpaint_image" in conditions:
        sources["inpaint"] = {} if channels == RGB else {"channels": channels}
    clip = conditions.get("clip_embed")
    if isinstance(clip, Embedding):
        sources["clip_embed"] = {"width": clip.width}
    return sources


def infer_config(state: Shapes) -> Section:
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
    options = Section(
        base_channels=base,
        multipliers=[width // base for width in widths],
        blocks_per_level=per_level - 1,
        attention=attention,
        text_width=text_width,
        text_layers=_count(state, "transformer.resblocks.{}.ln_1.weight"),
    )
    if "clip_to_xf.weight" in state:
        options["clip_positions"] = state["clip_to_xf.weight"].shape[0] // text_width
    return options


def _bare(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _is_res(state: Shapes, block: int, place: int) -> bool:
    return f"output_blocks.{block}.{place}.in_layers.0.weight" in state


def _count(state: Shapes, name: str) -> int:
    """Return how many numbers, from 0 on, give the name of a tensor."""
    count = 0
    while name.format(count) in state:
        count += 1
    return count


def unsaid(overrides: Section, base_channels: int, path: str | Path) -> Section:
    """Return what no shape tells: `preset`, a key of PRESETS, and `head_width`, `text_heads` and `timesteps`.

    Unless they are given they are those of the preset, and that follows from the width: 96 base channels are
    miniGLIDE's, or dogGLIDE's if the file's name has "dog" in it, others OpenAI's.

    Raises:
        UserError: overrides that are none of those.
    """
    for key, value in overrides.items():
        if key == "preset" and (not isinstance(value, str) or value not in PRESETS):
            raise UserError(f"preset: {unknown('preset', value, PRESETS)}")
        if key not in ("preset", *GLIDE):
            raise UserError(f"{key}: {unknown('key', key, ['preset', *GLIDE])}")
        if key in GLIDE and (type(value) is not int or value < 1):
            raise UserError(f"{key}: a positive whole number is needed, not {value!r}")
    mini = "dogglide" if "dog" in Path(path).name.lower() else "miniglide"
    preset = overrides.get("preset", mini if base_channels == MINI_CHANNELS else "openai")
    return Section({**PRESETS[preset], "preset": preset, **overrides})


def assumed(config: Section, path: Path, overrides: Section) -> str:
    """Return a line on what was read of a file and what had to be assumed, and the way out; "" of a released one."""
    if cache_folder() in path.parents:
        return ""
    denoiser, objective = Section(config["denoiser"]), Section(config["objective"])
    unknown_keys = [key for key in GLIDE if key not in overrides]
    if not unknown_keys:
        return ""
    values = {**denoiser, **objective}
    shown = ", ".join(f"{key}={values[key]}" for key in unknown_keys)
    form = "an upsampler" if "low_res" in config.get("condition_sources", {}) else "a base model"
    factor = f", low_res.scale_factor={SCALE_FACTOR}" * (form == "an upsampler")
    sizes = f"{denoiser['base_channels']} channels, levels {denoiser['multipliers']}"
    return (
        f"{path}: read as {form} of GLIDE's ({sizes}); not in the file, and assumed: {shown}, "
        f"betas={objective['betas']}{factor}; for another: python -m ldm_lab convert {path} OUT.safetensors "
        f"{unknown_keys[0]}=N, then take OUT.safetensors"
    )


@register_importer
class Glide(Importer):
    """A network of GLIDE's: a flat state dict, or one in a dict under "state_dict", "model" or "weights"."""

    kind = "glide"
    title = "a network of GLIDE's"
    precedence = 1
    holds_model = True
    takes_overrides = True

    def matches(self, file: OpenedFile) -> bool:
        """Return whether the tensors are named as the original names them."""
        return is_glide(file.tensors)

    def read_model(self, file: OpenedFile, ema: bool, overrides: Section) -> LoadedModel:
        """Return the model; a file holds one set of weights. What is assumed of a file that is not released is said."""
        loaded = model(file.read(), file.path, overrides)
        if line := assumed(loaded.config, file.path, overrides):
            say_once(line)
        return loaded

    def denoiser_shape(self, file: OpenedFile, ema: bool) -> DenoiserShape:
        """Return channels and conditions."""
        return unet(file.read(), file.path).shape
