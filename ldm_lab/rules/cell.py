"""A single value with the null logic and the method names of a table's column, so that one rule serves both."""

import re
from collections.abc import Callable, Iterable
from typing import Any


class Cell:
    """A value, or null (None). Operations on null give null, but for & and |, where the other side may decide.

    `truth` of a condition that is null is False.
    """

    __slots__ = ("value",)
    __hash__ = None

    def __init__(self, value: Any):
        self.value = value

    @property
    def truth(self) -> bool:
        """Whether a condition holds."""
        return self.value is True

    def _with(self, other: Any, operation: Callable[[Any, Any], Any]) -> "Cell":
        value = other.value if isinstance(other, Cell) else other
        return Cell(None if self.value is None or value is None else operation(self.value, value))

    def _on(self, operation: Callable[[Any], Any]) -> "Cell":
        return Cell(None if self.value is None else operation(self.value))

    def __lt__(self, other: Any) -> "Cell":
        return self._with(other, lambda a, b: a < b)

    def __le__(self, other: Any) -> "Cell":
        return self._with(other, lambda a, b: a <= b)

    def __gt__(self, other: Any) -> "Cell":
        return self._with(other, lambda a, b: a > b)

    def __ge__(self, other: Any) -> "Cell":
        return self._with(other, lambda a, b: a >= b)

    def __eq__(self, other: Any) -> "Cell":
        return self._with(other, lambda a, b: a == b)

    def __ne__(self, other: Any) -> "Cell":
        return self._with(other, lambda a, b: a != b)

    def __truediv__(self, other: Any) -> "Cell":
        return self._with(other, lambda a, b: a / b)

    def __and__(self, other: "Cell") -> "Cell":
        if self.value is False or other.value is False:
            return Cell(False)
        return self._with(other, lambda a, b: a and b)

    def __or__(self, other: "Cell") -> "Cell":
        if self.value is True or other.value is True:
            return Cell(True)
        return self._with(other, lambda a, b: a or b)

    def __invert__(self) -> "Cell":
        return self._on(lambda a: not a)

    def isnull(self) -> "Cell":
        return Cell(self.value is None)

    def nullif(self, other: Any) -> "Cell":
        return Cell(None if self.value == other else self.value)

    def isin(self, values: Iterable[Any]) -> "Cell":
        return self._on(lambda a: a in values)

    def lower(self) -> "Cell":
        return self._on(str.lower)

    def strip(self) -> "Cell":
        return self._on(lambda a: a.strip(" \t\n\r\v\f"))

    def length(self) -> "Cell":
        """Characters (code points) of a text."""
        return self._on(len)

    def re_search(self, pattern: str) -> "Cell":
        return self._on(lambda a: re.search(pattern, a) is not None)
