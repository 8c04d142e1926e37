"""The columns of a selection: which ones, under which names and types, in which order the rows come."""

from collections.abc import Sequence

import ibis
import ibis.expr.types as ir

from ldm_lab.curation.metadata.tables import TableRow, as_hash
from ldm_lab.errors import UserError, unknown
from ldm_lab.rules.quantities import find

KEY = "ldm_lab_order"  # the column that a shuffled table is ordered by
NUMBERS = ("aesthetic", "punsafe", "pwatermark", "similarity")  # quantities that a text file has as texts
BOOKKEEPING = {  # columns of img2dataset's output that are about the download, and one of pandas'
    "key", "status", "error_message", "exif", "width", "height", "original_width", "original_height",
    "__index_level_0__",
}  # fmt: skip


def output_table(row: TableRow, kept: ir.Table, wanted: Sequence[str] | None, shuffle: int | None) -> ir.Table:
    """Return the kept rows under the names that img2dataset takes, the sizes the right way round.

    Args:
        row: of the table before rows were dropped.
        kept: the rows to write.
        wanted: the columns in their order; None is all that say something of the image.
        shuffle: seed of the hash in the column `KEY`; None for no such column.
    """
    chosen = _names(row, wanted)
    values = {name: kept[column] for name, column in chosen.items()}
    for name, value in values.items():
        if value.type().is_string() and find("hash", [name]):
            values[name] = as_hash(value)  # out of a text file
        elif value.type().is_string() and any(find(quantity, [name]) for quantity in NUMBERS):
            values[name] = value.try_cast("float64")
        elif value.type().is_string() and name in ("WIDTH", "HEIGHT"):
            values[name] = value.try_cast("int32")
    if shuffle is None:
        return kept.select(**values)
    texts = [kept[row.columns[row.name(q)]].cast("string").fill_null("") for q in ("url", "caption") if row.name(q)]
    if not texts:
        raise UserError(f"{row.where}: shuffle needs a column url or caption; there are: {', '.join(row.columns)}")
    seeded = ibis.literal(f"{shuffle} ")
    for text in texts:
        seeded = seeded + text
    return kept.select(**values, **{KEY: seeded.hash()})


def _names(row: TableRow, wanted: Sequence[str] | None) -> dict[str, str]:
    """Return {column of the output: the table's column}."""
    names: dict[str, str] = {}
    standard = {"url": "URL", "caption": "TEXT", "width": "WIDTH", "height": "HEIGHT"}
    taken = {row.name(quantity): name for quantity, name in standard.items() if row.name(quantity)}
    downloaded = {"status", "error_message"} <= {name.lower() for name in row.columns}
    for name, column in row.columns.items():
        if name in taken:
            names[taken[name]] = column
        elif name == "__index_level_0__" or (downloaded and name in BOOKKEEPING):
            continue
        elif name.upper() in taken.values():
            continue  # such as the sizes of the crawl beside those that were measured: rules judge what is written
        else:
            names[name] = column
    if wanted is None:
        return names
    lower = {name.lower(): name for name in names}
    wrong = [name for name in wanted if name.lower() not in lower]
    if wrong:
        raise UserError(f"columns: {unknown('column', wrong[0], names)}")
    return {name: names[lower[name.lower()]] for name in wanted}
