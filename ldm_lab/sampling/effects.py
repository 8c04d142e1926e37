"""Choices that another one leaves without effect, and weights far above what was tried: a line for each.

What cannot be meant is refused where it is found (`ldm_lab.sampling.options`, `ldm_lab.sampling.request`); what only
these prompts, this model or this size make idle is carried out, and said.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ldm_lab.guidance.classifier_free import null_condition_weight
from ldm_lab.interfaces import Sampler
from ldm_lab.io.masks import hole_of
from ldm_lab.prompts import Prompt
from ldm_lab.sampling.aliases import syntax_hints
from ldm_lab.sampling.image_to_image import InitImage
from ldm_lab.sampling.model import Model
from ldm_lab.sampling.options import SamplingOptions
from ldm_lab.sampling.prompts import prompt_weights
from ldm_lab.sampling.tiles import Tiles

MOST_UPSAMPLER_GUIDANCE = 5.0  # they are asked without guidance, by GLIDE and here
MOST_CLIP_GUIDANCE = 15.0  # GLIDE's notebook has 3


@dataclass(frozen=True)
class Asked:
    """A request whose parts are checked, each for itself.

    Attributes:
        model: the model.
        mixes: the prompts of each picture.
        given: the options as they were given.
        options: the same, resolved.
        guidance: weight of prompts without one.
        sampler: of these options.
        init_image: what to begin with; None is noise.
        height, width: of the pictures, pixels.
        denoiser_tiles: how the denoiser sees them; None: at once.
    """

    model: Model
    mixes: Sequence[Sequence[Prompt]]
    given: SamplingOptions
    options: SamplingOptions
    guidance: float
    sampler: Sampler
    init_image: InitImage | None
    height: int
    width: int
    denoiser_tiles: Tiles | None = None

    @property
    def is_upsampling(self) -> bool:
        """Whether it is an upsampler's part: the base model's has told what both have."""
        return self.model.upscale_factor is not None


def remarks(asked: Asked) -> list[str]:
    """Return what a user should know of a request before it is carried out, a line each.

    Raises:
        UserError: a mask of which nothing is left.
    """
    found = [*_of_weights(asked), *_of_grid(asked), *_of_tiles(asked), *_of_denoiser_tiles(asked)]
    if asked.is_upsampling:
        return [f"upsampler: {line}" for line in found]
    return [*_of_prompts(asked), *found, *_of_init_image(asked)]


def _of_prompts(asked: Asked) -> Iterator[str]:
    """Yield what is said of the prompts themselves."""
    prompts = [prompt for mix in asked.mixes for prompt in mix]
    texts = [prompt.text for prompt in prompts if prompt.image is None]
    yield from syntax_hints([*texts, asked.options.negative or ""])
    said = any(text.strip() for text in texts) or len(texts) < len(prompts) or asked.options.negative is not None
    if asked.model.conditioner.is_unconditional and said:
        yield "prompts: without effect: this model was trained without any"
    if asked.given.guidance is not None and prompts and all(prompt.weight is not None for prompt in prompts):
        yield f"guidance: {asked.guidance:g} is without effect, since every prompt has a weight of its own"
    if asked.options.aesthetic is not None and not any(text.strip() for text in texts):
        yield "aesthetic: without effect: it leads texts, and there is none"
    elif asked.options.aesthetic_weight == 0:
        yield "aesthetic: without effect at a weight of 0"


def _of_weights(asked: Asked) -> Iterator[str]:
    """Yield what is said of guidance: how much there is, and what needs some."""
    if not asked.mixes:
        return
    model, options = asked.model, asked.options
    weights = prompt_weights(asked.mixes, asked.guidance)  # [N, k]
    leads_away = bool(null_condition_weight(weights).any())
    if not leads_away:
        why = "without effect: where the weights of a picture's prompts add up to 1, nothing is led away from"
        for name, is_given in (("negative", options.negative), ("guide_model", model.guide_model)):
            if is_given is not None:
                yield f"{name}: {why}"
    texts = [prompt.text.strip() or prompt.image for mix in asked.mixes for prompt in mix]
    if not weights.any() and any(texts):
        yield "prompts: without effect at a weight of 0"
    is_guided = leads_away or bool((weights < 0).any())
    idle = {
        "guidance_interval": options.guidance_interval != (0.0, 1.0),
        "guidance_rescale": options.guidance_rescale != 0,
    }
    for name in [name for name in idle if idle[name] and not is_guided]:
        yield f"{name}: without effect: with a guidance of 1 there is none to change"
    if idle["guidance_interval"] and is_guided:
        yield from _of_interval(asked)
    if options.clip_guidance == 0:
        yield "clip_guidance: 0 leads nowhere, and costs as much as any other; leave it out"
    most = MOST_UPSAMPLER_GUIDANCE if asked.is_upsampling else model.denoiser.most_guidance
    strongest = weights.abs().sum(1).amax().item()
    if strongest > most:
        yield (
            f"guidance: weights of {strongest:g} in sum are far above what such models were tried with ({most:g} at "
            "most); colors burn, shapes break up"
        )
    if options.clip_guidance is not None and abs(options.clip_guidance) > MOST_CLIP_GUIDANCE:
        yield (
            f"clip_guidance: {options.clip_guidance:g} is far above what such models were tried with (3; "
            f"{MOST_CLIP_GUIDANCE:g} at most)"
        )


def _of_interval(asked: Asked) -> Iterator[str]:
    first, last = asked.options.guidance_interval
    times = asked.sampler.times(asked.model.objective.schedule)  # [S], falling
    inside = (times >= first) & (times <= last)  # [S]
    if not inside.any():
        yield f"guidance_interval: no step begins between {first:g} and {last:g}, so that nothing is guided"
    elif first == 0 and last >= times[0].item():
        yield f"guidance_interval: without effect: every step begins between {first:g} and {last:g}"


def _of_grid(asked: Asked) -> Iterator[str]:
    section = asked.given.sampler
    if isinstance(section, dict) and isinstance(section.get("steps"), str) and section.get("spacing") is not None:
        yield f"spacing: without effect: steps {section['steps']} say themselves which timesteps they are"


def _of_tiles(asked: Asked) -> Iterator[str]:
    tile = asked.options.tile
    if tile is None:
        return
    if asked.model.pixel_bound is not None:
        yield "tile: without effect: this model makes pixels, and nothing is decoded"
    elif tile >= max(asked.height, asked.width):
        yield f"tile: without effect: {asked.width}x{asked.height} pixels fit into one of {tile}"


def _of_denoiser_tiles(asked: Asked) -> Iterator[str]:
    """Yield what tiles of the denoiser mean, wherever there are several."""
    tiles, downscale = asked.denoiser_tiles, asked.model.autoencoder.downscale
    if tiles is None:
        return
    side, count = tiles.side * downscale, tiles.count(asked.height // downscale, asked.width // downscale)
    if count == 1:
        yield f"tile_denoiser: without effect: {asked.width}x{asked.height} pixels fit into one of {side}"
        return
    drawn = "" if asked.is_upsampling else "; a base model draws its prompt in each of them"
    yield (
        f"tile_denoiser: {asked.width}x{asked.height} pixels in {count} tiles of {side}: norms and attention see one "
        f"at a time, so that pictures differ from those without{drawn}"
    )


def _of_init_image(asked: Asked) -> Iterator[str]:
    """Yield what is said of an init image and its mask. Raises UserError for a mask of which nothing is left."""
    image = asked.init_image
    if image is None:
        return
    yield from image.remarks(asked.height, asked.width)
    if not image.is_hole and image.mask is not None and hole_of(image.image) is not None:
        yield "init_image: its transparent part is laid over white, since the mask says what is painted anew"
    if asked.options.mask_blur and image.mask is None:
        yield "mask_blur: without effect: there is no mask, and the image has no transparent part"
    steps, taken = asked.sampler.steps, image.num_steps(asked.sampler.steps)
    idle = "the image comes back as the autoencoder gives it"
    if image.strength > 0 and taken == 0:
        yield f"strength: {image.strength:g} of {steps} steps is none: {idle}"
    elif image.strength == 0 and image.mask is not None:
        yield f"strength: 0 paints nothing where the mask is white: {idle}"
    elif image.mask is None and taken == steps and not asked.model.condition_sources:
        share = f"strength {image.strength:g} of {steps} steps"
        yield f"init_image: without effect but for the size: {share} is all of them"
    elif (mask := image.fitted_mask(asked.height, asked.width)) is not None and mask.min() == 1:
        yield "mask: without effect: it is white all over, so that nothing of the image is kept"
