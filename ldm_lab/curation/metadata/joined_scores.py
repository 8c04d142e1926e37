"""Scores out of other tables, joined by hash."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import ibis
import ibis.expr.types as ir

from ldm_lab.curation.metadata.engine import Engine
from ldm_lab.curation.metadata.inputs import Files
from ldm_lab.curation.metadata.tables import as_hash, as_number, is_unsigned_hash
from ldm_lab.errors import UserError
from ldm_lab.rules.limits import Limits
from ldm_lab.rules.names import QUANTITIES, Names, alternatives
from ldm_lab.rules.quantities import V2, plain
from ldm_lab.rules.rule import Rule

TAG_HASH = "ldm_lab_tag_hash"  # the hashes beside joined scores


class Joined(NamedTuple):
    """A table with scores beside it.

    Attributes:
        columns: its column for each name that the files have and each tag.
        names: which column holds which quantity; the tags go before the table's own.
        notes: what was replaced.
    """

    table: ir.Table
    columns: dict[str, str]
    names: Names
    notes: list[str]


def join_scores(engine: Engine, files: Files, tags: Mapping[str, Files], rules: Sequence[Rule], names: Names) -> Joined:
    """Return a table with the scores of some tags beside it.

    Args:
        engine: opened.
        files: the table.
        tags: quantity -> tables of `hash` and the score.
        rules: whose limits say which of several scores of a hash counts.
        names: which column holds which quantity, in the table and in the tags.
    """
    table = engine.read(files)
    columns = files.columns or {name: name for name in table.columns}
    names.check_there(columns, set(QUANTITIES) - set(tags), files.given[0])
    given = names.given_for("hash", columns)
    for name in {*alternatives("hash", columns), *([given] if given else [])}:
        if is_unsigned_hash(table[columns[name]].type()):
            table = table.mutate(**{columns[name]: as_hash(table[columns[name]])})
    notes = []
    for quantity, tag_files in tags.items():
        key = _hashes(table, columns, names, f"{files.given[0]}: to be joined with tags.{quantity}")
        score = _scores(engine.read(tag_files), tag_files, quantity, rules, names)
        table = table.left_join(score, key == score[TAG_HASH]).drop(TAG_HASH)
        name = _name_of_tag(quantity, rules, columns)
        for own in [column for column in columns if column.lower() == name.lower()]:
            table = table.drop(columns.pop(own))
            notes.append(f"the scores of tags.{quantity} take the place of those in the column {own}")
        columns[name] = f"ldm_lab_{quantity}"
        names = names.saying(quantity, name)
    return Joined(table, columns, names, notes)


def _quantity_asked(quantity: str, rules: Iterable[Rule]) -> str:
    """Return a quantity as the rule about it calls it: of one predictor, perhaps."""
    asked = (rule.quantity for rule in rules if isinstance(rule, Limits) and plain(rule.quantity) == quantity)
    return next(asked, quantity)


def _name_of_tag(quantity: str, rules: Sequence[Rule], columns: Collection[str]) -> str:
    """Return the name of joined scores in the output: not that of another predictor's."""
    if _quantity_asked(quantity, rules) == "aesthetic_v2":
        own = [column for column in columns if column.lower() in V2]
        if own or "aesthetic" in {column.lower() for column in columns}:
            return own[0] if own else V2[0].upper()
    return quantity


def _scores(tags: ir.Table, files: Files, quantity: str, rules: Sequence[Rule], names: Names) -> ir.Table:
    """Return one score per hash: the highest of those that the rules keep, or of all.

    So the threshold comes before duplicates are dropped, as in LAION's join, and yet a row whose only score is
    outside the limits can be told from one without any.
    """
    columns = files.columns or {name: name for name in tags.columns}
    where = f"tags.{quantity}: {files.given[0]}"
    own, asked = names.among(columns), _quantity_asked(quantity, rules)
    name = own.find(asked, columns, where) or own.find("prediction", columns, where)
    name = name or own.require(asked, columns, where)
    key, score = _hashes(tags, columns, own, where), tags[columns[name]]
    number = as_number(score)
    score = number if score.type().is_string() else score  # of texts "9" would be the highest, above "10"
    inside = ~number.isnull()
    for rule in rules:
        if isinstance(rule, Limits) and plain(rule.quantity) == quantity:
            inside = inside & ~rule.outside(number)
    known = tags.select(score=score, inside=inside, known=~number.isnull(), **{TAG_HASH: key})
    known = known.filter(known.known, ~known[TAG_HASH].isnull())
    best = known.group_by(TAG_HASH).agg(best=known.score.max(where=known.inside), any=known.score.max())
    return best.select(TAG_HASH, **{f"ldm_lab_{quantity}": ibis.coalesce(best.best, best["any"])})


def _hashes(table: ir.Table, columns: dict[str, str], names: Names, where: str) -> ir.Column:
    """Return the column of hashes to be joined by, as integers; a text file's that are none are null.

    Raises UserError if there is none, or if it is of a type that cannot hold a hash.
    """
    name = names.require("hash", columns, where)
    hashes = table[columns[name]]
    kind = hashes.type()
    if not (kind.is_string() or kind.is_integer() or is_unsigned_hash(kind)):
        raise UserError(
            f"{where}: the column {name!r} is {kind}; a hash is a signed integer of 64 bits, which this type "
            "cannot hold exactly: rows would get scores of others"
        )
    return as_hash(hashes)
