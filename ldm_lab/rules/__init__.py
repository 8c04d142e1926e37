"""Rules: which rows of metadata are left out of a data set, and for which reason.

A *rule* is a part of role "rule". It is written once and works on tables of any size (DuckDB, Spark) and on the
metadata of a single sample while training:

    violations(row) -> {reason: condition} the row goes where one of the conditions holds

`row` gives the quantities that rules speak of, whatever the release calls them (`quantities.py`):

    row.number("aesthetic")                a number; null where it is unknown: missing, null, NaN, not a number
    row.text("caption")                    a text, or null
    row.WORD                               the characters of words, for use inside [...] in a regular expression

These are expressions of ibis for a table (`curation/tables.py`) and `cell.Cell`s for a sample (`sample.py`); both know
comparisons, & | ~, /, isnull(), nullif(), isin(), lower(), strip(), length() and re_search(). A condition that is null
does not hold, so what is to happen to an unknown value has to be said: `{"missing_tag": score.isnull(), ...}`.

A new rule is one file with one `@register("rule", "name")`; its keyword-only constructor arguments are its options.
"""
