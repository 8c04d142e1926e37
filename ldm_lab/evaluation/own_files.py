"""The files that an evaluation writes, which may lie among the pictures that it measures."""

import os
from collections.abc import Iterable
from pathlib import Path, PurePath

from ldm_lab.io.json_files import Fields, parse_json, read_json

STEM = "evaluation"  # of the files' names


def is_plot(path: Path) -> bool:
    """Return whether a picture is the plot of an evaluation, which lies beside its table."""
    if path.name != f"{STEM}.png":
        return False
    table = Fields(read_json(path.with_suffix(".json")))
    return table.has("rows") and table.has("better")


def listed_pictures(folder: Path, names: Iterable[str]) -> frozenset[str] | None:
    """Return which pictures count where folders of sample.py's list their own, which leaves out grids.

    Args:
        folder: that they lie in, in any depth.
        names: of all of them, relative to it.

    Returns:
        Those in the list of the nearest folder above them that has one, and those below none; None without any list.
    """
    lists: dict[PurePath, frozenset[str]] = {}
    found = list[str]()
    for name in names:
        above = PurePath(name).parents
        for place in above:
            if place not in lists:
                lists[place] = _listed_in(folder / place)
        nearest = next((place for place in above if lists[place]), None)
        if nearest is None or os.path.relpath(name, nearest) in lists[nearest]:
            found.append(name)
    return frozenset(found) if any(lists.values()) else None


def _listed_in(folder: Path) -> frozenset[str]:
    """Return the names in a folder's samples.json; none without it."""
    try:
        entries = parse_json(b'{"all": ' + (folder / "samples.json").read_bytes() + b"}").get("all")
    except OSError:
        return frozenset()
    files = Fields({"all": entries}).listed("all") or []
    return frozenset(os.path.normpath(name) for its in files if (name := its.text("file")))
