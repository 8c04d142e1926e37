"""Public tables, recognized by their columns."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class KnownTable:
    """A table by columns, in lower case.

    Attributes:
        name: for messages.
        has: columns that it has, among others.
        lacks: columns that it does not have.
        is_all: it has no others.
    """

    name: str
    has: frozenset[str]
    lacks: frozenset[str] = frozenset()
    is_all: bool = False

    def matches(self, columns: frozenset[str]) -> bool:
        """Return whether columns, in lower case, are those of this table."""
        return columns >= self.has and not columns & self.lacks and (not self.is_all or columns == self.has)


BASE = frozenset({"sample_id", "url", "text", "width", "height", "license", "nsfw", "similarity"})
JOINED = frozenset({"url", "text", "width", "height", "similarity", "hash", "punsafe", "pwatermark"})
LAION = (
    KnownTable("laion2B-multi", BASE | {"language"}),
    KnownTable("a base collection of LAION (laion400m, laion2B-en, laion1B-nolang)", BASE),
    KnownTable("LAION-Aesthetics V1 (-aesthetic, laion-art)", JOINED | {"aesthetic"}, frozenset({"aesthetic_score"})),
    KnownTable("LAION-Aesthetics V2 (improved_aesthetics)", JOINED | {"aesthetic_score"}, frozenset({"aesthetic"})),
    KnownTable("LAION's -joined columns with scores of two predictors", JOINED | {"aesthetic", "aesthetic_score"}),
    KnownTable("a -joined table of LAION, or laion-high-resolution", JOINED),
    KnownTable("LAION's aesthetic tags", frozenset({"hash", "aesthetic"}), is_all=True),
    KnownTable("LAION's aesthetic tags", frozenset({"hash", "prediction"}), is_all=True),
    KnownTable("LAION's aesthetic tags", frozenset({"hash", "url", "prediction"}), is_all=True),
)
OTHERS = (
    KnownTable("COYO-700M", frozenset({"image_phash", "watermark_score", "aesthetic_score_laion_v2"})),
    KnownTable("DataComp", frozenset({"uid", "clip_b32_similarity_score", "clip_l14_similarity_score"})),
    KnownTable("url and caption alone, as CC12M and CC3M", frozenset({"url", "caption"}), is_all=True),
)
IMG2DATASET = KnownTable("img2dataset's output", frozenset({"key", "status", "error_message"}))


def known_as(columns: Iterable[str]) -> str | None:
    """Return the name of the table that has such columns, None if it is not known."""
    there = frozenset(column.lower() for column in columns)
    if IMG2DATASET.matches(there):
        source = next((table.name for table in (*LAION, *OTHERS) if table.matches(there)), None)
        return f"{IMG2DATASET.name}, of {source}" if source else IMG2DATASET.name
    return next((table.name for table in (*LAION, *OTHERS) if table.matches(there)), None)
