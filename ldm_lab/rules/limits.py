"""Numbers within limits: the aesthetic score, the probabilities, the similarity, the caption's length."""

from typing import Literal

from ldm_lab.config import register
from ldm_lab.rules.cell import Cell
from ldm_lab.rules.rule import Row, Rule, V


class Limits(Rule):
    """Base class: keep rows whose number lies within the limits; one that is unknown does not.

    Args:
        above: keep what is greater.
        at_least: keep what is greater or equal.
        below: keep what is less.
        at_most: keep what is less or equal.
    """

    quantity: str

    def __init__(
        self,
        *,
        above: float | None = None,
        at_least: float | None = None,
        below: float | None = None,
        at_most: float | None = None,
    ):
        self.above, self.at_least, self.below, self.at_most = above, at_least, below, at_most

    @staticmethod
    def check(*, above: float | None, at_least: float | None, below: float | None, at_most: float | None) -> list[str]:
        """Return what is wrong across the options."""
        is_limited = any(limit is not None for limit in (above, at_least, below, at_most))
        return [] if is_limited else ["above: this, at_least, below or at_most is needed"]

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.quantity,)

    def value(self, row: Row[V]) -> V:
        """Return the number that the limits are for."""
        return row.number(self.quantity)

    def outside(self, value: V) -> V:
        """Return the condition that a number is outside the limits."""
        limits = [
            *([value <= self.above] if self.above is not None else []),
            *([value < self.at_least] if self.at_least is not None else []),
            *([value >= self.below] if self.below is not None else []),
            *([value > self.at_most] if self.at_most is not None else []),
        ]
        outside = limits[0]
        for limit in limits[1:]:
            outside = outside | limit
        return outside

    def violations(self, row: Row[V]) -> dict[str, V]:
        value = self.value(row)
        return {self.part_name: self.outside(value), "missing_tag": value.isnull()}


@register("rule", "aesthetic")
class Aesthetic(Limits):
    """The aesthetic score, of whichever predictor.

    Args:
        predictor: whose scale the limits are on, and whose scores are judged where a table has both: "v1" (the linear
            heads) or "v2" (the improved predictor). They differ: v2's 5.0 lies near v1's 6.
    """

    quantity = "aesthetic"

    def __init__(
        self,
        *,
        predictor: Literal["v1", "v2"] | None = None,
        **common: float | None,
    ):
        super().__init__(**common)
        self.predictor = predictor
        if predictor is not None:
            self.quantity = f"aesthetic_{predictor}"


@register("rule", "punsafe")
class Unsafe(Limits):
    """The probability that an image is unsafe; LAION keeps what is below 0.5."""

    quantity = "punsafe"


@register("rule", "pwatermark")
class Watermark(Limits):
    """The probability of a watermark; LAION-Aesthetics keeps what is below 0.8."""

    quantity = "pwatermark"


@register("rule", "similarity")
class Similarity(Limits):
    """The cosine of image and text embedding, of whichever CLIP the table was made with."""

    quantity = "similarity"


@register("rule", "caption_length")
class CaptionLength(Limits):
    """Characters of the caption; one that is missing has none."""

    quantity = "caption"

    def violations(self, row: Row[V]) -> dict[str, V]:
        caption = row.text("caption")
        empty = self.outside_of_empty()
        condition = self.outside(caption.length())
        return {"caption_length": condition | caption.isnull() if empty else condition}

    def outside_of_empty(self) -> bool:
        """Return whether no caption at all is outside the limits."""
        return self.outside(Cell(0)).truth
