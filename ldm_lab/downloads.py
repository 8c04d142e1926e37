"""Files of weights that are not on this machine yet: told all at once, before the first of them comes."""

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ldm_lab.errors import UserError

MIB = 2**20


@dataclass(frozen=True)
class Download:
    """A file of weights that has to be downloaded.

    Attributes:
        where: the key path or flag that asks for it.
        name: what it is called there.
        target: where it will lie.
        size: bytes, or None if it is not known.
        mirrors: addresses of the file, the first one is tried first; none if no trustworthy one is known.
        page: where it is described.
    """

    where: str
    name: str
    target: Path
    size: int | None = None
    mirrors: tuple[str, ...] = ()
    page: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.name}, {_megabytes(self.size)}, to {self.target}"

    @property
    def by_hand(self) -> str:
        """What a user has to do who gets it in another way."""
        sources = " or ".join(filter(None, (*self.mirrors, self.page))) or "its publisher"
        return f"put {self.target.name} (from {sources}) at {self.target}"


def announcement(downloads: Iterable[Download]) -> str:
    """Return what is said before some files are downloaded: each with its size, and all of them; "" for none."""
    downloads = _different(downloads)
    if not downloads:
        return ""
    lines = "".join(f"\n  {download}" for download in downloads)
    if len(downloads) == 1:
        return f"to be downloaded: {downloads[0]}"
    known = [download.size for download in downloads if download.size is not None]
    unknown = len(downloads) - len(known)
    total = f"{_megabytes(sum(known))} and {unknown} of unknown size" if unknown and known else _megabytes(sum(known))
    return f"{len(downloads)} files are to be downloaded, {total if known else 'of unknown sizes'}:{lines}"


def refusals(downloads: Iterable[Download], offline: bool) -> list[str]:
    """Return why some files cannot be downloaded: a line for each, or one if there is no room for them.

    Args:
        downloads: all that are needed.
        offline: whether the environment forbids downloads.
    """
    downloads = _different(downloads)
    lines = []
    for download in downloads:
        what = f"{download.where}: {download.name} ({_megabytes(download.size)})"
        if offline:
            lines.append(f"{what}: not in the cache, and downloads are switched off: {download.by_hand}")
        elif not download.mirrors:
            lines.append(f"{what}: no address is known to download it from: {download.by_hand}")
    return lines or _lack_of_room(downloads)


def raise_refusals(lines: Iterable[str]) -> None:
    """Raise UserError with all lines, if there are any."""
    lines = list(dict.fromkeys(lines))
    if len(lines) > 1:
        raise UserError(f"{len(lines)} problems, found before anything was begun:" + "".join(f"\n  {x}" for x in lines))
    if lines:
        raise UserError(lines[0])


def _different(downloads: Iterable[Download]) -> list[Download]:
    """Return the downloads without those that another key asks for as well."""
    first: dict[tuple[str, Path], Download] = {}
    for download in downloads:
        first.setdefault((download.name, download.target), download)
    return list(first.values())


def _lack_of_room(downloads: list[Download]) -> list[str]:
    needed: dict[int, int] = {}
    places: dict[int, Path] = {}
    for download in downloads:
        target = download.target.absolute()
        place = next(folder for folder in (target, *target.parents) if folder.exists())
        device = os.stat(place).st_dev
        needed[device] = needed.get(device, 0) + (download.size or 0)
        places.setdefault(device, place)
    return [
        f"{places[device]}: {_megabytes(size)} are to be downloaded, and only {_megabytes(free)} are free"
        for device, size in needed.items()
        if size > (free := shutil.disk_usage(places[device]).free)
    ]


def _megabytes(size: int | None) -> str:
    return "size unknown" if size is None else f"{size / MIB:,.1f} MiB"
