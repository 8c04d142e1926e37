"""Models in a row: a base model makes small pictures, each of the others enlarges what the one before made."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from PIL import Image

from ldm_lab.conditions import ImageCondition
from ldm_lab.errors import UserError
from ldm_lab.guidance.classifier_free import proportional_weights
from ldm_lab.io.images import round_to_uint8
from ldm_lab.prompts import Prompt
from ldm_lab.sampling.decode import Sample
from ldm_lab.sampling.model import Model
from ldm_lab.sampling.options import BASE_ONLY, SamplingOptions
from ldm_lab.sampling.pipeline import Pipeline, Progress
from ldm_lab.sampling.prompts import Prompts, prompt_weights
from ldm_lab.sampling.request import Request

# Added to a picture's seed in each further stage, so that its noise is not that of the one before: 2**32 over the
# golden ratio, which is far from all neighboring seeds. (Of a seed torch's generators take the lowest 32 bits alone.)
SEED_OFFSET = 2_654_435_769
RGB = 3  # channels of a picture


@dataclass(frozen=True)
class Stage:
    """A model and how it is asked.

    Attributes:
        pipeline: of the model.
        options: all choices. An upsampler's guidance is the weight of its prompts together: those that it is guided
            toward, in proportion; 1 is the plain model. Where the base has an init image with a mask, the upsampler
            keeps what it masks off, too.
    """

    pipeline: Pipeline
    options: SamplingOptions = field(default_factory=SamplingOptions)


@dataclass(frozen=True)
class Plan:
    """A request that all stages can carry out.

    Attributes:
        base: the base's part.
        upsampling: each upsampler's part; its `low_res` is of the right shape, and empty.
    """

    base: Request
    upsampling: list[Request]

    @property
    def remarks(self) -> list[str]:
        """What a user should know of it, a line each."""
        return [line for request in (self.base, *self.upsampling) for line in request.remarks]

    @property
    def work(self) -> float:
        """What all stages cost together (`Request.work`)."""
        return sum(request.work for request in (self.base, *self.upsampling))

    @property
    def total_steps(self) -> int:
        """How many steps all batches of all stages go through."""
        candidates = len(self.base.mixes) * self.base.options.rerank
        further = sum(request.total_steps(len(request.mixes)) for request in self.upsampling)
        return self.base.total_steps(candidates) + further


class Stages:
    """A base model and any number of upsamplers."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        """Take them in the order in which they work.

        Raises:
            UserError: the first one is an upsampler, or another one is none; an upsampler's options have what is the
                base model's alone.
        """
        self.base, *self.upsamplers = stages
        if self.upsamplers and self.base.pipeline.model.upscale_factor is not None:
            raise UserError("base model: this is an upsampler, which enlarges pictures of a base model's")
        if any(stage.pipeline.model.upscale_factor is None for stage in self.upsamplers):
            raise UserError("upsampler: this is a base model, which takes no picture to be enlarged")
        for stage in self.upsamplers:
            if unfit := [name for name in stage.options.given() if name in BASE_ONLY and name != "batch_size"]:
                raise UserError(f"upsampler: {unfit[0]} belongs to the base model's options, which hold for all stages")

    def __call__(
        self, prompts: Prompts, *, seeds: Sequence[int] | None = None, progress: Progress | None = None
    ) -> list[tuple[Image.Image, ...]]:
        """Return the images of all stages, small to large, for each entry of `prompts`. See `samples`."""
        batches = self.samples(prompts, seeds=seeds, progress=progress)
        return [tuple(sample.image for sample in row) for batch in batches for row in batch]

    def samples(
        self, prompts: Prompts, *, seeds: Sequence[int] | None = None, progress: Progress | None = None
    ) -> Iterator[list[tuple[Sample, ...]]]:
        """Return an iterator over the pictures of all stages, batch by batch, in the order of `prompts`.

        Args:
            prompts: as for the base alone (`Pipeline.samples`); those that steer away are the base's only.
            seeds: of the base's pictures; by default they count on from its `options.seed`.
            progress: called after each step as `progress(steps done, steps in all)`, counted over all stages.

        Raises:
            UserError: what one of the models cannot do (`check`), before the first picture is made.
        """
        plan = self.check(prompts, seeds=seeds)
        base, counter = plan.base, _Counter(progress, plan.total_steps)
        batches = self.base.pipeline.samples(base.mixes, self.base.options, seeds=base.seeds, progress=counter.step)
        rows: Iterator[tuple[Sample, ...]] = ((sample,) for batch in batches for sample in batch)
        for number, (stage, request) in enumerate(zip(self.upsamplers, plan.upsampling, strict=True), start=1):
            rows = _enlarged(rows, stage.pipeline, request, number * SEED_OFFSET, counter.step)
        return _grouped(rows, base.options.batch_size)

    def check(self, prompts: Prompts, *, seeds: Sequence[int] | None = None) -> Plan:
        """Return the request with all defaults filled in; nothing is encoded or sampled yet.

        Raises:
            UserError: an upsampler of pictures of another size, guidance of one by no text; what `Pipeline.check`
                raises, for any of the models.
        """
        base = self.base.pipeline.check(prompts, self.base.options, seeds=seeds)
        downscale = self.base.pipeline.model.autoencoder.downscale
        height, width = (side * downscale for side in base.latent_size)
        requests, base_width, before = [], width, self.base
        for number, stage in enumerate(self.upsamplers, start=1):
            low_res = torch.empty(len(base.mixes), 3, height, width, device="meta")  # [N, 3, h, w]
            options = _with_mask(stage.options, base, width * (stage.pipeline.model.upscale_factor or 1) / base_width)
            try:
                _check_sizes(before.pipeline.model, stage.pipeline.model, height, width)
                mixes = [_guided_toward(stage, mix, base.guidance) for mix in base.mixes]
                requests.append(stage.pipeline.check(mixes, options, low_res=low_res))
            except UserError as error:
                if len(self.upsamplers) == 1:
                    raise
                raise UserError(f"upsampler {number}: {str(error).removeprefix('upsampler: ')}") from None
            before, downscale = stage, stage.pipeline.model.autoencoder.downscale
            height, width = (side * downscale for side in requests[-1].latent_size)
        return Plan(base, requests)


def _check_sizes(before: Model, upsampler: Model, height: int, width: int) -> None:
    """Raise UserError for an upsampler of smaller, or larger, pictures than it is to get, or of other channels.

    Models that were trained for one another may be asked for any size; others have to meet in the size that is asked.

    Args:
        before: the model whose pictures it enlarges.
        upsampler: the upsampler.
        height, width: of these pictures.
    """
    enlarged = upsampler.denoiser.spec["low_res"]
    if isinstance(enlarged, ImageCondition) and enlarged.channels != RGB:
        raise UserError(
            f"upsampler: it enlarges images of {enlarged.channels} channels, and gets pictures of {RGB} (RGB)"
        )
    if upsampler.image_size is None or before.image_size is None or upsampler.upscale_factor is None:
        return
    small, large, made = (min(side) for side in (upsampler.image_size, upsampler.image_size, before.image_size))
    small //= upsampler.upscale_factor
    if small not in (made, min(height, width)):
        raise UserError(
            f"upsampler: it was trained to enlarge {small} px to {large}, and gets {width}x{height} of a model of "
            f"{made} px; take an upsampler of {made} px, or make the small pictures at {small} (size)"
        )


def _with_mask(options: SamplingOptions, base: Request, scale: float) -> SamplingOptions:
    """Return an upsampler's options with what the base keeps of an image; it makes pictures `scale` times as large."""
    if base.init_image is None or base.init_image.mask is None:
        return options
    given = base.options
    return replace(
        options,
        init_image=given.init_image,
        mask=given.mask,
        invert_mask=given.invert_mask,
        mask_blur=base.init_image.mask_blur * scale or None,
        resize=base.init_image.resize,
        strength=1.0,
    )


def _guided_toward(stage: Stage, mix: Sequence[Prompt], guidance: float) -> list[Prompt]:
    """Return the prompts that a picture is enlarged with: those that the base is guided toward, in proportion."""
    model = stage.pipeline.model
    shares = proportional_weights(prompt_weights([mix], guidance).float())[1:, 0].tolist()  # k numbers
    toward = [(prompt, share) for prompt, share in zip(mix, shares, strict=True) if share > 0]
    unconditional = model.conditioner.is_unconditional
    has_text = not unconditional and any(prompt.text.strip() for prompt, _ in toward)
    total = stage.options.guidance
    if total is None:
        total = model.denoiser.sampling_defaults.upsampler_guidance if has_text and model.dropout else 1.0
    if total != 1 and not has_text:
        why = "it was trained without any" if unconditional else "this prompt is empty"
        raise UserError(f"guidance of the upsampler needs a text that it guides to, but {why}; leave it out")
    return [replace(prompt, weight=share * total) for prompt, share in toward] or [Prompt("", 1.0)]


def _enlarged(
    rows: Iterator[tuple[Sample, ...]],
    pipeline: Pipeline,
    request: Request,
    seed_offset: int,
    progress: Progress,
) -> Iterator[tuple[Sample, ...]]:
    """Yield the pictures of the stages so far, each with one more that is the last one enlarged."""
    size = request.options.batch_size
    told = "low_res_level" in pipeline.model.denoiser.spec  # of noise, beside which levels of 8 bits are nothing
    for first in range(0, len(request.mixes), size):
        group = list(islice(rows, size))
        low_res = torch.stack([row[-1].pixels for row in group])  # [B, 3, h, w]
        (large,) = pipeline.samples(
            request.mixes[first : first + len(group)],
            request.options,
            seeds=[row[0].seed + seed_offset for row in group],
            low_res=low_res if told else round_to_uint8(low_res),  # [B, 3, h, w]
            progress=progress,
        )
        for row, sample in zip(group, large, strict=True):
            sample.image.info.update(row[0].image.info)  # the seed that the user knows
            yield *row, replace(sample, seed=row[0].seed, similarity=row[0].similarity)


def _grouped(rows: Iterator[tuple[Sample, ...]], size: int) -> Iterator[list[tuple[Sample, ...]]]:
    """Yield the pictures in batches."""
    while group := list(islice(rows, size)):
        yield group


class _Counter:
    """Counts the steps of all stages for one progress report."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def step(self, done: int, total: int) -> None:
        """Count one step of any stage, whatever that stage counts itself."""
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)
