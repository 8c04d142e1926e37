"""The base class of rules, and rules out of a config."""

from collections.abc import Iterable
from typing import Any, ClassVar, Protocol

from ldm_lab.config import build, check_section


class Value(Protocol):
    """A value of a row, or null: an expression of ibis for a table, a `cell.Cell` for a sample."""

    def __lt__(self, other: "Value | float") -> "Value": ...
    def __le__(self, other: "Value | float") -> "Value": ...
    def __gt__(self, other: "Value | float") -> "Value": ...
    def __ge__(self, other: "Value | float") -> "Value": ...
    def __truediv__(self, other: "Value") -> "Value": ...
    def __and__(self, other: "Value") -> "Value": ...
    def __or__(self, other: "Value") -> "Value": ...
    def __invert__(self) -> "Value": ...

    def isnull(self) -> "Value":
        """Return whether it is unknown."""
        ...

    def nullif(self, other: float) -> "Value":
        """Return null in the place of one value."""
        ...

    def isin(self, values: Iterable[str]) -> "Value":
        """Return whether it is one of some values."""
        ...

    def lower(self) -> "Value":
        """Return a text in lower case."""
        ...

    def strip(self) -> "Value":
        """Return a text without the blanks around it."""
        ...

    def length(self) -> "Value":
        """Return the characters (code points) of a text."""
        ...

    def re_search(self, pattern: str) -> "Value":
        """Return whether a regular expression is found in a text."""
        ...


class Row(Protocol):
    """A row as rules see it: the quantities that they speak of, whatever the release calls them (`quantities.py`).

    Attributes:
        WORD: the characters of words, for use inside [...] in a regular expression.
    """

    WORD: str

    def number(self, quantity: str) -> Value:
        """Return a number; null if it is unknown: missing, null, NaN, not a number."""
        ...

    def text(self, quantity: str) -> Value:
        """Return a text, or null."""
        ...


Violations = dict[str, Value]  # reason -> whether a row goes for it


class Rule:
    """Base class of all rules; the contract is the docstring of `ldm_lab.rules`.

    Attributes:
        needs: the quantities that it cannot do without.
        short_circuits: a row that violates it is not asked about the other rules.
        compares_rows: it compares rows with each other, after all others, and so works on tables only.
    """

    part_name: ClassVar[str]
    needs: tuple[str, ...] = ()
    short_circuits = False
    compares_rows = False

    def violations(self, row: Row) -> Violations:
        """Return {reason: condition} of a row; it goes where one of the conditions holds."""
        raise NotImplementedError


def build_rules(section: dict[str, dict[str, Any] | None]) -> list[Rule]:
    """Return the rules of a section `{name: options}`; a name with null stands for no rule, so that it can be switched
    off. Raises UserError."""
    return [build("rule", {"name": name, **options}) for name, options in section.items() if options is not None]


def check_rules(section: Any, where: str = "rules") -> list[str]:
    """Return what is wrong with a section of rules, each with its key path."""
    if not isinstance(section, dict):
        return [f"{where}: a section of rules is needed, `{where}: {{punsafe: {{below: 0.5}}}}`, not {section!r}"]
    problems = []
    for name, options in section.items():
        if options is None:
            continue
        if not isinstance(options, dict):
            problems.append(f"{where}.{name}: options are needed, such as {{below: 0.5}}, not {options!r}")
            continue
        problems += check_section("rule", {"name": name, **options}, f"{where}.{name}")
    return problems
