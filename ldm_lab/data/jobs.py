"""The contract of a pass: what is made of work items (`Job`), how it runs, what comes of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Generic, NamedTuple, Protocol, Self, TypeVar

from torch import nn

from ldm_lab.data.counts import Counts
from ldm_lab.data.work_items import Content, WorkItem, describe

Fingerprint = dict[str, str]  # what makes results what they are -> its value, as a text


class Prepared(Protocol):
    """A sample as a preparation returns it.

    Attributes:
        key: its name.
        caption_place: where its caption came from, or why it cannot be read; "" if nobody knows.
    """

    @property
    def key(self) -> str: ...

    @property
    def caption_place(self) -> str: ...


Raw = TypeVar("Raw")  # a sample, undecoded
One = TypeVar("One", bound=Prepared)  # a sample, prepared
Many = TypeVar("Many", bound=tuple)  # a batch: a NamedTuple of tensors and lists, pinned and moved as such
Made = TypeVar("Made")  # what a job makes of a batch, on the CPU


class Preparation(Protocol[Raw, One, Many]):
    """What happens to samples in the loader processes, to which it is sent: it holds no network.

    Attributes:
        unique_keys: whether a second sample of an item with the same key is skipped.
    """

    unique_keys: ClassVar[bool]

    def prepare(self, sample: Raw) -> One:
        """Return a sample, decoded. Raises SkippedSample."""
        ...

    def collate(self, samples: list[One]) -> Many:
        """Return the batch of some samples."""
        ...


class Finished(NamedTuple):
    """What the last file of a finished item says of itself.

    Attributes:
        fingerprint: `Job.fingerprint` of the pass that made it.
        content: `WorkItem.content` at that time.
        counts: what was read of the item and skipped.
    """

    fingerprint: Fingerprint
    content: Content
    counts: Counts


class Job(nn.Module, Generic[Raw, One, Many, Made]):
    """What a pass makes of its items. A module, so that its networks are moved to the device.

    Attributes:
        task: a verb for the progress bar.
        results: what its files hold, in the plural.
        unit: of what the bar counts.
        preparation: of the samples.
    """

    task: ClassVar[str]
    results: ClassVar[str]
    unit: ClassVar[str] = "image"
    preparation: Preparation[Raw, One, Many]

    def check(self, items: Sequence[WorkItem[Raw]]) -> None:
        """Raise UserError for items that this job cannot do."""

    def describe(self, items: Sequence[WorkItem[Raw]]) -> list[str]:
        """Return what is seen of the items at the start, a line each."""
        return describe(items)

    def fingerprint(self, precision: str) -> Fingerprint:
        """Return what makes its results what they are; files with another one are never overwritten.

        Args:
            precision: of the networks' arithmetic, as Lightning calls it.
        """
        raise NotImplementedError

    def files(self, item: WorkItem[Raw]) -> list[Path]:
        """Return all files of an item, the one that is written last at the end."""
        raise NotImplementedError

    def finished(self, item: WorkItem[Raw]) -> Finished | None:
        """Return what an item's last file says, None if it is not there, damaged, or another program's."""
        raise NotImplementedError

    def process(self, batch: Many) -> Made:
        """Return what is made of a batch on the device, on the CPU again."""
        raise NotImplementedError

    def write(self, item: WorkItem[Raw], rows: list[Made], done: Finished) -> None:
        """Write an item's files, each whole or not at all.

        Args:
            item: whose last batch has been processed.
            rows: of its batches, in the item's order; none if no sample can be used.
            done: to be written into the last file; a job may count further skipped samples in it.

        Raises:
            UserError: a file cannot be written.
        """
        raise NotImplementedError

    def leave(self, rows: list[Made]) -> None:
        """Take leave of an item that is left for another time, as its end could not be reached. Raises UserError."""

    def finish(self, items: Sequence[WorkItem[Raw]], report: "PassReport") -> None:
        """Write what is about all items, in the first process, while all others wait. Raises UserError."""


@dataclass(frozen=True)
class PassOptions:
    """How a pass runs: batches, loader processes, and what Lightning's Trainer calls by the same names.

    Attributes:
        batch_size: samples that are processed at once.
        workers: loader processes per device.
        devices: per node, or "auto".
        precision: of the networks' arithmetic.
        max_skipped: share of the samples read that may be unusable; beyond it the pass ends.
    """

    batch_size: int = 64
    workers: int = 2
    devices: str = "1"
    num_nodes: int = 1
    accelerator: str = "auto"
    precision: str = "32-true"
    max_skipped: float = 1.0


@dataclass(frozen=True)
class PassReport:
    """What is done, by this pass and those before.

    Attributes:
        counts: samples of the items that are done.
        done: items.
        items: in all.
        unreached: addresses of items that could not be read; another pass tries again.
    """

    counts: Counts
    done: int
    items: int
    unreached: list[str]

    def with_that_of(self, other: Self) -> Self:
        """Return the report on this pass and another one together."""
        counts = Counts()
        counts.add(self.counts)
        counts.add(other.counts)
        done, items, unreached = self.done + other.done, self.items + other.items, self.unreached + other.unreached
        return replace(self, counts=counts, done=done, items=items, unreached=unreached)
