"""What img2dataset could not download has no image."""

from ldm_lab.config import register
from ldm_lab.rules.rule import Row, Rule, V


@register("rule", "downloaded")
class Downloaded(Rule):
    """Leave out what img2dataset failed to download or to resize; such a row is not asked about anything else.

    A table that img2dataset wrote gets this rule by itself.
    """

    needs = ("status",)
    short_circuits = True

    def violations(self, row: Row[V]) -> dict[str, V]:
        status = row.text("status")
        return {"not_downloaded": status.isnull() | (status != "success")}
