"""Released weights by name: list them, download them, say where they are.

    python -m ldm_lab pretrained list
    python -m ldm_lab pretrained get kl-f8 cloob/vit_b_16_laion400m_16e
    python -m ldm_lab pretrained where ccld/yfcc_cfg
    python -m ldm_lab pretrained check

Their names stand wherever a config or a program takes weights, and they are downloaded when they are needed. They lie
below $LDM_LAB_CACHE, or ~/.cache/ldm_lab. An interrupted download goes on where it stopped. LDM_LAB_OFFLINE=1 forbids
downloads; `where` says where to put a file that was got in another way. `check` asks all addresses, or those of the
names, whether they still have their files, and downloads nothing: which answer, refuse, hang, have another file or
none. It ends with 2 if a file is at none of its addresses.
"""

import argparse

from ldm_lab.errors import UserError
from ldm_lab.pretrained.answers import ask_all
from ldm_lab.pretrained.catalogue import catalogue
from ldm_lab.pretrained.resolve import cached_path, offline, resolve_weights

UNPUBLISHED = (
    "sha256 unpublished: the file that comes first is trusted, its checksum kept, and every later one held to it"
)
ACTIONS = ("list", "get", "where", "check")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("action", nargs="?", default="list", choices=ACTIONS, help="(default: list)")
    parser.add_argument("names", nargs="*", metavar="NAME", help="as in the list; get also takes hf:// addresses")


def run(args: argparse.Namespace) -> int:
    """Print the table, a path for each name, or which addresses answer."""
    if args.action == "check":
        check(args.names)
        return 0
    if args.action == "list":
        if args.names:
            raise UserError("list: takes no names; get and where do")
        print(table())
    elif not args.names:
        raise UserError(f"{args.action}: which weights? `python -m ldm_lab pretrained list` has their names")
    for name in args.names:
        print(resolve_weights(name, "get") if args.action == "get" else cached_path(name))
    return 0


def check(names: list[str]) -> None:
    """Print a line for each address of released files, all of them or the named ones, and a summary.

    Raises:
        UserError: a file is at none of its addresses; an unknown name; downloads are switched off.
    """
    for name in names:
        cached_path(name)  # says which name is unknown
    if offline():
        raise UserError("check: downloads are switched off (LDM_LAB_OFFLINE, HF_HUB_OFFLINE)")
    entries = {name: entry for name, entry in catalogue().items() if name in names or not names}
    answers = ask_all(entries.items())
    for answer in answers:
        print(f"{answer.name}: {answer.url}: {answer.words}")
    for name, entry in entries.items():
        if not entry.mirrors:
            print(f"{name}: no address is known; `pretrained where {name}` says where to put {entry.file}")
    there = {answer.name for answer in answers if answer.kind == "answers"}
    lost = [name for name, entry in entries.items() if entry.mirrors and name not in there]
    print(f"{sum(answer.kind == 'answers' for answer in answers)} of {len(answers)} addresses answer")
    if unsure := [name for name, entry in entries.items() if entry.mirrors and entry.sha256 is None]:
        print(f"no checksum is published of {', '.join(unsure)}: the file that comes first is trusted, and held to")
    for instead in dict.fromkeys(entries[name].instead for name in lost if entries[name].instead):
        print(f"a new training can do without {', '.join(n for n in lost if entries[n].instead == instead)}: {instead}")
    if lost:
        raise UserError(f"check: none of its addresses has the file of {', '.join(lost)}")


def table() -> str:
    """Return the released weights as a table: name, role, size, license, whether cached, and what they are."""
    rows = [("name", "role", "size", "license", "cached", "sha256", "what")]
    for name, entry in catalogue().items():
        path = cached_path(name)
        size = path.stat().st_size if path.is_file() else entry.size
        rows.append(
            (
                name,
                entry.role,
                "unknown" if size is None else f"{size / 2**20:,.1f} MiB",
                entry.license,
                "yes" if path.is_file() else "no",
                entry.sha256[:8] if entry.sha256 else "unpublished",
                entry.what,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join((*lines, UNPUBLISHED))
