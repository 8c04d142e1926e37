"""docs/extending.md as it stands: its files are written to an empty folder, its commands are run there in order."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import run_program

from ldm_lab.checkpoints import importer
from ldm_lab.config import registry

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILE = re.compile(r"^`([\w./]+)`\n\n```\w+\n(.*?)^```$", re.M | re.S)
COMMANDS = re.compile(r"^```bash\n(.*?)^```$", re.M | re.S)
SECTIONS = re.split(r"^## (.+)\n", TEXT, flags=re.M)[1:]
SECTIONS = dict(zip(SECTIONS[::2], SECTIONS[1::2]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with all files of the page, and nothing else."""
    folder = tmp_path_factory.mktemp("extending")
    for name, content in FILE.findall(TEXT):
        (folder / name).write_text(content, encoding="utf-8")
    return folder


@pytest.fixture
def registries(folder, monkeypatch):
    """What the page's files register is forgotten after the test."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    yield
    own = {path.stem for path in folder.glob("*.py")}
    for key, info in list(registry._registry.items()):
        if info.source is not None and info.source.module.name in own:
            del registry._registry[key]
    for kind, known in list(importer._registry.items()):
        if type(known).__module__ in own:
            del importer._registry[kind]
    registry._imports[:] = [name for name in registry._imports if name not in own]
    registry._read.difference_update(own)
    for name in own & sys.modules.keys():
        del sys.modules[name]


@pytest.mark.parametrize("heading", [heading for heading, body in SECTIONS.items() if COMMANDS.search(body)])
def test_the_commands_of_a_section(folder, registries, program, heading):
    for block in COMMANDS.findall(SECTIONS[heading]):
        for command in block.splitlines():
            words = shlex.split(command)
            if words[:3] != ["python", "-m", "ldm_lab"]:
                assert words[0] == "python", command
                runpy.run_path(words[1], run_name="__main__")
                continue
            words = words[3:]
            code, out, err = program("ldm_lab.__main__", *words)
            assert code == 0, f"{command}\n{out[-2000:]}\n{err[-4000:]}"
            if "--out" in words:
                pictures = Path(words[words.index("--out") + 1]).glob("0*.png")
                assert list(pictures), f"{command}: no pictures"


def test_another_process_samples_what_was_trained(folder):
    """The last model, with all its parts in files of their own, in a process that knows none of them at first."""
    if not (folder / "runs/letters/ema.safetensors").is_file():
        pytest.skip("the model is made by the test before")
    words = [
        "-m",
        "ldm_lab",
        "sample",
        "--checkpoint",
        "runs/letters",
        "a red circle",
        "--steps",
        "2",
        "--out",
        "again",
    ]
    result = run_program(*words, cwd=folder)
    assert result.returncode == 2 and "letters" in result.stderr and "--imports" in result.stderr, result.stderr
    imports = [word for name in ("letters", "states_transformer", "grain") for word in ("--imports", name)]
    result = run_program(*words, *imports, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert (folder / "again" / "00000.png").is_file()


def test_every_kind_of_part_has_an_example():
    roles = set(re.findall(r'^@register\("(\w+)"', TEXT, re.M))
    assert {"denoiser", "conditioner", "objective", "sampler", "data", "condition_source"} <= roles
    assert "@register_importer" in TEXT


def test_the_examples_keep_the_rules(folder):
    """What is shown is written as the package is: lint and format."""
    files = [str(folder / name) for name, _ in FILE.findall(TEXT) if name.endswith(".py")]
    config = ["--config", str(ROOT / "pyproject.toml")]
    order = ["--config", 'lint.isort.known-first-party=["ldm_lab"]']
    for command in (["check", *config, *order], ["format", "--check", *config]):
        result = subprocess.run([sys.executable, "-m", "ruff", *command, *files], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
