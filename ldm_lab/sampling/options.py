"""Every choice about how pictures are made: its meaning, default and bounds, declared once. Imports no torch.

The flags of `sample.py`, the section `sampling` of a YAML's `demo`, `enlargements` and `inpaintings`, the stages of a
cascade and the Python API all take them from here.
"""

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Interval, Le
from PIL import Image

from ldm_lab.config import LARGEST_SEED, NonNegativeInt, PartSection, PositiveInt, Share, build, check_section, register
from ldm_lab.errors import UserError
from ldm_lab.io.text import is_text
from ldm_lab.sampling_defaults import SamplingDefaults, Thresholding

SamplerConfig = dict[str, str | int | float | bool | None]  # a sampler's name and options
ImageFile = str | Path | Image.Image
OptionValue = str | int | float | bool | Path | Image.Image | tuple[float, float] | SamplerConfig | None
Resize = Literal["crop", "pad", "stretch"]
Precision = Literal["32-true", "16-mixed", "bf16-mixed"]  # as the trainer calls them

MIN_TIMESTEPS_FAST27 = 50  # that GLIDE's respacing for upsampling needs
DEFAULT_GUIDANCE = SamplingDefaults().guidance
DEFAULT_UPSAMPLER = "ddim"
DEFAULT_SAMPLER = "unipc"  # nearest to the converged picture for its model calls (docs/measured.md)
# Options that make no sense between prompts (`ldm_lab.sampling.interpolation`).
NOT_INTERPOLATED = (
    *("negative", "init_image", "mask", "invert_mask", "mask_blur", "resize", "strength"),
    *("clip_guidance", "rerank"),
)
# What makes no sense for an upsampler, or is the base's for both.
BASE_ONLY = (
    "negative", "size", "init_image", "strength", "mask", "invert_mask", "mask_blur", "resize",
    "aesthetic", "aesthetic_weight", "aesthetic_embeddings",
    "clip_guidance", "rerank", "seed", "batch_size",
)  # fmt: skip
# An option -> the one without which it means nothing.
BELONGS = {
    "strength": "init_image", "mask": "init_image", "mask_blur": "init_image", "resize": "init_image",
    "invert_mask": "mask",
    "aesthetic_weight": "aesthetic", "aesthetic_embeddings": "aesthetic",
    "tile_overlap": "tile_denoiser",
}  # fmt: skip
UPSAMPLER = "upsampler_"  # prefix of what is said of all upsamplers
STAGE = "upsampler."  # before the number of one of them, from 1 on, and a dot
# Options that name a file, and those of `ModelOptions` that change pictures otherwise.
IMAGE_FILES = ("init_image", "mask")
MODEL_FILES = ("guide_model", "autoencoder", "conditioner", "aesthetic_embeddings")
OF_LOADING = ("precision", "noised_clip_head_width")


def belongs_to(other: str) -> str:
    """Return why an option is wrong, or idle, without another one."""
    return f"belongs to {other}, which is not given"


def stage_prefix(number: int) -> str:
    """Return the prefix of what is said of one upsampler: "upsampler.2."."""
    return f"{STAGE}{number}."


class OptionValues(dict[str, OptionValue]):
    """Options by name: those that a YAML, a command line or a caller gives, or all of them."""

    def named(self, names: Iterable[str], prefix: str = "") -> "OptionValues":
        """Return those of some names that are given here under a prefix, without it; a list as a tuple."""
        found = {name: self[prefix + name] for name in names if self.get(prefix + name) is not None}
        return OptionValues({name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})


# Where training draws pictures of its own: what differs from the defaults, unless the YAML says otherwise.
DEMO = OptionValues(sampler={"name": "plms", "steps": 50})
SUPER_RESOLUTION_DEMO = OptionValues(sampler={"name": "ddim", "steps": 27}, temperature=1.0)


@register("sampling")
@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How pictures are made. None stands for a default that depends on other choices or on the model (`resolved`).

    Attributes:
        guidance: weight of prompts without one (default: 3; with CLIP guidance, and of an upsampler, 1; of Imagen's
            networks 5)
        negative: text that guidance steers away from (default: from no prompt at all)
        guidance_interval: guide between these two times only; 0 is the finished picture, 1 is noise
        guidance_rescale: bring the spread of guided predictions back, against burnt colors: 0 to 1
        sampler: name of the sampler (default: unipc; of an upsampler ddim in the steps fast27, or 27)
        temperature: factor of the noise that sampling starts from (default: 1; of an upsampler 0.997, of Imagen's 1)
        clip_denoised: keep clean estimates within the range of pixels (default: for models of pixels)
        thresholding: how they are kept there: clamped (static), or divided by a percentile of each picture's magnitudes
            (dynamic), against flat, burnt regions at much guidance (default: static; of Imagen's networks dynamic)
        threshold_percentile: of dynamic thresholding, 0 to 1 (default: 0.995; of IF's networks 0.95)
        threshold_divisor: the most that dynamic thresholding divides by, from 1 on, against pale pictures (default:
            whatever the percentile is; of IF's networks 1.5, of its super-resolution 1)
        low_res_level: of a super-resolution stage that is told of it: how much noise is added to what it enlarges, 0
            to 1 (default: the model's own, mostly 0.2); little keeps to the small picture
        size: pixels: 256, or 384x256 for width x height (default: as trained; the init image's own aspect, with about
            as many pixels)
        init_image: image to begin with instead of noise alone (img2img, inpainting); a transparent part is painted anew
        strength: share of the steps that the init image goes through: 0 to 1 (default: 0.7; 1 with a mask)
        mask: of the init image's size: only what is white here is painted anew, grey blends
        invert_mask: what is black is painted anew, and white stays
        mask_blur: soften the mask's edges by so many pixels
        resize: how the init image comes to the size: cropped, padded by its edges or stretched (default: crop, of a
            size with the image's own aspect)
        aesthetic: lead texts to the images of this rating, such as 9 of 0 to 9
        aesthetic_weight: how strongly; negative steers away (default: 0.5)
        aesthetic_embeddings: file of `rating-embeddings`, folder of LAION's, or a released name (default: the
            released set of the model's CLIP)
        clip_guidance: make pictures more like their texts by a noised CLIP: factor of its gradient (GLIDE's: 3)
        rerank: make so many pictures for each, keep the one most like its prompts
        seed: of the first picture, the others count on from it; -1 draws one
        batch_size: pictures at once
        tile: decode larger pictures in tiles of this side, pixels; the same pictures, with less memory on the device
        tile_denoiser: have the denoiser see larger pictures in overlapping tiles of this side, pixels, which are
            blended in every step: other pictures, with the memory of a tile; for upsamplers, at the size of their crops
        tile_overlap: pixels that these share at least (default: about a quarter)
    """

    guidance: float | None = None
    negative: str | None = None
    guidance_interval: tuple[Share, Share] = (0.0, 1.0)
    guidance_rescale: Share = 0.0
    sampler: Annotated[str | SamplerConfig | None, PartSection("sampler")] = None
    temperature: Annotated[float, Ge(0), Le(2)] | None = None
    clip_denoised: bool | None = None
    thresholding: Thresholding | None = None
    threshold_percentile: Share | None = None
    threshold_divisor: Annotated[float, Ge(1)] | None = None
    low_res_level: Share | None = None
    size: int | str | tuple[int, int] | None = None
    init_image: ImageFile | None = None
    strength: Share | None = None
    mask: ImageFile | None = None
    invert_mask: bool | None = None
    mask_blur: Annotated[float, Ge(0), Le(1000)] | None = None
    resize: Resize | None = None
    aesthetic: Annotated[int, Ge(0)] | None = None
    aesthetic_weight: float | None = None
    aesthetic_embeddings: str | Path | None = None
    clip_guidance: float | None = None
    rerank: PositiveInt = 1
    seed: Annotated[int, Interval(ge=-1, le=LARGEST_SEED)] = 0
    batch_size: PositiveInt = 16
    tile: PositiveInt | None = None
    tile_denoiser: PositiveInt | None = None
    tile_overlap: NonNegativeInt | None = None

    def __post_init__(self) -> None:
        if given := self.given():
            _check(given)
        object.__setattr__(self, "negative", self.negative or None)
        object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))

    @staticmethod
    def check(
        *,
        negative: str | None,
        guidance_interval: Sequence[float],
        clip_denoised: bool | None,
        thresholding: str | None,
        threshold_percentile: float | None,
        threshold_divisor: float | None,
        size: int | str | Sequence[int] | None,
        init_image: ImageFile | None,
        strength: float | None,
        mask: ImageFile | None,
        invert_mask: bool | None,
        mask_blur: float | None,
        resize: str | None,
        aesthetic: int | None,
        aesthetic_weight: float | None,
        aesthetic_embeddings: str | Path | None,
        tile_denoiser: int | None,
        tile_overlap: int | None,
    ) -> list[str]:
        """Return what is wrong across the options, of which each for itself is right."""
        values = {
            "init_image": init_image, "strength": strength, "mask": mask, "invert_mask": invert_mask,
            "mask_blur": mask_blur, "resize": resize, "aesthetic": aesthetic, "aesthetic_weight": aesthetic_weight,
            "aesthetic_embeddings": aesthetic_embeddings, "tile_denoiser": tile_denoiser, "tile_overlap": tile_overlap,
        }  # fmt: skip
        problems = [
            f"{key}: {belongs_to(other)}"
            for key, other in BELONGS.items()
            if values[key] is not None and values[other] is None
        ]
        dynamic = {"threshold_percentile": threshold_percentile, "threshold_divisor": threshold_divisor}
        given = [key for key, value in dynamic.items() if value is not None]
        if clip_denoised is False and (given or thresholding is not None):
            problems.append("clip_denoised: off leaves nothing to threshold; thresholding goes without it")
        if thresholding == "static":
            problems += [f"{key}: belongs to dynamic thresholding" for key in given]
        if not is_text(negative or ""):
            problems.append(f"negative: {negative!r}: a prompt is text in UTF-8; these bytes are none")
        first, last = guidance_interval
        if not first <= last:
            problems.append(f"guidance_interval: two times 0 <= first <= last <= 1 are needed, not {first:g} {last:g}")
        try:
            parse_size(size)
        except UserError as error:
            problems.append(str(error))
        return problems

    @classmethod
    def from_values(cls, values: Mapping[str, OptionValue]) -> "SamplingOptions":
        """Return options by name, such as those of a YAML's section. Raises UserError for an unknown name, too."""
        _check(values)
        options: SamplingOptions = build("sampling", dict(values))
        return options

    def given(self) -> OptionValues:
        """Return the options that are not at their defaults."""
        values = asdict(self)
        names = [field.name for field in fields(self) if values[field.name] != field.default]
        return OptionValues((name, values[name]) for name in names)

    @property
    def asked_thresholding(self) -> Thresholding | None:
        """How clean estimates are to be kept in range, by any of the options; None: as the network's kind has it."""
        is_dynamic = self.threshold_percentile is not None or self.threshold_divisor is not None
        return self.thresholding or ("dynamic" if is_dynamic else None)

    def resolved(
        self, upsampler: bool = False, timesteps: int | None = None, defaults: SamplingDefaults | None = None
    ) -> "SamplingOptions":
        """Return the options with the defaults that depend on others, or on the model, filled in; no seed is -1.

        The strength of an init image follows from its files (`ldm_lab.sampling.image_to_image.InitImage`).

        Args:
            upsampler: whether the model is one.
            timesteps: of the model's noise schedule; None if it is continuous.
            defaults: of the model's kind.
        """
        defaults = defaults or SamplingDefaults()
        guidance = defaults.upsampler_guidance if upsampler else defaults.guidance
        guidance = guidance if self.clip_guidance is None else 1.0
        asked = self.asked_thresholding
        thresholding = None if self.clip_denoised is False else asked or defaults.thresholding
        most = defaults.upsampler_most if upsampler else defaults.most
        percentile = defaults.percentile if self.threshold_percentile is None else self.threshold_percentile
        sampler = self.sampler or DEFAULT_SAMPLER
        if self.sampler is None and upsampler:  # as GLIDE's
            steps = "fast27" if (timesteps or 0) >= MIN_TIMESTEPS_FAST27 else 27
            sampler = {"name": DEFAULT_UPSAMPLER, "steps": steps}
        return replace(
            self,
            guidance=guidance if self.guidance is None else self.guidance,
            sampler={"name": sampler} if isinstance(sampler, str) else sampler,
            temperature=(defaults.upsampler_temperature if upsampler else 1.0)
            if self.temperature is None
            else self.temperature,
            clip_denoised=self.clip_denoised if asked is None or asked == defaults.thresholding == "static" else True,
            thresholding=thresholding,
            threshold_percentile=percentile if thresholding == "dynamic" else None,
            threshold_divisor=(self.threshold_divisor or most) if thresholding == "dynamic" else None,
            aesthetic_weight=0.5
            if self.aesthetic is not None and self.aesthetic_weight is None
            else self.aesthetic_weight,
            seed=secrets.randbelow(2**32) if self.seed == -1 else self.seed,
        )


@register("model_options")
@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a trained model is loaded and where it runs.

    Attributes:
        device: cpu, cuda, cuda:1, mps, ... (default: the accelerator, if there is one)
        precision: of the denoiser's arithmetic, in the trainer's words
        compile: compile the denoiser: slow to start, faster for many pictures
        offload: keep each part in main memory while it does not work
        lora: a LoRA of the model's, as FILE or FILE:0.8 with the strength after the last colon (default: 1); may be
            given again
        guide_model: autoguidance: a worse checkpoint, such as an earlier one, to guide away from instead of no prompt
        autoencoder: its weights file, if not where the checkpoint says
        conditioner: its weights file, if not where the checkpoint says
        noised_clip: image and text tower of the CLIP of CLIP guidance (default: GLIDE's, released)
        noised_clip_head_width: channels of an attention head in these (default: 64)
    """

    device: str | None = None
    precision: Precision = "32-true"
    compile: bool = False
    offload: bool = False
    lora: list[str | Path] = ()  # type: ignore[assignment]  # a default that nothing changes
    guide_model: str | Path | None = None
    autoencoder: str | Path | None = None
    conditioner: str | Path | None = None
    noised_clip: tuple[str | Path, str | Path] | None = None
    noised_clip_head_width: PositiveInt | None = None

    def __post_init__(self) -> None:
        values = asdict(self)
        given = {field.name: values[field.name] for field in fields(self) if values[field.name] != field.default}
        if given and (problems := check_section("model_options", given, "model_options")):
            raise UserError("; ".join(problem.removeprefix("model_options.") for problem in problems))

    def of_upsampler(self) -> "ModelOptions":
        """Return how an upsampler is loaded beside it: where and how precisely it runs; its parts are its own."""
        own = ModelOptions(device=self.device, precision=self.precision)
        return replace(own, compile=self.compile, offload=self.offload)

    @staticmethod
    def check(*, noised_clip: Sequence[str | Path] | None, noised_clip_head_width: int | None) -> list[str]:
        """Return what is wrong across the options."""
        if noised_clip_head_width is not None and noised_clip is None:
            return ["noised_clip_head_width: belongs to noised_clip, which is not given"]
        return []


def _check(values: Mapping[str, OptionValue]) -> None:
    """Raise UserError with all that is wrong with options, in one line."""
    problems = check_section("sampling", dict(values), "sampling")
    if problems:
        raise UserError("; ".join(problem.removeprefix("sampling.") for problem in problems))


def parse_size(size: int | str | Sequence[int] | None) -> tuple[int, int] | None:
    """Return `(height, width)` of 256 (a square), "384x256" (width x height), or height and width, all in pixels.

    None stays None.

    Raises:
        UserError: anything else.
    """
    if size is None:
        return None
    if isinstance(size, int):
        return size, size
    if not isinstance(size, str):
        height, width = size
        return height, width
    parts = size.lower().split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"size {size!r}: write pixels as 256 or as WIDTHxHEIGHT, e.g. 384x256")
    width, height = int(parts[0]), int(parts[-1])
    return height, width
