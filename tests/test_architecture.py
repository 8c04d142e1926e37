"""The layers: imports go one way, and only the named places import the named libraries."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = [  # a module may import from its own line only what is in its own package, and from any line above
    {"errors"},
    {
        *("conditions", "predictions", "sampling_defaults", "progress", "downloads", "devices", "attention"),
        *("lean_imports", "metrics"),
    },
    {"batch"},
    {"interfaces", "io", "processes", "sharded"},
    {"config"},
    {"schedules", "ema", "estimate", "rules", "clip_tokens", "pages"},
    {"pretrained"},
    {
        "data",
        "autoencoders",
        "conditioners",
        "condition_sources",
        "denoisers",
        "objectives",
        "guidance",
        "samplers",
        "prompts",
    },
    {"checkpoints"},
    {"embed"},
    {"sampling"},
    {"evaluation"},
    {"training"},
    {"curation", "app", "own_images", "sharing"},
    {"commands"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted((ROOT / "ldm_lab").rglob("*.py"))


@functools.cache
def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(dotted: str) -> str | None:
    """Return the top-level name below ldm_lab of an imported or importing module."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "ldm_lab" and len(parts) > 1 else None


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own = path.relative_to(ROOT / "ldm_lab").with_suffix("").parts[0]
    if own == "__init__":
        return
    assert own in LEVEL, f"{own} has no place in the layers"
    for imported in imports(path):
        other = room(imported)
        if other is None or other == own or other not in LEVEL:
            continue
        assert LEVEL[other] < LEVEL[own], f"{path.name} ({own}) imports {imported}"


@pytest.mark.parametrize(
    ("library", "rooms"),
    [
        ("omegaconf", {"config"}),
        ("pytorch_lightning", {"training", "data", "processes"}),
        ("webdataset", {"data"}),
        ("tqdm", {"progress"}),
        ("wandb", {"training"}),
        ("jinja2", {"pages"}),
        ("ibis", {"curation"}),
        ("duckdb", {"curation"}),
        ("pyspark", {"curation"}),
        ("gradio", {"app"}),
        ("starlette", {"app"}),
    ],
)
def test_a_library_is_used_where_it_belongs(library, rooms):
    for path in MODULES:
        own = path.relative_to(ROOT / "ldm_lab").with_suffix("").parts[0]
        if any(name.split(".")[0] == library for name in imports(path)):
            assert own in rooms, f"{path.relative_to(ROOT)} imports {library}"


def test_lightning_stays_in_the_datamodule_and_the_passes_of_the_data_package():
    for path in (ROOT / "ldm_lab" / "data").glob("*.py"):
        if any(name.startswith("pytorch_lightning") for name in imports(path)):
            assert path.name in ("datamodule.py", "passes.py")
