"""`python -m ldm_lab COMMAND ...`: the tools around training and sampling."""

import argparse
import importlib
import pkgutil
import sys

from ldm_lab import commands
from ldm_lab.errors import run_program


def main() -> int | None:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(prog="python -m ldm_lab", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    names = [found.name for found in pkgutil.iter_modules(commands.__path__)]
    if sys.argv[1:2] and sys.argv[1] in names:  # the others' imports would take seconds, and memory
        names = [sys.argv[1]]
    modules = {}
    for name in names:
        module = modules[name] = importlib.import_module(f"ldm_lab.commands.{name}")
        command = subparsers.add_parser(
            name,
            help=module.__doc__.splitlines()[0],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    args = parser.parse_args()
    return modules[args.command].run(args)


if __name__ == "__main__":
    run_program(main)
