"""What the sources that read shards have in common: which shards there are, and what is found in them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldm_lab.config import NonNegativeInt
from ldm_lab.data.caption_tables import CaptionTable
from ldm_lab.data.contents import contents_of, file_entries, names_within
from ldm_lab.data.remote_contents import remote_contents
from ldm_lab.data.samples import RawSample, SkippedSample
from ldm_lab.data.shard_urls import is_remote, scheme_of
from ldm_lab.data.shards_found import describe_shards
from ldm_lab.data.source import ImageSource, Unusable
from ldm_lab.data.tar import read_shard
from ldm_lab.data.tar_files import KeyUntil
from ldm_lab.errors import UserError


class ShardSource(ImageSource):
    """Base class of the sources that read shards: a subclass gives `list_shards`.

    Args:
        shuffle_buffer: undecoded samples that a loader process holds to draw the next one from. 0 keeps the order
            within a shard.
    """

    unit = "shards"
    key_until: KeyUntil = "first_dot"  # which dot of a file's name ends its sample's key

    def __init__(self, *, shuffle_buffer: NonNegativeInt = 1000, **common: Any):
        super().__init__(**common)
        self.shuffle_buffer = shuffle_buffer
        self.beside_shards: list[tuple[str, Path | None]] = []  # others that samples depend on, see `files`

    def list_shards(self) -> list[str]:
        """Return the addresses of all shards, in a fixed order. Raises UserError where there are none."""
        raise NotImplementedError

    def open(self) -> None:
        self.addresses = self.list_shards()
        self.count = len(self.addresses)
        if self.captions.metadata is not None:
            table = self.find_table(self.captions.metadata)
            self.captions.table = CaptionTable.read([("", table)], self.captions.column, self.captions.encoding)
            self.beside_shards.append(("data.captions.metadata", table))

    def find_table(self, name: str) -> Path:
        """Return where the table of captions is, here or beside the first shard. Raises UserError without one."""
        path = Path(name).expanduser()
        beside = Path(self.addresses[0]).parent / path
        found = next((its for its in (path, beside) if its.is_file()), None)
        if found is None:
            raise UserError(f"data.captions.metadata: no such file: {path}, nor {beside}")
        return found

    def found(self) -> list[str]:
        table = self.captions.table
        lines = table.lines(None) if table is not None else []
        return describe_shards(self.addresses, self.captions, self.key_until) + lines + super().found()

    def files(self) -> list[tuple[str, Path | None]]:
        local = [os.path.abspath(a) for a in self.addresses if not is_remote(a) and not scheme_of(a)]
        common = os.path.commonpath([os.path.dirname(path) for path in local]) if local else ""
        found: list[tuple[str, Path | None]] = [(os.path.relpath(path, common), Path(path)) for path in local]
        found += [(a, None) for a in self.addresses if is_remote(a) or scheme_of(a)]
        return found + self.beside_shards

    def contents(self) -> str:
        paths = [None if is_remote(its) or scheme_of(its) else os.path.abspath(its) for its in self.addresses]
        names = names_within([path or its for path, its in zip(paths, self.addresses)])
        remote = remote_contents(self.addresses)
        entries = zip(file_entries([*zip(names, paths)]), self.addresses)
        return contents_of(self.unit, ((name, remote.get(its, content)) for (name, content), its in entries))

    @property
    def items_key(self) -> str:
        return f"{super().items_key} {self.key_until} {self.captions.endings}"

    def items(self, unit: int) -> Iterator[RawSample | Unusable]:
        """Yield the samples of a shard."""
        self.note(self.addresses[unit])
        yield from self.samples(self.addresses[unit])

    def samples(self, address: str) -> Iterator[RawSample | Unusable]:
        """Yield the samples of a shard."""
        return self.read_shard(address)

    def read_shard(self, address: str) -> Iterator[RawSample | SkippedSample]:
        """Yield the samples of a shard, with their captions where `captions` says."""
        return read_shard(address, self.captions.endings, self.key_until)
