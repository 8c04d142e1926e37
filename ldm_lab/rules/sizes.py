"""The image's size as it was on the web, in pixels, and its shape."""

from ldm_lab.config import NonNegativeInt, register
from ldm_lab.rules.rule import Row, Rule, V


@register("rule", "size")
class Size(Rule):
    """Width and height of the original image; one that is unknown is left out.

    Args:
        min_side, max_side: limits of both sides, pixels; a side that equals one is kept.
        min_width, min_height: limits of one side.
    """

    needs = ("width", "height")

    def __init__(
        self,
        *,
        min_side: NonNegativeInt | None = None,
        max_side: NonNegativeInt | None = None,
        min_width: NonNegativeInt | None = None,
        min_height: NonNegativeInt | None = None,
    ):
        self.min_width, self.min_height = (max(min_side or 0, least or 0) for least in (min_width, min_height))
        self.max_side = max_side

    @staticmethod
    def check(
        *, min_side: int | None, max_side: int | None, min_width: int | None, min_height: int | None
    ) -> list[str]:
        """Return what is wrong across the options."""
        if all(limit is None for limit in (min_side, max_side, min_width, min_height)):
            return ["min_side: this, max_side, min_width or min_height is needed"]
        return []

    def violations(self, row: Row[V]) -> dict[str, V]:
        width, height = row.number("width"), row.number("height")
        conditions = {"unknown_size": width.isnull() | height.isnull()}
        if self.min_width or self.min_height:
            conditions["too_small"] = (width < self.min_width) | (height < self.min_height)
        if self.max_side is not None:
            conditions["too_large"] = (width > self.max_side) | (height > self.max_side)
        return conditions


@register("rule", "aspect_ratio")
class AspectRatio(Rule):
    """Width / height of the original image, in double precision. A ratio that equals a limit is kept.

    Sides below one pixel are too small for a ratio.

    Args:
        at_least, at_most: the limits.
    """

    needs = ("width", "height")

    def __init__(self, *, at_least: float | None = None, at_most: float | None = None):
        self.at_least, self.at_most = at_least, at_most

    @staticmethod
    def check(*, at_least: float | None, at_most: float | None) -> list[str]:
        """Return what is wrong across the options."""
        if at_least is None and at_most is None:
            return ["at_least: this or at_most is needed"]
        if at_least is not None and at_most is not None and at_least > at_most:
            return [f"at_least: {at_least:g} is above at_most, {at_most:g}"]
        return []

    def violations(self, row: Row[V]) -> dict[str, V]:
        width, height = row.number("width"), row.number("height")
        ratio = width / height.nullif(0)
        has_ratio = (width >= 1) & (height >= 1)
        conditions = {"unknown_size": width.isnull() | height.isnull(), "too_small": (width < 1) | (height < 1)}
        limits = [
            *([ratio < self.at_least] if self.at_least is not None else []),
            *([ratio > self.at_most] if self.at_most is not None else []),
        ]
        outside = limits[0] | limits[-1]
        return {**conditions, "aspect_ratio": has_ratio & outside}
