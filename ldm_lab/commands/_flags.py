"""Flags of a command line out of the options of parts: name, type, bounds, default and meaning are declared there."""

import argparse
import difflib
import re
import types
from argparse import SUPPRESS
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NoReturn, Union, get_args, get_origin

from ldm_lab.commands._arguments import Parser
from ldm_lab.config.bounds import TypeForm, problem
from ldm_lab.config.reading import Option
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
        kinds = list(_kinds(option.annotation))
        if bool in kinds:
            on_off = argparse.BooleanOptionalAction if type(None) in kinds else "store_true"
            group.add_argument(flag, dest=dest, action=on_off, default=SUPPRESS, help=meaning)
            continue
        values = [kind for kind in kinds if kind is not type(None)]
        if len(values) == 1 and get_origin(values[0]) is list:
            (item,) = get_args(values[0])
            kind = partial(read_value, item)
            group.add_argument(
                flag, dest=dest, action="append", type=kind, metavar=_metavar(list(_kinds(item))), default=SUPPRESS,
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
            metavar=_metavar(list(_kinds(items[0])) if items else kinds),
            default=SUPPRESS,
            help=meaning,
        )


def read_value(annotation: TypeForm, written: str) -> FlagValue:
    """Return the value that is written, of a type and within its bounds. Raises ArgumentTypeError."""
    kinds = list(_kinds(annotation))
    value: FlagValue = written
    if int in kinds and written.lstrip("-").isascii() and written.lstrip("-").isdigit() and len(written) < 20:
        value = int(written)
    elif float in kinds:
        try:
            value = float(written)
        except ValueError:
            value = written
    found = problem(value, annotation)
    if found:
        raise argparse.ArgumentTypeError(found.replace(" or null", ""))
    return value


def given(args: argparse.Namespace, options: Mapping[str, Option], prefix: str = "") -> OptionValues:
    """Return the options that stand on the command line, by name."""
    words = dict(args._get_kwargs())
    chosen = {name: words[prefix + name] for name in options if words.get(prefix + name) is not None}
    return OptionValues({name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()})


def _kinds(annotation: TypeForm) -> Iterator[TypeForm]:
    """Yield the types of a union without their bounds."""
    if get_origin(annotation) is Annotated:
        yield from _kinds(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _kinds(member)
    else:
        yield annotation


def _metavar(kinds: Sequence[TypeForm]) -> str:
    """Return a word for a value in the help."""
    choices = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())
    if choices:
        return "|".join(map(str, choices)) if len(choices) < 6 else "NAME"
    if Path in kinds:
        return "FILE"
    return "N" if int in kinds and float not in kinds else "X" if float in kinds else "TEXT"


def _plain(value: OptionValue) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
