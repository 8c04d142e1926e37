"""What lies in a folder: its images in any depth, and what is left out, by kind."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from ldm_lab.errors import install
from ldm_lab.io.decoding import IMAGE_ENDINGS

# Folders and files that systems and archives leave behind, beside the hidden ones.
DROPPINGS = ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")
PLUGINS = {"heic": "pillow_heif", "heif": "pillow_heif", "hif": "pillow_heif", "jxl": "pillow_jxl"}
MOST_ENDINGS = 8  # that are named


@dataclass
class Listing:
    """What a walk through a folder has met, beside the images.

    Attributes:
        folders: that have images.
        left_out: ending of other files -> how many; "" for names without one.
        hidden: files and folders whose name begins with a dot, or that a system left behind.
        links: symbolic links to folders that were followed.
        loops: symbolic links to folders that have been visited already.
        unreadable: folders that cannot be listed.
    """

    folders: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    hidden: int = 0
    links: int = 0
    loops: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return what was left out or followed, in words, a line each."""
        lines = []
        by_count = sorted(self.left_out.items(), key=lambda pair: (-pair[1], pair[0]))
        kinds = [f"{count:,} {f'.{e}' if e else 'without an ending'}" for e, count in by_count[:MOST_ENDINGS]]
        more = sum(count for _, count in by_count[MOST_ENDINGS:])
        kinds += [f"{more:,} others"] if more else []
        kinds += [f"{self.hidden:,} hidden (.name, {', '.join(DROPPINGS)})"] if self.hidden else []
        if kinds:
            lines.append(f"left out: {', '.join(kinds)}")
        if self.links:
            lines.append(f"{self.links:,} symbolic links to folders followed")
        if self.loops:
            example = f"(e.g. {self.loops[0]})"
            lines.append(f"{len(self.loops):,} symbolic links to folders that are visited anyway, left out {example}")
        if self.unreadable:
            lines.append(f"{len(self.unreadable):,} folders cannot be listed (e.g. {self.unreadable[0]})")
        return lines


def walk(root: Path, listing: Listing) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder relative to the root, names of the files in it), each real folder once, links last.

    Hidden files and folders are left out and counted, as is what else is no place of images.
    """
    visited: set[tuple[int, int]] = set()
    waiting, links = [""], list[str]()
    while waiting or links:
        is_link = not waiting
        folder = links.pop(0) if is_link else waiting.pop()
        path = os.path.join(root, folder)
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in visited:
                listing.loops.append(folder)
                continue
            visited.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError:
            listing.unreadable.append(folder)
            continue
        listing.links += is_link
        files, inner = [], []
        for entry in entries:
            if entry.name.startswith(".") or entry.name in DROPPINGS:
                listing.hidden += 1
            elif not entry.is_dir():
                files.append(entry.name)
            elif entry.is_symlink():
                links.append(os.path.join(folder, entry.name))
            else:
                inner.append(os.path.join(folder, entry.name))
        waiting += reversed(inner)
        yield folder, files


def is_image(name: str) -> bool:
    """Return whether a file is called like an image."""
    return ending_of(name) in IMAGE_ENDINGS


def ending_of(name: str) -> str:
    """Return the ending of a file's name, in lower case and without the dot; "" if there is none."""
    return os.path.splitext(name)[1][1:].lower()


def need_plugins(names: list[str]) -> str:
    """Return how many images need a package that is not installed, in words; "" if none does."""
    lacking = Counter(
        ending for ending in map(ending_of, names) if ending in PLUGINS and find_spec(PLUGINS[ending]) is None
    )
    kinds = ", ".join(f"{count:,} .{ending}" for ending, count in sorted(lacking.items()))
    return f"{kinds} need {install('images')}, and are skipped without it" if kinds else ""
