"""Paths that are not there: what may have been meant."""

import difflib
import os
from pathlib import Path


def near_paths(path: Path) -> list[str]:
    """Return at most two paths that are there and are written nearly as one that is not."""
    folder = next((parent for parent in path.parents if parent.is_dir()), Path())
    here = {entry.name: entry for entry in folder.iterdir()} if os.access(folder, os.R_OK) else {}
    wanted = path.name if folder == path.parent else path.relative_to(folder).parts[0]
    return [str(here[name]) for name in difflib.get_close_matches(wanted, here, n=2, cutoff=0.6)]


def meant(near: list[str]) -> str:
    """Return the question whether one of some paths or names was meant; nothing without any."""
    return f". Did you mean {' or '.join(near)}?" if near else ""
