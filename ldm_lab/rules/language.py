"""The language of the caption, as LAION's tables tell it."""

from typing import Annotated

from annotated_types import MinLen

from ldm_lab.config import register
from ldm_lab.rules.rule import Row, Rule, V


@register("rule", "language")
class Language(Rule):
    """Keep some languages only; trimmed, in any case, whole: "zh" is not "zh-Latn". An unknown one is left out.

    Args:
        keep: such as [en, de]; "nolang" where it could not be told.
    """

    needs = ("language",)

    def __init__(self, *, keep: Annotated[list[str], MinLen(1)]):
        self.keep = [language.strip().lower() for language in keep]

    def violations(self, row: Row[V]) -> dict[str, V]:
        language = row.text("language").strip().lower()
        return {"language": ~language.isin(self.keep), "missing_tag": language.isnull()}
