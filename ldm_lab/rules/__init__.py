"""Rules: which rows of metadata are left out of a data set, and for which reason.

A *rule* is a part of role "rule". It is written once and works on tables of any size (DuckDB, Spark) and on the
metadata of a single sample while training:

    violations(row) -> {reason: condition} the row goes where one of the conditions holds

`row` is a `rule.Row`; what it gives are `rule.Value`s: expressions of ibis for a table (`curation/metadata/tables.py`),
`cell.Cell`s for a sample (`sample.py`). A condition that is null does not hold, so what is to happen to an unknown
value has to be said: `{"missing_tag": score.isnull(), ...}`.

A new rule is one file with one `@register("rule", "name")`; its keyword-only constructor arguments are its options.
"""
