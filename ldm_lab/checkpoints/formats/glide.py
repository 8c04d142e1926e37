"""Importer of GLIDE's networks: OpenAI's, laionide's fine-tunes, miniGLIDE's and dogGLIDE's, glide-finetune's own.

All are state dicts under the names of openai/glide-text2im, plain or wrapped by a training program. What a network is
(base, upsampler, inpainting, for latents) and its sizes are read off the shapes.
"""

from pathlib import Path
from typing import NamedTuple, get_args

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
from ldm_lab.schedules.discrete import Betas

FIRST, LAST, TEXT = "input_blocks.0.0.weight", "out.2.weight", "transformer_proj.weight"
PREFIXES = ("_orig_mod.", "module.")  # of torch.compile, of DistributedDataParallel
# What no shape tells, and what each of the released models has there.
GLIDE = {"head_width": 64, "text_heads": 8, "norm_groups": 32, "timesteps": 1000}
MINI = {**GLIDE, "head_width": 32, "zero_to_one": True}  # trained on images in [0, 1]
PRESETS = {"openai": GLIDE, "laionide": GLIDE, "miniglide": {**MINI, "timesteps": 100}, "dogglide": MINI}
DENOISER = ("head_width", "text_heads", "norm_groups")  # of these the network's options
MINI_CHANNELS = 96  # base channels of miniGLIDE and dogGLIDE
SCALE_FACTOR = 4  # how many times an upsampler enlarges
RGB = 3  # channels of pixels, and of an upsampler's condition
DROPOUT = 0.2  # share of empty captions in the fine-tuning; miniGLIDE had none, but it is sampled as if
LATENT_STD = 1 / 0.18215  # of glide-finetune's latents: Stable Diffusion's
VOCABULARIES = {"gpt2": 50257, "clip": 49408}  # all tokens
CHOICES = {"betas": get_args(Betas), "vocabulary": tuple(VOCABULARIES)}


class Form(NamedTuple):
    """What a network is, as its shapes tell, of what matters for what they do not.

    Attributes:
        base_channels: of its first level.
        levels: how many there are.
        upsampler: whether it enlarges.
        latent: whether it is one of latents.
        vocabulary: tokens that it knows.
    """

    base_channels: int
    levels: int
    upsampler: bool
    latent: bool
    vocabulary: int


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
    state, options, shape, said = _read(tensors, path, overrides or Section())
    return LoadedDenoiser(state, Section({**options, **{key: said[key] for key in DENOISER}}), shape)


def _read(
    tensors: dict[str, Tensor], path: str | Path, overrides: Section
) -> tuple[dict[str, Tensor], Section, DenoiserShape, Section]:
    """Return tensors in float32, the options that they tell, what the network takes, and what no shape tells."""
    state = {_bare(name): value for name, value in tensors.items()}
    if not is_glide(state):
        raise UserError(f"{path}: not a GLIDE network: {FIRST!r}, {LAST!r} or {TEXT!r} is missing")
    try:
        sizes, channels = infer_config(state), state[LAST].shape[0] // 2
        conditions = infer_conditions(state)
        said = unsaid(overrides, form(sizes, channels, conditions), path)
        conditions = infer_conditions(state, said.get("scale_factor", SCALE_FACTOR))
    except KeyError as error:
        raise UserError(f"{path}: not a complete GLIDE network ({error} is missing or misshapen)") from None
    except UserError:
        raise
    except (IndexError, ValueError, ZeroDivisionError):
        raise UserError(f"{path}: not a complete GLIDE network (a tensor has too few or too many dimensions)") from None
    quantized = next((name for name, value in state.items() if not value.is_floating_point()), None)
    if quantized is not None:
        raise UserError(f"{path}: {quantized} is {state[quantized].dtype}: not a weight of a GLIDE network's")
    # Fine-tuning in half precision leaves files of mixed types; each tensor goes to float32 by itself.
    state = {name: value.float() for name, value in state.items()}
    return state, sizes, DenoiserShape(channels, conditions), said


def form(sizes: Section, channels: int, conditions: ConditionSpec) -> Form:
    """Return the form of a network of these options, channels and conditions."""
    text = conditions["token_ids"]
    vocabulary = text.vocabulary if isinstance(text, TokenIds) else 0
    levels = len(sizes["multipliers"])
    return Form(sizes["base_channels"], levels, "low_res" in conditions, channels != RGB, vocabulary)


def model(tensors: dict[str, Tensor], path: str | Path, overrides: Section | None = None) -> LoadedModel:
    """Return the model that a GLIDE network is.

    The noise schedule is in no file: upsamplers were trained with linear betas, glide-finetune's latent form with those
    of latent diffusion, all others with the cosine's.
    """
    state, options, (channels, conditions), said = _read(tensors, path, overrides or Section())
    latent, upsampler, text = channels != RGB, "low_res" in conditions, conditions["token_ids"]
    pixels = {"name": "identity", **({"zero_to_one": True} if said.get("zero_to_one") else {})}
    vocabulary = Section() if said["vocabulary"] == "gpt2" else Section(vocabulary="clip")
    if text.vocabulary != VOCABULARIES[said["vocabulary"]]:
        vocabulary["vocab_size"] = text.vocabulary
    config = Section(
        task="diffusion",
        autoencoder={"name": "kl_f8", "latent_std": said["latent_std"]} if latent else pixels,
        conditioner={
            "name": "glide_text",
            **vocabulary,
            "text_size": text.length,
            "dropout": 0.0 if upsampler else DROPOUT,
        },
        denoiser={"name": "glide_unet", **options, **{key: said[key] for key in DENOISER}},
        objective={"name": "eps_hybrid", "betas": said["betas"], "timesteps": said["timesteps"]},
    )
    if sources := infer_condition_sources(conditions, channels):
        config["condition_sources"] = sources
    return LoadedModel(config, state, {"image_size": str(said["image_size"])})


def infer_conditions(state: Shapes, scale_factor: int = SCALE_FACTOR) -> ConditionSpec:
    """Return the conditions that a network takes, from the shapes; they do not tell how much an upsampler enlarges."""
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
        conditions["low_res"] = ImageCondition(RGB, scale_factor)
    if inpaint:
        conditions |= {"inpaint_image": ImageCondition(channels), "inpaint_mask": ImageCondition(1)}
    if "clip_to_xf.weight" in state:
        conditions["clip_embed"] = Embedding(state["clip_to_xf.weight"].shape[1], optional=True)
    return conditions


def infer_condition_sources(conditions: ConditionSpec, channels: int) -> Section:
    """Return the config section `condition_sources` that goes with a network's conditions."""
    sources = Section()
    low_res = conditions.get("low_res")
    if isinstance(low_res, ImageCondition):
        sources["low_res"] = {"scale_factor": low_res.scale_factor}
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


def unsaid(overrides: Section, form: Form, path: str | Path) -> Section:
    """Return what no shape tells: `preset`, a key of PRESETS, and the keys of `assumable`.

    Unless they are given they are those of the preset, and that follows from the width: 96 base channels are
    miniGLIDE's, or dogGLIDE's if the file's name has "dog" in it, others OpenAI's.

    Raises:
        UserError: overrides that are none of those.
    """
    mini = "dogglide" if "dog" in Path(path).name.lower() else "miniglide"
    preset = overrides.get("preset", mini if form.base_channels == MINI_CHANNELS else "openai")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise UserError(f"preset: {unknown('preset', preset, PRESETS)}")
    values = assumable(preset, form)
    for key, value in overrides.items():
        if key not in ("preset", *values):
            raise UserError(f"{key}: {unknown('key', key, ['preset', *values])}")
        if type(values.get(key)) is int and (type(value) is not int or value < 1):
            raise UserError(f"{key}: a positive whole number is needed, not {value!r}")
        if type(values.get(key)) is bool and type(value) is not bool:
            raise UserError(f"{key}: true or false is needed, not {value!r}")
        if type(values.get(key)) is float and not (type(value) in (int, float) and 0 < value < float("inf")):
            raise UserError(f"{key}: a number above 0 is needed, not {value!r}")
        if key in CHOICES and value not in CHOICES[key]:
            raise UserError(f"{key}: {unknown('choice', value, CHOICES[key])}")
    return Section({**values, "preset": preset, **overrides})


def assumable(preset: str, form: Form) -> Section:
    """Return what is assumed of a network of this form, unless it is said."""
    upsampling = {"scale_factor": SCALE_FACTOR} if form.upsampler else {}
    pixels = {"latent_std": LATENT_STD} if form.latent else {"zero_to_one": False}
    values = Section({**GLIDE, **upsampling, **pixels})
    values["betas"] = "linear" if form.upsampler else "linear_latent" if form.latent else "squaredcos_cap_v2"
    values["vocabulary"] = "clip" if form.vocabulary == VOCABULARIES["clip"] else "gpt2"
    side = 2 ** (form.levels + 2)  # the original's own rule: 64 for base, 256 for the upsampler
    values["image_size"] = side * 8 if form.latent else side
    values.update({key: value for key, value in PRESETS[preset].items() if key in values})
    return values


def assumed(loaded: LoadedModel, form: Form, path: Path, overrides: Section) -> str:
    """Return a line on what was read of a file and what had to be assumed, and the way out; "" of a released one."""
    if cache_folder() in path.parents or "preset" in overrides:
        return ""
    values = {key: value for key, value in unsaid(overrides, form, path).items() if key not in ("preset", *overrides)}
    if not values:
        return ""
    texts = {key: f"{value:g}" if type(value) is float else str(value).lower() for key, value in values.items()}
    shown = " ".join(f"{key}={text}" for key, text in texts.items())
    denoiser = Section(loaded.config["denoiser"])
    kind = "an upsampler" if form.upsampler else "a base model"
    return (
        f"{path}: read as {kind} of GLIDE's ({denoiser['base_channels']} channels, levels {denoiser['multipliers']}, "
        f"{form.vocabulary} tokens); not in the file, and assumed: {shown}; where one is another: "
        f"python -m ldm_lab convert {path} OUT.safetensors KEY=VALUE ..., then take OUT.safetensors"
    )


def _shapes(file: OpenedFile) -> Shapes:
    return {_bare(name): info for name, info in file.tensors.items()}


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
        shape, sizes = self.denoiser_shape(file, ema), infer_config(_shapes(file))
        if line := assumed(loaded, form(sizes, shape.channels, shape.conditions), file.path, overrides):
            say_once(line)
        return loaded

    def denoiser_shape(self, file: OpenedFile, ema: bool) -> DenoiserShape:
        """Return channels and conditions."""
        shapes = _shapes(file)
        return DenoiserShape(shapes[LAST].shape[0] // 2, infer_conditions(shapes))
