"""Tables of metadata, larger than memory: selection by rules, histograms, what img2dataset managed to download.

An *engine* is a part of role "engine" (`engine.Engine`): DuckDB on one machine, or Spark. It runs expressions of ibis,
so that everything above it is written once.

`tables.py` shows rules a table's quantities, `selection.py` is `python -m ldm_lab select`,
`joined_scores.py` and `output.py` its two larger steps; `histogram.py` counts.
"""

from importlib.util import find_spec

from ldm_lab.errors import UserError, install

if missing := [library for library in ("duckdb", "ibis", "pyarrow") if find_spec(library) is None]:
    raise UserError(f"{', '.join(missing)} has to be installed for this: {install('curation')}")
