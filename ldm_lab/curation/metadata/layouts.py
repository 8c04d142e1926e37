"""One table out of Parquet files whose columns differ: in order, in the case of names, in type, in what is there."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import pyarrow as pa
from pyarrow import types

from ldm_lab.errors import UserError

MOST_RUNS = 64  # of files with equal columns, up to which their order is kept
PANDAS_INDEX = re.compile(r"__index_level_\d+__|unnamed: 0(\.\d+)?|", re.I)  # columns that pandas writes for itself
OWN = "ldm_lab_"  # begins the names of columns that a selection adds for itself
NOTHING = pa.int32()  # type of a column that is null everywhere, as Parquet stores it


def unique_names(names: Iterable[str]) -> list[str]:
    """Return names made different in more than case: img2dataset's tables may hold `WIDTH` and `width`."""
    seen: set[str] = set()
    unique = []
    for name in names:
        candidate, number = name, 1
        while candidate.lower() in seen:
            candidate, number = f"{name}_{number}", number + 1
        seen.add(candidate.lower())
        unique.append(candidate)
    return unique


def is_index(name: str) -> bool:
    """Return whether a column is one that pandas writes for itself: in Parquet, and without a name in a CSV."""
    return PANDAS_INDEX.fullmatch(name) is not None


def check_columns(names: Sequence[str], where: str) -> None:
    """Raise UserError if two columns of a file have the same name, or one a name that selections use for their own."""
    for name in names:
        if names.count(name) > 1 and not is_index(name):
            raise UserError(f"{where}: the column {name!r} is there twice")
        if name.lower().startswith(OWN):
            raise UserError(f"{where}: the column {name!r} has a name of the kind {OWN}..., which is taken")


@dataclass(frozen=True)
class Layout:
    """Files of equal columns.

    Attributes:
        paths: of the files.
        names: their columns, all of them, in their order.
        columns: column of the whole table -> (one of `names`, its type as engines see it).
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]
    columns: Mapping[str, tuple[str, pa.DataType]]


def layouts_of(schemas: Sequence[tuple[str, pa.Schema]]) -> tuple[list[str], list[Layout]]:
    """Return the columns of a table, and its files by the columns that they have.

    A name in another case is the same column, unless a file has both. Columns for pandas' index are left out.

    Args:
        schemas: (path, schema) of each file.
    """
    names: list[str] = []
    runs = [(key, [path for path, _ in run]) for key, run in groupby(schemas, lambda one: _key(one[1]))]
    if len(runs) > MOST_RUNS:
        merged: dict[tuple[tuple[str, pa.DataType], ...], list[str]] = {}
        for key, paths in runs:
            merged.setdefault(key, []).extend(paths)
        runs = list(merged.items())
    layouts = []
    for fields, paths in runs:
        own = [name for name, _ in fields]
        columns = {}
        for name, kind in fields:
            if is_index(name):
                continue
            others = [known for known in names if known.lower() == name.lower() and known not in own]
            column = name if name in names or len(others) != 1 else others[0]
            columns[column] = (name, kind)
        names += [column for column in columns if column not in names]
        layouts.append(Layout(tuple(paths), tuple(own), columns))
    return names, layouts


def _key(schema: pa.Schema) -> tuple[tuple[str, pa.DataType], ...]:
    """Return the names and types of a schema, as far as engines tell them apart."""
    return tuple((field.name, _plain(field.type)) for field in schema)


def _plain(kind: pa.DataType) -> pa.DataType:
    if types.is_dictionary(kind):
        return _plain(kind.value_type)
    if types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    if types.is_large_binary(kind) or types.is_binary_view(kind):
        return pa.binary()
    return kind


def table_types(names: Iterable[str], layouts: Sequence[Layout], where: str) -> dict[str, pa.DataType]:
    """Return the type of each column in the whole table: one that holds the numbers of all files.

    Raises:
        UserError: a column's types have none in common.
    """
    found = {}
    for name in names:
        first: dict[pa.DataType, str] = {}
        for layout in layouts:
            if name in layout.columns:
                first.setdefault(layout.columns[name][1], layout.paths[0])
        kind = common_type(list(first))
        if kind is None:
            said = ", ".join(f"{one} in {path}" for one, path in first.items())
            raise UserError(f"{where}: the column {name!r} has types that do not go together: {said}")
        found[name] = kind
    return found


def common_type(kinds: Sequence[pa.DataType]) -> pa.DataType | None:
    """Return the type that holds the values of all types; None if there is none.

    Whole numbers stay whole, numbers beside texts become texts.
    """
    there = [kind for kind in dict.fromkeys(kinds) if not types.is_null(kind)]
    if len(there) <= 1:
        return there[0] if there else NOTHING
    there = [kind for kind in there if not types.is_boolean(kind)] or there  # true and false as 1 and 0
    if len(there) == 1:
        return there[0] if _holds_flags(there[0]) else None
    if all(types.is_integer(kind) for kind in there):
        return _common_integer(there)
    if all(types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind) for kind in there):
        return _common_number(there)
    if all(types.is_string(kind) or types.is_integer(kind) or types.is_floating(kind) for kind in there):
        return pa.string()
    if all(types.is_timestamp(kind) for kind in there) and len({kind.tz is None for kind in there}) == 1:
        return pa.timestamp("us", tz=there[0].tz)
    return None


def _holds_flags(kind: pa.DataType) -> bool:
    return types.is_integer(kind) or types.is_floating(kind) or types.is_string(kind)


def _common_integer(kinds: Sequence[pa.DataType]) -> pa.DataType:
    signed = [kind.bit_width for kind in kinds if types.is_signed_integer(kind)]
    unsigned = [kind.bit_width for kind in kinds if types.is_unsigned_integer(kind)]
    if not signed:
        return max(kinds, key=lambda kind: kind.bit_width)
    if max(unsigned, default=0) == 64:
        return pa.decimal128(20, 0)
    bits = max(*signed, *(2 * width for width in unsigned), 8)
    return {8: pa.int8(), 16: pa.int16(), 32: pa.int32(), 64: pa.int64()}[bits]


def _common_number(kinds: Sequence[pa.DataType]) -> pa.DataType:
    if any(types.is_floating(kind) for kind in kinds):
        return pa.float64()
    scale = max(kind.scale if types.is_decimal(kind) else 0 for kind in kinds)
    whole = max(kind.precision - kind.scale if types.is_decimal(kind) else 20 for kind in kinds)
    return pa.decimal128(whole + scale, scale) if whole + scale <= 38 else pa.float64()
