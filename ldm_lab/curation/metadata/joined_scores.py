"""Scores out of other tables, joined by hash."""

from collections.abc import Mapping, Sequence

import ibis
import ibis.expr.types as ir

from ldm_lab.curation.metadata.engine import Engine
from ldm_lab.curation.metadata.inputs import Files
from ldm_lab.curation.metadata.tables import as_hash, as_number, is_unsigned_hash
from ldm_lab.errors import UserError
from ldm_lab.rules.limits import Limits
from ldm_lab.rules.quantities import find, matches, require
from ldm_lab.rules.rule import Rule

TAG_HASH = "ldm_lab_tag_hash"  # the hashes beside joined scores


def join_scores(
    engine: Engine, files: Files, tags: Mapping[str, Files], rules: Sequence[Rule]
) -> tuple[ir.Table, dict[str, str]]:
    """Return a table with the scores of some tags beside it.

    Args:
        engine: opened.
        files: the table.
        tags: quantity -> tables of `hash` and the score.
        rules: whose limits say which of several scores of a hash counts.

    Returns:
        The table, and its column for each name that the files have and each tagged quantity.
    """
    table = engine.read(files)
    columns = files.columns or {name: name for name in table.columns}
    for name in matches("hash", columns):
        if is_unsigned_hash(table[columns[name]].type()):
            table = table.mutate(**{columns[name]: as_hash(table[columns[name]])})
    for quantity, tag_files in tags.items():
        if own := find(quantity, columns):  # the tags take its place
            table = table.drop(columns.pop(own))
        key = _hashes(table, columns, f"{files.given[0]}: to be joined with tags.{quantity}")
        score = _scores(engine.read(tag_files), tag_files, quantity, rules)
        table = table.left_join(score, key == score[TAG_HASH]).drop(TAG_HASH)
        columns[quantity] = f"ldm_lab_{quantity}"
    return table, columns


def _scores(tags: ir.Table, files: Files, quantity: str, rules: Sequence[Rule]) -> ir.Table:
    """Return one score per hash: the highest of those that the rules keep, or of all.

    So the threshold comes before duplicates are dropped, as in LAION's join, and yet a row whose only score is
    outside the limits can be told from one without any.
    """
    columns = files.columns or {name: name for name in tags.columns}
    where = f"tags.{quantity}: {files.given[0]}"
    name = find(quantity, columns) or find("prediction", columns) or require(quantity, columns, where)
    key, score = _hashes(tags, columns, where), tags[columns[name]]
    number = as_number(score)
    inside = ~number.isnull()
    for rule in rules:
        if isinstance(rule, Limits) and rule.quantity == quantity:
            inside = inside & ~rule.outside(number)
    known = tags.select(score=score, inside=inside, known=~number.isnull(), **{TAG_HASH: key})
    known = known.filter(known.known, ~known[TAG_HASH].isnull())
    best = known.group_by(TAG_HASH).agg(best=known.score.max(where=known.inside), any=known.score.max())
    return best.select(TAG_HASH, **{f"ldm_lab_{quantity}": ibis.coalesce(best.best, best["any"])})


def _hashes(table: ir.Table, columns: dict[str, str], where: str) -> ir.Column:
    """Return the column of hashes to be joined by, as integers; a text file's that are none are null.

    Raises UserError if there is none, or if it is of a type that cannot hold a hash.
    """
    name = require("hash", columns, where)
    hashes = table[columns[name]]
    kind = hashes.type()
    if not (kind.is_string() or kind.is_integer() or is_unsigned_hash(kind)):
        raise UserError(
            f"{where}: the column {name!r} is {kind}; a hash is a signed integer of 64 bits, which this type "
            "cannot hold exactly: rows would get scores of others"
        )
    return as_hash(hashes)
