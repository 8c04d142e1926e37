"""What the order of an epoch rests on, in a few thousand characters however large the data are: other data in the place
of those that a checkpoint was made with are noticed, and about how many of them are others.

Names are sorted into buckets by their checksum; of each bucket the sums of the checksums are kept, of the names alone
and of what tells contents apart. Buckets that differ tell about how many names do (linear counting: Whang,
Vander-Zanden and Taylor 1990).
"""

import hashlib
import math
import os
import re
import stat
import zlib
from collections.abc import Iterable, Iterator, Sequence
from urllib.parse import urlsplit, urlunsplit

from ldm_lab.data.shard_urls import scheme_of

BUCKETS = 256
SIZED = 20_000  # files whose sizes are asked for, evenly spread: over a network each question takes its time
OPENED = 64  # files that are begun, likewise
BEGINNING = 4096  # bytes that are read of these
WRITTEN = re.compile(rf"[a-z]+ \d{{1,18}} [0-9a-f]{{16}} [0-9a-f]{{{16 + 16 * BUCKETS}}}")

Entry = tuple[str, str]  # a name, and what tells its content from another one under this name


def contents_of(kind: str, entries: Iterable[Entry]) -> str:
    """Return what stands for some entries in their order; "" if there are none.

    Args:
        kind: what they are, in the plural: "shards", "images".
        entries: (name, what tells its content apart; "" where nobody knows).
    """
    names, contents, number = [0] * BUCKETS, [0] * BUCKETS, 0
    order, known = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
    for name, content in entries:
        data = name.encode(errors="surrogateescape") + b"\0"
        order.update(data)
        checksum = zlib.crc32(data)
        names[checksum % BUCKETS] += checksum
        contents[checksum % BUCKETS] += zlib.crc32(content.encode(), checksum) + 1
        number += 1
        if content:
            known.update(data)
    sums = "".join(f"{total % 2**32:08x}" for total in (*names, *contents))
    return f"{kind} {number} {known.hexdigest()} {order.hexdigest()}{sums}" if number else ""


def are_contents(text: str) -> bool:
    """Return whether a text is what `contents_of` returns."""
    return text == "" or WRITTEN.fullmatch(text) is not None


def differing_contents(before: str, now: str) -> str:
    """Return in what two texts of `contents_of` differ, in words; "" if they do not, or nobody knows.

    Contents are compared where those of the same entries are known: what a server does not say is not, nor what cannot
    be reached at the moment.
    """
    if not before or not now or before == now:
        return ""
    (kind, number, known, sums), (kind_now, number_now, known_now, sums_now) = before.split(" "), now.split(" ")
    if (kind, number) != (kind_now, number_now):
        return f"{number} {kind} -> {number_now} {kind_now}"
    order, names, contents = (_differing(sums, sums_now, part) for part in range(3))
    renamed = min(-(-names // 2), int(number))  # a name that went and one that came
    if renamed:
        return f"{_share(renamed, number)} {kind} have other names"
    if contents and known == known_now:
        return f"{_share(min(contents, int(number)), number)} {kind} have another content under the same name"
    return f"the {kind} are the same ones in another order" if order else ""


def _share(differing: int, number: str) -> str:
    about = "about " if 8 < differing < int(number) else ""
    return f"{about}{differing:,} of {int(number):,}"


def _differing(sums: str, others: str, part: int) -> int:
    """Return about how many entries differ in a part of the sums: 0 the order, 1 the names, 2 the contents."""
    if not part:
        return int(sums[:16] != others[:16])
    places = range(16 + (part - 1) * 8 * BUCKETS, 16 + part * 8 * BUCKETS, 8)
    differing = sum(sums[i : i + 8] != others[i : i + 8] for i in places)
    return round(-BUCKETS * math.log(1 - min(differing, BUCKETS - 1) / BUCKETS))


def file_entries(files: Sequence[tuple[str, str | None]]) -> Iterator[Entry]:
    """Yield the entries of files, (name, path) each; the path is None for what is not on this machine.

    Sizes tell contents apart, and of some files how they begin. Times do not: copies have others.
    """
    sized, opened = (max(1, -(-len(files) // most)) for most in (SIZED, OPENED))
    for number, (name, path) in enumerate(files):
        looks = path is not None and not (number % sized and number % opened)
        yield name, _told_apart_by(path, begins=not number % opened) if looks and path is not None else ""


def _told_apart_by(path: str, begins: bool) -> str:
    """Return the size of a file, and the checksum of its beginning if that is asked for; "" if it is out of reach."""
    try:
        status = os.stat(path)
        if not begins or not stat.S_ISREG(status.st_mode):
            return str(status.st_size)
        with open(path, "rb") as file:
            return f"{status.st_size} {zlib.crc32(file.read(BEGINNING))}"
    except OSError:
        return ""


def names_within(addresses: Sequence[str]) -> list[str]:
    """Return the names of addresses or absolute paths below the folder that they have in common, in their order.

    So a folder that was moved, or a server that was renamed, has the names that it had. What a server is told behind a
    question mark, such as a signature that expires, is left out where the names differ without it.
    """
    parts = [urlsplit(its) if scheme_of(its) in ("http", "https") else None for its in addresses]
    plain = [urlunsplit(part._replace(query="")) if part else its for part, its in zip(parts, addresses)]
    named = plain if len(set(plain)) == len(set(addresses)) else list(addresses)
    groups = {scheme: [its for its in named if scheme_of(its) == scheme] for scheme in {scheme_of(i) for i in named}}
    common = {scheme: _folder_of(its) for scheme, its in groups.items() if scheme != "pipe"}
    return [its[len(common.get(scheme_of(its), "")) :] for its in named]


def _folder_of(addresses: Sequence[str]) -> str:
    """Return what addresses of a kind begin with, up to the last slash of it."""
    folders = [address[: address.rfind("/") + 1] for address in addresses]
    first, last = min(folders), max(folders)
    common = next((i for i, (one, other) in enumerate(zip(first, last)) if one != other), min(len(first), len(last)))
    return first[:common].rpartition("/")[0]
