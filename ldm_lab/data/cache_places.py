"""Where a cache lies: in a folder, or on a server that its shards are fetched from, whole and checked, one by one."""

import errno
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from ldm_lab.data.cache_files import LARGEST_META, META, CacheMeta, CacheShard, ShardFacts, read_meta, size_of
from ldm_lab.data.samples import DAMAGED, UNREACHABLE, SkippedSample
from ldm_lab.data.shard_urls import scheme_of
from ldm_lab.data.streams import open_stream, reason_of
from ldm_lab.errors import UserError
from ldm_lab.io.atomic import move_into_place, sha256

CHUNK = 1 << 20  # bytes
MOST_OPENED = 1024  # shards that a process has mapped at once; systems allow some 65,000 maps
UNOPENED = (OSError, ValueError)  # what a stream raises


@dataclass(frozen=True)
class LocalCache:
    """A cache in a folder."""

    folder: Path
    meta: CacheMeta

    def check(self) -> None:
        """Raise UserError if shards are missing, or of another size than they were written with."""
        wrong = [
            (shard, size) for shard in self.meta.shards if (size := size_of(self.folder / shard.name)) != shard.bytes
        ]
        if wrong:
            shard, size = wrong[0]
            what = "is missing" if size is None else f"has {size:,} bytes, not {shard.bytes:,}: it is damaged"
            more = f" ({len(wrong)} of {len(self.meta.shards)} shards are missing or damaged)" if len(wrong) > 1 else ""
            remedy = "the command that made the cache makes it again"
            raise UserError(f"data.path: {self.folder / shard.name}: {what}{more}; {remedy}")

    def address_of(self, number: int) -> str:
        """Return where a shard is."""
        return str(self.folder / self.meta.shards[number].name)

    def shard(self, number: int) -> CacheShard:
        """Return a shard by its number. Raises SkippedSample."""
        return opened(self.folder / self.meta.shards[number].name, self.meta, self.meta.shards[number])


@dataclass(frozen=True)
class RemoteCache:
    """A cache on a server.

    Attributes:
        address: of its folder.
        meta: what its `meta.json` says.
        local: folder that shards stay in; None if they are not kept.
    """

    address: str
    meta: CacheMeta
    local: Path | None = None

    def check(self) -> None:
        """Nothing can be said of shards before they are fetched."""

    def shard(self, number: int) -> CacheShard:
        """Return a shard by its number, fetched unless it is kept here already.

        Raises:
            SkippedSample: it cannot be had, or is not the one that `meta.json` lists.
            UserError: there is no room for it.
        """
        shard = self.meta.shards[number]
        address = address_in(self.address, shard.name)
        kept = None if self.local is None else self.local / f"{shard.sha256[:16]}-{shard.name}"
        if kept is not None and kept.is_file() and kept.stat().st_size == shard.bytes:
            return opened(kept, self.meta, shard, address)
        with tempfile.TemporaryDirectory(dir=self.local, prefix=".ldm_lab-cache-") as folder:
            temporary = Path(folder) / shard.name
            download(address, temporary, shard)
            if kept is not None:
                move_into_place(temporary, kept)
            return opened(kept or temporary, self.meta, shard, address)  # a mapped file lives on without its name

    def address_of(self, number: int) -> str:
        """Return where a shard is."""
        return address_in(self.address, self.meta.shards[number].name)


@dataclass
class Opened:
    """The shards that a process has open, by their numbers; those opened first are closed first.

    Attributes:
        samples: a shard is closed once shards of so many have been opened behind it; None only looks at their number.
    """

    samples: int | None = None
    shards: dict[int, CacheShard] = field(default_factory=dict)

    def get(self, number: int, place: LocalCache | RemoteCache) -> CacheShard:
        """Return a shard, opened if need be; batches that hold rows of closed ones keep them. Raises SkippedSample."""
        if number not in self.shards:
            while self._is_full():
                del self.shards[next(iter(self.shards))]
            self.shards[number] = place.shard(number)
        return self.shards[number]

    def _is_full(self) -> bool:
        if self.samples is None:
            return len(self.shards) >= MOST_OPENED
        first = next(iter(self.shards.values()), None)
        behind = sum(shard.samples for shard in self.shards.values()) - (first.samples if first else 0)
        return first is not None and behind >= self.samples


def open_place(path: str, local: str | None) -> LocalCache | RemoteCache:
    """Return the cache of a folder or an address. Raises UserError if there is none."""
    if not scheme_of(path):
        folder = Path(path.removeprefix("file://")).expanduser()
        return LocalCache(folder, read_meta(folder))
    base = path.removesuffix("/").removesuffix(f"/{META}")
    address = address_in(base, META)
    try:
        stream = open_stream(address)
        try:
            data = b""
            while len(data) <= LARGEST_META and (chunk := stream.read(CHUNK)):
                data += chunk
        finally:
            stream.close()
    except UNOPENED as error:
        raise UserError(f"data.path: no cache at {path}: {address}: {reason_of(error)}") from None
    kept = None if local is None else Path(local).expanduser()
    if kept is not None:
        try:
            kept.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.local: {kept}: cannot be made: {error.strerror}") from None
    return RemoteCache(base, CacheMeta.of(data, address), kept)


def address_in(base: str, name: str) -> str:
    """Return the address of a file in the folder at an address; what comes behind a question mark stays there."""
    if scheme_of(base) not in ("http", "https"):
        return f"{base.removesuffix('/')}/{name}"
    parts = urlsplit(base)
    return urlunsplit(parts._replace(path=f"{parts.path.removesuffix('/')}/{name}"))


def opened(path: Path, meta: CacheMeta, shard: ShardFacts, name: str = "") -> CacheShard:
    """Return a shard, open. Raises SkippedSample if it is not what the cache's `meta.json` says."""
    found = CacheShard(path, meta.columns, meta.variants, name)
    if found.samples != shard.samples:
        raise SkippedSample(DAMAGED, found.name)
    return found


def download(address: str, path: Path, shard: ShardFacts) -> None:
    """Fill a file with a shard of a server's, and check it.

    Raises:
        SkippedSample: it cannot be had, or has another size or checksum.
        UserError: there is no room for it.
    """
    try:
        stream = open_stream(address)
    except UNOPENED:
        raise SkippedSample(UNREACHABLE, address) from None
    size = 0
    try:
        with open(path, "wb") as file:
            while size <= shard.bytes and (chunk := _read(stream.read, address)):
                size += len(chunk)
                file.write(chunk)
    except OSError as error:
        what = "no room" if error.errno == errno.ENOSPC else error.strerror
        raise UserError(
            f"{path.parent}: {address} cannot be kept here: {what}; data.local names another folder"
        ) from None
    finally:
        stream.close()
    if size != shard.bytes or sha256(path) != shard.sha256:
        raise SkippedSample(DAMAGED, address)


def _read(read: Callable[[int], bytes], address: str) -> bytes:
    try:
        return read(CHUNK)
    except UNOPENED:
        raise SkippedSample(UNREACHABLE, address) from None
