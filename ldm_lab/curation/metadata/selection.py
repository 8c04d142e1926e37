"""From a release's metadata to the subset to download: rules, join, duplicates, shuffle, a report."""

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import ibis
import ibis.expr.types as ir
from annotated_types import MinLen

from ldm_lab.config import PartMapping, PartSection, PositiveInt, build, register
from ldm_lab.curation.metadata.inputs import Broken, Files, broken_files, find_files
from ldm_lab.curation.metadata.report import Report, Tally
from ldm_lab.curation.metadata.tables import TableRow, as_number, bit_mask, kept_by, may_be_swapped, sizes_are_swapped
from ldm_lab.errors import UserError, unknown
from ldm_lab.io.atomic import replaced_folder
from ldm_lab.rules.limits import Limits
from ldm_lab.rules.quantities import find, require
from ldm_lab.rules.rule import Rule, build_rules

KEY = "ldm_lab_order"  # the column that a shuffled table is ordered by
TAG_HASH = "ldm_lab_tag_hash"  # and the hashes beside joined scores
TAG_QUANTITIES = ("aesthetic", "punsafe", "pwatermark")
BOOKKEEPING = {  # columns of img2dataset's output that are about the download, and one of pandas'
    "key", "status", "error_message", "exif", "width", "height", "original_width", "original_height",
    "__index_level_0__",
}  # fmt: skip
REPORT = "_report.json"  # whoever reads the folder as a table leaves out names that begin with _
SPILL = ".spill"


@register("selection")
class Selection:
    """What `python -m ldm_lab select` does.

    Args:
        input: Parquet, TSV or CSV: paths, folders, globs, or addresses that the engine knows.
        out: folder for the selected rows and _report.json.
        rules: {name: options}, in the order of the report. A name with null switches a rule of `defaults:` off.
        tags: {aesthetic: files, ...}: tables of `hash` and a score, which are joined by hash. Of several scores for one
            hash the highest that the rule keeps counts.
        columns: the columns of the output in their order; null is all that say something of the image.
        language: what the LANGUAGE column says where the table has none.
        swapped_sizes: HEIGHT holds the width; null tells it from the columns.
        shuffle: order the rows by a hash of this seed, url and caption; null keeps their order.
        parts: files to write; null is one with DuckDB.
        skip_broken: leave out Parquet files with damaged row groups, and count them, instead of stopping.
        overwrite: replace an earlier selection in `out`.
        engine: where it runs.
    """

    def __init__(
        self,
        *,
        input: str | list[str],
        out: str,
        rules: Annotated[dict[str, Any], PartMapping("rule")],
        tags: dict[str, Any] | None = None,
        columns: Annotated[list[str], MinLen(1)] | None = None,
        language: str | None = None,
        swapped_sizes: bool | None = None,
        shuffle: int | None = None,
        parts: PositiveInt | None = None,
        skip_broken: bool = False,
        overwrite: bool = False,
        engine: Annotated[dict[str, Any] | None, PartSection("engine")] = None,
    ):
        self.input, self.out, self.columns, self.language = input, Path(out).expanduser(), columns, language
        self.swapped_sizes, self.shuffle, self.parts = swapped_sizes, shuffle, parts
        self.skip_broken, self.overwrite = skip_broken, overwrite
        self.rules_section, self.engine_section = rules, engine or {"name": "duckdb"}
        self.rules = build_rules(rules)
        self.tags = {quantity: files for quantity, files in (tags or {}).items() if files is not None}

    @staticmethod
    def check(section: dict[str, Any]) -> list[str]:
        """Return what is wrong with the values of a section."""
        problems = []
        for quantity, files in (section.get("tags") or {}).items():
            if quantity not in TAG_QUANTITIES:
                problems.append(f"tags.{quantity}: {unknown('tag', quantity, TAG_QUANTITIES)}")
            elif not isinstance(files, str | list | None):
                problems.append(f"tags.{quantity}: files are needed, not {files!r}")
        return problems

    def run(self) -> Report:
        """Write the selection and its report. Raises UserError; then nothing has been written."""
        self._check_out()
        files = find_files(self.input, "input")
        tags = {quantity: find_files(paths, f"tags.{quantity}") for quantity, paths in self.tags.items()}
        try:
            return self._select(files, tags, [])
        except UserError as error:
            if error.__cause__ is None:  # else the engine failed, and perhaps the input is why
                raise
            broken = broken_files(files)
            damaged = broken or [one for table in tags.values() for one in broken_files(table)]
            if not damaged:
                raise
            if self.skip_broken and broken == damaged and len(broken) < len(files.paths):
                paths = tuple(path for path in files.paths if path not in {one.path for one in broken})
                rows = None if files.rows is None else files.rows - sum(one.rows for one in broken)
                return self._select(Files(paths, files.names, rows=rows), tags, broken)
            whole = f"; {len(files.paths) - len(broken)} of {len(files.paths)} files are whole" if broken else ""
            remedy = ", skip_broken=true leaves out the damaged ones" if 0 < len(broken) < len(files.paths) else ""
            raise UserError(f"{damaged[0]}{whole}{remedy}. Nothing was written.") from None

    def _check_out(self) -> None:
        if ":/" in str(self.out):  # what a Path makes of ://
            raise UserError(f"out: {self.out}: a folder is needed that all machines of the engine see, no address")
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"out: {self.out} is a file; a folder is needed")
        there = [path.name for path in self.out.iterdir()] if self.out.is_dir() else []
        if not there:
            return
        if not self.overwrite:
            raise UserError(f"out: {self.out} is not empty; take another folder, or overwrite=true")
        foreign = [name for name in there if name != REPORT and not name.endswith(".parquet")]
        if foreign:
            raise UserError(f"out: {self.out} holds {foreign[0]!r}, which no selection wrote; take another folder")

    def _select(self, files: Files, tags: dict[str, Files], broken: list[Broken]) -> Report:
        engine = build("engine", self.engine_section)
        with replaced_folder(self.out) as folder, engine.open(folder / SPILL):
            table = engine.read(files)
            row, scores = self._joined(engine, table, files, tags)
            rules = self._with_downloaded(row)
            tally = self._count(engine, row, rules)
            kept = self._kept(row, rules)
            output = self._output(row, kept, scores)
            report = Report(
                rows=tally.rows,
                kept=0,
                tally=tally,
                rules={rule.part_name: self.rules_section.get(rule.part_name) or {} for rule in rules},
                input=list(files.paths),
                columns={quantity: row.name(quantity) for rule in rules for quantity in rule.needs},
                swapped_sizes=row.swapped_sizes,
                engine=self.engine_section,
                broken=[str(one) for one in broken],
                broken_rows=sum(one.rows for one in broken),
                output=[name for name in output.columns if name != KEY],
            )
            report.notes += self._notes(row)
            if tally.kept == 0:
                raise UserError(f"the selection is empty, nothing was written:\n{report}")
            report.kept = engine.write(
                output,
                folder,
                parts=self.parts,
                key=KEY if self.shuffle is not None else None,
                metadata={"ldm_lab": json.dumps({"rules": report.rules})},
            )
            across = [rule for rule in rules if rule.across_rows]
            assert across or report.kept == tally.kept, f"{report.kept} rows written, {tally.kept} counted"
            if across:
                tally.removed_after(across[0], tally.kept - report.kept)
            shutil.rmtree(folder / SPILL, ignore_errors=True)
            (folder / REPORT).write_text(json.dumps(report.as_dict(), indent=2, ensure_ascii=False) + "\n")
        return report

    def _joined(
        self, engine: Any, table: ir.Table, files: Files, tags: dict[str, Files]
    ) -> tuple[TableRow, dict[str, str]]:
        """Return the table with the scores of the tags beside it, and {tagged quantity: its column}."""
        columns = files.columns or {name: name for name in table.columns}
        scores = {}
        for quantity, tag_files in tags.items():
            if own := find(quantity, columns):  # the tags take its place
                table = table.drop(columns.pop(own))
            key = _hashes(table, columns, f"{files.paths[0]}: to be joined with tags.{quantity}")
            score = self._scores(engine.read(tag_files), tag_files, quantity)
            table = table.left_join(score, key == score[TAG_HASH]).drop(TAG_HASH)
            columns[quantity] = scores[quantity] = f"ldm_lab_{quantity}"
        swapped = sizes_are_swapped(list(columns)) if self.swapped_sizes is None else self.swapped_sizes
        where = files.paths[0] if len(files.paths) == 1 else f"{files.paths[0]} (and {len(files.paths) - 1} more)"
        if self.language is not None and find("language", columns) is None:
            columns["LANGUAGE"] = "LANGUAGE"
            table = table.mutate(LANGUAGE=ibis.literal(self.language))
        return TableRow(table, columns, swapped_sizes=swapped, where=where), scores

    def _scores(self, tags: ir.Table, files: Files, quantity: str) -> ir.Table:
        """Return one score per hash: the highest of those that the rules keep, or of all.

        So the threshold comes before duplicates are dropped, as in LAION's join, and yet a row whose only score is
        outside the limits can be told from one without any.
        """
        columns = files.columns or {name: name for name in tags.columns}
        where = f"tags.{quantity}: {files.paths[0]}"
        name = find(quantity, columns) or find("prediction", columns) or require(quantity, columns, where)
        key, score = _hashes(tags, columns, where), tags[columns[name]]
        number = as_number(score)
        inside = ~number.isnull()
        for rule in self.rules:
            if isinstance(rule, Limits) and rule.quantity == quantity:
                inside = inside & ~rule.outside(number)
        known = tags.select(score=score, inside=inside, known=~number.isnull(), **{TAG_HASH: key})
        known = known.filter(known.known, ~known[TAG_HASH].isnull())
        best = known.group_by(TAG_HASH).agg(best=known.score.max(where=known.inside), any=known.score.max())
        return best.select(TAG_HASH, **{f"ldm_lab_{quantity}": ibis.coalesce(best.best, best["any"])})

    def _with_downloaded(self, row: TableRow) -> list[Rule]:
        """Return the rules; a table that img2dataset wrote gets the one about failed downloads."""
        lower = {name.lower() for name in row.columns}
        if {"status", "error_message"} <= lower and "downloaded" not in self.rules_section:
            return [build("rule", {"name": "downloaded"}), *self.rules]
        return self.rules

    def _count(self, engine: Any, row: TableRow, rules: list[Rule]) -> Tally:
        """Return how many rows break which rules: one pass over the columns that the rules need."""
        mask, bits = bit_mask(row, rules)
        masks = row.table.select(mask=mask).group_by("mask").agg(count=ibis._.count())
        return Tally(rules, bits, {int(entry["mask"]): int(entry["count"]) for entry in engine.rows(masks)})

    def _kept(self, row: TableRow, rules: list[Rule]) -> ir.Table:
        """Return the rows that all rules keep."""
        conditions = kept_by(row, rules)
        kept = row.table.filter(conditions) if conditions else row.table
        for rule in rules:
            if rule.across_rows:
                for quantity in rule.needs:
                    require(quantity, row.columns, f"{row.where}: rule {rule.part_name}")
                kept = _first_of_each(kept, row.columns[row.name(rule.by)])
        return kept

    def _output(self, row: TableRow, kept: ir.Table, scores: dict[str, str]) -> ir.Table:
        """Return the kept rows under the names that img2dataset takes, the sizes the right way round."""
        chosen = self._names(row, scores)
        values = {name: kept[column] for name, column in chosen.items()}
        for name, value in values.items():
            if value.type().is_string() and find("hash", [name]):
                values[name] = value.try_cast("int64")  # out of a text file
            elif value.type().is_string() and any(
                find(quantity, [name]) for quantity in (*TAG_QUANTITIES, "similarity")
            ):
                values[name] = value.try_cast("float64")
            elif value.type().is_string() and name in ("WIDTH", "HEIGHT"):
                values[name] = value.try_cast("int32")
        if self.shuffle is None:
            return kept.select(**values)
        texts = [kept[row.columns[row.name(q)]].cast("string").fill_null("") for q in ("url", "caption") if row.name(q)]
        if not texts:
            raise UserError(f"{row.where}: shuffle needs a column url or caption; there are: {', '.join(row.columns)}")
        seeded = ibis.literal(f"{self.shuffle} ")
        for text in texts:
            seeded = seeded + text
        return kept.select(**values, **{KEY: seeded.hash()})

    def _names(self, row: TableRow, scores: dict[str, str]) -> dict[str, str]:
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
            elif name.upper() in standard.values() and downloaded:
                continue  # the sizes of the crawl beside those that were measured
            else:
                names[name] = column
        if self.columns is None:
            return names
        lower = {name.lower(): name for name in names}
        wrong = [name for name in self.columns if name.lower() not in lower]
        if wrong:
            raise UserError(f"columns: {unknown('column', wrong[0], names)}")
        return {name: names[lower[name.lower()]] for name in self.columns}

    def _notes(self, row: TableRow) -> list[str]:
        """Return what somebody should know of this selection."""
        notes = []
        if self.swapped_sizes is None and not row.swapped_sizes and may_be_swapped(list(row.columns)):
            notes.append(
                "the sizes were taken as they are, though some columns are those of a base collection, whose WIDTH and "
                "HEIGHT are swapped: swapped_sizes=true or false says which it is"
            )
        for rule in self.rules:
            predictor = getattr(rule, "predictor", None)
            name = row.name("aesthetic") if predictor else None
            if name and (name == "AESTHETIC_SCORE") != (predictor == "v2"):
                usual = "v2" if name == "AESTHETIC_SCORE" else "v1"
                notes.append(
                    f"the column {name} usually holds scores of the predictor {usual}; the limits of "
                    f"rules.aesthetic are meant for {predictor}, whose scale is another"
                )
        return notes


def _hashes(table: ir.Table, columns: dict[str, str], where: str) -> ir.Column:
    """Return the column of hashes to be joined by, as integers; a text file's that are none are null.

    Raises UserError if there is none, or if it is of a type that cannot hold a hash.
    """
    name = require("hash", columns, where)
    hashes = table[columns[name]]
    if hashes.type().is_string():
        return hashes.try_cast("int64")
    if not hashes.type().is_integer():
        raise UserError(
            f"{where}: the column {name!r} is {hashes.type()}; a hash is a signed integer of 64 bits, which this type "
            "cannot hold exactly: rows would get scores of others"
        )
    return hashes


def _first_of_each(table: ir.Table, column: str) -> ir.Table:
    """Return the table with one row per value of a column, all rows where it is null: the first by all columns."""
    rest = [table[name] for name in table.columns if name != column]
    place = ibis.row_number().over(ibis.window(group_by=table[column], order_by=rest))
    numbered = table.mutate(ldm_lab_place=place)
    return numbered.filter((numbered.ldm_lab_place == 0) | numbered[column].isnull()).drop("ldm_lab_place")
