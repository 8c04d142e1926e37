"""Show runs on pages: the curves of several over one another, and each run's own page, made of its local logs alone.

    python -m ldm_lab runs                                all runs below runs/: runs/index.html
    python -m ldm_lab runs runs/a runs/b --out ab.html    these two
    python -m ldm_lab runs runs/a                         one run: runs/a/index.html anew, from its logs as they are

A run that trains renews its own page (logging.page). The pages open from the file system, and need no server.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_lab.errors import UserError
from ldm_lab.io.near import meant, near_paths

if TYPE_CHECKING:
    from ldm_lab.pages.runs_page import NamedRun

DEFAULT = "runs"
DEEPEST = 4  # folders below the one that is given: a run's name may have slashes in it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "folders", nargs="*", metavar="DIR", help=f"folders of runs, or with runs below them (default: {DEFAULT})"
    )
    parser.add_argument("--out", metavar="FILE", help="the page of all of them (default: DIR/index.html of one DIR)")


def run(args: argparse.Namespace) -> None:
    """Find, read, write, print."""
    from ldm_lab.pages.engine import write_page
    from ldm_lab.pages.run_folder import PAGE
    from ldm_lab.pages.runs_page import runs_page

    folders = [Path(given).expanduser() for given in args.folders or [DEFAULT]]
    found = named([path for folder in folders for path in find_runs(folder)])
    alone = args.out is None and len(found) == 1 and found[0].reader.folder == folders[0]
    if not alone and args.out is None and len(folders) > 1:
        raise UserError("--out: a file is needed for the page of several folders, such as --out runs.html")
    out = folders[0] / PAGE if args.out is None else Path(args.out).expanduser()
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder; a file is needed, such as {out / 'runs.html'}")
    for one in found:
        own = one.reader.folder / PAGE
        if not alone and out.resolve() == own.resolve():
            raise UserError(f"--out: {out} is the page of the run {one.name} itself; another file is needed")
    found = [one for one in found if is_read(one)]
    if not found:
        raise UserError("no run could be read")
    for one in found:
        written = write_own(one)
        for note in one.reader.notes():
            print(f"note: {one.name}: {note}")
        if alone:
            print(f"written: {written}")
    if not alone:
        title = f"{len(found)} runs" if len(found) > 1 else found[0].name
        write_page(out, runs_page(found, out.absolute().parent, title))
        print(f"written: {out}, with links to the pages of {len(found)} runs, which are renewed")


def is_read(one: "NamedRun") -> bool:
    """Read a run; say where it cannot be read, and is left out."""
    try:
        return one.reader.read()
    except OSError as error:
        print(f"note: {one.name}: cannot be read and is left out: {error.strerror}: {error.filename}")
        return False


def write_own(one: "NamedRun") -> Path | None:
    """Write a run's own page; say where it cannot be written, as it may be somebody else's."""
    try:
        return one.reader.write_page()
    except (UserError, OSError) as error:
        print(f"note: {one.name}: its own page is not renewed: {error}")
        return None


def find_runs(folder: Path) -> list[Path]:
    """Return the folders of runs: the folder itself, or those below it. Raises UserError for none."""
    from ldm_lab.pages.run_folder import METRICS, is_run

    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder{meant(near_paths(folder))}")
    if is_run(folder):
        return [folder]
    found, level, seen = list[Path](), [folder], {folder.resolve()}
    for _ in range(DEEPEST):
        there = sorted((path for one in level for path in folders_in(one)), key=os.path.islink, reverse=True)
        whole = {path.resolve(): path for path in there}  # links may lead to the same folder: its own path, if any
        below = sorted(path for its, path in whole.items() if its not in seen)
        seen.update(whole)
        found += [path for path in below if is_run(path)]
        level = [path for path in below if not is_run(path) and not path.name.startswith(".")]
    if not found:
        raise UserError(f"{folder}: holds no run: a run's folder has a {METRICS}")
    return found


def folders_in(folder: Path) -> list[Path]:
    """Return the folders in a folder, and those that links in it lead to; say where it cannot be read."""
    try:
        return [path for path in sorted(folder.iterdir()) if os.path.isdir(path)]  # False of what cannot be looked at
    except OSError as error:
        print(f"note: {folder}: cannot be read: {error.strerror}; no run is looked for there")
        return []


def named(paths: Sequence[Path]) -> "list[NamedRun]":
    """Return runs with names that differ: their folders', or as much of the path as is needed; each run once."""
    from ldm_lab.pages.run_page import RunReader
    from ldm_lab.pages.runs_page import NamedRun

    paths = list({path.resolve(): path for path in paths}.values())
    whole = [path.resolve().parts for path in paths]
    names = []
    for parts in whole:
        length = next(n for n in range(1, len(parts) + 1) if sum(p[-n:] == parts[-n:] for p in whole) == 1)
        names.append("/".join(parts[-length:]))
    return [NamedRun(name, RunReader(path)) for name, path in zip(names, paths)]
