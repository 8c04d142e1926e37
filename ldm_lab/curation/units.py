"""What scoring goes through, one after the other: shards, or blocks of image files. A unit is done or it is not."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ldm_lab.data.files import Folder
from ldm_lab.data.shards import expand, read_shard, stem_of
from ldm_lab.data.source import Raw, Skip
from ldm_lab.errors import UserError

BLOCK = 1000  # image files in a unit


class Shard(NamedTuple):
    """A tar file of samples.

    Attributes:
        address: a path, or an http(s) or cloud address.
        target: where its results go, without the ending.
        name: path, without the ending, relative to the folder that all shards are in.
    """

    address: str
    target: Path
    name: Path

    @property
    def is_remote(self) -> bool:
        return "://" in self.address

    def content(self) -> Any:
        """Return what tells whether this is still the same shard: its bytes, where they can be counted."""
        return None if self.is_remote else os.path.getsize(self.address)

    def items(self) -> Iterator[Raw | Skip]:
        """Yield the samples."""
        return read_shard(self.address)


class Block(NamedTuple):
    """Image files of a folder that follow on one another in its sorted list.

    Attributes:
        folder: opened.
        first: place of the first of them.
        names: of them.
        target: where the results go, without the ending.
    """

    folder: Folder
    first: int
    names: list[str]
    target: Path

    is_remote = False

    @property
    def address(self) -> str:
        return f"{self.folder.root}: {self.names[0]} ... {self.names[-1]}"

    def content(self) -> Any:
        """Return a checksum of the files' names."""
        return hashlib.sha256("\n".join(self.names).encode(errors="surrogateescape")).hexdigest()

    def items(self) -> Iterator[Raw | Skip]:
        """Yield the samples."""
        for index in range(self.first, self.first + len(self.names)):
            try:
                yield self.folder.read(index)
            except Skip as problem:
                yield problem


def shards(patterns: list[str], out: Path | None) -> list[Shard]:
    """Return the shards of some addresses and patterns; results lie beside each, or in `out` in the same order.

    Raises:
        UserError: no such shard; an address that results cannot lie beside; two shards with the same target.
    """
    addresses = expand(patterns)
    local = [Path(address) for address in addresses if "://" not in address]
    for address in addresses:
        if address.startswith("pipe:"):
            raise UserError(f"--shards {address}: a command has no name that its scores could have; give files")
        if out is None and "://" in address:
            raise UserError(f"--shards {address}: --out has to say where its scores go")
    common = Path(os.path.commonpath([path.absolute().parent for path in local])) if local else Path()
    found, names = [], {}
    for address in addresses:
        path = Path(urlsplit(address).path if "://" in address else address)
        stem = stem_of(path.name)
        name = Path(stem) if "://" in address else path.absolute().parent.relative_to(common) / stem
        if name in names:
            raise UserError(f"--shards: the scores of {names[name]} and {address} would have the same name, {name}")
        names[name] = address
        found.append(Shard(address, path.with_name(stem) if out is None else out / name, name))
    return found


def blocks(path: str, out: Path | None) -> list[Block]:
    """Return the images below a folder in blocks. Raises UserError if there is none, or if `out` is not given."""
    if out is None:
        raise UserError("--images: --out has to say where the scores go")
    folder = Folder(path=path, image_size=1, batch_size=1)
    folder.open()
    names = folder.names()
    return [
        Block(folder, first, names[first : first + BLOCK], out / f"{number:05d}")
        for number, first in enumerate(range(0, len(names), BLOCK))
    ]
