"""Samples on their way through the loader: as bytes, decoded, or not usable and why."""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from ldm_lab.data.captions import Caption, Captions

# Reasons of whole shards.
UNREACHABLE = "unreachable shard"  # it could not be opened
BROKEN = "broken shard"  # it breaks off
DAMAGED = "damaged shard"  # of a cache: not what its checksum, or the cache's list, says
EMPTY = "shard without a sample"
OF_LINKS = "shard of links alone (tar -h stores the files)"
UNSORTED = "unsorted shard (mkdir d; tar xf SHARD -C d; tar cf SHARD --sort=name -C d . sorts it)"
UNREADABLE_SCORES = "unreadable scores"
OF_SHARDS = (UNREACHABLE, BROKEN, DAMAGED, EMPTY, OF_LINKS, UNSORTED, UNREADABLE_SCORES)
# Reasons of samples that do not come from decoding.
DUPLICATE = "duplicate key"
APART = "files of one sample lie apart (mkdir d; tar xf SHARD -C d; tar cf SHARD --sort=name -C d . sorts them)"
LINK = "link in place of a file (tar -h stores the files)"
DOTTED = "no image (a dot within its name? data.key_until=last_dot takes names up to the last one)"


class RawSample(NamedTuple):
    """An undecoded sample: the bytes of its parts, None for a part that is not there.

    Attributes:
        key: its name, unique in the data set as far as the user keeps it so.
        image: an encoded image of any format that Pillow reads.
        text: the file with the caption.
        json: metadata, as img2dataset writes them.
        ending: of the caption's file.
        caption: what was found to be the caption; None leaves it to `caption_of`.
    """

    key: str
    image: bytes | None
    text: bytes | None = None
    json: bytes | None = None
    ending: str = ".txt"
    caption: Caption | None = None

    def read(self, ending: str) -> bytes | None:
        """Return the file of the sample that has an ending, .json or that of the caption."""
        return self.json if ending == ".json" else self.text if ending == self.ending else None


@dataclass
class Sample:
    """A decoded sample: a row of a `Batch`, its image as bytes.

    Attributes:
        key: its name.
        text: the caption; "" where there is none.
        caption_place: where it came from, or why it cannot be read; "" if nobody knows.
        image: uint8 [3, S, S], or None.
        mean, logvar: of the posterior of the autoencoder's raw latent, [C, h, w] each, or None.
        conditions: name -> [...], of a cache.
    """

    key: str
    text: str = ""
    caption_place: str = ""
    image: Tensor | None = None
    mean: Tensor | None = None
    logvar: Tensor | None = None
    conditions: dict[str, Tensor] = field(default_factory=dict)


class Captioned(NamedTuple):
    """What is said of a sample.

    Attributes:
        key: its name.
        caption_place: where its captions came from, or why they cannot be read; "" if nobody knows.
        texts: all that an epoch may draw as its caption; "" where there is none.
    """

    key: str
    caption_place: str
    texts: list[str]


class SkippedSample(Exception):
    """A sample (or a whole shard) that cannot be used.

    Args:
        reason: a few words that the counts are kept by: "truncated image", "too small", "broken shard", ...
        key: which one, for the report.
        samples: how many they are, as far as it is known; a shard whose samples nobody knows counts as one.
    """

    def __init__(self, reason: str, key: str, samples: int = 1):
        super().__init__(f"{reason}: {key}")
        self.reason, self.key, self.samples = reason, key, samples


class FilteredOut(SkippedSample):
    """A sample that the config leaves out, by a rule or for want of a caption: no sign that something is wrong.

    Args:
        judged: samples that the rules have judged since the one before it that was left out, itself included; 0 if
            no rule did it.
    """

    def __init__(self, reason: str, key: str, judged: int = 0):
        super().__init__(reason, key)
        self.judged = judged


@dataclass(frozen=True)
class Judged:
    """How many samples rules have judged and kept since the last one that was left out; not a sample itself."""

    count: int


DEFAULT_CAPTIONS = Captions()


def caption_of(sample: RawSample, captions: Captions = DEFAULT_CAPTIONS) -> Caption:
    """Return a sample's caption."""
    return captions.find(sample.key, sample.read) if sample.caption is None else sample.caption


def as_utf8(text: str) -> str:
    """Return a text that can be written as UTF-8, whatever bytes a name was made of."""
    return text.encode(errors="surrogateescape").decode(errors="replace") if not text.isascii() else text
