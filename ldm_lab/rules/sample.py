"""The metadata of one sample, as rules see them: what its json says, or a table's row as a dict."""

import math
import re
from collections.abc import Iterable
from typing import Any

from ldm_lab.rules.cell import NUMBER, Cell
from ldm_lab.rules.names import Names, is_of_predictor
from ldm_lab.rules.rule import Rule

NUMBER_TEXT = re.compile(NUMBER)
NO_NAMES = Names()
JSON, BESIDE = "the json of a sample", "the scores beside a shard"  # of messages


class SampleRow:
    """A row of which every quantity may be missing.

    Args:
        values: column -> value.
        swapped_sizes: the column called height holds the width, as in LAION's base collections.
        before: column -> value of what goes before `values`, whatever it calls a quantity.
        names: which column holds which quantity, where a doubt may be.
    """

    WORD = r"\w"

    def __init__(
        self,
        values: dict[str, Any],
        swapped_sizes: bool = False,
        *,
        before: dict[str, Any] | None = None,
        names: Names = NO_NAMES,
    ):
        self.values, self.swapped_sizes, self.before, self.names = values, swapped_sizes, before or {}, names

    def _cell(self, quantity: str) -> Cell:
        own = self._own(quantity)
        column = self.names.find(quantity, self.before, BESIDE) if self.before else None
        if column and (own is None or not is_of_predictor(quantity, own) or is_of_predictor(quantity, column)):
            return Cell(self.before[column])
        return Cell(None if own is None else self.values[own])

    def _own(self, quantity: str) -> str | None:
        found = self.names.find(quantity, self.values, JSON)
        if self.swapped_sizes and found is not None and found.lower() in ("width", "height"):
            return self.names.find({"width": "height", "height": "width"}[quantity], self.values, JSON)
        return found

    def number(self, quantity: str) -> Cell:
        """Return a number; null if it is unknown, NaN, or none."""
        value = self._cell(quantity).value
        try:
            is_none = (
                value is None or isinstance(value, bool) or (isinstance(value, str) and not NUMBER_TEXT.search(value))
            )
            number = None if is_none else float(value)
        except (TypeError, ValueError, OverflowError):
            number = None
        return Cell(None if number is None or math.isnan(number) else number)

    def text(self, quantity: str) -> Cell:
        """Return a text, or null."""
        value = self._cell(quantity).value
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
