"""Types of options with their bounds: whether a value from a YAML fits, and how what would fit is said in words.

An option's annotation says its type and its bounds: `Annotated[int, Ge(1)]`, with the constraints of the library
annotated_types. The common ones have names here, which parts import from `ldm_lab.config`. An option that describes
another part says so: `Annotated[dict | None, PartSection("sampler")]`.
"""

import contextlib
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, TypeAlias, Union

from annotated_types import BaseMetadata, Ge, GroupedMetadata, Gt, Interval, Le, Lt, MaxLen, MinLen

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"  # what a YAML holds
TypeForm: TypeAlias = type | types.GenericAlias | types.UnionType | None  # int, list[float], Annotated[int, Ge(1)], ...

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Share = Annotated[float, Interval(ge=0, le=1)]
ShareBelowOne = Annotated[float, Interval(ge=0, lt=1)]

WORDS: dict[TypeForm, str] = {
    int: "whole number", float: "number", str: "text", bool: "true or false", dict: "section", list: "list",
    None: "null", types.NoneType: "null", Any: "anything", Plain: "anything",
}  # fmt: skip


@dataclass(frozen=True)
class PartSection:
    """Marks an option that is a section `{name, options ...}` of a part.

    Attributes:
        role: of the part.
        name: of the part if the section does not say it; None if it has to.
    """

    role: str
    name: str | None = None


@dataclass(frozen=True)
class PartMapping:
    """Marks an option that is a mapping `{name: options}` of parts of one role; null in place of options is no part."""

    role: str


def marker(annotation: TypeForm) -> PartSection | PartMapping | None:
    """Return the mark of an option that describes other parts, None for any other."""
    for member in _members(annotation):
        for constraint in constraints_of(member):
            if isinstance(constraint, PartSection | PartMapping):
                return constraint
    return None


def describe(annotation: TypeForm) -> str:
    """Return an annotation in words: "whole number (at least 1)", "one of 'a', 'b'", "number or null"."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in WORDS:
        return WORDS[annotation]
    if origin is Annotated:
        bounds = _bounds(annotation)
        return describe(args[0]) + (f" ({bounds.removeprefix('a number ')})" if bounds else "")
    if origin is Literal:
        names = [str(choice) for choice in args]  # of '16' and 16 the first one is enough
        return "one of " + ", ".join(repr(c) for place, c in enumerate(args) if names.index(names[place]) == place)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(member) for member in args)
    if origin in (list, dict):
        return f"list of {_plural(describe(args[0]))}" if origin is list else "section"
    if origin is tuple:
        return f"list of {len(args)}: {', '.join(map(describe, args))}"
    return annotation.__name__.lower() if isinstance(annotation, type) else str(annotation)


def fits(value: Plain, annotation: TypeForm) -> bool:
    """Return whether a value is of a type and within its bounds."""
    return problem(value, annotation) is None


def problem(value: Plain, annotation: TypeForm) -> str | None:
    """Return what is wrong with a value, such as "at least 1 is needed, not 0"; None if it fits."""
    reasons = []
    for member in _members(annotation):
        base = typing.get_args(member)[0] if typing.get_origin(member) is Annotated else member
        if not _is_of(value, base):
            continue
        if not (outside := _outside(value, member)):
            return None
        reasons.append(outside)
    if reasons:
        choices = [describe(m).removeprefix("one of ") for m in _members(annotation) if typing.get_origin(m) is Literal]
        needed = " or ".join(dict.fromkeys(reasons + choices))
    else:
        needed = describe(annotation)
    return f"{needed} {'are' if needed.endswith('entries') else 'is'} needed, not {value!r}"


class Interpolated(str):
    """A text that an interpolation gave, such as ${oc.env:N}: its option knows whether it is a number."""

    def read_as(self, annotation: TypeForm) -> int | float | bool | str | None:
        """Return it as an annotation takes it: a number, true or false, nothing; the plain text if all that fails."""
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        readings: list[int | float | bool | None] = []
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                readings.append(kind(self))
        readings += [words[self.lower()]] if self.lower() in words else []
        readings += [None] if self.lower() in ("null", "~", "") else []
        return next((reading for reading in readings if fits(reading, annotation)), str(self))


def converted(value: Plain, annotation: TypeForm) -> Plain:
    """Return a value in the type of its annotation where a YAML has only a cousin: 3 for a float."""
    bases = [typing.get_args(m)[0] if typing.get_origin(m) is Annotated else m for m in _members(annotation)]
    if isinstance(value, int) and not isinstance(value, bool) and float in bases and int not in bases:
        return float(value)
    return value


def entries_form(annotation: TypeForm) -> TypeForm:
    """Return the annotation of a list's entries, of a union the first list's; anything fits if it takes no list."""
    bases = [typing.get_args(m)[0] if typing.get_origin(m) is Annotated else m for m in _members(annotation)]
    return next((typing.get_args(base)[0] for base in bases if typing.get_origin(base) in (list, tuple)), Plain)


def _members(annotation: TypeForm) -> Iterator[TypeForm]:
    """Yield the members of a union, or an annotation itself."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from _members(member)
    elif typing.get_origin(annotation) is Annotated and typing.get_origin(typing.get_args(annotation)[0]) in (
        Union,
        types.UnionType,
    ):
        inner, *constraints = typing.get_args(annotation)
        for member in _members(inner):
            yield Annotated[member, *constraints] if member is not types.NoneType else member
    else:
        yield annotation


def constraints_of(annotation: TypeForm) -> Iterator[BaseMetadata | PartSection | PartMapping]:
    """Yield the constraints and marks of an annotation, an `Interval` as its single ones."""
    if typing.get_origin(annotation) is not Annotated:
        return
    for constraint in typing.get_args(annotation)[1:]:
        if isinstance(constraint, GroupedMetadata):
            yield from constraint
        else:
            yield constraint


def _is_of(value: Plain, annotation: TypeForm) -> bool:
    """Return whether a value is of a type; bounds count inside lists and mappings alone."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any or annotation is Plain:
        return True
    if annotation is None or annotation is types.NoneType:
        return value is None
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in args)
    if origin is list:
        return isinstance(value, list | tuple) and all(fits(entry, args[0]) for entry in value)
    if origin is tuple:
        entries = value if isinstance(value, list | tuple) else ()
        return len(entries) == len(args) and all(map(fits, entries, args))
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, args[0]) and fits(v, args[1]) for k, v in value.items())
    if isinstance(value, bool):  # to Python a bool is an int, to a user it is not
        return annotation is bool
    if annotation is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, annotation)


def _outside(value: Plain, annotation: TypeForm) -> str:
    """Return the bounds that a value is outside of, in words; "" if it is within all of them."""
    for constraint in constraints_of(annotation):
        within = True
        if isinstance(constraint, MinLen):
            within = len(value) >= constraint.min_length
        elif isinstance(constraint, MaxLen):
            within = len(value) <= constraint.max_length
        elif isinstance(constraint, Ge):
            within = value >= constraint.ge
        elif isinstance(constraint, Gt):
            within = value > constraint.gt
        elif isinstance(constraint, Le):
            within = value <= constraint.le
        elif isinstance(constraint, Lt):
            within = value < constraint.lt
        if not within:
            return _bounds(annotation)
    return ""


def _bounds(annotation: TypeForm) -> str:
    """Return the bounds of an annotation in words: "at least 1", "a number from 0 to 1", "2 or more entries"."""
    words = {}
    for constraint in constraints_of(annotation):
        for kind, key in (
            (MinLen, "min_length"),
            (MaxLen, "max_length"),
            (Ge, "ge"),
            (Gt, "gt"),
            (Le, "le"),
            (Lt, "lt"),
        ):
            if isinstance(constraint, kind):
                words[key] = f"{asdict(constraint)[key]:,}".replace(",", "_")
    least, most = words.pop("min_length", ""), words.pop("max_length", "")
    if least or most:
        return f"{least} entries" if least == most else f"{least} or more entries" if least else f"up to {most} entries"
    low, above, high, below = (words.get(key) for key in ("ge", "gt", "le", "lt"))
    if low and not (high or below):
        return f"at least {low}"
    lower = f"from {low} " if low else f"above {above}" if above else ""
    upper = f"to {high}" if high and low else f"up to {high}" if high else f"to less than {below}" if below else ""
    return f"a number {lower}{' and ' if above and upper else ''}{upper}" if lower or upper else ""


def _plural(words: str) -> str:
    head, bracket, rest = words.partition(" (")
    return f"{head}s{bracket}{rest}"
