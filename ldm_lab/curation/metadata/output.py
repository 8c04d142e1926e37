"""The columns of a selection: which ones, under which names and types, in which order the rows come."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import ibis
import ibis.expr.types as ir

from ldm_lab.curation.metadata.engine import Engine
from ldm_lab.curation.metadata.layouts import unique_names
from ldm_lab.curation.metadata.tables import TableRow, as_hash, as_number, is_unsigned_hash
from ldm_lab.errors import UserError, unknown
from ldm_lab.rules.names import alternatives, is_downloaded
from ldm_lab.rules.quantities import STANDARD

KEY = "ldm_lab_order"  # the column that a shuffled table is ordered by
HASH = "hash"
SIZES = ("WIDTH", "HEIGHT")
UNKNOWN = ("", "nan", "null", "none", "na", "n/a", "-", "\\n")  # texts in the place of a number
NUMBERS = ("aesthetic", "punsafe", "pwatermark", "similarity")  # quantities that a text file has as texts
BOOKKEEPING = {  # columns of img2dataset's output that are about the download
    "key", "status", "error_message", "exif", "width", "height", "original_width", "original_height",
}  # fmt: skip


@dataclass
class OutputColumns:
    """The columns of a selection.

    Attributes:
        names: column of the output -> column of the engine's table.
        notes: which columns of the input are not written, and why.
    """

    names: dict[str, str]
    notes: list[str] = field(default_factory=list)


def output_table(
    engine: Engine, row: TableRow, kept: ir.Table, columns: OutputColumns, shuffle: int | None
) -> ir.Table:
    """Return the kept rows under the names that img2dataset takes, the sizes the right way round.

    Args:
        engine: opened.
        row: of the table before rows were dropped.
        kept: the rows to write.
        columns: what is written; gets a note of columns of numbers that some texts are not.
        shuffle: seed of the hash in the column `KEY`; None for no such column.
    """
    texts = {name: kept[column] for name, column in columns.names.items()}
    numbers = _numbers(row, texts, columns.names)
    lost = _lost(engine, kept, texts, numbers)
    columns.notes += [
        f"{count:,} values of the column {name} are texts that are no numbers; it is written as it is"
        for name, count in lost.items()
    ]
    values = {**texts, **{name: value for name, value in numbers.items() if name not in lost}}
    if shuffle is None:
        return kept.select(**values)
    said = [kept[row.columns[row.name(q)]].cast("string").fill_null("") for q in ("url", "caption") if row.name(q)]
    if not said:
        raise UserError(f"{row.where}: shuffle needs a column url or caption; there are: {', '.join(row.columns)}")
    seeded = ibis.literal(f"{shuffle} ")
    for text in said:
        seeded = seeded + text
    return kept.select(**values, **{KEY: seeded.hash()})


def _numbers(row: TableRow, values: Mapping[str, ir.Column], columns: Mapping[str, str]) -> dict[str, ir.NumericValue]:
    """Return the columns that hold a number or a hash in other types, as texts of a text file, as numbers."""
    hashes, scores = _columns_of(row, (HASH,)), _columns_of(row, NUMBERS)
    numbers: dict[str, ir.NumericValue] = {}
    for name, value in values.items():
        is_text = value.type().is_string()
        if is_text and columns[name] in hashes:
            numbers[name] = as_hash(value)
        elif is_text and columns[name] in scores:
            numbers[name] = value.try_cast("float64")
        elif name.upper() in SIZES and (is_text or is_unsigned_hash(value.type())):  # whose types engines write apart
            numbers[name] = as_number(value).floor().try_cast("int32")
    return numbers


def _lost(
    engine: Engine, kept: ir.Table, values: Mapping[str, ir.Column], numbers: Mapping[str, ir.NumericValue]
) -> dict[str, int]:
    """Return how many texts of which columns are no numbers, of those that have such texts."""
    asked = {name: number for name, number in numbers.items() if values[name].type().is_string()}
    if not asked:
        return {}
    names = list(asked)
    counts = {
        f"c{place}": (asked[name].isnull() & values[name].notnull() & ~values[name].strip().lower().isin(UNKNOWN)).sum()
        for place, name in enumerate(names)
    }
    (found,) = engine.rows(kept.aggregate(**counts))
    return {name: int(count) for place, name in enumerate(names) if (count := found[f"c{place}"])}


def _columns_of(row: TableRow, quantities: Sequence[str]) -> set[str]:
    """Return the table's columns that hold some quantities, or may."""
    found = {name for quantity in quantities for name in alternatives(quantity, row.columns)}
    found |= {name for q in quantities if (name := row.names.given_for(q, row.columns))}
    return {row.columns[name] for name in found}


def output_columns(row: TableRow, wanted: Sequence[str] | None, judged: Mapping[str, str]) -> OutputColumns:
    """Return the columns to write, the standard ones under the names that img2dataset's users know.

    Args:
        wanted: the columns in their order; None is all that say something of the image, one for each quantity of a
            standard column.
        judged: quantity -> the column that rules judge.

    Raises:
        UserError: a column is not there, or of a type that it cannot be written in.
    """
    taken: dict[str, str] = {}
    for quantity, standard in STANDARD.items():
        if name := row.name(quantity):
            if name in taken:
                raise UserError(
                    f"{row.where}: the column {name} cannot be both {taken[name]} and {standard}; see names"
                )
            taken[name] = standard
    for quantity in ("url", "caption"):
        if row.name(quantity):
            row.text(quantity)  # raises for bytes
    if wanted is not None:
        standards = {standard: row.columns[name] for name, standard in taken.items()}
        other = {quantity: row.columns[name] for quantity, name in judged.items()}
        names = _wanted({**standards, **row.columns}, wanted, other)
        return OutputColumns(names, _judged_elsewhere(row, names, judged))
    about = [name for name in row.columns if is_downloaded(row.columns) and name in BOOKKEEPING and name not in taken]
    twins = {
        name: (quantity, row.name(quantity))
        for quantity in STANDARD
        for name in alternatives(quantity, row.columns)
        if name not in taken and name not in about
    }
    notes = [
        f"the column {name} is not written: {STANDARD[quantity]} holds {own}, which rules judge, too; "
        f"{row.names.answer(quantity, name)} takes {name} instead"
        for name, (quantity, own) in twins.items()
    ]
    if about:
        notes.append(f"columns about the earlier download are not written: {', '.join(about)}")
    written = {name: column for name, column in row.columns.items() if name not in {*twins, *about}}
    first = {name: taken.get(name, name) for name in written if name in taken or name in judged.values()}
    others = [name for name in written if name not in first]
    unique = dict(zip((*first, *others), unique_names((*first.values(), *others))))
    notes += [
        f"the column {name} is written as {unique[name]}: another's name differs from it in case only"
        for name in others
        if unique[name] != name
    ]
    return OutputColumns({unique[name]: column for name, column in written.items()}, notes)


def _judged_elsewhere(row: TableRow, names: Mapping[str, str], judged: Mapping[str, str]) -> list[str]:
    """Return what to say of columns that rules judge while others of the same quantity are written."""
    written = set(names.values())
    return [
        f"rules judge {own}; the columns that are written have {name} for '{quantity}' instead"
        for quantity, own in judged.items()
        if row.columns[own] not in written
        for name in alternatives(quantity, row.columns)
        if row.columns[name] in written
    ]


def _wanted(available: Mapping[str, str], wanted: Sequence[str], judged: Mapping[str, str]) -> dict[str, str]:
    """Return the columns that a user asks for, in whatever case, under the names that he writes.

    A quantity that rules judge is the column that they take for it, unless one has its name.
    """
    names: dict[str, str] = {}
    available = {**{q: column for q, column in judged.items() if q not in map(str.lower, available)}, **available}
    for name in wanted:
        found = [one for one in available if one == name] or [one for one in available if one.lower() == name.lower()]
        if not found:
            raise UserError(f"columns: {unknown('column', name, available)}")
        if name.lower() in {one.lower() for one in names}:
            raise UserError(f"columns: {name!r} is there twice, in whatever case")
        names[name] = available[found[0]]
    return names
