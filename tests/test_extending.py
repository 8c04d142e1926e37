"""docs/extending.md as it stands: its files are written to an empty folder, its commands are run there in order."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import run_program

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


def run(folder: Path, command: str) -> subprocess.CompletedProcess:
    """Run a line of the page: `ldm-lab` is `python -m ldm_lab`."""
    first, *rest = shlex.split(command)
    arguments = ["-m", "ldm_lab", *rest] if first == "ldm-lab" else rest
    assert first in ("ldm-lab", "python"), command
    return run_program(*arguments, cwd=folder)


@pytest.mark.skip(reason="condition sources and parts outside the package are on their way")
@pytest.mark.parametrize("heading", [heading for heading, body in SECTIONS.items() if COMMANDS.search(body)])
def test_the_commands_of_a_section(folder, heading):
    for block in COMMANDS.findall(SECTIONS[heading]):
        for command in block.splitlines():
            result = run(folder, command)
            assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
            if "--out out/" in command:
                out = folder / command.split("--out ")[1].split()[0]
                assert list(out.glob("0*.png")), f"{command}: no pictures"


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
