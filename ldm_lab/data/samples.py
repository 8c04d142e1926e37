"""Samples on their way through the loader: as bytes, decoded, or not usable and why."""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

DUPLICATE = "duplicate key"  # the reason of a single sample; all others come from decoding, or stand for a shard
UNREACHABLE = "unreachable shard"  # it could not be opened
BROKEN = "broken shard"  # it breaks off


class RawSample(NamedTuple):
    """An undecoded sample: the bytes of its parts, None for a part that is not there.

    Attributes:
        key: its name, unique in the data set as far as the user keeps it so.
        image: an encoded image of any format that Pillow reads.
        text: the caption, UTF-8.
        json: metadata, as img2dataset writes them.
    """

    key: str
    image: bytes | None
    text: bytes | None = None
    json: bytes | None = None


@dataclass
class Sample:
    """A decoded sample: a row of a `Batch`, its image as bytes.

    Attributes:
        key: its name.
        text: the caption; "" where there is none.
        image: uint8 [3, S, S], or None.
        mean, logvar: of the posterior of the autoencoder's raw latent, [C, h, w] each, or None.
        conditions: name -> [...], of a cache.
    """

    key: str
    text: str = ""
    image: Tensor | None = None
    mean: Tensor | None = None
    logvar: Tensor | None = None
    conditions: dict[str, Tensor] = field(default_factory=dict)


class SkippedSample(Exception):
    """A sample (or a whole shard) that cannot be used.

    Args:
        reason: a few words that the counts are kept by: "truncated image", "too small", "broken shard", ...
        key: which one, for the report.
    """

    def __init__(self, reason: str, key: str):
        super().__init__(f"{reason}: {key}")
        self.reason, self.key = reason, key


class FilteredOut(SkippedSample):
    """A sample that the config leaves out, by a rule or for want of a caption: no sign that something is wrong."""


def caption_of(sample: RawSample) -> str:
    """Return a sample's caption, stripped; "" if it has none."""
    return (sample.text or b"").decode("utf-8-sig", errors="replace").strip()


def as_utf8(text: str) -> str:
    """Return a text that can be written as UTF-8, whatever bytes a name was made of."""
    return text.encode(errors="surrogateescape").decode(errors="replace") if not text.isascii() else text
