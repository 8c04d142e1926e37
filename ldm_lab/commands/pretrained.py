"""Released weights by name: list them, download them, say where they are.

    python -m ldm_lab pretrained list
    python -m ldm_lab pretrained get kl-f8 cloob/vit_b_16_laion400m_16e
    python -m ldm_lab pretrained where ccld/yfcc_cfg

Their names stand wherever a config or a program takes weights, and they are downloaded when they are needed. They lie
below $LDM_LAB_CACHE, or ~/.cache/ldm_lab. An interrupted download goes on where it stopped. LDM_LAB_OFFLINE=1 forbids
downloads; `where` says where to put a file that was got in another way.
"""

import argparse

from ldm_lab.errors import UserError
from ldm_lab.pretrained.catalogue import catalogue
from ldm_lab.pretrained.resolve import cached_path, resolve_weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("action", nargs="?", default="list", choices=("list", "get", "where"), help="(default: list)")
    parser.add_argument("names", nargs="*", metavar="NAME", help="as in the list; get also takes hf:// addresses")


def run(args: argparse.Namespace) -> None:
    """Print the table, or a path for each name."""
    if args.action == "list":
        if args.names:
            raise UserError("list: takes no names; get and where do")
        print(table())
    elif not args.names:
        raise UserError(f"{args.action}: which weights? `python -m ldm_lab pretrained list` has their names")
    for name in args.names:
        print(resolve_weights(name, "get") if args.action == "get" else cached_path(name))


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
                entry.sha256[:8] if entry.sha256 else "unknown",
                entry.what,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
