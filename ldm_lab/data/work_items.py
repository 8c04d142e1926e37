"""What a pass goes through, one after the other: shards, or batches of image files. Each is done or it is not."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar
from urllib.parse import urlsplit

from ldm_lab.data.captions import Captions
from ldm_lab.data.files import Folder
from ldm_lab.data.samples import Judged, RawSample, SkippedSample
from ldm_lab.data.shard_source import ShardSource
from ldm_lab.data.shard_urls import expand, is_remote, without_ending
from ldm_lab.data.shards_found import describe_shards
from ldm_lab.data.source import Item, Source, Unusable
from ldm_lab.data.tar import read_shard
from ldm_lab.errors import UserError

FILES = 1000  # image files in a work item
FEW_FILES = 64  # at least as many are in one
PARTS = 64  # work items that a source of files is divided into, as long as they are not too small or too large

Content = str | int | None  # plain, as it is written into files
Raw = TypeVar("Raw", covariant=True)  # a sample, undecoded


@dataclass(frozen=True)
class WorkItem(Generic[Raw]):
    """Base class: samples that are done as a whole or not at all.

    Attributes:
        target: where the results go, without the ending.
    """

    target: Path

    @property
    def limit(self) -> int | None:
        """How many of its samples are wanted, the first usable ones; None for all."""
        return None

    @property
    def address(self) -> str:
        """What it is, in words."""
        raise NotImplementedError

    @property
    def is_remote(self) -> bool:
        """Whether it may be reached at another time though it cannot be now."""
        return False

    def content(self) -> Content:
        """Return what tells whether these are still the same samples; None if nothing can."""
        raise NotImplementedError

    def samples(self) -> Iterator[Raw | Unusable]:
        """Yield the samples, undecoded, in a fixed order."""
        raise NotImplementedError

    def file(self, ending: str) -> Path:
        """Return the path of a result."""
        return self.target.with_name(self.target.name + ending)


@dataclass(frozen=True)
class Shard(WorkItem[RawSample]):
    """A tar file of samples.

    Attributes:
        location: a path, or an http(s) or cloud address.
        name: path, without the ending, relative to the folder that all shards are in.
    """

    location: str
    name: Path

    @property
    def address(self) -> str:
        return self.location

    @property
    def is_remote(self) -> bool:
        return is_remote(self.location)

    def content(self) -> Content:
        return None if self.is_remote else os.path.getsize(self.location)

    def samples(self) -> Iterator[RawSample | SkippedSample]:
        return read_shard(self.location)


@dataclass(frozen=True)
class FileBatch(WorkItem[RawSample]):
    """Image files of a folder that follow on one another in its sorted list.

    Attributes:
        folder: opened.
        first: place of the first of them.
        names: of them.
    """

    folder: Folder
    first: int
    names: tuple[str, ...]

    @property
    def address(self) -> str:
        return f"{self.folder.root}: {self.names[0]} ... {self.names[-1]}"

    def content(self) -> Content:
        return hashlib.sha256("\n".join(self.names).encode(errors="surrogateescape")).hexdigest()

    def samples(self) -> Iterator[RawSample | SkippedSample]:
        for index in range(self.first, self.first + len(self.names)):
            try:
                yield self.folder.read(index)
            except SkippedSample as problem:
                yield problem


@dataclass(frozen=True)
class SourceItem(WorkItem[Item]):
    """Units of a data source: one shard, or images that follow on one another in its list.

    Attributes:
        source: opened.
        first: of the units.
        units: how many.
        most: how many samples are wanted; None for all.
        behind: so many samples are another item's, which come first.
    """

    source: Source
    first: int
    units: int
    most: int | None = None
    behind: int = 0

    @property
    def limit(self) -> int | None:
        return self.most

    @property
    def address(self) -> str:
        if isinstance(self.source, ShardSource):
            return self.source.addresses[self.first]
        return f"{self.source.unit} {self.first:,} to {self.first + self.units - 1:,}"

    @property
    def is_remote(self) -> bool:
        return isinstance(self.source, ShardSource) and is_remote(self.address)

    def content(self) -> Content:
        rest = f", {self.most} behind {self.behind}" if self.behind else ""
        return f"{self.units} from {self.first} on{rest}"

    def samples(self) -> Iterator[Item | Unusable]:
        passed = 0
        for sample in self._all():
            if passed < self.behind:
                passed += not isinstance(sample, Judged)
            else:
                yield sample

    def _all(self) -> Iterator[Item | Unusable]:
        for unit in range(self.first, self.first + self.units):
            if self.source.shuffle_buffer is None:  # every unit is an item
                yield unit
            else:
                yield from self.source.items(unit)


class Seen(NamedTuple):
    """What a finished work item has read and used of its samples."""

    read: int
    used: int


class SourceItems(list[SourceItem]):
    """The work items of an opened source; they do not depend on how many processes there are.

    With a limit as many samples are wanted of each, but some may have fewer: a pass then asks for the rest where there
    is more (`rest`), until the limit is reached or nothing is left.
    """

    def __init__(self, source: Source, out: Path, limit: int | None = None) -> None:
        """List them.

        Args:
            source: whose samples they have.
            out: folder of the results, named by numbers.
            limit: samples that are wanted of all together, evenly spread over the items.
        """
        count = source.count or 0
        units = 1 if source.shuffle_buffer is not None else min(FILES, max(FEW_FILES, -(-count // PARTS)))
        firsts = range(0, count, units)
        self.limit = limit
        self.whole = [
            SourceItem(out / f"{number:05d}", source, first, min(units, count - first))
            for number, first in enumerate(firsts)
        ]
        shares = [None] * len(firsts) if limit is None else evenly(limit, len(firsts))
        super().__init__(replace(item, most=most) for item, most in zip(self.whole, shares) if most != 0)

    def rest(self, seen: Sequence[Seen | None]) -> list[SourceItem]:
        """Return what is to be read beside these items, as some of them had fewer samples than were wanted of them.

        Args:
            seen: of each item; None of one that could not be reached, and is left for another time.
        """
        if self.limit is None or None in seen:
            return []
        read, ended, missing = dict[int, int](), set[int](), self.limit  # by first unit
        for item, its in zip(self, seen, strict=True):
            if its is not None:
                read[item.first] = read.get(item.first, 0) + its.read
                missing -= its.used
                if item.most is not None and its.used < item.most:
                    ended.add(item.first)
        more = [item for item in self.whole if item.first not in ended]
        found = []
        for item, most in zip(more, evenly(max(missing, 0), len(more))):
            start = read.get(item.first, 0)
            target = item.file(f"-{start:07d}") if start else item.target
            found += [replace(item, target=target, most=most, behind=start)] if most else []
        return found


def evenly(count: int, parts: int) -> list[int]:
    """Return how many of a count each of some parts gets: equal numbers, or one apart."""
    return [count * (number + 1) // parts - count * number // parts for number in range(parts)]


def shard_items(patterns: list[str], out: Path | None) -> list[Shard]:
    """Return the shards of some addresses and patterns; results lie beside each, or in `out` in the same order.

    Raises:
        UserError: no such shard; an address that results cannot lie beside; two shards with the same target.
    """
    addresses = expand(patterns)
    local = [Path(address) for address in addresses if not is_remote(address)]
    for address in addresses:
        if address.startswith("pipe:"):
            raise UserError(f"--shards {address}: a command has no name that its scores could have; give files")
        if out is None and is_remote(address):
            raise UserError(f"--shards {address}: --out has to say where its scores go")
    common = Path(os.path.commonpath([path.absolute().parent for path in local])) if local else Path()
    found, names = [], {}
    for address in addresses:
        path = Path(urlsplit(address).path if is_remote(address) else address)
        stem = without_ending(path.name)
        name = Path(stem) if is_remote(address) else path.absolute().parent.relative_to(common) / stem
        if name in names:
            raise UserError(f"--shards: the scores of {names[name]} and {address} would have the same name, {name}")
        names[name] = address
        found.append(Shard(path.with_name(stem) if out is None else out / name, address, name))
    return found


def file_batches(path: str, out: Path | None, leaves_out: Callable[[Path], bool] | None = None) -> list[FileBatch]:
    """Return the images below a folder in batches, without those that are none (`Folder.leaves_out`).

    Raises:
        UserError: no image, or `out` is not given.
    """
    if out is None:
        raise UserError("--images: --out has to say where the scores go")
    folder = Folder(path=path, image_size=1, batch_size=1)
    folder.leaves_out = leaves_out
    folder.open()
    names = folder.names
    return [
        FileBatch(out / f"{number:05d}", folder, first, tuple(names[first : first + FILES]))
        for number, first in enumerate(range(0, len(names), FILES))
    ]


def describe(items: Sequence[WorkItem]) -> list[str]:
    """Return what is seen of the items at the start of a pass, a line each."""
    folder = next((item.folder for item in items if isinstance(item, FileBatch)), None)
    if folder is not None:
        return folder.found()
    return describe_shards([item.location for item in items if isinstance(item, Shard)], Captions(), "first_dot")
