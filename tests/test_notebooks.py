"""examples/*.ipynb: stripped in the repository, and run from top to bottom at a tiny size."""

import os
import re
import shutil
import zipfile
from pathlib import Path

import nbformat
import pytest
from small_world import scratch
from tiny import ROOT, program_environment

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stripped_and_says_what_is_to_be_installed(path):
    notebook = read(path)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    assert [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    for cell in cells:
        if "skip" not in cell.metadata.get("tags", []):
            assert not re.search(r"^[!%]", cell.source, re.M)
            compile(cell.source, path.name, "exec")


@pytest.mark.parametrize("here", ["nothing", "address", "archive", "examples", "project"])
def test_the_project_is_fetched_where_it_is_not(here, tmp_path, monkeypatch, capsys):
    """Its first cell, with git and pip left out: it names no address that is not there."""
    (cell,) = (its for its in read(NOTEBOOKS[-1]).cells if "setup" in its.metadata.get("tags", []))
    assert "://" not in cell.source
    asked = []
    monkeypatch.setattr("subprocess.run", lambda words, **_: asked.append(words))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    copy = tmp_path / ("project" if here in ("examples", "project") else "elsewhere")
    (copy / "configs").mkdir(parents=True)
    (copy / "configs" / "quickstart.yaml").touch()
    start = {"examples": copy / "examples", "project": copy}.get(here, tmp_path / "start")
    start.mkdir(exist_ok=True)
    monkeypatch.chdir(start)
    source, folder = cell.source, copy
    if here == "archive":
        with zipfile.ZipFile("ldm_lab.zip", "w") as packed:
            packed.writestr("copy-main/configs/quickstart.yaml", "")
        folder = start / "ldm_lab" / "copy-main"
    if here == "address":
        source = source.replace('project = ""', 'project = "me@server:mine.git"')
        shutil.copytree(copy, folder := start / "ldm_lab")
    if here == "nothing":
        with pytest.raises(SystemExit, match="write its address into `project` above, or upload it"):
            exec(source, {})
        return
    exec(source, {})
    assert Path.cwd() == folder and asked.pop()[1:] == ["-m", "pip", "install", "-q", "-e", "."]
    assert asked == ([["git", "clone", "-q", "me@server:mine.git", "ldm_lab"]] if here == "address" else [])


@pytest.mark.parametrize("folder", ["", "photos"], ids=["none", "own"])
def test_what_was_trained_is_taken_home(folder):
    """The quickstart's model, and that of the user's own images."""
    taken: list[str] = []
    exec(read(ROOT / "examples" / "train.ipynb").cells[-1].source, {"run": taken.append, "folder": folder})
    models = ["notebook", "mine"] if folder else ["notebook"]
    assert [line.split()[:4] for line in taken] == [
        ["export", f"runs/{name}", "--hub-folder", f"shared/{name}"] for name in models
    ]


def execute(path: Path, parameters: str, folder: Path) -> str:
    """Run a notebook in a folder with other parameters; what it printed. Raises CellExecutionError."""
    from nbclient import NotebookClient

    notebook = read(path)
    notebook.cells = [cell for cell in notebook.cells if "skip" not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = parameters
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [its for cell in notebook.cells if cell.cell_type == "code" for its in cell.outputs]
    assert any("image/png" in its.get("data", {}) for its in outputs)
    return "".join(its.get("text", "") for its in outputs)


@pytest.mark.slow
def test_the_notebooks_run_one_after_the_other(tmp_path, monkeypatch):
    assert [path.stem for path in NOTEBOOKS] == ["sample_and_compare", "train"]
    folder = scratch(tmp_path)
    for key, value in program_environment({"LDM_LAB_OFFLINE": "1"}).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    small = 'steps, images = 4, 16\nfolder, words = "photos", "--memory cpu --steps 2"'
    execute(ROOT / "examples" / "train.ipynb", small, folder)
    assert all((folder / "shared" / name / "model.safetensors").is_file() for name in ("notebook", "mine"))
    few = 'checkpoint, steps = "runs/notebook", 2\nprompts = ["a red star", "a blue circle", "a cross"]'
    execute(ROOT / "examples" / "sample_and_compare.ipynb", few, folder)
