"""Conditioner, guided denoiser, sampler and autoencoder put together."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ldm_lab.checkpoints.embedders import embedder_of
from ldm_lab.checkpoints.models import read_model
from ldm_lab.checkpoints.parts import has_weights, load_part, load_strictly, weights_sha256
from ldm_lab.condition_sources import ConditionSources, build_sources, given_conditions
from ldm_lab.conditions import ConditionRequest, ConditionSpec, Embedding, ImageCondition, is_upsampler
from ldm_lab.config import build
from ldm_lab.errors import UserError
from ldm_lab.guidance.base import Wrapper
from ldm_lab.guidance.classifier_free import guided, null_condition_weight, unguided_weights
from ldm_lab.guidance.clip import ClipGradient, ClipGuidance
from ldm_lab.guidance.inpaint import Inpaint
from ldm_lab.guidance.stack import stack
from ldm_lab.guidance.thresholding import StaticThresholding
from ldm_lab.interfaces import Denoiser, Prediction, check_conditions
from ldm_lab.interfaces import Sampler as SamplerPart
from ldm_lab.io.images import to_images, to_tensor
from ldm_lab.pretrained.resolve import check_untrusted
from ldm_lab.prompts import Prompt, parse_prompt
from ldm_lab.sampling.aesthetic import Aesthetic
from ldm_lab.sampling.image_to_image import Later, Start, first_time
from ldm_lab.sampling.interpolate import between
from ldm_lab.sampling.tiles import decode_in_tiles

# One prompt: `text` or `text:weight`, or as an object. One picture's prompts: one of them, or several to be mixed.
OnePrompt = str | Prompt | Image.Image
Mix = OnePrompt | Sequence[OnePrompt]

log = logging.getLogger(__name__)

DECODE_BATCH = 8  # images; the autoencoder's full-size feature maps need far more memory than the denoiser's


class Picture(NamedTuple):
    """A picture that was made.

    Attributes:
        image: 8-bit RGB; `image.info` has its seed.
        pixels: the same before it was rounded, [3, H, W]; about [-1, 1], not clamped.
    """

    image: Image.Image
    pixels: Tensor


class Sampler:
    """A trained model, ready to be asked for pictures.

    An image is made from its own prompts and its own seed: its noise comes from a generator of its own on the CPU, so
    that it is the same on every device, and no step mixes images. Batches of other sizes can still change its last
    bits, because matrix products round differently with other shapes: in fp32 on a CPU a latent moves by less than
    1e-4 of its norm, nearly all of it in the first steps, which divide by a small alpha, and a pixel by at most one of
    255 levels (`tests/test_sampling.py`).
    """

    def __init__(
        self,
        denoiser: nn.Module,
        objective: Any,
        autoencoder: nn.Module,
        conditioner: nn.Module,
        *,
        sources: ConditionSources | None = None,
        dropout: float,
        size: tuple[int, int] | None = None,
        weak: nn.Module | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        low_memory: bool = False,
        conditioner_section: dict[str, Any] | None = None,
    ) -> None:
        """Take the parts of a model; all are used where they are, none is copied.

        Args:
            denoiser: the network, usually the averaged one.
            objective: what its output means.
            autoencoder: decodes latents.
            conditioner: encodes prompts.
            sources: what else the denoiser is told.
            dropout: share of the conditions that were dropped in training; guidance needs more than 0.
            size: default height and width in pixels.
            weak: a worse denoiser of the same kind, to guide away from (autoguidance).
            dtype: of the denoiser's arithmetic (autocast); the samplers' own is float32.
            device: where to run; by default where the denoiser is.
            low_memory: each part is on the device only while it works.
            conditioner_section: where the conditioner is from; what is made for one network's embeddings is compared
                with it.
        """
        self.denoiser, self.objective, self.weak = denoiser, objective, weak
        self.autoencoder, self.conditioner = autoencoder, conditioner
        self.sources = sources or {}
        self.dropout, self.size, self.dtype, self.low_memory = dropout, size, dtype, low_memory
        self.conditioner_section = conditioner_section
        self._device = None if device is None else torch.device(device)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        autoencoder: str | Path | None = None,
        conditioner: str | Path | None = None,
        device: str | torch.device = "cpu",
        weak: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        low_memory: bool = False,
        compiled: bool = False,
    ) -> "Sampler":
        """Load a trained model with its averaged weights.

        Args:
            path: `ema.safetensors`, a `.ckpt` of a run, or whatever else `resolve_weights` takes.
            autoencoder: weights file of the autoencoder, if not where the checkpoint says.
            conditioner: weights file of the conditioner, if not where the checkpoint says.
            device: where to run.
            weak: autoguidance: another checkpoint of the same objective, earlier or smaller, to guide away from.
            dtype: of the denoiser's arithmetic.
            low_memory: each part is on the device only while it works.
            compiled: compile the denoiser (`torch.compile`); the first picture takes long, the others less.

        Raises:
            UserError: missing, damaged or foreign file; weights of another architecture.
        """
        config, state, extra = read_model(path)
        for role in ("autoencoder", "conditioner", "denoiser", "objective"):
            if not isinstance(config.get(role), dict):
                raise UserError(f"{path}: not a diffusion model; its config has no section {role!r}")
        frozen = {
            role: _load_frozen(role, config[role], moved, extra.get(role))
            for role, moved in (("autoencoder", autoencoder), ("conditioner", conditioner))
        }
        if not isinstance(sections := config.get("condition_sources") or {}, dict):
            raise UserError(f"{path}: its config has no readable section 'condition_sources'")
        sources = build_sources(sections)
        channels, given = frozen["autoencoder"].channels, given_conditions(frozen["conditioner"], sources)
        denoiser = _load_denoiser(config, state, path, channels, given)
        worse = None
        if weak is not None:
            weak_config, weak_state, _ = read_model(weak)
            if weak_config.get("objective") != config["objective"]:
                raise UserError(f"{weak}: its objective is another than that of {path}, which it cannot guide")
            worse = _load_denoiser(weak_config, weak_state, weak, channels, given)
        if compiled:
            denoiser.compile()
        waiting = "cpu" if low_memory else device
        side = extra.get("image_size", "")
        return cls(
            denoiser.to(waiting),
            build("objective", config["objective"]),
            frozen["autoencoder"].to(waiting),
            frozen["conditioner"].to(waiting),
            dropout=config["conditioner"].get("dropout", 0.0),
            size=(int(side), int(side)) if side.isdecimal() else None,
            sources=sources,
            weak=None if worse is None else worse.to(waiting),
            dtype=dtype,
            device=device,
            low_memory=low_memory,
            conditioner_section={**config["conditioner"], **({"weights": str(conditioner)} if conditioner else {})},
        )

    def __call__(self, prompts: Sequence[Mix], **options: Any) -> list[Image.Image]:
        """Return one 8-bit RGB image per entry of `prompts`. Options and errors are those of `pictures`."""
        return [image for batch in self.batches(prompts, **options) for image in batch]

    def batches(self, prompts: Sequence[Mix], **options: Any) -> Iterator[list[Image.Image]]:
        """Return an iterator over the images, batch by batch. Options and errors are those of `pictures`."""
        made = self.pictures(prompts, **options)
        return ([picture.image for picture in batch] for batch in made)

    def pictures(
        self,
        prompts: Sequence[Mix],
        *,
        negative: str | None = None,
        seeds: Sequence[int] | None = None,
        guidance: float = 3.0,
        interval: tuple[float, float] = (0.0, 1.0),
        rescale: float = 0.0,
        sampler: str | dict[str, Any] = "unipc",
        size: int | tuple[int, int] | None = None,
        start: Start | None = None,
        aesthetic: Aesthetic | None = None,
        low_res: Sequence[Image.Image] | Tensor | None = None,
        temperature: float = 1.0,
        clamp: bool | None = None,
        clip_guidance: ClipGuidance | None = None,
        rerank: int = 1,
        batch_size: int = 16,
        tile: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[list[Picture]]:
        """Return an iterator over the pictures, batch by batch, in the order of `prompts`.

        `image.info` has the image's seed and, if it was chosen among several, its similarity to its prompts.

        Args:
            prompts: one entry per image: a text (`text` or `text:weight`, see `ldm_lab.prompts`), a `Prompt`, a Pillow
                image as an image prompt, or a list of these that are mixed by their weights.
            negative: a text that takes the place of "no prompt": what guidance leads away from.
            seeds: one per image; by default 0, 1, 2, ...
            guidance: weight of the prompts that have none.
            interval: first and last t, from 0 (data) to 1 (noise), between which there is guidance.
            rescale: from 0 to 1, how far guided predictions are brought back to the spread of unguided ones.
            sampler: a sampler's name, or its config section such as {"name": "ddim", "steps": 50, "eta": 0.5}.
            size: pixels: a square's side, or height and width; by default the size of training.
            start: a picture to begin with (image to image, inpainting).
            aesthetic: a rating that the texts' embeddings are led to; the negative's is not.
            low_res: what an upsampler is to enlarge, one for each image: pictures of one size, or [N, 3, h, w] in
                [-1, 1] (see `ldm_lab.io.images.round_to_uint8`).
            temperature: factor of the noise that sampling starts from.
            clamp: keep the clean estimate of every step within [-1, 1]; by default so for models of pixels.
            clip_guidance: make images more like their texts in the eyes of a noised CLIP; models of pixels only.
            rerank: make this many images for each, and keep the one whose embedding is most like its prompts. Candidate
                j of an image has its seed + j * (number of images).
            batch_size: images at once; the denoiser sees 1 + (number of prompts) rows for each.
            tile: pixels; larger pictures are decoded in tiles of this side. By default they are decoded at once.
            progress: called after each step as `progress(steps done, steps in all)`, counted over all batches.

        Raises:
            UserError: an unknown sampler or option, a size that the model's levels do not divide, guidance asked of a
                model that was trained without dropped conditions, no prompt for an image, a weight that is not finite,
                an aesthetic of another network's embeddings.
        """
        seeds = range(len(prompts)) if seeds is None else seeds
        if len(seeds) != len(prompts):
            raise UserError(f"seeds: {len(seeds)} for {len(prompts)} images; one per image is needed")
        if rerank < 1:
            raise UserError(f"rerank: at least 1 candidate per image is needed, not {rerank}")
        mixes = [as_mix(entry) for entry in prompts]
        low_res = self._low_res(low_res, len(mixes))  # [N, 3, h, w] or None
        weights = self.weights(mixes, guidance, negative)  # [N, k]
        embedded, index = self._encode(mixes, negative, aesthetic)  # [U, ...] for U distinct prompts, [N, k]
        if rerank > 1 and "embed" not in embedded:
            raise UserError("rerank: this model's conditioner has no embeddings of images and texts to compare")
        if rerank > 1 and not embedded["embed"].any():
            raise UserError("rerank: this model is unconditional, nothing says which of its pictures is better")
        candidates = [(i, seed + j * len(seeds)) for i, seed in enumerate(seeds) for j in range(rerank)]
        options = {"sampler": sampler, "size": size, "interval": interval, "rescale": rescale, "start": start}
        options |= {"low_res": low_res, "temperature": temperature, "clamp": clamp}
        if clip_guidance is not None:
            options["climb"] = clip_guidance, self._likeness(clip_guidance, mixes, guidance)
        made = self._made(embedded, index, weights, candidates, batch_size, tile, progress, **options)
        return made if rerank == 1 else self._best(made, embedded["embed"], index, weights, rerank)

    def film(
        self,
        prompts: Sequence[Mix],
        frames: int,
        *,
        seed: int = 0,
        guidance: float = 3.0,
        interval: tuple[float, float] = (0.0, 1.0),
        rescale: float = 0.0,
        sampler: str | dict[str, Any] = "unipc",
        size: int | tuple[int, int] | None = None,
        aesthetic: Aesthetic | None = None,
        batch_size: int = 16,
        tile: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Image.Image]:
        """Return images on the way from each prompt to the next, all from one seed's noise.

        Args:
            prompts: the stations, two or more, each one prompt; their weights are interpolated, too.
            frames: images in all, evenly spread, at least as many as stations.
            seed: of the noise.

        The other options and errors are those of `batches`.
        """
        mixes = [as_mix(entry) for entry in prompts]
        if len(mixes) < 2 or any(len(mix) != 1 for mix in mixes):
            raise UserError("interpolation: two or more stations of one prompt each are needed")
        if frames < len(mixes):
            raise UserError(f"interpolation: {frames} frames are fewer than the {len(mixes)} prompts")
        embedded, index = self._encode(mixes, aesthetic=aesthetic)  # [U, ...], [S, 1]
        if "embed" not in embedded:
            raise UserError("interpolation: this model's conditioner has no embeddings to walk between")
        stations = {name: rows[index[:, 0].to(rows.device)] for name, rows in embedded.items()}  # [S, ...]
        at = self.weights(mixes, guidance)  # [S, 1]
        weights = F.interpolate(at.T[None], frames, mode="linear", align_corners=True)[0].T  # [frames, 1]
        options = {"sampler": sampler, "size": size, "interval": interval, "rescale": rescale}
        one_each = torch.arange(frames)[:, None]  # [frames, 1]
        candidates = [(i, seed) for i in range(frames)]
        film = between(stations, frames)  # [frames, ...]
        made = self._made(film, one_each, weights, candidates, batch_size, tile, progress, **options)
        return [picture.image for batch in made for picture in batch]

    def _made(
        self,
        embedded: dict[str, Tensor],
        index: Tensor,
        weights: Tensor,
        candidates: list[tuple[int, int]],
        batch_size: int,
        tile: int | None,
        progress: Callable[[int, int], None] | None,
        *,
        sampler: str | dict[str, Any],
        size: int | tuple[int, int] | None,
        start: Start | None = None,
        low_res: Tensor | None = None,
        climb: tuple[ClipGuidance, Tensor] | None = None,
        temperature: float = 1.0,
        clamp: bool | None = None,
        **guide: Any,
    ) -> Iterator[list[Picture]]:
        """Return an iterator over batches of pictures.

        Args:
            embedded: conditions, tensors of [U, ...].
            index: which of them each of N images has, [N, k].
            weights: of the conditions, [N, k].
            candidates: (which of the N, seed) of each image to be made.
            climb: CLIP guidance, and what each image is to be like, [N, D].
            batch_size, tile, progress, sampler, size, start, low_res, temperature, clamp, guide: see `pictures`.
        """
        walk = build("sampler", {"name": sampler} if isinstance(sampler, str) else sampler)
        walk.times(self.objective.schedule)  # complains of steps that this schedule does not have
        latent_size = self.latent_size(self._enlarged_size(size, low_res))
        if batch_size < 1:
            raise UserError(f"batch_size: at least 1 is needed, not {batch_size}")
        _check_guide(**guide)
        tile_side = self._tile(tile)
        steps = walk.steps if start is None else round(start.strength * walk.steps)
        total = math.ceil(len(candidates) / batch_size) * steps

        def run() -> Iterator[list[Picture]]:
            for first in range(0, len(candidates), batch_size):
                part = candidates[first : first + batch_size]
                which, seeds = [i for i, _ in part], [seed for _, seed in part]
                done = first // batch_size * steps
                report = (lambda step, x, x0, done=done: progress(done + step + 1, total)) if progress else None
                rows = {name: value[index[which].to(value.device)] for name, value in embedded.items()}  # [B, k, ...]
                latents = self.latents(
                    walk,
                    latent_size,
                    rows,
                    weights[which],
                    seeds,
                    report,
                    start=start,
                    low_res=None if low_res is None else low_res[which],
                    climb=None if climb is None else (climb[0], climb[1][which]),
                    temperature=temperature,
                    clamp=clamp,
                    **guide,
                )  # [B, C, h, w]
                pictures = self.decode(latents, tile_side)
                if start is not None:
                    pictures = [_restored(picture, start) for picture in pictures]
                for picture, seed in zip(pictures, seeds):
                    picture.image.info["seed"] = seed
                yield pictures

        return run()

    def _best(
        self, made: Iterator[list[Picture]], embeds: Tensor, index: Tensor, weights: Tensor, rerank: int
    ) -> Iterator[list[Picture]]:
        """Return an iterator over the best of every `rerank` pictures in a row, by similarity to their prompts."""
        best, seen = None, 0
        for batch in made:
            chosen = []
            for picture in batch:
                i, image = seen // rerank, picture.image
                image.info["similarity"] = self.similarity(image, embeds[index[i]], weights[i])
                if best is None or image.info["similarity"] > best.image.info["similarity"]:
                    best = picture
                seen += 1
                if seen % rerank == 0:
                    chosen.append(best)
                    best = None
            if chosen:
                yield chosen

    @torch.no_grad()
    def similarity(self, image: Image.Image, embeds: Tensor, weights: Tensor) -> float:
        """Return the mean cosine, weighted, of an image's embedding and its prompts', [k, D] with weights [k]."""
        with self._in_use(self.conditioner):
            embed = self.conditioner.from_prompts([], [image])["embed"]  # [1, D]
        cosine = F.cosine_similarity(embed, embeds.to(embed))  # [k]
        weights = weights.to(cosine)
        return float((weights * cosine).sum() / weights.abs().sum().clamp(min=1e-12))

    @property
    def enlarges(self) -> bool:
        """Whether the model is an upsampler: it is told what to enlarge, beside the prompts."""
        return is_upsampler(self.denoiser.spec)

    @property
    def device(self) -> torch.device:
        """Where the denoiser runs."""
        return self._device or next(self.denoiser.parameters()).device

    def latent_size(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        """Return height and width of the latents for a size in pixels.

        Raises:
            UserError: no size known, or one that autoencoder and denoiser do not divide.
        """
        size = self.size if size is None else size
        if size is None:
            raise UserError("size: this checkpoint does not say what size it was trained at; give one (--size)")
        height, width = (size, size) if isinstance(size, int) else size
        unit = self.autoencoder.downscale * self.denoiser.multiple_of
        if height < 1 or width < 1 or height % unit or width % unit:
            near = [max(1, round(side / unit)) * unit for side in (width, height)]
            raise UserError(
                f"size {width}x{height}: this model takes multiples of {unit} pixels, such as {near[0]}x{near[1]}"
            )
        return height // self.autoencoder.downscale, width // self.autoencoder.downscale

    @torch.no_grad()
    def latents(
        self,
        walk: SamplerPart,
        latent_size: tuple[int, int],
        cond: dict[str, Tensor],
        weights: Tensor,
        seeds: Sequence[int],
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
        *,
        start: Start | None = None,
        low_res: Tensor | None = None,
        climb: tuple[ClipGuidance, Tensor] | None = None,
        temperature: float = 1.0,
        clamp: bool | None = None,
        **guide: Any,
    ) -> Tensor:
        """Return one batch of latents, float32 [B, C, h, w].

        Args:
            walk: a sampler (`ldm_lab.samplers`).
            latent_size: h and w.
            cond: conditions, tensors of [B, k, ...].
            weights: of the conditions, [B, k], on the CPU.
            seeds: one per image.
            callback: handed to the sampler.
            start: a picture to begin with.
            low_res: what is to be enlarged, [B, 3, h', w'].
            climb: CLIP guidance, and what each image is to be like, [B, D].
            temperature: factor of the noise that sampling starts from.
            clamp: keep clean estimates within [-1, 1]; None does so for models of pixels.
            guide: `interval` and `rescale` (`ldm_lab.guidance.classifier_free.guided`).
        """
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def noise(x: Tensor) -> Tensor:
            rows = [torch.randn(x.shape[1:], generator=generator) for generator in generators]  # [C, h, w] each
            return torch.stack(rows).to(x.device)  # [B, C, h, w]

        schedule, device = self.objective.schedule, self.device
        x = noise(torch.empty(len(seeds), self.autoencoder.channels, *latent_size, device=device))  # [B, C, h, w]
        x = x * temperature  # [B, C, h, w]
        known = mask = None
        if start is not None:
            size = [side * self.autoencoder.downscale for side in latent_size]
            with self._in_use(self.autoencoder):
                known = start.latents(self.autoencoder, *size, device)  # [1, C, h, w]
            mask = start.latent_mask(self.autoencoder.downscale, *size, device)  # [1, 1, h, w]
            skip = walk.steps - round(start.strength * walk.steps)
            if skip == walk.steps:
                return known.expand_as(x)
            if skip:  # at full strength nothing of the picture is in x, but what is masked off
                schedule = Later(schedule, skip)
                alpha, sigma = schedule.alpha_sigma(first_time(walk, schedule))  # [], []
                x = alpha * known + sigma * x  # [B, C, h, w]
        cond = {name: value.to(device) for name, value in cond.items()}  # [B, k, ...]
        null = self.conditioner.null({name: value[:, 0] for name, value in cond.items()})  # [B, ...]
        request = ConditionRequest(x, low_res, known, mask)
        for source in self.sources.values():
            given = source.from_request(request)
            null |= source.null(given)
            for name, value in given.items():
                cond[name] = value[:, None].expand(-1, weights.shape[1], *value.shape[1:])  # [B, k, ...]
        weak = None if self.weak is None else self._predict(self.weak)
        predict = guided(
            self._predict(self.denoiser), cond, null, weights, guide_model=weak, schedule=schedule, **guide
        )
        wrappers: list[Wrapper] = []
        limit = self._limit(clamp)
        if limit is not None:
            wrappers.append(StaticThresholding(limit))
        if climb is not None:
            wrappers.append(ClipGradient(climb[0], climb[1].to(device)))
        if mask is not None:
            wrappers.append(Inpaint(known, mask))
        predict = stack(predict, wrappers, schedule=schedule, uses_gradient=walk.uses_gradient)
        guide = climb[0].clip if climb is not None else None
        with self._in_use(self.denoiser), self._in_use(self.weak), self._in_use(guide), _evaluating(self.denoiser):
            return walk.sample(predict, x, schedule=schedule, noise=noise, callback=callback)

    def _limit(self, clamp: bool | None) -> float | None:
        """Return the largest magnitude that clean estimates may have; None is any."""
        wanted = self.autoencoder.pixel_range is not None if clamp is None else clamp
        return 1 / float(self.autoencoder.latent_std) if wanted else None

    def _predict(self, denoiser: nn.Module) -> Callable[[Tensor, Tensor, dict[str, Tensor]], Prediction]:
        """Return a denoiser's reading of rows, at the precision that was asked for."""

        def predict(x: Tensor, t: Tensor, rows: dict[str, Tensor]) -> Prediction:
            with torch.autocast(x.device.type, self.dtype, enabled=self.dtype is not torch.float32):
                prediction = self.objective.predict(denoiser, x, t, rows)
            return prediction

        return predict

    @torch.no_grad()
    def decode(self, latents: Tensor, tile: int | None = None) -> list[Picture]:
        """Return the pictures of latents [B, C, h, w]; if they are larger than a tile of latent elements, in tiles."""
        pictures: list[Picture] = []
        rounded = self.autoencoder.pixel_range is not None  # models of pixels were trained on whole levels
        with self._in_use(self.autoencoder):
            for part in latents.split(DECODE_BATCH):
                if tile is None:
                    pixels = self.autoencoder.decode(part)  # [B, 3, H, W]
                else:
                    pixels = decode_in_tiles(self.autoencoder, part, tile, overlap=tile // 4)  # [B, 3, H, W]
                pictures += map(Picture, to_images(pixels, rounded), pixels.float().cpu())
        return pictures

    def _tile(self, pixels: int | None) -> int | None:
        """Return the side of a tile in latent elements. Raises UserError if it is no multiple of the downscaling."""
        if pixels is None:
            return None
        unit = self.autoencoder.downscale
        if pixels < 4 * unit or pixels % unit:
            raise UserError(f"tile: a multiple of {unit} pixels from {4 * unit} on is needed, not {pixels}")
        return pixels // unit

    @contextlib.contextmanager
    def _in_use(self, module: nn.Module | None) -> Iterator[None]:
        """Have a part on the device for a while; with `low_memory` it waits in main memory at other times."""
        if module is None or not self.low_memory:
            yield
            return
        module.to(self.device)
        try:
            yield
        finally:
            module.to("cpu")

    def _low_res(self, low_res: Sequence[Image.Image] | Tensor | None, count: int) -> Tensor | None:
        """Return what is to be enlarged, [N, 3, h, w]. Raises UserError if this model wants it otherwise."""
        if self.enlarges != (low_res is not None):
            raise UserError(
                "this model is an upsampler: it enlarges the pictures of a base model "
                "(sample.py --checkpoint BASE --upsampler THIS)"
                if self.enlarges
                else "this model is no upsampler: it takes no pictures to enlarge"
            )
        if low_res is None or isinstance(low_res, Tensor):
            given = low_res
        elif len({image.size for image in low_res}) > 1:
            raise UserError("low_res: the pictures have to be of one size")
        else:
            given = torch.stack([to_tensor(image) for image in low_res])  # [N, 3, h, w]
        if given is not None and len(given) != count:
            raise UserError(f"low_res: {len(given)} pictures for {count} images; one for each is needed")
        return given

    def _enlarged_size(
        self, size: int | tuple[int, int] | None, low_res: Tensor | None
    ) -> int | tuple[int, int] | None:
        """Return the size to be made: what is asked for, or what the picture's own becomes when it is enlarged."""
        kind = self.denoiser.spec.get("low_res")
        if size is not None or low_res is None or not isinstance(kind, ImageCondition):
            return size
        return low_res.shape[2] * kind.scale_factor, low_res.shape[3] * kind.scale_factor

    @torch.no_grad()
    def _likeness(self, guidance: ClipGuidance, mixes: list[list[Prompt]], usual: float) -> Tensor:
        """Return what each image is to be like in the CLIP's eyes, [N, D]: its texts' embeddings, in proportion.

        Raises:
            UserError: an image without a text, or a model of latents.
        """
        if self.autoencoder.pixel_range not in ((-1.0, 1.0), (0.0, 1.0)):
            raise UserError("CLIP guidance: the noised CLIP sees pixels, this model makes latents")
        rows = []
        for mix in mixes:
            texts = [prompt for prompt in mix if prompt.image is None]
            weights = torch.tensor([[usual if prompt.weight is None else prompt.weight for prompt in texts]])  # [1, k]
            shares = unguided_weights(weights)[1:, 0]  # [k]
            if not shares.any():
                raise UserError("CLIP guidance: each image needs a text with a weight above 0")
            with self._in_use(guidance.clip):
                embeds = guidance.clip.text_embedding([prompt.text for prompt in texts])  # [k, D]
            rows.append((shares.to(embeds)[:, None] * embeds).sum(0))  # [D]
        return torch.stack(rows)  # [N, D]

    def weights(self, mixes: list[list[Prompt]], guidance: float, negative: str | None = None) -> Tensor:
        """Return the weights, float64 [N, k], 0 where an image has fewer than k prompts.

        With a negative prompt there is one more column, at the end: what the others leave over.
        """
        rows = [[guidance if prompt.weight is None else prompt.weight for prompt in mix] for mix in mixes]
        longest = max(map(len, rows), default=0)
        weights = torch.tensor([row + [0.0] * (longest - len(row)) for row in rows], dtype=torch.float64)  # [N, k]
        if not weights.isfinite().all():
            raise UserError("guidance and weights have to be finite numbers")
        if negative is not None and len(mixes):
            return torch.cat([weights, null_condition_weight(weights)[:, None]], dim=1)  # [N, k + 1]
        if not self.dropout and self.weak is None and len(mixes) and null_condition_weight(weights).any():
            raise UserError(
                "guidance needs a model that was trained with dropped conditions (conditioner.dropout above 0); "
                "with this one the weights of an image have to add up to 1, as a single prompt's with --guidance 1 do"
            )
        return weights

    @torch.no_grad()
    def _encode(
        self, mixes: list[list[Prompt]], negative: str | None = None, aesthetic: Aesthetic | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the conditions of the U distinct prompts, [U, ...], and which of them each image has, [N, k].

        They are encoded one at a time: an embedding that depended on its neighbours would change the image. A negative
        prompt is every image's last one; it has no aesthetic.
        """
        if aesthetic is not None:
            self._check_aesthetic(aesthetic)
        longest = max(map(len, mixes), default=0)
        # Any prompt, at weight 0, where there is none.
        index = torch.zeros(len(mixes), longest + (negative is not None), dtype=torch.long)  # [N, k]
        numbers: dict[Any, int] = {}
        conds: list[dict[str, Tensor]] = []

        def number(prompt: Prompt, led: bool) -> int:
            key = (prompt.text, led) if prompt.image is None else id(prompt.image)
            if key not in numbers:
                numbers[key] = len(conds)
                texts, images = ([prompt.text], []) if prompt.image is None else ([], [prompt.image])
                cond = self.conditioner.from_prompts(texts, images)  # [1, ...]
                if led and texts:
                    if "embed" not in cond:
                        raise UserError("aesthetic: this model's conditioner has no single embedding of a text")
                    cond["embed"] = aesthetic.guide(cond["embed"])  # [1, D]
                conds.append(cond)
            return numbers[key]

        with self._in_use(self.conditioner):
            for i, mix in enumerate(mixes):
                for j, prompt in enumerate(mix):
                    index[i, j] = number(prompt, aesthetic is not None)
            if negative is not None and len(mixes):
                index[:, -1] = number(Prompt(negative), False)
        names = conds[0] if conds else ()
        return {name: torch.cat([cond[name] for cond in conds]) for name in names}, index

    def _check_aesthetic(self, aesthetic: Aesthetic) -> None:
        """Raise UserError if the conditioner's embeddings are not those that an aesthetic is made for."""
        section, embed = self.conditioner_section, self.conditioner.spec.get("embed")
        if not isinstance(embed, Embedding):
            raise UserError("aesthetic: this model's conditioner has no single embedding of a text")
        aesthetic.check(embed.width, None if section is None else embedder_of(section))


def as_mix(entry: Mix) -> list[Prompt]:
    """Return the prompts of one image. Raises UserError for an empty mix, or a weight that is not finite."""
    if isinstance(entry, str):
        return [parse_prompt(entry)]
    if isinstance(entry, Prompt):
        return [entry]
    if isinstance(entry, Image.Image):
        return [Prompt("image", image=entry)]
    if not entry:
        raise UserError("an image needs at least one prompt")
    return [prompt for part in entry for prompt in as_mix(part)]


def _restored(picture: Picture, start: Start) -> Picture:
    """Return a picture with what was masked off as it was."""
    if start.mask is None:
        return picture
    image = start.restore(picture.image)
    return Picture(image, to_tensor(image))


def _check_guide(interval: tuple[float, float], rescale: float) -> None:
    """Raise UserError for an interval or a rescaling that makes no sense."""
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise UserError(f"guidance interval: two times 0 <= first <= last <= 1 are needed, not {low:g} {high:g}")
    if not 0 <= rescale <= 1:
        raise UserError(f"guidance rescale: a share from 0 to 1 is needed, not {rescale:g}")


def _load_denoiser(
    config: dict[str, Any], state: dict[str, Tensor], path: str | Path, channels: int, given: ConditionSpec
) -> Denoiser:
    """Return the denoiser of a model file, frozen, on the CPU."""
    denoiser = build("denoiser", config["denoiser"], channels, given)
    check_conditions(denoiser, given)
    load_strictly(denoiser, state, path)
    return denoiser.eval().requires_grad_(False)


def _load_frozen(role: str, section: dict[str, Any], moved: str | Path | None, trained_with: str | None) -> nn.Module:
    """Return a frozen part of a checkpoint, from `moved` if given; warn if it is not the file of training."""
    if moved is not None:
        section = {**section, "weights": moved}
    try:
        if moved is None:
            check_untrusted(section.get("weights"), f"{role}.weights")
        part = load_part(role, section)
        if any(True for _ in part.parameters()) and not has_weights(role, section):
            raise UserError("the file does not say where its weights are")
        given = weights_sha256(role, section) if trained_with else None
    except UserError as error:
        hint = "" if moved else f"; --{role} FILE says where it is"
        raise UserError(f"{role} of the checkpoint: {error}{hint}") from None
    if trained_with and given != trained_with:
        name = section.get("weights") or section.get("pretrained") or section.get("model")
        log.warning("%s: not the %s file that the model was trained with", name, role)
    return part


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode for a while; during training it may be the one that is trained."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)
