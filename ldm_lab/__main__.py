"""`python -m ldm_lab COMMAND ...`: the tools around training and sampling."""

import argparse
import ast
import importlib
import sys
from pathlib import Path

from ldm_lab import commands
from ldm_lab.commands._arguments import Parser
from ldm_lab.errors import run_program


def main() -> int | None:
    """Parse the command line and run the command."""
    parser = Parser(prog="python -m ldm_lab", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for path in sorted(Path(commands.__path__[0]).glob("[!_]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        name = path.stem.replace("_", "-")
        command = subparsers.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in sys.argv[1:2]:  # no other is imported: some of them take ten seconds for that
            _module(name).add_arguments(command)
    args = parser.parse_args()
    return _module(args.command).run(args)


def _module(command: str):
    return importlib.import_module(f"ldm_lab.commands.{command.replace('-', '_')}")


def program() -> None:
    """Run as the installed command `ldm-lab`."""
    run_program(main)


if __name__ == "__main__":
    program()
