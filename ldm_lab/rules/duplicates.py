"""One row of each kind."""

from typing import Literal

from ldm_lab.config import register
from ldm_lab.rules.rule import Row, Rule, V


@register("rule", "duplicates")
class Duplicates(Rule):
    """Keep one of the rows that are equal in some way, among those that the other rules keep.

    It is the one that comes first in the order of all its columns, so that every engine keeps the same. Rows whose
    value is unknown are all kept.

    Args:
        by: what makes two rows duplicates. "hash" is LAION's, of url and caption, not of the image's bytes; "sha256"
            and "md5" are img2dataset's, of the bytes.
    """

    compares_rows = True

    def __init__(self, *, by: Literal["hash", "url", "caption", "sha256", "md5"] = "hash"):
        self.by = by

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.by,)

    def violations(self, row: Row[V]) -> dict[str, V]:
        return {}
