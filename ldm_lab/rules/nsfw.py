"""The NSFW tag of LAION's base collections."""

from collections.abc import Sequence

from ldm_lab.config import register
from ldm_lab.rules.rule import Row, Rule, V


@register("rule", "nsfw")
class NSFW(Rule):
    """The tag as a whole, trimmed, in any case: "UNLIKELY" contains "LIKELY", and columns have shifted in places.

    Args:
        drop: tags that are left out. Everything else is kept, a missing tag included.
        keep: the only tags that are kept, instead of `drop`; a missing tag is left out then.
    """

    needs = ("nsfw",)

    def __init__(self, *, drop: list[str] = (), keep: list[str] | None = None):
        self.drop = [tag.strip().lower() for tag in drop]
        self.keep = None if keep is None else [tag.strip().lower() for tag in keep]

    @staticmethod
    def check(*, drop: Sequence[str], keep: Sequence[str] | None) -> list[str]:
        """Return what is wrong across the options."""
        if bool(drop) == bool(keep):
            return ["drop: either this or keep is needed, a list such as [NSFW, LIKELY]"]
        return []

    def violations(self, row: Row[V]) -> dict[str, V]:
        tag = row.text("nsfw").strip().lower()
        if self.keep is None:
            return {"nsfw": tag.isin(self.drop)}
        return {"nsfw": ~tag.isin(self.keep), "missing_tag": tag.isnull()}
