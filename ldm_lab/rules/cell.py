"""A single value with the null logic and the method names of a table's column, so that one rule serves both."""

import operator
import re
from collections.abc import Callable, Container

# Texts that are numbers, in RE2, Java and Python alike; what is left over, such as NaN and 1_000, is unknown.
NUMBER = r"(?i)^[ \t\n\r\f\v]*[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|inf|infinity)[ \t\n\r\f\v]*$"
Scalar = str | float | bool | None


class Cell:
    """A value, or null (None). Operations on null give null, but for & and |, where the other side may decide.

    `truth` of a condition that is null is False.
    """

    __slots__ = ("value",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: Scalar) -> None:
        self.value = value

    @property
    def truth(self) -> bool:
        """Whether a condition holds."""
        return self.value is True

    def _with(self, other: "Cell | Scalar", operation: Callable[..., Scalar]) -> "Cell":
        value = other.value if isinstance(other, Cell) else other
        return Cell(None if self.value is None or value is None else operation(self.value, value))

    def _on(self, operation: Callable[..., Scalar]) -> "Cell":
        return Cell(None if self.value is None else operation(self.value))

    def __lt__(self, other: "Cell | Scalar") -> "Cell":
        return self._with(other, operator.lt)

    def __le__(self, other: "Cell | Scalar") -> "Cell":
        return self._with(other, operator.le)

    def __gt__(self, other: "Cell | Scalar") -> "Cell":
        return self._with(other, operator.gt)

    def __ge__(self, other: "Cell | Scalar") -> "Cell":
        return self._with(other, operator.ge)

    def __eq__(self, other: "Cell | Scalar") -> "Cell":  # type: ignore[override]
        return self._with(other, operator.eq)

    def __ne__(self, other: "Cell | Scalar") -> "Cell":  # type: ignore[override]
        return self._with(other, operator.ne)

    def __truediv__(self, other: "Cell | Scalar") -> "Cell":
        return self._with(other, operator.truediv)

    def __and__(self, other: "Cell") -> "Cell":
        if self.value is False or other.value is False:
            return Cell(False)
        return self._with(other, operator.and_)

    def __or__(self, other: "Cell") -> "Cell":
        if self.value is True or other.value is True:
            return Cell(True)
        return self._with(other, operator.or_)

    def __invert__(self) -> "Cell":
        return self._on(operator.not_)

    def isnull(self) -> "Cell":
        return Cell(self.value is None)

    def nullif(self, other: Scalar) -> "Cell":
        return Cell(None if self.value == other else self.value)

    def isin(self, values: Container[Scalar]) -> "Cell":
        return self._on(lambda value: value in values)

    def lower(self) -> "Cell":
        return self._on(str.lower)

    def strip(self) -> "Cell":
        return self._on(lambda text: text.strip(" \t\n\r\v\f"))

    def length(self) -> "Cell":
        """Characters (code points) of a text."""
        return self._on(len)

    def re_search(self, pattern: str) -> "Cell":
        return self._on(lambda text: re.search(pattern, text) is not None)
