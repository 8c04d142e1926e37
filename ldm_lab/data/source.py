"""What all sources have in common: their options, and how an image sample is made of its raw parts."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ldm_lab.config import NonNegativeInt, PartSection, Plain, PositiveFloat, PositiveInt, ShareBelowOne, build
from ldm_lab.data.captions import Caption, Captions
from ldm_lab.data.order import Order
from ldm_lab.data.samples import Captioned, FilteredOut, Judged, RawSample, Sample, SkippedSample, caption_of
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Batch
from ldm_lab.io.color import BadImage
from ldm_lab.io.squares import Road, read_square, torch_has_lanczos

Item = int | RawSample  # what `decode` takes: the number of a unit, or bytes
Unusable = SkippedSample | Judged  # what `items` gives in the place of an item
TOO_SMALL = "too small"  # the reader's reason (`io.decoding.check_pixels`)
LEAST_SIDE = 16  # pixels; what is smaller is an icon, or one that tracks readers, and no picture
WHOLE = 2**31  # pixels, longer than any side
CHECK_AFTER = 500  # samples that are read before the share of skipped ones is judged


class Source:
    """Base class of all sources. The contract is the docstring of `ldm_lab.data`.

    A `**common` in a subclass's constructor stands for the options of its base class, so that each is written once.

    Args:
        batch_size: samples per batch and device.
        workers: loader processes per device; 0 reads in the training process itself.
        max_skipped: share of the samples read that may be unusable, in [0, 1); beyond it the run stops.
        timeout: seconds without a batch after which training saves and leaves.

    Attributes:
        unit: what is dealt out to the readers, in the plural.
        count: units; None before `open`.
        image_size: side of the square images that samples were made of, pixels; None if nobody has said it.
        cut_from: short side of the pictures that these were cut from, pixels; `WHOLE` if each has its own, None if the
            squares have all of it.
        shuffle_buffer: items that are held to draw the next one from, where a unit has several of them; None where
            every unit is an item.
        judged_after: samples that a rank reads before the share of skipped ones is judged.
        note: told what is about to be read, for the message of a wait that takes long.
        accept: raises SkippedSample for a decoded sample that the run cannot use.
        encoded_by: of a cache, role -> what is known of the part that made its latents or conditions.
    """

    unit = "samples"
    count: int | None = None
    shuffle_buffer: int | None = None
    image_size: int | None = None
    cut_from: int | None = None
    judged_after: int = CHECK_AFTER
    encoded_by: Mapping[str, dict[str, str]] = MappingProxyType({})

    def __init__(
        self,
        *,
        batch_size: PositiveInt,
        workers: NonNegativeInt = 4,
        max_skipped: ShareBelowOne = 0.1,
        timeout: PositiveFloat = 1800.0,
    ):
        self.batch_size, self.workers, self.max_skipped = batch_size, workers, max_skipped
        self.timeout = timeout
        self.note: Callable[[str], None] = noted_nowhere
        self.accept: Callable[[Sample], None] = accept_all

    @property
    def picture_size(self) -> int | None:
        """Short side of the pictures that samples are of, whole or cut out, pixels; None if each has its own."""
        return self.image_size if self.cut_from is None else None if self.cut_from == WHOLE else self.cut_from

    def prepare(self) -> None:
        """Make what has to be on disk before reading. Called in one process per node, before `open`."""

    def open(self) -> None:
        """List the units and set `count`; called in every process. Raises UserError where there is nothing to read."""
        raise NotImplementedError

    @property
    def items_key(self) -> str:
        """What the items of a unit and their order depend on beside the unit itself, in a few characters."""
        return "" if self.shuffle_buffer is None else f"shuffle_buffer={self.shuffle_buffer}"

    def found(self) -> list[str]:
        """Return what `open` found, a line each, for the start of a run; samples are not decoded for it."""
        return []

    def files(self) -> list[tuple[str, Path | None]]:
        """Return what `open` found on the disk, by which a cache is known to be stale.

        (name, path) of each file: names do not depend on how the data's own folder is written, the path of what is
        elsewhere is None. None at all where the options say everything, or nobody knows.
        """
        return []

    def contents(self) -> str:
        """Return what stands for all that `open` found, as `contents.contents_of` does; "" where nobody knows.

        By it a run that goes on knows whether other data lie in the place of those that it was trained on.
        """
        return ""

    def items(self, unit: int) -> Iterator[Item | Unusable]:
        """Yield the items of a unit, the same ones in the same order whenever it is read.

        An item is what `decode` takes, or a `SkippedSample` for something that could not even be read. Nothing is
        decoded here, so that resuming is quick. Only asked for where there is a `shuffle_buffer`: as it stands, every
        unit is an item, known by its number.
        """
        yield unit

    def decode(self, item: Item, order: Order) -> Sample:
        """Return the sample of an item; every random choice comes from `order.random`. Raises SkippedSample."""
        raise NotImplementedError

    def captions_of(self, item: Item) -> Captioned:
        """Return what is said of an item, undecoded where that is known without its image. Raises SkippedSample."""
        sample = self.decode(item, Order(0, 0))
        return Captioned(sample.key, sample.caption_place, [sample.text])

    def collate(self, samples: list[Sample]) -> Batch:
        """Return the batch of some samples, its image uint8; runs in the loader process."""
        return Batch(
            key=[sample.key for sample in samples],
            text=[sample.text for sample in samples],
            image=_stacked([sample.image for sample in samples]),  # [B, 3, S, S]
            mean=_stacked([sample.mean for sample in samples]),  # [B, C, h, w]
            logvar=_stacked([sample.logvar for sample in samples]),  # [B, C, h, w]
            conditions={
                name: torch.stack([sample.conditions[name] for sample in samples])  # [B, ...]
                for name in (samples[0].conditions if samples else {})
            },
        )

    def to_device_format(self, batch: Batch) -> Batch:
        """Return the batch as the model gets it; runs in the training process, on the device if there is a Trainer.

        A batch that has been through it already stays what it is.
        """
        return batch


def noted_nowhere(name: str) -> None:
    """Forget what is about to be read."""


def accept_all(sample: Sample) -> None:
    """Take every sample."""


def _stacked(rows: list[Tensor | None]) -> Tensor | None:
    """Return [B, ...] of rows [...]; None unless all of them are there."""
    there = [row for row in rows if row is not None]
    return torch.stack(there) if there and len(there) == len(rows) else None


class ImageSource(Source):
    """Base class of the sources whose items are `RawSample`: an encoded image with an optional caption.

    Args:
        image_size: side of the square that the model sees, pixels. The short side is resized to it (Lanczos), unless
            resize_to says otherwise.
        resize_to: the square is cut from a larger picture: its short side is reduced to so many pixels, "original"
            leaves it as it is. Nothing is enlarged then; images smaller than the square are left out, and counted.
        resize: fast reads and resizes plain JPEGs by torch; exact does everything by Pillow, pixel for pixel as the
            programs that are reproduced. They differ by two levels of 255 at most.
        crop: which square of the resized image is taken; a random one is drawn anew in every epoch.
        flip: mirror each image left to right with probability 0.5.
        min_size: images with a shorter side below this are skipped, pixels; above 16 they count as left out as asked.
        max_pixels: images with more than that are skipped; null is Pillow's limit, 179 million.
        require_text: leave out samples without a caption, "file" only those without any, not those with an empty one;
            otherwise their text is "". They are counted apart from unusable ones.
        captions: where captions are, and how they are read.
    """

    def __init__(
        self,
        *,
        image_size: PositiveInt,
        resize_to: PositiveInt | Literal["original"] | None = None,
        resize: Road = "fast",
        crop: Literal["center", "random"] = "center",
        flip: bool = False,
        min_size: NonNegativeInt = LEAST_SIDE,
        max_pixels: PositiveInt | None = None,
        require_text: bool | Literal["file"] = False,
        captions: Annotated[dict[str, Plain] | None, PartSection("captions")] = None,
        **common: Any,
    ):
        super().__init__(**common)
        self.captions: Captions = build("captions", captions)
        self.image_size, self.crop, self.flip = image_size, crop, flip
        self.cut_from = WHOLE if resize_to == "original" else resize_to
        if self.cut_from is not None and self.cut_from < image_size:
            raise UserError(f"data.resize_to: {resize_to} is less than data.image_size, {image_size}, which is cut out")
        self.resize: Road = resize
        self.min_size, self.max_pixels, self.require_text = min_size, max_pixels, require_text

    def found(self) -> list[str]:
        if self.resize == "exact" or torch_has_lanczos():
            return []
        return ["resize: fast: takes torch 2.12 or a newer one; with this one Pillow reads and resizes (exact)"]

    def parts_of(self, item: RawSample) -> tuple[bytes, Caption]:
        """Return the encoded image and the caption of a sample. Raises SkippedSample: none, or no wanted caption."""
        if item.image is None:
            raise SkippedSample("no image", item.key)
        caption = caption_of(item, self.captions)
        if self.require_text and caption.problem:
            raise SkippedSample(caption.problem, item.key)
        if self.require_text and not caption.texts and not (self.require_text == "file" and caption.exists):
            raise FilteredOut("no caption", item.key)  # the user asked for that: nothing is wrong with the image
        return item.image, caption

    def captions_of(self, item: RawSample) -> Captioned:
        caption = self.parts_of(item)[1]
        return Captioned(item.key, caption.problem or caption.place, list(caption.texts) or [""])

    def decode(self, item: RawSample, order: Order) -> Sample:
        """Return the sample with its image, uint8 [3, S, S]. Raises SkippedSample."""
        data, caption = self.parts_of(item)
        text = caption.draw(order.random("caption", item.key)) if len(caption.texts) > 1 else caption.whole
        across, down, mirror = 0.5, 0.5, 0.5
        if self.crop == "random" or self.flip:  # a generator costs as much as the header of an image
            random = order.random("augment", item.key)
            across, down, mirror = random.random(), random.random(), random.random()
        if self.crop == "center":
            across = down = 0.5
        try:
            image = read_square(
                data, self.image_size, across, down, self.resize, self.min_size, self.max_pixels, self.cut_from
            )  # [3, S, S]
        except BadImage as problem:
            asked = str(problem) == TOO_SMALL and (self.min_size > LEAST_SIDE or self.cut_from is not None)
            raise (FilteredOut if asked else SkippedSample)(str(problem), item.key) from None
        if self.flip and mirror < 0.5:
            image = image.flip(2)  # [3, S, S]
        return Sample(item.key, text, caption.problem or caption.place, image)

    def to_device_format(self, batch: Batch) -> Batch:
        """Bring the image to float32 in [-1, 1]; as bytes it took a quarter of the room on its way here."""
        if batch.image is None or batch.image.dtype != torch.uint8:
            return batch
        return replace(batch, image=batch.image.float().div_(127.5).sub_(1))  # [B, 3, S, S]
