"""Where a table has the keys of a score store."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ldm_lab.errors import UserError, unknown
from ldm_lab.rules.names import Names

FLAGS = {"hash": "key", "url": "url", "caption": "text", "aesthetic": "score"}  # quantity -> flag that names its column


@dataclass
class Columns:
    """Where a table has the keys: a column of hashes, or those of url and text, which are hashed."""

    hash: str | None = None
    url: str | None = None
    text: str | None = None

    @classmethod
    def of(cls, columns: Iterable[str], where: str, key: str | None, url: str | None, text: str | None) -> "Columns":
        """Return them by the names given, or else by those of LAION's releases and img2dataset's tables.

        The hash, unless there is none or `url` or `text` is given. Raises UserError if a column is not there.
        """
        columns = list(columns)
        if key is not None and (url is not None or text is not None):
            raise UserError("--key names the hash, --url and --text what to make one of: give one of these")
        if url is None and text is None and (key is not None or _names("hash").find("hash", columns, where)):
            return cls(hash=named(key, "hash", columns, where))
        return cls(url=named(url, "url", columns, where), text=named(text, "caption", columns, where))


def named(given: str | None, quantity: str, columns: Sequence[str], where: str) -> str:
    """Return the column of a given name, in whatever case, or else the one that holds a quantity. Raises UserError."""
    if given is None:
        return _names(quantity).require(quantity, columns, where)
    found = [name for name in columns if name == given] or [name for name in columns if name.lower() == given.lower()]
    if not found:
        raise UserError(unknown("column", given, columns).replace("no such", f"{where}: no such", 1))
    return found[0]


def _names(quantity: str) -> Names:
    """Return no names, but how a flag gives one."""
    return Names(ask=f"--{FLAGS[quantity]} {{column}}")


def not_a_hash(column: str, kind: str, is_float: bool) -> UserError:
    """Return the error about a column of hashes of the wrong type."""
    why = ", which cannot hold one exactly" if is_float else ""
    return UserError(
        f"column {column!r}: a hash is an integer of 64 bits, this column is {kind}{why}; "
        "--url and --text hash these columns instead"
    )
