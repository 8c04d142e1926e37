"""From metadata and images to the subset that a model trains on: scores, rules, statistics, the score store.

Tables are Parquet, read with DuckDB, larger than memory. Needs `pip install 'ldm_lab[curation]'`; its libraries are
imported where they are used, so that the rest of the program runs without them.
"""
