"""What the releases of LAION and img2dataset call the quantities that rules speak of."""

from collections.abc import Iterable

from ldm_lab.errors import UserError

# quantity -> column names, in lower case, the first one that is there counts.
NAMES = {
    "url": ("url",),
    "caption": ("caption", "text"),
    "width": ("original_width", "width"),  # img2dataset's `width` is that of the resized image
    "height": ("original_height", "height"),
    "similarity": ("similarity",),
    "hash": ("hash",),
    "punsafe": ("punsafe",),
    "pwatermark": ("pwatermark",),
    "aesthetic": ("aesthetic", "aesthetic_score", "prediction"),
    "prediction": ("prediction",),  # what LAION's scoring writes, whatever it scored
    "nsfw": ("nsfw",),
    "language": ("language",),
    "status": ("status",),
    "sha256": ("sha256",),
    "md5": ("md5",),
}
# quantity -> who has it, for messages
RELEASES = {
    "width": "all releases of LAION (WIDTH, HEIGHT), img2dataset's output (original_width, original_height)",
    "height": "all releases of LAION (WIDTH, HEIGHT), img2dataset's output (original_width, original_height)",
    "similarity": "all releases of LAION",
    "hash": "the -joined, -aesthetic and -aesthetic-tags tables, laion-art, laion-high-resolution, improved_aesthetics",
    "punsafe": "the -joined and -aesthetic tables, laion-art, laion-high-resolution, improved_aesthetics; "
    "the base collections have NSFW instead",
    "pwatermark": "the -joined and -aesthetic tables, laion-art, laion-high-resolution, improved_aesthetics",
    "aesthetic": "the -aesthetic tables and laion-art (aesthetic), improved_aesthetics (AESTHETIC_SCORE), the "
    "-aesthetic-tags (aesthetic or prediction, to be joined with `tags:`), what `python -m ldm_lab score` writes",
    "nsfw": "the base collections: laion400m, laion2B-en, laion2B-multi, laion1B-nolang; the -joined tables have "
    "punsafe instead",
    "language": "laion2B-multi and its -joined and -aesthetic tables, laion-art, laion-high-resolution; `language: en` "
    "says it for a table of one language",
    "status": "img2dataset's output",
    "sha256": "img2dataset's output, by its default compute_hash",
    "md5": "img2dataset's output, with compute_hash md5",
}


def find(quantity: str, columns: Iterable[str]) -> str | None:
    """Return the column that holds a quantity, in whatever case; None if there is none.

    Raises:
        UserError: two columns differ in case only.
    """
    found = matches(quantity, columns)
    if len(found) > 1:
        raise UserError(f"{quantity}: the columns {' and '.join(map(repr, found))} differ in case only")
    return found[0] if found else None


def matches(quantity: str, columns: Iterable[str]) -> list[str]:
    """Return the columns that may hold a quantity: those with the first of its names that is there."""
    columns = list(columns)
    for name in NAMES[quantity]:
        if found := [column for column in columns if column.lower() == name]:
            return found
    return []


def require(quantity: str, columns: Iterable[str], where: str) -> str:
    """Return the column that holds a quantity. Raises UserError that says which releases have it."""
    columns = list(columns)
    found = find(quantity, columns)
    if found is None:
        names = " or ".join(NAMES[quantity])
        has = f" It is in {RELEASES[quantity]}." if quantity in RELEASES else ""
        raise UserError(
            f"{where}: no column {names} (in any case) for '{quantity}'; there are: {', '.join(columns)}.{has}"
        )
    return found
