"""The parser of command lines, types of arguments with bounds, and arguments that several commands have."""

import argparse
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from ldm_lab.errors import UserError

if TYPE_CHECKING:  # the list of commands needs no config, and no torch
    from ldm_lab.config import PartConfig
    from ldm_lab.data.jobs import PassOptions

Parsed: TypeAlias = "int | float | str | bool | Sequence[Parsed] | None"
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
ENCODER_PRECISIONS = ("32-true", "bf16-mixed")  # of a config's frozen parts


REPEATED = (argparse._AppendAction, argparse._ExtendAction, argparse._CountAction)  # flags that may be given again


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage above it; a flag that takes one value is given once."""

    _is_mixed = False  # whether flags are being parsed, and all else after them

    @cached_property
    def _given(self) -> dict[argparse.Action, list[str]]:
        """The flags met so far, with what stood behind them."""
        return {}

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse words, flags and other arguments in any order: key=value may stand behind a flag, too."""
        if self._subparsers is not None or self._is_mixed:
            return super().parse_known_args(args, namespace)
        return self.parse_known_intermixed_args(args, namespace)

    def parse_known_intermixed_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse words in any order, by `parse_known_args` as argparse has it, flags first."""
        self._is_mixed = True
        try:
            return super().parse_known_intermixed_args(args, namespace)
        finally:
            self._is_mixed = False

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Parsed:
        """Return the values of an argument: argparse asks for each time that it stands on the command line."""
        if action.option_strings and not isinstance(action, REPEATED):
            before = self._given.setdefault(action, arg_strings)
            if before is not arg_strings and (before or isinstance(action, argparse.BooleanOptionalAction)):
                flag = "/".join(action.option_strings)
                values = f", {' '.join(before)!r} and {' '.join(arg_strings)!r}" if before else ""
                raise UserError(f"{flag}: is given twice{values}; which one is meant?")
        return super()._get_values(action, arg_strings)


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return the type of an argument that is a whole number from `least` on, up to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"a whole number is needed, not {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"at least {least} is needed, not {text}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"at most {most} is needed, not {text}")
        return value

    return parse


def number(text: str, fits: Callable[[float], bool], needed: str) -> float:
    """Return the number in a text. Raises ArgumentTypeError "{needed} is needed" if it is none, or does not fit."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and fits(value)):
        raise argparse.ArgumentTypeError(f"{needed} is needed, not {text}")
    return value


def positive(text: str) -> float:
    """Return a number above 0."""
    return number(text, lambda value: value > 0, "a number above 0")


def not_negative(text: str) -> float:
    """Return a number from 0 on."""
    return number(text, lambda value: value >= 0, "a number from 0 on")


def share(text: str) -> float:
    """Return a number between 0 and 1, both excluded."""
    return number(text, lambda value: 0 < value < 1, "a share between 0 and 1")


def safetensors_file(text: str) -> str:
    """Return the name of a file that is written as safetensors."""
    if not text.endswith(".safetensors"):
        raise argparse.ArgumentTypeError(
            f"the file is written as .safetensors, so its name has to end like that, not {text}"
        )
    return text


class Taking(argparse._AppendAction):
    """A flag that may be given again, and does something as soon as it is read."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[str] | None,
        option_string: str | None = None,
    ) -> None:
        self.take(namespace, [values] if isinstance(values, str) else values or [])

    def take(self, namespace: argparse.Namespace, values: Sequence[str]) -> None:
        """Take what stands behind the flag."""
        raise NotImplementedError


class _Imports(Taking):
    """Makes the parts of the named modules known."""

    def take(self, namespace: argparse.Namespace, values: Sequence[str]) -> None:
        from ldm_lab.config.registry import add_imports  # not before: the list of commands needs no config

        add_imports(values)


def add_imports_argument(parser: argparse.ArgumentParser) -> None:
    """Declare the argument that names modules with parts of the user's own; it may be given several times."""
    parser.add_argument(
        "--imports", action=_Imports, metavar="MODULE", help="a module or package with parts of your own"
    )


def add_clip_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that say which CLIP embeds."""
    parser.add_argument(
        "--clip",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="keys of a conditioner: model, pretrained, weights; name=cloob for a CLOOB (default: as the heads say)",
    )


def add_config_arguments(parser: argparse.ArgumentParser, meaning: str, required: bool = True) -> None:
    """Declare the arguments that say which config, and what is changed in it: `config`, `overrides`, `--imports`."""
    add_imports_argument(parser)
    parser.add_argument("--config", required=required, metavar="YAML", help=meaning)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the YAML's")


def add_pass_arguments(
    parser: argparse.ArgumentParser,
    whose: str | None = "the CLIP's",
    of_config: bool = False,
    batch: int | None = None,
    what: str = "images",
) -> None:
    """Declare the arguments of a pass over images: those of `pass_options`.

    Args:
        parser: of the command.
        whose: arithmetic has the precision; None declares none.
        of_config: whether batches, loader processes and precision are a config's, where they are not given.
        batch: size of a batch unless it is given.
        what: is processed.
    """
    add = parser.add_argument
    workers, precision = (None, None) if of_config else (2, PRECISIONS[0])
    batch = batch if of_config or batch is not None else 64
    said = (batch or "data.batch_size", workers or "data.workers", precision or "the config's")
    add("--batch-size", type=whole_number(1), default=batch, metavar="N", help=f"{what} at once ({said[0]})")
    add(
        "--workers", type=whole_number(0), default=workers, metavar="N", help=f"loader processes per device ({said[1]})"
    )
    add("--devices", default="1", metavar="N", help="devices per node, or auto (%(default)s)")
    add("--num-nodes", type=whole_number(1), default=1, metavar="N", help="nodes (%(default)s)")
    add("--accelerator", default="auto", metavar="NAME", help="auto, gpu, cpu, mps (%(default)s)")
    if whose is None:
        parser.set_defaults(precision=None)
        return
    choices = ENCODER_PRECISIONS if of_config else PRECISIONS
    add("--precision", choices=choices, default=precision, help=f"of {whose} arithmetic ({said[2]})")


def pass_options(args: argparse.Namespace, data: "PartConfig | None" = None) -> "PassOptions":
    """Return what `add_pass_arguments` declares; what is not given is as a config's data section has it."""
    from ldm_lab.data.jobs import PassOptions  # not before: it imports torch, which takes seconds

    return PassOptions(
        batch_size=data.option("batch_size") if data and args.batch_size is None else args.batch_size,
        workers=data.option("workers") if data and args.workers is None else args.workers,
        devices=args.devices,
        num_nodes=args.num_nodes,
        accelerator=args.accelerator,
        precision=args.precision or PassOptions.precision,
    )
