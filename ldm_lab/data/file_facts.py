"""Which files a cache was made of, so that it is known to be stale when they are others."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ldm_lab.errors import UserError
from ldm_lab.io.atomic import atomic_write

LIST = "files.tsv"  # in the cache's folder: size, time of the last change in seconds, name of each file
UNKNOWN = -1  # size and time of what is not on this machine
EXAMPLES = 3  # names that are told


@dataclass(frozen=True)
class FileFacts:
    """What is known of a file.

    Attributes:
        size: bytes.
        time: of its last change, whole seconds.
        time_ns: the same in nanoseconds, which the lists of caches do not have.
    """

    size: int = UNKNOWN
    time: int = UNKNOWN
    time_ns: int = field(default=UNKNOWN, compare=False)


Files = dict[str, FileFacts]  # name, relative to the data's own folder -> facts


def facts_of(files: Iterable[tuple[str, Path | None]]) -> Files:
    """Return the facts of some files, (name, path) each; the path is None for what is not on this machine."""
    found = {}
    for name, path in files:
        try:
            status = os.stat(path) if path is not None else None
        except OSError:
            status = None
        known = None if status is None else FileFacts(status.st_size, int(status.st_mtime), status.st_mtime_ns)
        found[name] = known or FileFacts()
    return found


def digest(files: Files, times: bool = False) -> str:
    """Return what stands for names and sizes of files, or for names and times, which copies have others of."""
    lines = sorted(f"{name}\t{facts.time_ns if times else facts.size}\n" for name, facts in files.items())
    return hashlib.blake2b("".join(lines).encode(errors="surrogateescape"), digest_size=16).hexdigest()


def write_facts(folder: Path, files: Files) -> None:
    """Write the list of a cache's files."""
    lines = [f"{facts.size}\t{facts.time}\t{_escaped(name)}\n" for name, facts in sorted(files.items())]
    with atomic_write(folder / LIST) as file:
        file.write("".join(lines).encode(errors="surrogateescape"))


def read_facts(folder: Path) -> Files | None:
    """Return the list of a cache's files; None if it has none. Raises UserError for a damaged one."""
    try:
        lines = (folder / LIST).read_bytes().decode(errors="surrogateescape").split("\n")
    except OSError:
        return None
    files = {}
    for line in lines:
        size, _, rest = line.partition("\t")
        time, _, name = rest.partition("\t")
        try:
            files |= {_read(name): FileFacts(int(size), int(time))} if line else {}
        except ValueError:
            raise UserError(f"{folder / LIST}: damaged; delete the cache, and make it anew") from None
    return files


def _escaped(name: str) -> str:
    return name.replace("\\", "\\\\").replace("\n", "\\n")


def _read(name: str) -> str:
    return name.replace("\\\\", "\0").replace("\\n", "\n").replace("\0", "\\")


def differences(before: Files, now: Files, times: bool = True) -> str:
    """Return how files differ from those that a cache was made of, in words; "" if they do not.

    Args:
        before, now: the files then and now.
        times: whether the time of the last change counts.
    """
    added = sorted(now.keys() - before.keys())
    removed = sorted(before.keys() - now.keys())
    both = sorted(now.keys() & before.keys())
    resized = [name for name in both if now[name].size != before[name].size]
    touched = [name for name in both if now[name].size == before[name].size and now[name].time != before[name].time]
    kinds = {"new": added, "gone": removed, "of another size": resized, "changed since": touched if times else []}
    told = [
        f"{len(names):,} {kind} ({', '.join(names[:EXAMPLES])}{', ...' if len(names) > EXAMPLES else ''})"
        for kind, names in kinds.items()
        if names
    ]
    return ", ".join(told)
