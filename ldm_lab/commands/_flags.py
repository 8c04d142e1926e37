"""Flags of a command line out of the options of parts: name, type, bounds, default and meaning are declared there."""

import argparse
import difflib
import re
from argparse import SUPPRESS
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn, get_args, get_origin

from ldm_lab.commands._arguments import Parser
from ldm_lab.config.bounds import TypeForm, problem
from ldm_lab.config.reading import Option
from ldm_lab.config.written import from_text, kinds
from ldm_lab.errors import UserError
from ldm_lab.sampling.options import OptionValue, OptionValues

FlagValue = int | float | str


class FlagParser(Parser):
    """A parser without abbreviations that answers unknown flags with the name that is meant, if that is known."""

    def __init__(self, *, prog: str, description: str, hint: Callable[[str], str | None]) -> None:
        """Make a parser without any flags yet.

        Args:
            prog: name of the program.
            description: for the help.
            hint: an unknown flag -> what it is called here, in words; None if that is not known.
        """
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.hint = hint

    def error(self, message: str) -> NoReturn:
        super().error(f"{message} (--help explains)")

    def parse_words(self, words: Sequence[str]) -> argparse.Namespace:
        """Return the parsed words; positional ones may stand between flags. Raises UserError."""
        known = [flag for action in self._actions for flag in action.option_strings]
        for word in words:
            if word == "--":
                break
            flag = re.sub("=.*", "", word)
            if not flag.startswith("-") or flag in known or not flag.lstrip("-")[:1].isalpha():
                continue
            if ours := self.hint(flag):
                raise UserError(ours)
            if flag.startswith("--"):
                near = difflib.get_close_matches(flag, known, n=1)
                self.error(f"unknown flag: {flag}" + (f"; is {near[0]} meant?" if near else ""))
        return self.parse_intermixed_args(list(words))


def add_flags(
    group: argparse._ArgumentGroup, options: Mapping[str, Option], prefix: str = "", repeated: bool = False
) -> None:
    """Add a flag for each option; one that is not given stays out of the parsed namespace.

    Args:
        group: of the parser.
        options: by name.
        prefix: of the flags and of the names in the namespace, such as "upsampler_": those without it explain them.
        repeated: flags that take values may be given again, and the namespace has the list of what was given.
    """
    for name, option in options.items():
        dest = prefix + name
        flag = "--" + dest.replace("_", "-")
        meaning = option.meaning.rstrip(".")
        if option.default is not None and option.default is not False:
            meaning += f" (default: {_plain(option.default)})"
        if prefix:
            meaning = f"as --{name.replace('_', '-')}"
        meaning = meaning.replace("%", "%%")
        forms = list(kinds(option.annotation))
        if bool in forms:
            on_off = argparse.BooleanOptionalAction if type(None) in forms else "store_true"
            group.add_argument(flag, dest=dest, action=on_off, default=SUPPRESS, help=meaning)
            continue
        values = [form for form in forms if form is not type(None)]
        if len(values) == 1 and get_origin(values[0]) is list:
            (item,) = get_args(values[0])
            kind = partial(read_value, item)
            group.add_argument(
                flag, dest=dest, action="append", type=kind, metavar=_metavar(list(kinds(item))), default=SUPPRESS,
                help=meaning,
            )  # fmt: skip
            continue
        items = get_args(values[0]) if len(values) == 1 and get_origin(values[0]) is tuple else ()
        group.add_argument(
            flag,
            dest=dest,
            action="append" if repeated else "store",
            nargs=len(items) or None,
            type=partial(read_value, items[0] if items else option.annotation),
            metavar=_metavar(list(kinds(items[0])) if items else forms),
            default=SUPPRESS,
            help=meaning,
        )


def read_value(annotation: TypeForm, written: str) -> FlagValue:
    """Return the value that is written, of a type and within its bounds. Raises ArgumentTypeError."""
    value = from_text(annotation, written)
    found = problem(value, annotation)
    if found:
        raise argparse.ArgumentTypeError(found.replace(" or null", ""))
    return value


def words_of(args: argparse.Namespace) -> OptionValues:
    """Return what stands on the command line, by the names of the namespace."""
    return OptionValues(args._get_kwargs())


def given(args: argparse.Namespace, options: Mapping[str, Option]) -> OptionValues:
    """Return the options that stand on the command line, by name."""
    return words_of(args).named(options)


def _metavar(forms: Sequence[TypeForm]) -> str:
    """Return a word for a value in the help."""
    choices = next((get_args(form) for form in forms if get_origin(form) is Literal), ())
    if choices:
        return "|".join(map(str, choices)) if len(choices) < 6 else "NAME"
    if Path in forms:
        return "FILE"
    return "N" if int in forms and float not in forms else "X" if float in forms else "TEXT"


def _plain(value: OptionValue) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
