"""From a release's metadata to the subset to download: rules, join, duplicates, shuffle, a report."""

import json
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import ibis
import ibis.expr.datatypes as dt
import ibis.expr.types as ir
from annotated_types import MinLen

from ldm_lab.config import PartMapping, PartSection, PositiveInt, build, register
from ldm_lab.curation.metadata.engine import Engine
from ldm_lab.curation.metadata.inputs import Broken, Files, broken_files, find_files, table_notes
from ldm_lab.curation.metadata.joined_scores import join_scores
from ldm_lab.curation.metadata.output import KEY, output_columns, output_table
from ldm_lab.curation.metadata.report import Report, RuleCounts
from ldm_lab.curation.metadata.tables import TableRow, bit_mask, kept_by, may_be_swapped, sizes_are_swapped
from ldm_lab.curation.metadata.text_files import BadLines, as_parquet
from ldm_lab.errors import UserError, unknown
from ldm_lab.io.atomic import replaced_folder
from ldm_lab.rules.duplicates import Duplicates
from ldm_lab.rules.known_tables import known_as
from ldm_lab.rules.limits import Aesthetic
from ldm_lab.rules.names import Names, check_names, is_downloaded, is_of_predictor
from ldm_lab.rules.quantities import STANDARD, plain
from ldm_lab.rules.rule import Rule, build_rules

TAG_QUANTITIES = ("aesthetic", "punsafe", "pwatermark")
REPORT = "_report.json"  # whoever reads the folder as a table leaves out names that begin with _
SPILL = ".spill"


@register("selection")
class Selection:
    """What `python -m ldm_lab select` does.

    Args:
        input: Parquet, TSV, CSV, JSON lines, lists of urls (.txt): paths, folders, globs; or addresses
            of Parquet that the engine knows.
        out: folder for the selected rows and _report.json.
        rules: {name: options}, in the order of the report. A name with null switches a rule of `defaults:` off.
        tags: {aesthetic: files, ...}: tables of `hash` and a score, which are joined by hash. Of several scores for one
            hash the highest that the rule keeps counts.
        names: {aesthetic: aesthetic_score_laion_v2, ...}: which column holds which quantity, for rules and the output,
            where a table has several for one, or one of another name than the public tables.
        columns: the columns of the output in their order; null is all that say something of the image.
        language: what the LANGUAGE column says where the table has none.
        swapped_sizes: HEIGHT holds the width; null tells it from the columns.
        shuffle: order the rows by a hash of this seed, url and caption; null keeps their order.
        parts: files to write; null is one with DuckDB.
        skip_broken: leave out Parquet files with damaged row groups, and count them, instead of stopping.
        bad_lines: of text files: "skip" leaves them out and counts them, "error" stops at the first.
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
        names: dict[str, str | None] | None = None,
        columns: Annotated[list[str], MinLen(1)] | None = None,
        language: str | None = None,
        swapped_sizes: bool | None = None,
        shuffle: int | None = None,
        parts: PositiveInt | None = None,
        skip_broken: bool = False,
        bad_lines: Literal["skip", "error"] = "skip",
        overwrite: bool = False,
        engine: Annotated[dict[str, Any] | None, PartSection("engine")] = None,
    ):
        self.input, self.out, self.columns, self.language = input, Path(out).expanduser(), columns, language
        self.swapped_sizes, self.shuffle, self.parts = swapped_sizes, shuffle, parts
        self.skip_broken, self.bad_lines, self.overwrite = skip_broken, bad_lines, overwrite
        self.rules_section, self.engine_section = rules, engine or {"name": "duckdb"}
        self.rules = build_rules(rules)
        self.tags = {quantity: files for quantity, files in (tags or {}).items() if files is not None}
        self.names = Names.of(names)

    @staticmethod
    def check(*, tags: dict[str, Any] | None, names: dict[str, str | None] | None) -> list[str]:
        """Return what is wrong with `tags` and `names`."""
        problems = check_names(names)
        for quantity, files in (tags or {}).items():
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
                return self._select(files.without(broken), tags, broken)
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
        bad = BadLines(as_error=self.bad_lines == "error")
        with replaced_folder(self.out) as folder, engine.open(folder / SPILL):
            files = as_parquet(files, folder / SPILL / "input", bad, "input")
            tags = {
                quantity: as_parquet(table, folder / SPILL / quantity, bad, f"tags.{quantity}")
                for quantity, table in tags.items()
            }
            row, notes = self._row(engine, files, tags)
            rules = self._with_downloaded(row)
            judged = {plain(q): name for rule in rules for q in rule.needs if (name := row.name(q))}
            chosen = output_columns(row, self.columns, judged)
            counts = self._count(engine, row, rules)
            table = output_table(engine, row, self._kept(row, rules), chosen, self.shuffle)
            report = Report(
                rows=counts.rows,
                kept=0,
                counts=counts,
                rules={rule.part_name: self.rules_section.get(rule.part_name) or {} for rule in rules},
                input=list(files.given),
                bad_lines=dict(bad.counts),
                table=known_as(row.columns),
                columns=_quantities(row, rules),
                swapped_sizes=row.swapped_sizes,
                engine=self.engine_section,
                broken=[str(one) for one in broken],
                broken_rows=sum(one.rows for one in broken),
                output=[name for name in table.columns if name != KEY],
            )
            report.notes += [*notes, *bad.notes(), *self._notes(row), *chosen.notes, *table_notes(files)]
            report.notes += [f"tags.{name}: {note}" for name, one in tags.items() for note in table_notes(one)]
            if counts.kept == 0:
                raise UserError(f"the selection is empty, nothing was written:\n{report}")
            report.kept = engine.write(
                table,
                folder,
                parts=self.parts,
                key=KEY if self.shuffle is not None else None,
                metadata={"ldm_lab": json.dumps({"rules": report.rules})},
            )
            across = [rule for rule in rules if rule.compares_rows]
            assert across or report.kept == counts.kept, f"{report.kept} rows written, {counts.kept} counted"
            if across:
                counts.removed_after(across[0], counts.kept - report.kept)
            shutil.rmtree(folder / SPILL, ignore_errors=True)
            (folder / REPORT).write_text(json.dumps(report.as_dict(), indent=2, ensure_ascii=False) + "\n")
        return report

    def _row(self, engine: Engine, files: Files, tags: dict[str, Files]) -> tuple[TableRow, list[str]]:
        """Return the table as rules see it, with the scores of the tags, and what they took the place of."""
        table, columns, names, notes = join_scores(engine, files, tags, self.rules, self.names)
        row_names = list(files.names or columns)
        swapped = _sizes_are_swapped(files, row_names) if self.swapped_sizes is None else self.swapped_sizes
        swapped = swapped and not (names.has("width") or names.has("height"))
        first, *more = files.given
        where = f"{first} (and {len(more)} more)" if more else first
        if self.language is not None and names.find("language", columns, where) is None:
            columns["LANGUAGE"] = "LANGUAGE"
            table = table.mutate(LANGUAGE=ibis.literal(self.language))
        return TableRow(table, columns, names=names, swapped_sizes=swapped, where=where), notes

    def _with_downloaded(self, row: TableRow) -> list[Rule]:
        """Return the rules; a table that img2dataset wrote gets the one about failed downloads."""
        if is_downloaded(row.columns) and "downloaded" not in self.rules_section:
            return [build("rule", {"name": "downloaded"}), *self.rules]
        return self.rules

    def _count(self, engine: Engine, row: TableRow, rules: list[Rule]) -> RuleCounts:
        """Return how many rows break which rules: one pass over the columns that the rules need."""
        mask, bits = bit_mask(row, rules)
        masks = row.table.select(mask=mask).group_by("mask").agg(count=ibis._.count())
        return RuleCounts(rules, bits, {int(entry["mask"]): int(entry["count"]) for entry in engine.rows(masks)})

    def _kept(self, row: TableRow, rules: list[Rule]) -> ir.Table:
        """Return the rows that all rules keep."""
        conditions = kept_by(row, rules)
        kept = row.table.filter(conditions) if conditions else row.table
        for rule in rules:
            if isinstance(rule, Duplicates):
                row.names.require(rule.by, row.columns, f"{row.where}: rule {rule.part_name}")
                kept = _first_of_each(kept, row.columns[row.name(rule.by)])
        return kept

    def _notes(self, row: TableRow) -> list[str]:
        """Return what somebody should know of this selection."""
        notes = []
        is_said = self.swapped_sizes is not None or row.names.has("width") or row.names.has("height")
        if not is_said and not row.swapped_sizes and may_be_swapped(list(row.columns)):
            notes.append(
                "the sizes were taken as they are, though some columns are those of a base collection, whose WIDTH and "
                "HEIGHT are swapped: swapped_sizes=true or false says which it is"
            )
        for rule in self.rules:
            predictor = rule.predictor if isinstance(rule, Aesthetic) else None
            name = row.name(rule.quantity) if predictor and not row.names.has("aesthetic") else None
            usual = next((one for one in ("v1", "v2") if name and is_of_predictor(f"aesthetic_{one}", name)), predictor)
            if usual != predictor:
                notes.append(
                    f"the column {name} usually holds scores of the predictor {usual}; the limits of "
                    f"rules.aesthetic are meant for {predictor}, whose scale is another"
                )
        return notes


def _quantities(row: TableRow, rules: list[Rule]) -> dict[str, str | None]:
    """Return the columns of the quantities that rules judge, and of those that the standard columns hold."""
    needed = [quantity for rule in rules for quantity in rule.needs]
    written = [quantity for quantity in STANDARD if row.name(quantity)]
    return {plain(quantity): row.name(quantity) for quantity in (*needed, *written)}


def _first_of_each(table: ir.Table, column: str) -> ir.Table:
    """Return the table with one row per value of a column, all rows where it is null: the first by all columns."""
    rest = [table[name] for name in table.columns if name != column and _has_order(table[name].type())]
    place = ibis.row_number().over(ibis.window(group_by=table[column], order_by=rest))
    numbered = table.mutate(ldm_lab_place=place)
    return numbered.filter((numbered.ldm_lab_place == 0) | numbered[column].isnull()).drop("ldm_lab_place")


def _has_order(kind: dt.DataType) -> bool:
    """Return whether all engines can order a column's values; they cannot those of maps."""
    if isinstance(kind, dt.Array):
        return _has_order(kind.value_type)
    if isinstance(kind, dt.Struct):
        return all(map(_has_order, kind.types))
    return not isinstance(kind, dt.Map)


def _sizes_are_swapped(files: Files, names: list[str]) -> bool:
    """Return whether HEIGHT holds the width. Raises UserError if it does in some files only."""
    swapped = {sizes_are_swapped(list(one.columns)): one for one in files.layouts}
    if len(swapped) > 1:
        first, other = swapped[False], swapped[True]
        if first.paths[0] != files.paths[0]:
            first, other = other, first
        odd = sorted(set(first.columns) ^ set(other.columns))
        raise UserError(
            f"input: {other.paths[0]} has other columns than {first.paths[0]}: {', '.join(odd)} only in one of them, "
            "and WIDTH and HEIGHT are swapped in one; select from such releases one by one, or give swapped_sizes"
        )
    return next(iter(swapped)) if swapped else sizes_are_swapped(names)
