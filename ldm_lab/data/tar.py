"""Shards: tar files of samples, as img2dataset writes them.

The files of one sample share their name up to the first dot of the base name: `00012.jpg`, `00012.txt`, `00012.json`.
The format, the names and the writer are webdataset's. Reading is ours, because webdataset's `tar_file_expander` takes a
shard that is cut off, or damaged in the middle, for a whole one, and `group_by_keys` loses the sample at the break.

The files of a sample should follow on one another. Where they do not (`tar cf x.tar *.jpg *.txt`), a local shard is
read by its list of files, and of a stream so much is held as `HELD` allows. A large shard, or a stream, is suspected by
its first samples.
"""

import itertools
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from lzma import LZMAError
from pathlib import Path

from webdataset.writer import TarWriter

from ldm_lab.data.samples import (
    APART,
    BROKEN,
    DOTTED,
    DUPLICATE,
    EMPTY,
    LINK,
    OF_LINKS,
    UNREACHABLE,
    UNSORTED,
    RawSample,
    SkippedSample,
)
from ldm_lab.data.shard_urls import scheme_of
from ldm_lab.data.streams import ByteStream, NoTar, drain, open_stream, reason_of, unpacked
from ldm_lab.data.tar_files import Archive, KeyUntil, TarList, list_files, split_name
from ldm_lab.data.text import composed
from ldm_lab.io.atomic import atomic_write
from ldm_lab.io.decoding import IMAGE_ENDINGS

LARGEST_MEMBER = 2**28  # bytes; a larger file inside a shard is no image of ours
HELD = 2**27  # bytes of a stream's samples that wait for further files
LISTED = 2**26  # bytes of a local shard whose files are listed before it is read
FIRST = 8  # samples that tell whether the files of one follow on one another
DAMAGES = (tarfile.TarError, OSError, EOFError, zlib.error, LZMAError)

SampleFiles = tuple[str, dict[str, bytes]]  # of a sample: its key, extension -> bytes


def read_shard(
    address: str, endings: tuple[str, ...] = (".txt",), key_until: KeyUntil = "first_dot"
) -> Iterator[RawSample | SkippedSample]:
    """Yield the samples of a shard, in its order.

    A shard that cannot be opened gives one SkippedSample "unreachable shard", one without a sample "shard without a
    sample". One that breaks off gives the samples before the break and then one SkippedSample "broken shard"; the
    sample at the break counts as one of them when it has all the files that the one before it had. Of samples with the
    same key the first one counts; the others give "duplicate key".

    Args:
        address: of the shard.
        endings: of the captions' files; the first that a sample has is its caption. * is the image's own ending.
        key_until: which dot of a name ends the sample's key.
    """
    captions = {
        written[1:].lower(): ending
        for ending in endings
        for written in ([ending.replace("*", kind) for kind in IMAGE_ENDINGS] if "*" in ending else [ending])
    }
    empty = True
    for item in _ShardReader(address, (*IMAGE_ENDINGS, *captions, "json"), key_until).samples():
        if isinstance(item, _Group):
            yield _raw_sample(item, captions)
        else:
            yield item
        empty = False
    if empty:
        yield SkippedSample(EMPTY, address)


def read_files(
    address: str, extensions: tuple[str, ...] | None = None, key_until: KeyUntil = "first_dot"
) -> Iterator[SampleFiles | SkippedSample]:
    """Yield the samples of a shard as `read_shard` does, whatever files they are made of.

    Args:
        address: of the shard.
        extensions: those of the files that are wanted, in lower case; None wants all.
        key_until: which dot of a name ends the sample's key.
    """
    for item in _ShardReader(address, extensions, key_until).samples():
        yield (item.key, item.files) if isinstance(item, _Group) else item


@dataclass
class _Group:
    """The files of a sample that follow on one another.

    Attributes:
        key: of the sample.
        files: extension -> content of those that are wanted.
        kinds: extensions of all.
        links: how many of them are links to what is not here.
    """

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    kinds: set[str] = field(default_factory=set)
    links: int = 0

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(map(len, self.files.values()))

    def takes(self, key: str, extension: str) -> bool:
        """Return whether a file that follows on these is one of this sample, too."""
        return (key == self.key or composed(key) == composed(self.key)) and extension not in self.kinds


Found = _Group | SkippedSample


class _ShardReader:
    """The samples of one shard."""

    def __init__(self, address: str, extensions: tuple[str, ...] | None, key_until: KeyUntil) -> None:
        self.address, self.extensions, self.key_until = address, extensions, key_until
        self.list: TarList | None = None
        self.every: frozenset[str] = frozenset()  # extensions that the first samples have
        self.completed: set[str] = set()  # keys of samples that got files from elsewhere in the shard

    def samples(self) -> Iterator[Found]:
        """Yield the samples: each key once, its files together."""
        try:
            stream = open_stream(self.address)
        except (OSError, ValueError) as error:
            yield SkippedSample(UNREACHABLE, f"{self.address}: {reason_of(error)}")
            return
        seen: dict[str, frozenset[str]] = {}
        kinds: dict[frozenset[str], frozenset[str]] = {}
        links: list[str] = []  # keys of samples that are links alone
        with closing(stream):
            for item in self._together(self._groups(stream)):
                if isinstance(item, SkippedSample):
                    yield item
                    continue
                key = composed(item.key)
                if key not in seen and not self.every <= item.kinds:
                    self._complete(item)
                has = frozenset(item.kinds)
                if key in seen and not (key in self.completed and has <= seen[key]):
                    yield SkippedSample(DUPLICATE if seen[key] & has else APART, item.key)
                elif key not in seen and item.links and not item.files:
                    links.append(item.key)
                elif key not in seen:
                    seen[key] = kinds.setdefault(has, has)
                    yield item
        if links and not seen:
            yield SkippedSample(OF_LINKS, self.address)
        else:
            yield from (SkippedSample(LINK, key) for key in links)

    def _groups(self, stream: ByteStream) -> Iterator[Found]:
        """Yield groups of files as they follow on one another, up to the end or the break."""
        previous: dict[str, bytes] = {}
        group: _Group | None = None
        try:
            with Archive.open(fileobj=unpacked(stream), mode="r|") as archive:
                for member in archive:
                    archive.members.clear()  # tarfile would keep every header of the shard
                    key, extension = split_name(member.name, self.key_until)
                    if not extension or not (member.isreg() or member.issym() or member.islnk()):
                        continue
                    if group is None or not group.takes(key, extension):
                        if group is not None:
                            yield group
                            previous = group.files
                        group = _Group(key)
                    group.kinds.add(extension)
                    self._add(archive, member, extension, group)
                drain(stream)
        except DAMAGES as error:
            if group is not None and previous and previous.keys() <= group.files.keys():
                yield group
            why = f": {reason_of(error)}" if scheme_of(self.address) or isinstance(error, NoTar) else ""
            yield SkippedSample(BROKEN, f"{self.address}{why}")
            return
        if group is not None:
            yield group

    def _groups_of(self, files: TarList) -> Iterator[Found]:
        """Yield the groups of a listed shard as `_groups` does, without another look at its headers."""
        group: _Group | None = None
        try:
            with open(self.address, "rb") as shard:
                for member in files.members:
                    key, extension = split_name(member.name, self.key_until)
                    if not extension:
                        continue
                    if group is None or not group.takes(key, extension):
                        if group is not None:
                            yield group
                        group = _Group(key)
                    group.kinds.add(extension)
                    if self._wants(extension, member.size):
                        shard.seek(member.offset)
                        group.files[extension] = shard.read(member.size)
                        if len(group.files[extension]) < member.size:
                            raise EOFError("it has become shorter")
        except DAMAGES:
            yield SkippedSample(BROKEN, self.address)
            return
        if group is not None:
            yield group

    def _wants(self, extension: str, size: int) -> bool:
        return (self.extensions is None or extension in self.extensions) and size <= LARGEST_MEMBER

    def _add(self, archive: tarfile.TarFile, member: tarfile.TarInfo, extension: str, group: _Group) -> None:
        """Add the content of a file to its group if it is wanted; of a link that of its target in a local shard."""
        if not self._wants(extension, member.size):
            return
        if member.isreg():
            group.files[extension] = archive.extractfile(member).read()
            return
        files = self._list()
        target = files.by_name.get(os.path.normpath(member.name)) if files is not None else None
        if target is None:
            group.links += 1
        elif target.size <= LARGEST_MEMBER:
            group.files[extension] = target.read(self.address)

    def _list(self) -> TarList | None:
        """Return the list of a local shard's files; None of a stream, or a compressed one."""
        if self.list is None:
            self.list = list_files(self.address)
        return self.list

    def _together(self, groups: Iterator[Found]) -> Iterator[Found]:
        """Yield the groups, joined where the files of one sample lie apart."""
        if self._is_small() and (files := self._list()) is not None:
            if files.are_apart(self.key_until):
                yield from self._by_list(files)
                return
            groups = self._groups_of(files) if files.is_plain else groups
        first = list(itertools.islice(groups, FIRST))
        kinds = [frozenset(item.kinds) for item in first if isinstance(item, _Group)]
        self.every = frozenset[str]().union(*kinds)
        if len(kinds) > 1 and (len(self.every) == 1 or any(its != self.every for its in kinds)):
            files = self._list()
            if files is None:
                yield from self._held(itertools.chain(first, groups))
                return
            if files.are_apart(self.key_until):
                yield from self._by_list(files)
                return
        yield from itertools.chain(first, groups)

    def _is_small(self) -> bool:
        """Return whether this is a local shard whose files are quickly listed."""
        try:
            return os.path.getsize(self.address) <= LISTED
        except (OSError, ValueError):
            return False

    def _complete(self, group: _Group) -> None:
        """Give a sample that lacks what others have the files that lie elsewhere in a local shard."""
        files = self._list()
        if files is None:
            return
        elsewhere = files.by_key(self.key_until).get(composed(group.key), {})
        if composed(group.key) in files.repeated:
            return  # they are another sample's
        for extension in elsewhere.keys() - group.kinds:
            self.completed.add(composed(group.key))
            group.kinds.add(extension)
            if self.extensions is None or extension in self.extensions:
                group.files[extension] = elsewhere[extension].read(self.address)

    def _by_list(self, files: TarList) -> Iterator[Found]:
        """Yield the samples of a local shard whose files lie apart."""
        keys: dict[str, str] = {}
        again: list[SkippedSample] = []
        samples = files.by_key(self.key_until)
        for member in files.members:
            key, extension = split_name(member.name, self.key_until)
            its = samples.get(composed(key), {})
            keys.setdefault(composed(key), key)
            if extension and its[extension] is not member and extension == next(iter(its)):
                again.append(SkippedSample(DUPLICATE, key))  # another sample of this key begins
        every = {extension for its in samples.values() for extension in its}
        links = Counter(composed(split_name(name, self.key_until)[0]) for name in files.links)
        for key, its in samples.items():
            if files.is_broken and its.keys() < every:
                continue  # what it lacks was behind the break
            wanted = {e: m for e, m in its.items() if self.extensions is None or e in self.extensions}
            try:
                contents = {e: m.read(self.address) for e, m in wanted.items() if m.size <= LARGEST_MEMBER}
            except DAMAGES:
                yield SkippedSample(BROKEN, self.address)
                return
            yield _Group(keys[key], contents, set(its), links[key])
        yield from again
        yield from (SkippedSample(LINK, key) for key in links if key not in samples)
        if files.is_broken:
            yield SkippedSample(BROKEN, self.address)

    def _held(self, groups: Iterator[Found]) -> Iterator[Found]:
        """Yield the samples of a stream whose files may lie apart, as far as there is room to hold them."""
        held: dict[str, _Group] = {}
        size, are_apart = 0, False
        for item in groups:
            if isinstance(item, SkippedSample):
                yield item
                continue
            before = held.get(composed(item.key))
            size += item.size
            if before is None:
                held[composed(item.key)] = item
            elif before.kinds & item.kinds:
                yield SkippedSample(DUPLICATE, item.key)
            else:
                are_apart = True
                before.files |= item.files
                before.kinds |= item.kinds
                before.links += item.links
            if size > HELD and are_apart:
                yield SkippedSample(UNSORTED, self.address)
                return
            if size > HELD:
                break
        yield from held.values()
        yield from groups


def _raw_sample(group: _Group, captions: dict[str, str]) -> RawSample | SkippedSample:
    """Return the sample of a group; `captions` is extension -> the ending that it stands for, by rank."""
    files = group.files
    image = next((files[extension] for extension in IMAGE_ENDINGS if extension in files), None)
    if image is None and group.links:
        return SkippedSample(LINK, group.key)
    if image is None and any(kind.rpartition(".")[2] in IMAGE_ENDINGS for kind in group.kinds if "." in kind):
        return SkippedSample(DOTTED, group.key)
    text = next((extension for extension in captions if extension in files), None)
    if text is None:
        return RawSample(group.key, image, None, files.get("json"))
    return RawSample(group.key, image, files[text], files.get("json"), captions[text])


def write_shard(path: str | Path, samples: Iterable[SampleFiles]) -> None:
    """Write samples as a shard, whole or not at all, their files in the order given; the same give the same bytes."""
    with (
        atomic_write(path) as file,
        TarWriter(file, "", "", mode=0o644, compress=False, encoder=False, keep_meta=True, mtime=0) as writer,
    ):
        for key, files in samples:
            for extension, data in files.items():  # one at a time, as webdataset would sort them
                writer.write({"__key__": key, extension: data})
