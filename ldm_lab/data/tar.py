"""Shards: tar files of samples, as img2dataset writes them.

The files of one sample share their name up to the first dot of the base name: `00012.jpg`, `00012.txt`, `00012.json`.
The format, the names and the writer are webdataset's. Reading is ours, because webdataset's `tar_file_expander` takes a
shard that is cut off, or damaged in the middle, for a whole one, and `group_by_keys` loses the sample at the break.
"""

import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from lzma import LZMAError
from pathlib import Path

from webdataset.tariterators import base_plus_ext
from webdataset.writer import TarWriter

from ldm_lab.data.samples import BROKEN, DUPLICATE, UNREACHABLE, RawSample, SkippedSample
from ldm_lab.data.shard_urls import scheme_of
from ldm_lab.data.streams import drain, open_stream, reason_of
from ldm_lab.io.atomic import atomic_write
from ldm_lab.io.decoding import IMAGE_ENDINGS

LARGEST_MEMBER = 2**28  # bytes; a larger file inside a shard is no image of ours

SampleFiles = tuple[str, dict[str, bytes]]  # of a sample: its key, extension -> bytes


class _Member(tarfile.TarInfo):
    """tarfile takes a damaged header in mid-archive for its end, and so the file's end without the archive's own; here
    both are errors."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError, tarfile.EmptyHeaderError) as error:
            raise tarfile.ReadError(str(error)) from None


def read_shard(address: str) -> Iterator[RawSample | SkippedSample]:
    """Yield the samples of a shard, in its order.

    A shard that cannot be opened gives one SkippedSample "unreachable shard", with the reason beside its address. One
    that breaks off gives the samples before the break and then one SkippedSample "broken shard"; the sample at the
    break counts as one of them when it has all the files that the one before it had. Of samples with the same key the
    first one counts; the others give "duplicate key".
    """
    for item in read_files(address, (*IMAGE_ENDINGS, "txt", "json")):
        yield item if isinstance(item, SkippedSample) else _raw_sample(*item)


def read_files(address: str, extensions: tuple[str, ...] | None = None) -> Iterator[SampleFiles | SkippedSample]:
    """Yield the samples of a shard as `read_shard` does, whatever files they are made of.

    Args:
        address: of the shard.
        extensions: those of the files that are wanted, in lower case; None wants all.
    """
    try:
        stream = open_stream(address)
    except (OSError, ValueError) as error:
        yield SkippedSample(UNREACHABLE, f"{address}: {reason_of(error)}")
        return
    previous: dict[str, bytes] = {}
    files: dict[str, bytes] = {}
    key = ""
    seen: set[str] = set()

    def finished() -> SampleFiles | SkippedSample:
        if key in seen:
            return SkippedSample(DUPLICATE, key)
        seen.add(key)
        return key, files

    begun = False
    try:
        with closing(stream), tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member) as archive:
            for member in archive:
                name, extension = base_plus_ext(member.name)
                archive.members.clear()  # tarfile would keep every header of the shard
                if not extension or not member.isreg() or os.path.basename(member.name).startswith("."):
                    continue
                extension = extension.lower()
                if not begun or name != key or extension in files:
                    if begun:
                        yield finished()
                    begun, key, previous, files = True, name, files, {}
                if (extensions is None or extension in extensions) and member.size <= LARGEST_MEMBER:
                    files[extension] = archive.extractfile(member).read()
            drain(stream)
    except (tarfile.TarError, OSError, EOFError, zlib.error, LZMAError) as error:
        if begun and previous and previous.keys() <= files.keys():
            yield finished()
        yield SkippedSample(BROKEN, f"{address}: {reason_of(error)}" if scheme_of(address) else address)
        return
    if begun:
        yield finished()


def _raw_sample(key: str, files: dict[str, bytes]) -> RawSample:
    image = next((files[extension] for extension in IMAGE_ENDINGS if extension in files), None)
    return RawSample(key, image, files.get("txt"), files.get("json"))


def write_shard(path: str | Path, samples: Iterable[SampleFiles]) -> None:
    """Write samples as a shard, whole or not at all, their files in the order given; the same give the same bytes."""
    with (
        atomic_write(path) as file,
        TarWriter(file, "", "", mode=0o644, compress=False, encoder=False, keep_meta=True, mtime=0) as writer,
    ):
        for key, files in samples:
            for extension, data in files.items():  # one at a time, as webdataset would sort them
                writer.write({"__key__": key, extension: data})
