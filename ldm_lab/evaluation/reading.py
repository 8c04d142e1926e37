"""From samples to what passes of an evaluation take: the image, its caption, and the image as each network takes it."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ldm_lab.data.order import Order
from ldm_lab.data.samples import FilteredOut, RawSample, SkippedSample, as_utf8, caption_of
from ldm_lab.data.source import Item, Source
from ldm_lab.embed import Prepare
from ldm_lab.io.color import BadImage
from ldm_lab.io.decoding import decode_image
from ldm_lab.io.images import to_rgb

NOT_LISTED = "not in samples.json"  # a grid, a base model's small picture
SEED = 0  # of what a source draws: a caption of several, a random crop


class PreparedPicture(NamedTuple):
    """A picture, ready for the networks.

    Attributes:
        key: its name.
        text: its caption; "" where there is none.
        caption_place: where that came from, or why it cannot be read.
        inputs: as each network takes it, [3, S, S] each.
        image: of a data source, uint8 [3, S, S]; empty otherwise.
    """

    key: str
    text: str
    caption_place: str
    inputs: list[Tensor]
    image: Tensor


class PictureBatch(NamedTuple):
    """Several pictures: keys and texts, B of each; inputs [B, 3, S, S] of each network; images uint8 [B, 3, S, S]."""

    key: list[str]
    text: list[str]
    inputs: list[Tensor]
    image: Tensor


def collated(samples: list[PreparedPicture]) -> PictureBatch:
    """Return the batch of some pictures."""
    return PictureBatch(
        [as_utf8(sample.key) for sample in samples],
        [as_utf8(sample.text) for sample in samples],
        [torch.stack(inputs) for inputs in zip(*(sample.inputs for sample in samples))],  # [B, 3, S, S] each
        torch.stack([sample.image for sample in samples]),  # [B, 3, S, S]
    )


@dataclass(frozen=True)
class FromSource:
    """Items of a data source, as training reads them: squares of its size, the same caption every time."""

    unique_keys: ClassVar[bool] = False

    source: Source
    prepares: tuple[Prepare, ...]

    def prepare(self, sample: Item) -> PreparedPicture:
        """Return a sample with its image. Raises SkippedSample."""
        decoded = self.source.decode(sample, Order(SEED, 0))
        if decoded.image is None:
            raise SkippedSample("no image", decoded.key)
        pictures = [Image.fromarray(decoded.image.permute(1, 2, 0).numpy())] if self.prepares else []
        inputs = [prepare(picture) for picture in pictures for prepare in self.prepares]
        return PreparedPicture(decoded.key, decoded.text, decoded.caption_place, inputs, decoded.image)

    def collate(self, samples: list[PreparedPicture]) -> PictureBatch:
        """Return the batch of some pictures."""
        return collated(samples)


@dataclass(frozen=True)
class FromFiles:
    """Image files as they are, of any size: each network's own way of resizing makes them fit."""

    unique_keys: ClassVar[bool] = True

    prepares: tuple[Prepare, ...]
    listed: frozenset[str] | None = None  # names of the pictures that count; None takes all

    def prepare(self, sample: RawSample) -> PreparedPicture:
        """Return a file's image and caption. Raises SkippedSample."""
        if self.listed is not None and sample.key not in self.listed:
            raise FilteredOut(NOT_LISTED, sample.key)
        if sample.image is None:
            raise SkippedSample("no image", sample.key)
        try:
            picture = to_rgb(decode_image(sample.image))
        except BadImage as problem:
            raise SkippedSample(str(problem), sample.key) from None
        caption = caption_of(sample)
        inputs = [prepare(picture) for prepare in self.prepares]
        place = caption.problem or caption.place
        return PreparedPicture(sample.key, caption.first, place, inputs, torch.empty(0, dtype=torch.uint8))

    def collate(self, samples: list[PreparedPicture]) -> PictureBatch:
        """Return the batch of some pictures."""
        return collated(samples)


class Asked(NamedTuple):
    """A picture that is to be made.

    Attributes:
        setting: number of the model and choices that it is made with.
        seed: of its noise.
        prompt: number of its prompt.
    """

    setting: int
    seed: int
    prompt: int

    @property
    def key(self) -> str:
        """Its name."""
        return str(self.seed)

    @property
    def caption_place(self) -> str:
        """Nothing is to be said of where a prompt came from."""
        return ""


class AskedBatch(NamedTuple):
    """Pictures of one setting that are to be made: its number, and B seeds and numbers of prompts."""

    setting: int
    seed: list[int]
    prompt: list[int]


class AsAsked:
    """Pictures that are to be made, to which nothing has to be done before a model is asked."""

    unique_keys: ClassVar[bool] = False

    def prepare(self, sample: Asked) -> Asked:
        """Return the picture."""
        return sample

    def collate(self, samples: list[Asked]) -> AskedBatch:
        """Return the batch of some pictures of one setting."""
        return AskedBatch(samples[0].setting, [s.seed for s in samples], [s.prompt for s in samples])
