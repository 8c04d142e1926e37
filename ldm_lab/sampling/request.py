"""A request for pictures, checked against the model before any work."""

import functools
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral

import torch
from PIL import Image
from torch import Tensor

from ldm_lab.conditions import UPSAMPLER_ALONE
from ldm_lab.config import build
from ldm_lab.errors import UserError
from ldm_lab.guidance.classifier_free import null_condition_weight
from ldm_lab.interfaces import Sampler
from ldm_lab.io.images import own_size, to_tensor
from ldm_lab.prompts import Prompt
from ldm_lab.sampling.aesthetic import Aesthetic
from ldm_lab.sampling.effects import Asked, remarks
from ldm_lab.sampling.image_to_image import InitImage
from ldm_lab.sampling.model import Model
from ldm_lab.sampling.options import SamplingOptions, parse_size
from ldm_lab.sampling.prompts import check_target_embeddings, prompt_weights
from ldm_lab.sampling.tiles import Tiles, unit_of
from ldm_lab.sampling_defaults import SamplingDefaults

log = logging.getLogger(__name__)

MIN_TILE = 4  # latent elements


@dataclass(frozen=True)
class Request:
    """What is asked of a model, with all defaults filled in and all files read.

    Attributes:
        mixes: the prompts of each of N pictures.
        seeds: one for each picture.
        options: resolved (`SamplingOptions.resolved`).
        guidance: weight of prompts without one.
        temperature: factor of the noise that sampling starts from.
        sampler: of these options.
        latent_size: height and width of the latents.
        downscale: pixels of a side of a latent element.
        tile: side of a decoder's tile in latent elements; None decodes at once.
        denoiser_tiles: how the denoiser sees them; None: at once.
        low_res: what an upsampler is to enlarge, [N, 3, h, w] in [-1, 1]; None for a base model.
        init_image: what to begin with; None is noise.
        aesthetic: what the texts are guided toward; None leaves them as they are.
        remarks: what a user should know of it, a line each.
    """

    mixes: list[list[Prompt]]
    seeds: Sequence[int]
    options: SamplingOptions
    guidance: float
    temperature: float
    sampler: Sampler
    latent_size: tuple[int, int]
    downscale: int
    tile: int | None
    denoiser_tiles: Tiles | None
    low_res: Tensor | None
    init_image: InitImage | None
    aesthetic: Aesthetic | None
    remarks: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """How many steps each picture goes through."""
        steps = self.sampler.steps
        return steps if self.init_image is None else self.init_image.num_steps(steps)

    @property
    def work(self) -> float:
        """What it costs: pictures, candidates included, x steps x megapixels x prompts that are mixed.

        The pixels of tiles, in which a denoiser sees a picture, count as often as they overlap.
        """
        height, width = self.latent_size
        tiles = self.denoiser_tiles
        area = height * width if tiles is None else tiles.count(height, width) * tiles.side**2
        prompts = sum(max(1, len(mix)) for mix in self.mixes)  # of all pictures
        return prompts * self.options.rerank * self.steps * area * self.downscale**2 / 1e6

    def total_steps(self, pictures: int) -> int:
        """Return how many steps all batches of so many pictures go through."""
        return math.ceil(pictures / self.options.batch_size) * self.steps


def checked_request(
    model: Model,
    mixes: list[list[Prompt]],
    options: SamplingOptions,
    seeds: Sequence[int] | None = None,
    low_res: Sequence[Image.Image] | Tensor | None = None,
) -> Request:
    """Return a request that the model can carry out.

    Args:
        model: the model.
        mixes: the prompts of each picture.
        options: all choices.
        seeds: one for each picture; None counts on from `options.seed`.
        low_res: what an upsampler is to enlarge, one for each picture: images of one size, or [N, 3, h, w] in [-1, 1].

    Raises:
        UserError: an unknown sampler or option, a size that the model's levels do not divide, guidance asked of a
            model that was trained without dropped conditions, a weight that is not finite, an aesthetic of another
            network's embeddings, ...
    """
    schedule, asked = model.objective.schedule, options
    options = options.resolved(model.upscale_factor is not None, schedule.timesteps, _defaults(model, options))
    options = _without_thresholds(model, asked, options)
    seeds = _seeds(range(options.seed, options.seed + len(mixes)) if seeds is None else seeds, len(mixes))
    given = _low_res(model, low_res, len(mixes))  # [N, 3, h, w] or None
    if options.low_res_level is not None and "low_res_level" not in model.denoiser.spec:
        raise UserError("low_res_level: this model is told of no noise in what it enlarges")
    init_image = InitImage.from_options(options)
    if init_image is not None:
        options = replace(options, strength=init_image.strength)
    guidance, temperature = options.guidance, options.temperature
    assert guidance is not None and temperature is not None and isinstance(options.sampler, dict), "they are resolved"
    sampler: Sampler = build("sampler", options.sampler)
    _check_guidance(model, mixes, options, guidance)
    _check_rerank(model, options)
    latent_size = model.latent_size(_size(model, options, given, init_image))
    sampler.times(schedule, latent_size)  # refuses steps that this schedule does not have
    height, width = (side * model.autoencoder.downscale for side in latent_size)
    if options.clip_guidance is not None:
        check_target_embeddings(model, mixes, guidance, height, width)
    tiles = _denoiser_tiles(model, options)
    told = tuple(remarks(Asked(model, mixes, asked, options, guidance, sampler, init_image, height, width, tiles)))
    _tell(told)
    return Request(
        mixes=mixes,
        seeds=seeds,
        options=options,
        guidance=guidance,
        temperature=temperature,
        sampler=sampler,
        latent_size=latent_size,
        downscale=model.autoencoder.downscale,
        tile=_tile(model, options.tile),
        denoiser_tiles=tiles,
        low_res=given,
        init_image=init_image,
        aesthetic=_aesthetic(model, options),
        remarks=told,
    )


def _without_thresholds(model: Model, asked: SamplingOptions, options: SamplingOptions) -> SamplingOptions:
    """Return the resolved options, of a model of latents without thresholds, unless it is to clip all the same.

    Raises:
        UserError: it is asked for some.
    """
    if model.pixel_bound is not None or asked.clip_denoised:
        return options
    if asked.asked_thresholding is not None:
        raise UserError(
            "thresholding: this model makes latents, which have no range to be kept in, as pixels have; leave it out"
        )
    return replace(options, thresholding=None, threshold_percentile=None, threshold_divisor=None)


def _seeds(seeds: Sequence[int], pictures: int) -> Sequence[int]:
    """Return the seeds of pictures. Raises UserError unless there is one for each, of 64 bits."""
    if len(seeds) != pictures:
        raise UserError(f"seeds: {len(seeds)} for {pictures} pictures; one for each is needed")
    if odd := [seed for seed in seeds if not isinstance(seed, Integral) or not -(2**63) <= seed < 2**64]:
        raise UserError(f"seeds: whole numbers of at most 64 bits are needed, not {odd[0]!r}")
    return seeds


def _low_res(model: Model, low_res: Sequence[Image.Image] | Tensor | None, pictures: int) -> Tensor | None:
    """Return what is to be enlarged, [N, 3, h, w]; None for a base model."""
    if model.upscale_factor is not None and low_res is None:
        raise UserError(UPSAMPLER_ALONE)
    if model.upscale_factor is None and low_res is not None:
        raise UserError("this model is no upsampler: it takes no pictures to enlarge")
    if low_res is None or isinstance(low_res, Tensor):
        given = low_res
    elif len({image.size for image in low_res}) > 1:
        raise UserError("low_res: the images have to be of one size")
    else:
        given = torch.stack([to_tensor(image) for image in low_res])  # [N, 3, h, w]
    if given is not None and len(given) != pictures:
        raise UserError(f"low_res: {len(given)} images to enlarge for {pictures} pictures; one for each is needed")
    return given


def _size(
    model: Model, options: SamplingOptions, low_res: Tensor | None, init_image: InitImage | None
) -> tuple[int, int] | None:
    """Return the size that is asked for: as written, of the enlarged pictures, or of the init image's own aspect."""
    size = parse_size(options.size)
    if size is not None:
        return size
    if low_res is not None and model.upscale_factor is not None:
        return low_res.shape[2] * model.upscale_factor, low_res.shape[3] * model.upscale_factor
    if init_image is not None and options.resize is None and model.image_size is not None:
        unit = model.autoencoder.downscale * model.denoiser.multiple_of
        return own_size(init_image.image.size, *model.image_size, unit)
    return None


def _tell(lines: Iterable[str]) -> None:
    """Log each line the first time that it is said: the grids of a run are asked for again and again."""
    for line in lines:
        _tell_once(line)


@functools.cache
def _tell_once(line: str) -> None:
    log.warning("%s", line)


def _tile(model: Model, pixels: int | None) -> int | None:
    """Return the side of a tile in latent elements."""
    if pixels is None:
        return None
    unit = model.autoencoder.downscale
    if pixels < MIN_TILE * unit or pixels % unit:
        raise UserError(f"tile: a multiple of {unit} pixels from {MIN_TILE * unit} on is needed, not {pixels}")
    return pixels // unit


def _denoiser_tiles(model: Model, options: SamplingOptions) -> Tiles | None:
    """Return how the denoiser sees the latents. Raises UserError for sides that its levels do not divide."""
    side, overlap = options.tile_denoiser, options.tile_overlap
    if side is None:
        return None
    downscale = model.autoencoder.downscale
    unit = downscale * unit_of(model.denoiser.spec, model.denoiser.multiple_of)
    if side % unit:
        raise UserError(f"tile_denoiser: a multiple of {unit} pixels is needed, not {side}")
    overlap = max(side // 4 // unit, side > unit) * unit if overlap is None else overlap
    if overlap % unit or overlap >= side:
        raise UserError(f"tile_overlap: a multiple of {unit} below {side} (tile_denoiser) is needed, not {overlap}")
    return Tiles(side // downscale, overlap // downscale)


def _defaults(model: Model, options: SamplingOptions) -> SamplingDefaults:
    """Return what the model is sampled with; an upsampler that cannot be guided is not: its small picture says most."""
    defaults = model.denoiser.sampling_defaults
    return defaults if _can_be_guided(model, options) else replace(defaults, upsampler_guidance=1.0)


def _can_be_guided(model: Model, options: SamplingOptions) -> bool:
    """Return whether there is something to guide away from."""
    return bool(model.dropout) or model.guide_model is not None or options.negative is not None


def _check_guidance(model: Model, mixes: list[list[Prompt]], options: SamplingOptions, guidance: float) -> None:
    if options.negative is not None and model.guide_model is not None:
        raise UserError(
            "negative: does not go with a guide model (autoguidance): guidance leads away from one of the two; beside "
            "a guide model a prompt of a negative weight, such as 'blurry:-0.5', is steered away from"
        )
    weights = prompt_weights(mixes, guidance)  # [N, k]
    if not _can_be_guided(model, options) and len(mixes) and null_condition_weight(weights).any():
        raise UserError(
            "guidance needs a model that was trained with dropped conditions (conditioner.dropout above 0); "
            "with this one the weights of a picture have to add up to 1, as a single prompt's with --guidance 1 do"
        )


def _check_rerank(model: Model, options: SamplingOptions) -> None:
    if options.rerank > 1 and model.embed_width is None:
        raise UserError("rerank: this model's conditioner has no embeddings of images and texts to compare")
    if options.rerank > 1 and model.conditioner.is_unconditional:
        raise UserError("rerank: this model is unconditional, nothing says which of its pictures is better")


def _aesthetic(model: Model, options: SamplingOptions) -> Aesthetic | None:
    """Return what the texts are guided toward, for the embeddings of this model's conditioner."""
    if options.aesthetic is None or options.aesthetic_weight is None:
        return None
    if model.embed_width is None:
        raise UserError("aesthetic: this model's conditioner has no single embedding of a text")
    embedder = model.embedder()
    aesthetic = Aesthetic.load(options.aesthetic, options.aesthetic_weight, options.aesthetic_embeddings, embedder)
    aesthetic.check(model.embed_width, embedder)
    return aesthetic
