"""Which column holds which quantity: what the user says, or else what public tables call it; a doubt is asked."""

import json
import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from ldm_lab.errors import UserError, unknown
from ldm_lab.rules.quantities import NAMES, OF_COYO, OF_DATACOMP, PLAIN, RELEASES, plain

ASK = "names.{quantity}={column}"  # how a doubt is answered on the command line
BARE = re.compile(r"[^\W\d][\w.-]*")  # a column's name that YAML takes for a text; but for the words below
WORDS = ("true", "false", "yes", "no", "on", "off", "null")
QUANTITIES = tuple(quantity for quantity in NAMES if quantity not in (*PLAIN, "prediction"))  # that users name


@dataclass(frozen=True)
class Names:
    """A mapping of quantities to columns, which may leave out most.

    Attributes:
        given: (quantity, column) pairs that go before all others.
        ask: how an override is written that answers a doubt.
    """

    given: tuple[tuple[str, str], ...] = ()
    ask: str = ASK

    @classmethod
    def of(cls, mapping: Mapping[str, str | None] | None, ask: str = ASK) -> "Names":
        """Return the names of a section; null stands for none."""
        pairs = [(quantity, column) for quantity, column in (mapping or {}).items() if column is not None]
        return cls(tuple(pairs), ask)

    def has(self, quantity: str) -> bool:
        """Return whether the user says which column it is."""
        return plain(quantity) in dict(self.given)

    def given_for(self, quantity: str, columns: Iterable[str]) -> str | None:
        """Return the column that the user says, None if there is none of its name."""
        column = dict(self.given).get(plain(quantity))
        return None if column is None else _called(column, columns)

    def saying(self, quantity: str, column: str) -> "Names":
        """Return the names with one more, which goes before all others."""
        rest = tuple(pair for pair in self.given if pair[0] != quantity)
        return replace(self, given=(*rest, (quantity, column)))

    def find(self, quantity: str, columns: Iterable[str], where: str = "") -> str | None:
        """Return the column that holds a quantity, in whatever case; None if there is none.

        Raises:
            UserError: several may be meant.
        """
        return _found(self, quantity, tuple(columns), where)

    def among(self, columns: Collection[str]) -> "Names":
        """Return the names as far as some columns are theirs, for another table than the one that they are of."""
        return replace(self, given=tuple(pair for pair in self.given if _called(pair[1], columns)))

    def require(self, quantity: str, columns: Iterable[str], where: str) -> str:
        """Return the column that holds a quantity. Raises UserError that says which releases have it."""
        columns = tuple(columns)
        found = self.find(quantity, columns, where)
        if found is None:
            self.check_there(columns, [plain(quantity)], where)
            usual = [name for group in NAMES[quantity] for name in group if name not in (*OF_COYO, *OF_DATACOMP)]
            has = f" It is in {RELEASES[plain(quantity)]}." if plain(quantity) in RELEASES else ""
            raise UserError(
                f"{where}: no column {' or '.join(usual)} (in any case) for '{plain(quantity)}'; there are: "
                f"{', '.join(columns)}. {self.answer(quantity, 'COLUMN')} says another.{has}"
            )
        return found

    def check_there(self, columns: Iterable[str], quantities: Iterable[str], where: str) -> None:
        """Raise UserError if a column that is given for one of some quantities is not among those of a table."""
        columns, wanted = list(columns), set(quantities)
        for quantity, column in self.given:
            if quantity in wanted and not _called(column, columns):
                raise UserError(f"{where}: {self.answer(quantity, column)}: {unknown('column', column, columns)}")

    def answer(self, quantity: str, column: str) -> str:
        """Return the override that says which column holds a quantity, quoted for a shell."""
        is_bare = BARE.fullmatch(column) and column.lower() not in WORDS
        value = column if is_bare else json.dumps(column, ensure_ascii=False)
        word = self.ask.format(quantity=plain(quantity), column=value)
        return word if re.fullmatch(r"[\w =.,-]+", word) else shlex.quote(word)


def check_names(names: Mapping[str, str | None] | None) -> list[str]:
    """Return what is wrong with a section `names`."""
    wrong = [quantity for quantity in (names or {}) if quantity not in QUANTITIES]
    return [f"names.{quantity}: {unknown('quantity', quantity, QUANTITIES)}" for quantity in wrong]


def alternatives(quantity: str, columns: Iterable[str]) -> list[str]:
    """Return all columns that public tables have for a quantity, in any case."""
    columns = list(columns)
    return [column for group in NAMES[quantity] for name in group for column in columns if column.lower() == name]


def is_of_predictor(quantity: str, column: str) -> bool:
    """Return whether a column is known for the scores of the one predictor that a quantity asks for."""
    return quantity in PLAIN and column.lower() in NAMES[quantity][0]


def is_downloaded(columns: Iterable[str]) -> bool:
    """Return whether img2dataset wrote a table, or the json of a sample, of these columns."""
    return {"status", "error_message"} <= {column.lower() for column in columns}


def _called(name: str, columns: Iterable[str]) -> str | None:
    """Return the column of a name, or the only one that has it in another case."""
    columns = list(columns)
    others = [column for column in columns if column.lower() == name.lower()]
    return name if name in columns else others[0] if len(others) == 1 else None


@lru_cache(maxsize=4096)  # the samples of a shard have the same few columns
def _found(names: Names, quantity: str, columns: tuple[str, ...], where: str) -> str | None:
    if names.has(quantity):
        return names.given_for(quantity, columns)
    for group in NAMES[quantity]:
        found = [column for name in group for column in columns if column.lower() == name]
        if len(found) > 1 and len({column.lower() for column in found}) == 1 and is_downloaded(columns):
            found = [column for column in found if column.islower()] or found  # img2dataset's own
        if len(found) > 1:
            answers = " or ".join(names.answer(quantity, column) for column in found)
            said = " and ".join(map(repr, found))
            raise UserError(
                f"{f'{where}: ' if where else ''}several columns may be meant by '{plain(quantity)}': {said}; say "
                f"which one: {answers}"
            )
        if found:
            return found[0]
    return None
