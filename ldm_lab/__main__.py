"""`python -m ldm_lab COMMAND ...`: training, sampling, and the tools around them."""

import argparse
import ast
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from ldm_lab import commands
from ldm_lab.commands._arguments import Parser
from ldm_lab.errors import UserError, run_program

PROGRAMS = ("train", "sample")  # commands that read their words themselves; also train.py and sample.py
QUIET = "60"  # seconds between states of other libraries' bars where nobody watches: tqdm takes it from the environment
NEEDED = ("omegaconf", "torch", "pytorch_lightning")  # if one of them is missing, this is another Python


def start(command: str | None = None) -> None:
    """Run a command with the words of the command line, and leave; None takes the command's name from there, too."""
    if sys.stderr is None or not sys.stderr.isatty():  # our own bars print lines then; see QUIET
        os.environ.setdefault("TQDM_MININTERVAL", QUIET)
        os.environ.setdefault("TQDM_MAXINTERVAL", QUIET)
    words = sys.argv[1:]
    run_program(lambda: main(words if command is None else [command, *words]))


def program() -> None:
    """Run as the installed command `ldm-lab`."""
    start()


def main(words: Sequence[str] | None = None) -> int | None:
    """Run the command that the words name. Returns its exit code."""
    check_environment()
    words = list(sys.argv[1:] if words is None else words)
    if words[:1] and words[0] in PROGRAMS:
        return _module(words[0]).main(words[1:])
    parser = Parser(prog="python -m ldm_lab", description=__doc__, allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for path in sorted(Path(commands.__path__[0]).glob("[!_]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        name = path.stem.replace("_", "-")
        command = subparsers.add_parser(
            name,
            help=text.partition("\n")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # a flag that comes later would change what an abbreviation means
        )
        if name in words[:1]:  # no other is imported: some of them take ten seconds for that
            _module(name).add_arguments(command)
    args = parser.parse_args(words)
    return _module(args.command).run(args)


def check_environment() -> None:
    """Raise UserError outside of the environment that the package was installed into."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{missing[0]} is not installed for {sys.executable}; `make setup` makes an environment with all that is "
            "needed, and `source .venv/bin/activate` enters it"
        )


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"ldm_lab.commands.{command.replace('-', '_')}")


if __name__ == "__main__":
    start()
