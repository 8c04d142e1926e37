"""From prompts to pictures, in numbered steps."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from einops import repeat
from PIL import Image
from torch import Tensor

from ldm_lab.conditions import ConditionRequest, Conditions
from ldm_lab.guidance.base import Wrapper
from ldm_lab.guidance.classifier_free import guided
from ldm_lab.guidance.clip import ClipGradient, ClipGuidance
from ldm_lab.guidance.inpaint import Inpaint
from ldm_lab.guidance.stack import stack
from ldm_lab.guidance.thresholding import DynamicThresholding, StaticThresholding
from ldm_lab.interfaces import Callback, Predict, Schedule
from ldm_lab.sampling import rerank
from ldm_lab.sampling.decode import Sample, decode
from ldm_lab.sampling.image_to_image import TruncatedSchedule
from ldm_lab.sampling.loading import load_model
from ldm_lab.sampling.model import Model
from ldm_lab.sampling.options import ModelOptions, SamplingOptions
from ldm_lab.sampling.prompts import PromptBatch, Prompts, parse_prompts, target_embeddings
from ldm_lab.sampling.request import Request, checked_request

Progress = Callable[[int, int], None]  # steps done, steps in all


class Draw(NamedTuple):
    """A picture to be made: which of the request's it is for, and the seed of its noise."""

    picture: int
    seed: int


class Pipeline:
    """Makes pictures with a model.

    A picture is made of its own prompts and its own seed: its noise comes from a generator of its own on the CPU, so
    that it is the same on every device, and no step mixes pictures. Batches of other sizes can still change its last
    bits, because matrix products round differently with other shapes: in fp32 on a CPU a latent moves by less than
    1e-4 of its norm, nearly all of it in the first steps, which divide by a small alpha, and a pixel by at most one of
    255 levels (`tests/test_sampling.py`).
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, options: ModelOptions | None = None, others: Sequence["Pipeline"] = ()
    ) -> "Pipeline":
        """Load a trained model with its averaged weights.

        Args:
            path: `ema.safetensors` or the run's folder, a `.ckpt` of a run, another program's file, or a released name.
            options: device, precision, where the frozen parts are, ...
            others: of models in a row, those loaded before: the same text encoder is in memory once.

        Raises:
            UserError: missing, damaged or foreign file; weights of another architecture.
        """
        return cls(load_model(path, options or ModelOptions(), [other.model for other in others]))

    def __call__(
        self,
        prompts: Prompts,
        options: SamplingOptions | None = None,
        *,
        seeds: Sequence[int] | None = None,
        low_res: Sequence[Image.Image] | Tensor | None = None,
        progress: Progress | None = None,
    ) -> list[Image.Image]:
        """Return one 8-bit RGB image for each entry of `prompts`. Arguments and errors are those of `samples`."""
        batches = self.samples(prompts, options, seeds=seeds, low_res=low_res, progress=progress)
        return [sample.image for batch in batches for sample in batch]

    def samples(
        self,
        prompts: Prompts,
        options: SamplingOptions | None = None,
        *,
        seeds: Sequence[int] | None = None,
        low_res: Sequence[Image.Image] | Tensor | None = None,
        progress: Progress | None = None,
    ) -> Iterator[list[Sample]]:
        """Return an iterator over the pictures, batch by batch, in the order of `prompts`.

        Args:
            prompts: one entry for each picture (`ldm_lab.sampling.prompts.parse_prompts`).
            options: all choices; by default the defaults.
            seeds: one for each picture; by default they count on from `options.seed`. Of several candidates
                (`options.rerank`) number j of a picture has its seed + j * (number of pictures).
            low_res: what an upsampler is to enlarge, one for each picture: images of one size, or [N, 3, h, w] in
                [-1, 1].
            progress: called after each step as `progress(steps done, steps in all)`, counted over all batches.

        Raises:
            UserError: what this model cannot do (`check`), before the first picture is made.
        """
        request = self.check(prompts, options, seeds=seeds, low_res=low_res)
        batch = self.encode(request)
        count, candidates = len(request.seeds), request.options.rerank
        draws = [Draw(i, seed + j * count) for i, seed in enumerate(request.seeds) for j in range(candidates)]
        samples = self.draw(request, batch, draws, progress)
        return samples if candidates == 1 else rerank.best(self.model, batch, samples, candidates)

    def check(
        self,
        prompts: Prompts,
        options: SamplingOptions | None = None,
        *,
        seeds: Sequence[int] | None = None,
        low_res: Sequence[Image.Image] | Tensor | None = None,
    ) -> Request:
        """Return the request with all defaults filled in; nothing is encoded or sampled yet.

        Raises:
            UserError: something that this model cannot do (`ldm_lab.sampling.request.checked_request`).
        """
        return checked_request(self.model, parse_prompts(prompts), options or SamplingOptions(), seeds, low_res)

    def encode(self, request: Request) -> PromptBatch:
        """Return the request's prompts, encoded."""
        negative = request.options.negative
        return PromptBatch.encode(self.model, request.mixes, request.guidance, negative, request.aesthetic)

    def draw(
        self, request: Request, prompts: PromptBatch, draws: Sequence[Draw], progress: Progress | None = None
    ) -> Iterator[list[Sample]]:
        """Return an iterator over pictures, batch by batch.

        Args:
            request: all but the prompts.
            prompts: encoded (`encode`).
            draws: the pictures to be made.
            progress: as for `samples`.
        """
        total, size = request.total_steps(len(draws)), request.options.batch_size
        for first in range(0, len(draws), size):
            group, done = draws[first : first + size], first // size * request.steps
            report = None if progress is None else partial(_report, progress, done, total)
            z = self.latents(request, prompts, group, report)  # [B, C, h, w]
            # 6. Pixels.
            samples = decode(self.model, z, [draw.seed for draw in group], request.tile)
            if request.init_image is not None:
                samples = [sample.restored(request.init_image) for sample in samples]
            yield samples

    @torch.no_grad()
    def latents(
        self, request: Request, prompts: PromptBatch, draws: Sequence[Draw], callback: Callback | None = None
    ) -> Tensor:
        """Return the latents of one batch of draws, float32 [B, C, h, w]; arguments are those of `draw`."""
        model, options, schedule = self.model, request.options, self.model.objective.schedule
        pictures, seeds = [draw.picture for draw in draws], [draw.seed for draw in draws]

        # 1. Conditions of the prompts, [B, k, ...] each, their weights, [B, k], and what stands for no prompt.
        conditions, weights, null = prompts.select(pictures, model.device)

        # 2. Noise, of each picture's own seed.
        noise = SeededNoise(seeds)
        x = torch.empty(len(draws), model.autoencoder.channels, *request.latent_size, device=model.device)
        x = noise(x) * request.temperature  # [B, C, h, w]

        # 3. An image to begin with: sampling starts later, from the image under less noise.
        known = mask = visible = None
        if request.init_image is not None:
            known, mask, visible = request.init_image.encode(model, request.latent_size)  # [1, C, h, w], [1, 1, h, w]
            if request.steps == 0:
                return known.expand_as(x)  # [B, C, h, w]
            if request.steps < request.sampler.steps:  # at full strength only the mask keeps something of it
                schedule = TruncatedSchedule(schedule, request.sampler.steps - request.steps)
                alpha, sigma = schedule.alpha_sigma(request.sampler.times(schedule, request.latent_size)[0])  # [], []
                x = alpha * known + sigma * x  # [B, C, h, w]

        # 4. What else the denoiser is conditioned on, with and without prompts, and how its predictions are guided.
        low_res = None if request.low_res is None else request.low_res[pictures]  # [B, 3, h', w']
        asked = ConditionRequest(x, low_res, visible, mask, options.low_res_level, noise)
        for source in model.condition_sources.values():
            given = source.from_request(asked)  # [B, ...] each
            null |= source.null(given)
            conditions |= {name: repeat(value, "b ... -> b k ...", k=weights.shape[1]) for name, value in given.items()}
        predict = self._classifier_free(request, schedule, conditions, null, weights)
        wrappers = self._wrappers(request, pictures, known, mask)
        predict = stack(predict, wrappers, schedule=schedule, uses_gradient=request.sampler.uses_gradient)

        # 5. The sampler.
        clip = None if options.clip_guidance is None else model.load_noised_clip()
        with model.on_device(model.denoiser, model.guide_model, clip), model.evaluating():
            return request.sampler.sample(predict, x, schedule=schedule, noise=noise, callback=callback)

    def _classifier_free(
        self, request: Request, schedule: Schedule, conditions: Conditions, null: Conditions, weights: Tensor
    ) -> Predict:
        """Return the denoiser's predictions, guided by weighted prompts."""
        model, options, tiles = self.model, request.options, request.denoiser_tiles
        return guided(
            model.predict(model.denoiser, tiles),
            conditions,
            null,
            weights,
            interval=options.guidance_interval,
            rescale=options.guidance_rescale,
            guide_model=None if model.guide_model is None else model.predict(model.guide_model, tiles),
            schedule=schedule,
        )

    def _wrappers(
        self, request: Request, pictures: Sequence[int], known: Tensor | None, mask: Tensor | None
    ) -> list[Wrapper]:
        """Return what else changes the predictions of a batch.

        Args:
            request: the request.
            pictures: which of the request's the batch is.
            known: latents of an image of which a part is kept, [1, C, h, w].
            mask: where it is painted anew, bool [1, 1, h, w]; None: everywhere.
        """
        model, options, bound = self.model, request.options, self.model.pixel_bound
        clip_denoised = bound is not None if options.clip_denoised is None else options.clip_denoised
        wrappers: list[Wrapper] = []
        if clip_denoised:
            limit, percentile = bound or 1 / float(model.autoencoder.latent_std.min()), options.threshold_percentile
            if options.thresholding == "dynamic" and percentile is not None:
                wrappers.append(DynamicThresholding(limit, percentile, options.threshold_divisor or math.inf))
            else:
                wrappers.append(StaticThresholding(limit))
        if options.clip_guidance is not None:
            targets = target_embeddings(model, [request.mixes[i] for i in pictures], request.guidance)  # [B, D]
            guidance = ClipGuidance(model.load_noised_clip(), options.clip_guidance)
            wrappers.append(ClipGradient(guidance, targets.to(model.device)))
        if known is not None and mask is not None:
            wrappers.append(Inpaint(known, mask))
        return wrappers


class SeededNoise:
    """Standard normal noise, of each row's own generator on the CPU: the same on every device, in every batch."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, x: Tensor) -> Tensor:
        """Return noise [B, C, h, w] of the shape, and on the device, of x."""
        rows = [torch.randn(x.shape[1:], generator=generator) for generator in self.generators]  # [C, h, w] each
        return torch.stack(rows).to(x.device)  # [B, C, h, w]


def _report(progress: Progress, done: int, total: int, step: int, x: Tensor, x0: Tensor) -> None:
    """Tell how many steps are done after a step of a sampler."""
    progress(done + step + 1, total)
