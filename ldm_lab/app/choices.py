"""The options of sampling as controls of a form, and as parameters of requests: one for each that is declared.

Name, type, bounds, default and meaning are those of `SamplingOptions` and of the samplers; nothing is listed again.
"""

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin

from PIL import Image

from ldm_lab.config.bounds import PartSection, TypeForm, constraints_of
from ldm_lab.config.reading import Option
from ldm_lab.config.registry import infos
from ldm_lab.config.written import from_text, kinds
from ldm_lab.errors import UserError
from ldm_lab.sampling import flat
from ldm_lab.sampling.options import UPSAMPLER

Chosen = int | float | str | bool | tuple[float, ...]  # of an option that is given
FormValue = int | float | str | bool | list[str] | None  # of a control; None and "" leave the default
ON, OFF = "on", "off"  # of an option that is neither by default


class Kind(enum.Enum):
    """How an option is asked for."""

    CHECK = enum.auto()
    CHOICE = enum.auto()
    NUMBER = enum.auto()
    NUMBERS = enum.auto()  # several, in one line
    TEXT = enum.auto()
    IMAGE = enum.auto()  # uploaded
    FILE = enum.auto()  # one of those that are offered


@dataclass(frozen=True)
class Choice:
    """An option, as a form or a request asks for it.

    Attributes:
        name: flat (`ldm_lab.sampling.flat`).
        option: what is declared of it.
        kind: how it is asked for.
        choices: of a CHOICE.
        preset: what a form shows at first; None is nothing, which stands for the default.
    """

    name: str
    option: Option
    kind: Kind
    choices: tuple[str, ...] = ()
    preset: FormValue = None

    @property
    def label(self) -> str:
        """The name for people."""
        words = self.name.removeprefix(UPSAMPLER).replace("_", " ")
        return words[0].upper() + words[1:]

    @property
    def meaning(self) -> str:
        """What it says, and its default."""
        default = self.option.default
        known = default is not None and default is not False and not self.name.startswith(UPSAMPLER)
        text = self.option.meaning.rstrip(".")
        return f"{text} (default: {_written(default)})" if known and "default" not in text else text

    @property
    def json_type(self) -> TypeForm:
        """The type in a request, for its description."""
        if self.kind is Kind.CHOICE and ON in self.choices:
            return bool | None
        if self.kind is Kind.CHOICE:
            return _one_of(_literals(self.option.annotation) or self.choices)
        plain = [form for form in kinds(self.option.annotation) if form in (int, float, str, bool)]
        types: dict[Kind, TypeForm] = {Kind.CHECK: bool, Kind.NUMBERS: list[float], Kind.FILE: str, Kind.IMAGE: dict}
        found = types.get(self.kind) or plain[0]
        for form in plain[1:] if self.kind in (Kind.NUMBER, Kind.TEXT) else ():
            found = found | form
        return found | None

    def read(self, given: FormValue) -> Chosen | None:
        """Return what a control of a form gives as a value of the option; None where it says nothing.

        What the value is allowed to be is checked where all options are.
        """
        if given is None or given == "" or isinstance(given, list):
            return None
        if self.kind is Kind.CHOICE and given in (ON, OFF) and ON in self.choices:
            return given == ON
        if self.kind is Kind.CHOICE:
            return next((value for value in _literals(self.option.annotation) if str(value) == given), given)
        if self.kind is Kind.NUMBER and isinstance(given, float) and given.is_integer() and self._is_whole:
            return int(given)
        if not isinstance(given, str):
            return given
        if self.kind is Kind.NUMBERS:
            return tuple(_number(self.name, word) for word in given.replace(",", " ").split())
        return from_text(self.option.annotation, given.strip() if self.kind is not Kind.TEXT else given)

    def shown(self, value: Chosen) -> FormValue:
        """Return a value as its control shows it."""
        if self.kind is Kind.CHOICE and ON in self.choices:
            return ON if value else OFF
        return value if self.kind is Kind.CHECK else _written(value)

    @property
    def _is_whole(self) -> bool:
        found = list(kinds(self.option.annotation))
        return int in found and float not in found


def base_choices() -> list[Choice]:
    """Return those of a base model, those of samplers last."""
    return _choices(flat.base_names())


def upsampler_choices() -> list[Choice]:
    """Return those of all upsamplers, under their prefix."""
    return _choices(flat.upsampler_names(), UPSAMPLER)


def _choices(names: Mapping[str, Option], prefix: str = "") -> list[Choice]:
    return [_choice(prefix + name, option, not prefix) for name, option in names.items()]


def _choice(name: str, option: Option, with_preset: bool) -> Choice:
    forms = [form for form in kinds(option.annotation) if form is not type(None)]
    preset = option.default if with_preset and isinstance(option.default, int | float | str) else None
    marks = [mark for mark in constraints_of(option.annotation) if isinstance(mark, PartSection)]
    if marks:
        return Choice(name, option, Kind.CHOICE, tuple(infos(marks[0].role)))
    if Image.Image in forms:
        return Choice(name, option, Kind.IMAGE)
    if Path in forms:
        return Choice(name, option, Kind.FILE)
    if bool in forms:
        if type(None) in kinds(option.annotation):
            return Choice(name, option, Kind.CHOICE, (ON, OFF))
        return Choice(name, option, Kind.CHECK, preset=bool(preset))
    if literals := _literals(option.annotation):
        kind = Kind.CHOICE if all(get_origin(form) is Literal for form in forms) else Kind.TEXT
        return Choice(name, option, kind, tuple(map(str, literals)), preset)
    if any(get_origin(form) is tuple for form in forms) and str not in forms:
        written = _written(option.default) if option.default and with_preset else None
        return Choice(name, option, Kind.NUMBERS, preset=written)
    return Choice(name, option, Kind.NUMBER if str not in forms else Kind.TEXT, preset=preset)


def _one_of(words: Sequence[int | float | str]) -> TypeForm:
    found: TypeForm = Literal[tuple(words)] | None  # type: ignore[assignment]
    return found


def _literals(annotation: TypeForm) -> list[int | float | str]:
    return [value for form in kinds(annotation) if get_origin(form) is Literal for value in get_args(form)]


def _number(name: str, word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise UserError(f"{name}: numbers are needed, such as 0.2 0.8, not {word!r}") from None


def _written(value: Chosen | Iterable[float]) -> str:
    return " ".join(f"{entry:g}" for entry in value) if isinstance(value, list | tuple) else str(value)
