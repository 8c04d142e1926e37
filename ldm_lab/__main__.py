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
    modules = {}
    names = [found.name for found in pkgutil.iter_modules(commands.__path__)]
    # One command alone where it is known which: what the others import takes seconds and hundreds of megabytes.
    for found in [name for name in names if name.replace("_", "-") in sys.argv[1:2]] or names:
        name = found.replace("_", "-")
        module = modules[name] = importlib.import_module(f"ldm_lab.commands.{found}")
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
