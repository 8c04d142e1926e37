"""The base class of rules, what they see of a row, and rules out of a config."""

from collections.abc import Collection
from typing import Any, ClassVar, Protocol, Self, TypeVar

from ldm_lab.config import build


class Value(Protocol):
    """A value of a row, or a condition: a `Cell` of one sample, an expression of ibis for a table."""

    def __lt__(self, other: float, /) -> Self: ...
    def __le__(self, other: float, /) -> Self: ...
    def __gt__(self, other: float, /) -> Self: ...
    def __ge__(self, other: float, /) -> Self: ...
    def __ne__(self, other: str | float, /) -> Self: ...  # type: ignore[override]
    def __truediv__(self, other: Self, /) -> Self: ...
    def __and__(self, other: Self, /) -> Self: ...
    def __or__(self, other: Self, /) -> Self: ...
    def __invert__(self) -> Self: ...
    def isnull(self) -> Self: ...
    def nullif(self, other: float, /) -> Self: ...
    def isin(self, values: Collection[str], /) -> Self: ...
    def lower(self) -> Self: ...
    def strip(self) -> Self: ...
    def length(self) -> Self: ...
    def re_search(self, pattern: str, /) -> Self: ...


V = TypeVar("V", bound=Value)
V_co = TypeVar("V_co", bound=Value, covariant=True)


class Row(Protocol[V_co]):
    """A row of metadata: quantities by the names of `quantities.py`.

    Attributes:
        WORD: the characters of words, for use inside [...] in a regular expression.
    """

    WORD: str

    def number(self, quantity: str) -> V_co:
        """Return a number; null where it is unknown."""
        ...

    def text(self, quantity: str) -> V_co:
        """Return a text, or null."""
        ...


class Rule:
    """Base class of all rules; the contract is the docstring of `ldm_lab.rules`.

    Attributes:
        needs: the quantities that it cannot do without.
        short_circuits: a row that breaks it is not asked about the other rules.
        compares_rows: it compares rows with each other, after all others, and so works on tables only.
    """

    part_name: ClassVar[str] = ""

    short_circuits = False
    compares_rows = False

    @property
    def needs(self) -> tuple[str, ...]:
        return ()

    def violations(self, row: Row[V]) -> dict[str, V]:
        """Return {reason: condition} of a row."""
        raise NotImplementedError


def build_rules(section: dict[str, dict[str, Any] | None]) -> list[Rule]:
    """Return the rules of a section `{name: options}`; a name with null stands for no rule, so that it can be switched
    off. Raises UserError."""
    return [build("rule", {"name": name, **options}) for name, options in section.items() if options is not None]
