"""A base model and the upsampler that enlarges its pictures."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from ldm_lab.config import build
from ldm_lab.errors import UserError
from ldm_lab.guidance.classifier_free import unguided_weights
from ldm_lab.io.images import round_to_uint8
from ldm_lab.prompts import Prompt
from ldm_lab.sampling.image_to_image import Start
from ldm_lab.sampling.pipeline import Mix, Picture, Sampler, as_mix

# Added to an image's seed, so that the upsampler's noise is not the base's once more: 2**32 over the golden ratio,
# which is far from all neighbouring seeds. (Of a seed torch's generators take the lowest 32 bits alone.)
OTHER_NOISE = 2_654_435_769
LEAST_FOR_FAST27 = 50  # timesteps that GLIDE's schedule for upsampling needs


@dataclass(frozen=True)
class Upsampling:
    """How pictures are enlarged.

    Attributes:
        sampler: name, or config section; None is GLIDE's own: DDIM with the respacing fast27, or with 27 steps where
            the schedule has no such timesteps.
        temperature: factor of the noise that it starts from; a little below 1 makes smoother pictures.
        guidance: weight of the prompts, together; None is none: the prompts count in proportion, the plain model.
    """

    sampler: str | dict[str, Any] | None = None
    temperature: float = 0.997
    guidance: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise UserError(f"upsampling temperature: a number from 0 to 2, near 1, is needed, not {self.temperature}")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise UserError("upsampling guidance: a finite number is needed")


class Cascade:
    """Two models in a row: the base makes small pictures of prompts, the upsampler enlarges them."""

    def __init__(self, base: Sampler, upsampler: Sampler) -> None:
        """Take two models.

        Raises:
            UserError: the base is an upsampler, or the upsampler is none.
        """
        if base.enlarges:
            raise UserError("base model: this is an upsampler, which enlarges pictures of a base model's")
        if not upsampler.enlarges:
            raise UserError("upsampler: this is a base model, which takes no picture to be enlarged")
        self.base, self.upsampler = base, upsampler

    def __call__(self, prompts: Sequence[Mix], **options: Any) -> list[tuple[Image.Image, Image.Image]]:
        """Return small and large image for each entry of `prompts`. Options and errors are those of `batches`."""
        return [pair for batch in self.batches(prompts, **options) for pair in batch]

    def batches(
        self,
        prompts: Sequence[Mix],
        *,
        upsampling: Upsampling = Upsampling(),
        start: Start | None = None,
        batch_size: int = 16,
        progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> Iterator[list[tuple[Image.Image, Image.Image]]]:
        """Return an iterator over pairs of small and large images, batch by batch, in the order of `prompts`.

        Args:
            prompts: as for the base alone (`Sampler.pictures`); those that lead away are the base's only.
            upsampling: how the base's pictures are enlarged.
            start: a picture to begin with. Where there is a mask, the upsampler keeps what it masks off, too.
            batch_size: images at once, of either model.
            progress: called after each step as `progress(steps done, steps in all)`, counted over both models.
            options: further options of the base (`Sampler.pictures`).

        Raises:
            UserError: guidance of the upsampler by no text; what `Sampler.pictures` raises, for either model.
        """
        mixes = [as_mix(entry) for entry in prompts]
        larger = [self._enlarged(mix, options.get("guidance", 3.0), upsampling.guidance) for mix in mixes]
        self.upsampler.weights(larger, 1.0)  # complains before the base begins to work
        sampler = self._sampler(upsampling.sampler)
        walk = build("sampler", sampler)
        walk.times(self.upsampler.objective.schedule)  # likewise
        steps = _Steps(progress, math.ceil(len(mixes) / max(batch_size, 1)) * walk.steps)
        made = self.base.pictures(mixes, start=start, batch_size=batch_size, progress=steps.base, **options)
        keep = None if start is None or start.mask is None else Start(start.image, 1.0, start.mask)

        def run() -> Iterator[list[tuple[Image.Image, Image.Image]]]:
            pictures = (picture for batch in made for picture in batch)
            for first in range(0, len(mixes), batch_size):
                small = list(itertools.islice(pictures, batch_size))
                seeds = [picture.image.info["seed"] for picture in small]
                (large,) = self.upsampler.pictures(
                    larger[first : first + len(small)],
                    low_res=round_to_uint8(torch.stack([picture.pixels for picture in small])),
                    seeds=[seed + OTHER_NOISE for seed in seeds],
                    sampler=sampler,
                    temperature=upsampling.temperature,
                    start=keep,
                    batch_size=batch_size,
                    progress=steps.upsampler,
                )
                yield [self._pair(*pictures) for pictures in zip(small, large, strict=True)]

        return run()

    @staticmethod
    def _pair(small: Picture, large: Picture) -> tuple[Image.Image, Image.Image]:
        large.image.info.update(small.image.info)  # the seed that the user knows
        return small.image, large.image

    def _sampler(self, sampler: str | dict[str, Any] | None) -> dict[str, Any]:
        """Return the config section of the upsampler's sampler."""
        if sampler is not None:
            return {"name": sampler} if isinstance(sampler, str) else sampler
        enough = getattr(self.upsampler.objective.schedule, "timesteps", 0) >= LEAST_FOR_FAST27
        return {"name": "ddim", "steps": "fast27" if enough else 27}

    def _enlarged(self, mix: list[Prompt], usual: float, guidance: float | None) -> list[Prompt]:
        """Return the prompts that an image is enlarged with: those that the base is led towards, in proportion."""
        weights = torch.tensor([[usual if prompt.weight is None else prompt.weight for prompt in mix]])  # [1, k]
        shares = unguided_weights(weights)[1:, 0].tolist()  # k numbers
        towards = [(prompt, share) for prompt, share in zip(mix, shares) if share > 0]
        wordless = getattr(self.upsampler.conditioner, "part_name", None) == "none"
        if guidance not in (None, 1.0) and (wordless or not any(prompt.text.strip() for prompt, _ in towards)):
            why = "it was trained without any" if wordless else "this prompt is empty"
            raise UserError(f"guidance of the upsampler needs a text that it guides to, but {why}; leave it out")
        total = 1.0 if guidance is None else guidance
        return [replace(prompt, weight=share * total) for prompt, share in towards] or [Prompt("", 1.0)]


class _Steps:
    """Counts the steps of both models for one progress report."""

    def __init__(self, progress: Callable[[int, int], None] | None, upsampling: int) -> None:
        self.progress, self.upsampling = progress, upsampling
        self.done, self.total, self.enlarged = 0, 0, 0

    def base(self, done: int, total: int) -> None:
        self.done, self.total = done, total
        self._report(0)

    def upsampler(self, done: int, total: int) -> None:
        self._report(done)
        if done == total:
            self.enlarged += total

    def _report(self, now: int) -> None:
        if self.progress is not None:
            self.progress(self.done + self.enlarged + now, self.total + self.upsampling)
