"""The base class of rules, and rules out of a config."""

from typing import Any

from ldm_lab.config import build


class Rule:
    """Base class of all rules; the contract is the docstring of `ldm_lab.rules`.

    Attributes:
        needs: the quantities that it cannot do without.
        comes_first: a row that breaks it is not asked about the other rules.
        across_rows: it compares rows with each other, after all others, and so works on tables only.
    """

    needs: tuple[str, ...] = ()
    comes_first = False
    across_rows = False

    def broken(self, row: Any) -> dict[str, Any]:
        """Return {reason: condition} of a row."""
        raise NotImplementedError


def build_rules(section: dict[str, dict[str, Any] | None]) -> list[Rule]:
    """Return the rules of a section `{name: options}`; a name with null stands for no rule, so that it can be switched
    off. Raises UserError."""
    return [build("rule", {"name": name, **options}) for name, options in section.items() if options is not None]
