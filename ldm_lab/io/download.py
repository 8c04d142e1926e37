"""One file from one of several web servers: continued after a break, checked, with a progress bar.

No library does all of it for plain web servers: huggingface_hub continues downloads, but only from the Hub; pooch and
torch.hub begin again after a break; pypdl continues and has mirrors, but does not go to the next one after a wrong
checksum.
"""

import errno
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ldm_lab.errors import UserError
from ldm_lab.io import http
from ldm_lab.io.atomic import move_into_place, sha256
from ldm_lab.io.http import ConnectionBroken, HTTPError, Response
from ldm_lab.io.json_files import read_json, write_json
from ldm_lab.progress import Bar, print_line

LIMIT = 64 << 30  # bytes; nothing released is larger, and a server could send without end


class MirrorFailed(Exception):
    """A mirror does not give the file; the next one may."""


@dataclass(frozen=True)
class Source:
    """Where a part of a file comes from.

    Attributes:
        url: the mirror.
        validator: the server's mark of the file's version, or None.
        total: bytes of the whole file as it was announced, or None.
    """

    url: str = ""
    validator: str | None = None
    total: int | None = None


class PartialDownload:
    """A file on its way, and beside it where it comes from."""

    def __init__(self, path: Path) -> None:
        self.file, self.source_file = (path.with_name(f".{path.name}.{end}") for end in ("part", "part.json"))

    def size(self) -> int:
        """Return how many bytes have come."""
        return self.file.stat().st_size if self.file.exists() else 0

    def source(self) -> Source:
        """Return where they come from; nothing where that is not known."""
        stored = read_json(self.source_file)
        url, validator, total = (stored.get(key) for key in ("url", "validator", "total"))
        return Source(
            url if isinstance(url, str) else "",
            validator if isinstance(validator, str) else None,
            total if isinstance(total, int) else None,
        )

    def begin(self, source: Source) -> None:
        """Drop what has come, and write down where the rest will come from."""
        self.remove()
        write_json(self.source_file, asdict(source))

    def remove(self) -> None:
        """Drop what has come."""
        self.file.unlink(missing_ok=True)
        self.source_file.unlink(missing_ok=True)

    def finish(self, path: Path) -> None:
        """Put the file, which is complete, in its place."""
        move_into_place(self.file, path)
        self.source_file.unlink(missing_ok=True)


@dataclass(frozen=True)
class Wanted:
    """What a download has to give.

    Attributes:
        name: what is downloaded, for the user.
        sha256: of the right file, or None if it is not known.
        size: in bytes, or None if it is not known.
    """

    name: str
    sha256: str | None = None
    size: int | None = None


def download(urls: Sequence[str], path: Path, wanted: Wanted) -> tuple[str, str]:
    """Get a file from the first mirror that gives the right one; it appears at `path` when all of it is there.

    What came before a break lies beside it (`.NAME.part`) and is continued, also by the next process; one process at a
    time may do this.

    Args:
        urls: the mirrors, tried in this order.
        path: in a folder that exists.
        wanted: what it is, and how the right one is known.

    Returns:
        The file's sha256, and the mirror that it came from.

    Raises:
        UserError: no mirror gives the right file; with each one's reason.
        OSError: it cannot be written, or there is no room for it.
    """
    part, reasons = PartialDownload(path), []
    for url in urls:
        try:
            checksum = _checked(url, part, wanted)
        except MirrorFailed as error:
            reasons.append(f"{url}: {error}")
            if url != urls[-1]:
                print_line(f"{wanted.name}: {reasons[-1]}; the next address is asked", file=sys.stderr)
            continue
        part.finish(path)
        return checksum, url
    raise UserError(f"{wanted.name}: cannot be downloaded: {'; '.join(reasons)}")


def _checked(url: str, part: PartialDownload, wanted: Wanted) -> str:
    """Complete the part from one mirror and return its checksum; remove it if that is wrong."""
    continued = part.size() > 0
    _complete(url, part, wanted)
    checksum = sha256(part.file)
    if wanted.sha256 in (None, checksum):
        return checksum
    part.remove()
    if continued:  # the beginning may have been of another version, or another mirror's
        return _checked(url, part, wanted)
    line = f"{wanted.name}: {url} gave a file with sha256 {checksum}, not {wanted.sha256}; it is removed"
    print_line(line, file=sys.stderr)
    raise MirrorFailed(f"wrong checksum {checksum}, not {wanted.sha256}")


def _complete(url: str, part: PartialDownload, wanted: Wanted) -> None:
    """Get all of a file from one mirror, in several tries if need be."""
    reason = ""
    for attempt in range(http.TRIES):
        if attempt:
            time.sleep(http.PAUSE * 2 ** (attempt - 1))
        try:
            return _continue(url, part, wanted)
        except ConnectionBroken as error:
            reason = str(error)
    raise MirrorFailed(f"{reason} ({http.TRIES} tries; what came is kept)")


def _continue(url: str, part: PartialDownload, wanted: Wanted) -> None:
    """Ask a server for the rest of a part, or all of it, and append what comes."""
    try:
        response = Response(url, *_resume_from(url, part, wanted))
    except HTTPError as error:
        raise MirrorFailed(str(error)) from None
    with response:
        have = part.size()
        if response.status == 416:  # the part is as long as the file, or longer
            if have and response.total == have and wanted.sha256 and sha256(part.file) == wanted.sha256:
                return
            part.remove()
            raise ConnectionBroken("the part that was there did not fit")
        if response.status == 206:
            if response.start != have or part.source().total not in (None, response.total):
                part.remove()
                raise ConnectionBroken("it answered with another piece, or of another file")
        else:
            have = 0
            part.begin(Source(url, response.validator, response.total))
        total = response.total or wanted.size
        _check_size(total, wanted, part.file, have)
        have = _append(response, part.file, wanted.name, have, total)
    if have > (total or LIMIT):
        part.remove()
        raise MirrorFailed("it sends more than it announced")
    if total is not None and have < total:
        raise ConnectionBroken("the connection broke off")


def _append(response: Response, path: Path, name: str, have: int, total: int | None) -> int:
    """Append what a server sends to a file, with a progress bar, and return how many bytes there are then."""
    with Bar(name, "B", total, initial=have) as bar, open(path, "ab") as file:
        try:
            while have <= (total or LIMIT) and (chunk := response.read(http.CHUNK)):
                have += len(chunk)
                if have <= (total or LIMIT):
                    file.write(chunk)
                    bar.update(len(chunk))
        finally:
            file.flush()
            os.fsync(file.fileno())
    return have


def _resume_from(url: str, part: PartialDownload, wanted: Wanted) -> tuple[int, str | None]:
    """Return the byte to go on from, 0 if what is there is not sure to be of the same file, and the validator."""
    have, source = part.size(), part.source()
    if have and source.url == url and source.validator:
        return have, source.validator
    # Without a mark of its version, or from another mirror: only if a checksum tells whether the pieces fit together.
    return (have, None) if have and wanted.sha256 else (0, None)


def _check_size(total: int | None, wanted: Wanted, file: Path, have: int) -> None:
    """Refuse a file of a wrong or unknown size, and one that there is no room for."""
    if total is None:
        if wanted.sha256 is None:
            raise MirrorFailed("it does not say how large the file is, and no checksum would show that some is missing")
        return
    if wanted.size not in (None, total) or total > LIMIT:
        raise MirrorFailed(f"a file of {total:,} bytes, not {f'{wanted.size:,}' if wanted.size else 'a sensible size'}")
    free = shutil.disk_usage(file.parent).free
    if total - have > free:
        lack = f"{(total - have) / 2**30:.1f} GiB are to come and only {free / 2**30:.1f} GiB are free"
        raise OSError(errno.ENOSPC, lack)
