"""A table as rules see it: quantities under their own names, sizes the right way round, NaN as unknown."""

from decimal import Decimal

import ibis
import ibis.expr.datatypes as dt
import ibis.expr.types as ir

from ldm_lab.errors import UserError
from ldm_lab.rules.cell import NUMBER
from ldm_lab.rules.names import Names
from ldm_lab.rules.quantities import plain
from ldm_lab.rules.rule import Rule

BASE_ONLY = ("sample_id", "license", "nsfw")  # columns that no other release has
BASE_COLUMNS = BASE_ONLY[:2]  # of the base collections, whose sizes are swapped ...
JOINED_COLUMNS = ("hash", "punsafe", "original_width")  # ... and of those that were made right

WIDE = "decimal(20, 0)"  # holds signed and unsigned integers of 64 bits


def sizes_are_swapped(names: list[str]) -> bool:
    """Return whether a table's columns are those of a base collection (laion400m, laion2B-en, laion2B-multi,
    laion1B-nolang), where HEIGHT holds the width and WIDTH the height."""
    lower = {name.lower() for name in names}
    return any(name in lower for name in BASE_COLUMNS) and not any(name in lower for name in JOINED_COLUMNS)


def may_be_swapped(names: list[str]) -> bool:
    """Return whether a table has some columns of a base collection alone beside its sizes: one with a few columns left
    out or added, whose sizes may be swapped whatever `sizes_are_swapped` says."""
    lower = {name.lower() for name in names}
    return {"width", "height"} <= lower and "original_width" not in lower and not lower.isdisjoint(BASE_ONLY)


class TableRow:
    """The row of a table, as expressions of ibis.

    Args:
        table: its columns' names are unique in any case.
        columns: the table's column for each name that the files have.
        names: which column holds which quantity, where a doubt may be.
        swapped_sizes: HEIGHT holds the width.
        where: of messages, such as the files' name.
    """

    WORD = r"\p{L}\p{N}_"

    def __init__(
        self,
        table: ir.Table,
        columns: dict[str, str],
        *,
        names: Names | None = None,
        swapped_sizes: bool = False,
        where: str = "table",
    ):
        self.table, self.columns, self.swapped_sizes, self.where = table, columns, swapped_sizes, where
        self.names = names or Names()

    def name(self, quantity: str) -> str | None:
        """Return the name that the files have for the column with a quantity, None if there is none.

        Raises UserError if several may be meant.
        """
        found = self.names.find(quantity, self.columns, self.where)
        if self.swapped_sizes and found is not None and found.lower() in ("width", "height"):
            found = self.names.find({"width": "height", "height": "width"}[quantity], self.columns, self.where)
        return found

    def column(self, quantity: str) -> ir.Column:
        """Return the column with a quantity, as it is. Raises UserError if there is none."""
        name = self.name(quantity) or self.names.require(quantity, self.columns, self.where)
        return self.table[self.columns[name]]

    def number(self, quantity: str) -> ir.NumericValue:
        """Return a number; null if it is unknown, NaN, or none."""
        return as_number(self._checked(quantity, "number"))

    def text(self, quantity: str) -> ir.StringValue:
        """Return a text, or null."""
        column = self._checked(quantity, "text")
        return column if column.type().is_string() else column.cast("string")

    def _checked(self, quantity: str, what: str) -> ir.Column:
        """Return a column. Raises UserError if its type is neither a number nor a text: engines differ in those."""
        column = self.column(quantity)
        kind = column.type()
        if not (kind.is_string() or kind.is_numeric() or kind.is_boolean() or kind.is_null()):
            name = self.name(quantity)
            raise UserError(f"{self.where}: the column {name!r} is {kind}; for '{plain(quantity)}' a {what} is needed")
        return column

    def violations(self, rule: Rule) -> dict[str, ir.BooleanValue]:
        """Return {reason: condition} of a rule, conditions never null."""
        for quantity in rule.needs:
            self.names.require(quantity, self.columns, f"{self.where}: rule {rule.part_name}")
        return {reason: condition.fill_null(False) for reason, condition in rule.violations(self).items()}


def as_number(column: ir.Column) -> ir.NumericValue:
    """Return a column as double precision, NaN and what is no number as null: engines call NaN greater than all."""
    kind = column.type()
    if kind.is_boolean() or kind.is_null():  # true is no score
        return ibis.null("float64")
    if kind.is_integer():
        return column.cast("float64")
    if kind.is_string():  # engines alone take 8.0f, 1_000 and others for numbers, each its own
        column = ibis.ifelse(column.re_search(NUMBER), column, ibis.null("string")).strip()
        number = column.try_cast("float64")
    else:
        number = column.cast("float64")
    return ibis.ifelse(number.isnan(), ibis.null("float64"), number)


def is_unsigned_hash(kind: dt.DataType) -> bool:
    """Return whether a column's type holds hashes of 64 bits that may be unsigned; Spark reads such as decimals."""
    return isinstance(kind, dt.UInt64) or (isinstance(kind, dt.Decimal) and kind.scale == 0)


def as_hash(column: ir.Column) -> ir.IntegerValue:
    """Return a column of hashes as signed integers of 64 bits, as LAION's are; a text that is none is null.

    One that is written without a sign, above 2^63, is the signed one of the same bits.
    """
    kind = column.type()
    if kind.is_string():
        return ibis.coalesce(column.try_cast("int64"), as_hash(column.try_cast(WIDE)))
    if not is_unsigned_hash(kind):
        return column
    wide = column.cast(WIDE)
    least, turn = (ibis.literal(Decimal(number), WIDE) for number in (2**63, 2**64))
    turns = ibis.ifelse((wide >= least) & (wide < turn), turn, 0)
    return (wide - turns).try_cast("int64")  # null beyond 64 bits


def bit_mask(row: TableRow, rules: list[Rule]) -> tuple[ir.IntegerValue, list[tuple[Rule, str]]]:
    """Return a number per row with a bit for each reason to leave it out, 0 for none, and the bits' meanings."""
    bits: list[tuple[Rule, str]] = []

    def mask_of(chosen: list[Rule]) -> ir.IntegerValue:
        mask = ibis.literal(0, "int64")
        for rule in chosen:
            for reason, condition in row.violations(rule).items():
                mask = mask + ibis.ifelse(condition, ibis.literal(1 << len(bits), "int64"), ibis.literal(0, "int64"))
                bits.append((rule, reason))
        return mask

    first = mask_of([rule for rule in rules if rule.short_circuits and not rule.compares_rows])
    rest = mask_of([rule for rule in rules if not rule.short_circuits and not rule.compares_rows])
    return ibis.ifelse(first > 0, first, rest), bits


def kept_by(row: TableRow, rules: list[Rule]) -> list[ir.BooleanValue]:
    """Return the conditions of which all hold where no rule is broken."""
    return [~condition for rule in rules if not rule.compares_rows for condition in row.violations(rule).values()]
