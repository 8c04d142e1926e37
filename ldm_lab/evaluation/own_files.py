"""The files that an evaluation writes, which may lie among the pictures that it measures."""

from pathlib import Path

from ldm_lab.io.json_files import Fields, read_json

STEM = "evaluation"  # of the files' names
ENDINGS = (".json", ".csv", ".md", ".png")


def is_plot(path: Path) -> bool:
    """Return whether a picture is the plot of an evaluation, which lies beside its table."""
    if path.name != f"{STEM}.png":
        return False
    table = Fields(read_json(path.with_suffix(".json")))
    return table.has("rows") and table.has("better")
