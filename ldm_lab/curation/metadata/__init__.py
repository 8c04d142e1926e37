"""Tables of metadata, larger than memory: selection by rules, histograms, what img2dataset managed to download.

An *engine* is a part of role "engine" (`duckdb_engine.py`, `spark_engine.py`). It runs expressions of ibis, so that
everything above it is written once:

    open(spill)                                a context; `spill` is a folder for what does not fit into memory
    read(files) -> ibis table                  of Parquet, TSV or CSV files; its columns are unique in any case
    rows(expression) -> list of dicts          small results
    write(expression, folder, parts, key, ...) Parquet files part-00000.parquet, ... in the order of `key`

`tables.py` shows rules a table's quantities, `selection.py` is `python -m ldm_lab select`.
"""

from importlib.util import find_spec

from ldm_lab.errors import UserError

if missing := [library for library in ("duckdb", "ibis", "pyarrow") if find_spec(library) is None]:
    raise UserError(f"{', '.join(missing)} has to be installed for this: pip install 'ldm_lab[curation]'")
