"""WebDataset shards: tar files of samples, as img2dataset writes them, from disk, over HTTP or out of a command.

The files of one sample share their name up to the first dot of the base name: `00012.jpg`, `00012.txt`, `00012.json`.
The tar format and the addresses are webdataset's; the order of shards and samples is ours, because it has to be
reshuffled every epoch and found again on resume.
"""

import glob
import io
import json
import os
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from lzma import LZMAError
from pathlib import Path
from typing import Any

import braceexpand
from webdataset.gopen import gopen, gopen_schemes
from webdataset.tariterators import base_plus_ext

from ldm_lab.config import part_class, register
from ldm_lab.data.order import Order, shuffled
from ldm_lab.data.source import DUPLICATE, ImageSource, LeftOut, Raw, Skip, caption_of
from ldm_lab.errors import UserError, unknown
from ldm_lab.io.atomic import atomic_write
from ldm_lab.io.decoding import IMAGE_ENDINGS
from ldm_lab.io.http import open_url
from ldm_lab.rules.rule import build_rules, check_rules
from ldm_lab.rules.sample import SampleRow, broken_rules

RUN = 4  # a run of shards that are shuffled together ends once it has this many times the shuffle buffer
LARGEST_MEMBER = 2**28  # bytes; a larger file inside a shard is no image of ours


class ShardSource(ImageSource):
    """Base class of the sources that read shards: a subclass gives `list_shards`.

    Args:
        shuffle_buffer: undecoded samples that a loader process holds to draw the next one from. 0 keeps the order
            within a shard.
    """

    unit = "shards"

    def __init__(self, *, shuffle_buffer: int = 1000, **common: Any):
        super().__init__(**common)
        self.shuffle_buffer = shuffle_buffer

    def list_shards(self) -> list[str]:
        """Return the addresses of all shards, in a fixed order. Raises UserError where there are none."""
        raise NotImplementedError

    def open(self) -> None:
        self.addresses = self.list_shards()
        self.count = len(self.addresses)

    def items(self, order: Order, start: int = 0) -> Iterator[tuple[int, Raw | Skip]]:
        """Yield the samples; an anchor is the place of the first shard of a run.

        The shuffle buffer is emptied at the end of every run, so that resuming reads at most one run again and not
        the whole epoch.
        """
        share = order.share(self.count)  # [about count / readers]
        places = iter(range(start, len(share)))
        for first in places:
            run = self._run(share, first, places)
            for item in shuffled(run, self.shuffle_buffer, order.random("run", order.reader, first), LeftOut):
                yield first, item

    def _run(self, share: Any, place: int | None, places: Iterator[int]) -> Iterator[Raw | Skip]:
        """Yield the samples of the shard at `place` and of further shards until there are enough of them."""
        samples = 0
        while place is not None:
            for item in self.samples(self.addresses[share[place]]):
                samples += not isinstance(item, LeftOut)
                yield item
            place = next(places, None) if samples < RUN * self.shuffle_buffer else None

    def samples(self, address: str) -> Iterator[Raw | Skip]:
        """Yield the samples of a shard."""
        return read_shard(address)


@register("data", "webdataset")
class WebDataset(ShardSource):
    """WebDataset shards: jpg/png/webp + txt + json in tar files.

    Args:
        shards: addresses: paths, `{00000..00012}` braces, globs, http(s), cloud addresses that webdataset knows, or
            `pipe:` and a shell command that writes a tar file to its standard output.
        rules: {name: options}, as in `python -m ldm_lab select`: which samples are left out, by their json. They are
            counted by rule, apart from the skipped ones.
        scores: the ending of a Parquet file beside each shard, in the place of `.tar`, with columns such as `key` and
            `aesthetic`: what it says of a sample goes before what its json says.
    """

    def __init__(
        self, *, shards: str | list[str], rules: dict[str, Any] | None = None, scores: str | None = None, **common: Any
    ):
        super().__init__(**common)
        self.shards = [shards] if isinstance(shards, str) else shards
        self.rules, self.scores = build_rules(rules or {}), scores

    @staticmethod
    def check(section: dict[str, Any]) -> list[str]:
        """Return what is wrong with the values of a section."""
        problems = ImageSource.check(section)
        rules = section.get("rules") or {}
        wrong = check_rules(rules)
        if not wrong:
            used = [name for name, options in rules.items() if options is not None]
            across = [name for name in used if part_class("rule", name).across_rows]
            wrong = [f"rules.{name}: compares samples with each other, which a stream cannot" for name in across]
        if section.get("scores") is not None and not rules:
            wrong.append("scores: only rules ask for them, and there are none")
        return problems + wrong

    def list_shards(self) -> list[str]:
        addresses = expand(self.shards)
        if self.scores is not None:
            if find_spec("pyarrow") is None:
                raise UserError("data.scores: pyarrow has to be installed for it: pip install 'ldm_lab[curation]'")
            missing = [path for path in (scores_of(a, self.scores) for a in addresses) if not os.path.isfile(path)]
            if missing:
                raise UserError(
                    f"data.scores: no such file: {missing[0]}; {len(missing)} of {len(addresses)} are missing"
                )
        return addresses

    def samples(self, address: str) -> Iterator[Raw | Skip]:
        """Yield the samples of a shard, with LeftOut in the place of those that break a rule."""
        if not self.rules:
            yield from read_shard(address)
            return
        try:
            scores = read_scores(scores_of(address, self.scores)) if self.scores is not None else {}
        except OSError:
            yield Skip("unreadable scores", address)
            return
        for item in read_shard(address):
            if isinstance(item, Raw):
                broken = broken_rules(self.rules, SampleRow(metadata_of(item), before=scores.get(item.key)))
                if broken:
                    rule, reason = broken[0]
                    item = LeftOut(f"rule {rule}" if reason == rule else f"rule {rule}: {reason}", item.key)
            yield item


def expand(patterns: list[str]) -> list[str]:
    """Return the shard addresses that some patterns stand for: braces first, then globs (sorted).

    Raises:
        UserError: no pattern at all, a pattern that matches nothing, a named local file that is not there, an unknown
            kind of address.
    """
    addresses, missing = [], []
    for pattern in patterns:
        try:
            alternatives = list(braceexpand.braceexpand(pattern, escape=False))
        except braceexpand.UnbalancedBracesError:
            raise UserError(f"data.shards: unbalanced braces in {pattern!r}") from None
        for address in alternatives:
            scheme = _scheme(address)
            if scheme and scheme not in gopen_schemes:
                kind = unknown("kind of address", scheme, [s for s in gopen_schemes if not s.startswith("_")])
                raise UserError(f"data.shards: {address}: {kind}")
            if scheme:
                addresses.append(address)
                continue
            path = os.path.expanduser(address.removeprefix("file://"))
            if os.path.isfile(path):
                addresses.append(path)
            elif os.path.isdir(path):
                raise UserError(f"data.shards: {path} is a folder; its shards are {os.path.join(path, '*.tar')}")
            elif glob.has_magic(path):
                found = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
                if not found:
                    raise UserError(f"data.shards: {pattern!r} matches no file")
                addresses += found
            else:
                missing.append(path)
    if missing:
        files = f"no such file: {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        raise UserError(f"data.shards: {files}; a pattern with * takes those that are there")
    if not addresses:
        raise UserError("data.shards: the list of shards is empty")
    return addresses


def _scheme(address: str) -> str:
    """Return "pipe", "http", ... of an address, "" for a local path."""
    if address.startswith("pipe:"):
        return "pipe"
    scheme = address.partition("://")[0].lower() if "://" in address else ""
    return "" if scheme == "file" else scheme


# -------------------------------------------------------------------------------------------------- what rules look at


def metadata_of(item: Raw) -> dict[str, Any]:
    """Return what a sample's json says, with the caption that training takes; {} and the caption if it is none."""
    try:
        metadata = json.loads(item.json) if item.json is not None else {}
    except (ValueError, RecursionError):  # not JSON, not UTF-8
        metadata = {}
    return {**(metadata if isinstance(metadata, dict) else {}), "caption": caption_of(item)}


def scores_of(address: str, ending: str) -> str:
    """Return the path of the scores beside a shard."""
    return stem_of(address) + ending


def stem_of(address: str) -> str:
    """Return a shard's address without its ending: .tar, .tar.gz, .tgz."""
    return address.removesuffix(".gz").removesuffix(".tgz").removesuffix(".tar")


def read_scores(path: str) -> dict[str, dict[str, Any]]:
    """Return {key: {column: value}} of a Parquet file. Raises OSError if it is not readable."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
        return {str(row.pop("key")): row for row in rows}
    except (pa.ArrowException, KeyError) as error:
        raise OSError(str(error)) from None


# -------------------------------------------------------------------------------------------------- reading one shard


class _Member(tarfile.TarInfo):
    """tarfile takes a damaged header in mid-archive for its end, and so the file's end without the archive's own; here
    both are errors."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError, tarfile.EmptyHeaderError) as error:
            raise tarfile.ReadError(str(error)) from None


def read_shard(address: str) -> Iterator[Raw | Skip]:
    """Yield the samples of a shard, in its order.

    A shard that cannot be opened gives one Skip "unreachable shard". One that breaks off gives the samples before the
    break and then one Skip "broken shard"; the sample at the break counts as one of them when it has all the parts
    that the one before it had. Of samples with the same key the first one counts; the others give "duplicate key".
    """
    for item in read_parts(address, (*IMAGE_ENDINGS, "txt", "json")):
        yield item if isinstance(item, Skip) else _raw(*item)


def read_parts(
    address: str, extensions: tuple[str, ...] | None = None
) -> Iterator[tuple[str, dict[str, bytes]] | Skip]:
    """Yield (key, {extension: bytes}) of the samples of a shard as `read_shard` does, whatever files they are made of.

    Args:
        address: of the shard.
        extensions: those of the files that are wanted, in lower case; None wants all.
    """
    try:
        stream = _open(address)
    except (OSError, ValueError):
        yield Skip("unreachable shard", address)
        return
    previous: dict[str, bytes] = {}
    parts: dict[str, bytes] = {}
    key = None
    seen: set[str] = set()

    def finished() -> tuple[str, dict[str, bytes]] | Skip:
        if key in seen:
            return Skip(DUPLICATE, key)
        seen.add(key)
        return key, parts

    try:
        with closing(stream), tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member) as archive:
            for member in archive:
                name, extension = base_plus_ext(member.name)
                archive.members.clear()  # tarfile would keep every header of the shard
                if name is None or not member.isreg() or os.path.basename(member.name).startswith("."):
                    continue
                extension = extension.lower()
                if name != key or extension in parts:
                    if key is not None:
                        yield finished()
                    key, previous, parts = name, parts, {}
                if (extensions is None or extension in extensions) and member.size <= LARGEST_MEMBER:
                    parts[extension] = archive.extractfile(member).read()
            _drain(stream)
    except (tarfile.TarError, OSError, EOFError, zlib.error, LZMAError):
        if key is not None and previous.keys() <= parts.keys() and previous:
            yield finished()
        yield Skip("broken shard", address)
        return
    if key is not None:
        yield finished()


def _raw(key: str, parts: dict[str, bytes]) -> Raw:
    image = next((parts[e] for e in IMAGE_ENDINGS if e in parts), None)
    return Raw(key, image, parts.get("txt"), parts.get("json"))


def _open(address: str) -> Any:
    """Return an open binary stream."""
    scheme = _scheme(address)
    if not scheme:
        return open(address, "rb")
    if scheme == "pipe":
        return _Command(address.removeprefix("pipe:"))
    if scheme in ("http", "https"):
        return open_url(address)
    return gopen(address)


def _drain(stream: Any) -> None:
    """Read on to the end, behind the archive's own: only there a command or a download shows that it failed."""
    while stream.read(2**16):
        pass


class _Command:
    """The standard output of a shell command; OSError at its end if the command failed."""

    def __init__(self, command: str):
        self.process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)

    def read(self, size: int) -> bytes:
        data = self.process.stdout.read(size)
        if not data and self.process.wait() != 0:
            raise OSError(f"the command ended with status {self.process.returncode}")
        return data

    def close(self) -> None:
        self.process.stdout.close()
        self.process.kill()
        self.process.wait()


# -------------------------------------------------------------------------------------------------- writing a shard


def write_shard(path: str | Path, samples: Iterator[tuple[str, dict[str, bytes]]]) -> None:
    """Write (key, {extension: bytes}) samples as a shard, whole or not at all; the same samples give the same bytes."""
    with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for key, parts in samples:
            for extension, data in parts.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
