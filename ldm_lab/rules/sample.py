"""The metadata of one sample, as rules see them: what its json says, or a table's row as a dict."""

import math
from collections.abc import Iterable
from typing import Any

from ldm_lab.rules.cell import Cell
from ldm_lab.rules.quantities import matches
from ldm_lab.rules.rule import Rule


class SampleRow:
    """A row of which every quantity may be missing.

    Args:
        values: column -> value.
        swapped_sizes: the column called height holds the width, as in LAION's base collections.
        before: column -> value of what goes before `values`, whatever it calls a quantity.
    """

    WORD = r"\w"

    def __init__(self, values: dict[str, Any], swapped_sizes: bool = False, *, before: dict[str, Any] | None = None):
        self.values, self.swapped_sizes, self.before = values, swapped_sizes, before or {}

    def _value(self, quantity: str) -> Any:
        if columns := matches(quantity, self.before):
            return self.before[columns[0]]
        columns = matches(quantity, self.values)
        if self.swapped_sizes and columns and columns[0].lower() in ("width", "height"):
            columns = matches({"width": "height", "height": "width"}[quantity], self.values)
        return self.values[columns[0]] if columns else None

    def number(self, quantity: str) -> Cell:
        """Return a number; null if it is unknown, NaN, or none."""
        value = self._value(quantity)
        try:
            number = None if value is None or isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = None
        return Cell(None if number is None or math.isnan(number) else number)

    def text(self, quantity: str) -> Cell:
        """Return a text, or null."""
        value = self._value(quantity)
        return Cell(None if value is None else str(value))


def violated_rules(rules: Iterable[Rule], row: SampleRow) -> list[tuple[str, str]]:
    """Return the (rule, reason) pairs for which a row goes, in the order of the rules; none if it is kept.

    A row that breaks a rule with `short_circuits` is not asked about the others.
    """
    found = []
    for rule in sorted(rules, key=lambda rule: not rule.short_circuits):
        if rule.compares_rows:
            continue
        found += [(rule.part_name, reason) for reason, condition in rule.violations(row).items() if condition.truth]
        if found and rule.short_circuits:
            break
    return found
