"""What each rule removed, as numbers, as JSON, and as a table for people."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ldm_lab.rules.rule import Rule


class RuleCounts:
    """How many rows violate which rules.

    Args:
        rules: in their order.
        bits: the rule and the reason behind each bit of a mask.
        masks: mask -> rows.
    """

    def __init__(self, rules: list[Rule], bits: list[tuple[Rule, str]], masks: dict[int, int]):
        self.rows, self.kept = sum(masks.values()), masks.get(0, 0)
        self.violated, self.alone, self.first = Counter[str](), Counter[str](), Counter[str]()
        self.reasons: dict[str, Counter[str]] = {rule.part_name: Counter() for rule in rules}
        for mask, count in masks.items():
            hit = [(rule, reason) for bit, (rule, reason) in enumerate(bits) if mask >> bit & 1]
            names = list(dict.fromkeys(rule.part_name for rule in rules if any(rule is one for one, _ in hit)))
            for name in names:
                self.violated[name] += count
            if names:
                self.first[names[0]] += count
            if len(names) == 1:
                self.alone[names[0]] += count
            for rule, reason in hit:
                self.reasons[rule.part_name][reason] += count

    def removed_after(self, rule: Rule, count: int) -> None:
        """Note what a rule removed from the rows that all others kept."""
        name = rule.part_name
        self.violated[name] = self.alone[name] = self.first[name] = self.reasons[name]["duplicate"] = count


@dataclass
class Report:
    """What a selection did.

    Attributes:
        rows: read; kept: written.
        rules: name -> options.
        bad_lines: reason -> lines of text files that were left out.
        table: which public table it was, by its columns; None for one that is not known.
        columns: quantity -> the column that held it.
        output: columns written.
    """

    rows: int
    kept: int
    counts: RuleCounts
    rules: dict[str, dict[str, Any]]
    input: list[str]
    table: str | None
    columns: dict[str, str | None]
    swapped_sizes: bool
    engine: dict[str, Any]
    bad_lines: dict[str, int]
    broken: list[str]
    broken_rows: int
    output: list[str]
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values.

        Of each rule: `violated`, rows that violate it; `alone`, those that violate no other; `first`, those that
        violate none before it; `left`, rows left behind it; `reasons`.
        """
        left, rules = self.rows, {}
        for name, options in self.rules.items():
            left -= self.counts.first[name]
            rules[name] = {
                "options": options,
                "violated": self.counts.violated[name],
                "alone": self.counts.alone[name],
                "first": self.counts.first[name],
                "left": left,
                "reasons": {reason: count for reason, count in self.counts.reasons[name].items() if count},
            }
        return {
            "rows": self.rows,
            "kept": self.kept,
            "rules": rules,
            "input": self.input,
            "table": self.table,
            "columns": self.columns,
            "swapped_sizes": self.swapped_sizes,
            "engine": self.engine,
            "bad_lines": self.bad_lines,
            "broken_files": self.broken,
            "broken_rows": self.broken_rows,
            "output_columns": self.output,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        report = self.as_dict()
        width = max([len(name) for name in self.rules] + [4])
        columns = ", ".join(f"{quantity} is {column}" for quantity, column in self.columns.items())
        lines = [
            f"table: {f'{self.table}, by its columns; ' if self.table else ''}{columns}",
            *(f"note: {note}" for note in self.notes),
            *(["sizes: WIDTH and HEIGHT are swapped in this release; taken the other way round"] * self.swapped_sizes),
            *(f"left out: {one}" for one in self.broken),
            *([f"left out with them: {self.broken_rows:,} rows"] if self.broken else []),
            f"{'rule':{width}}  {'breaks it':>14} {'it alone':>14} {'removed':>14} {'left':>14}  reasons",
            f"{'':{width}}  {'':>14} {'':>14} {'':>14} {self.rows:14,}",
        ]
        for name, rule in report["rules"].items():
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in rule["reasons"].items())
            numbers = " ".join(f"{rule[key]:14,}" for key in ("violated", "alone", "first", "left"))
            lines.append(f"{name:{width}}  {numbers}  {reasons}".rstrip())
        share = self.kept / self.rows if self.rows else 0
        return "\n".join([*lines, f"{self.kept:,} of {self.rows:,} rows kept ({share:.2%})"])
