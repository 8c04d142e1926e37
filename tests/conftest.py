"""What all tests share: one thread per process, no network, the programs called in-process."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The suite's tensors are tiny: more threads only wait for one another."""
    torch.set_num_threads(1)


@pytest.fixture
def program(monkeypatch, capsys):
    """Run a program of the repository in this process: `program("train", "--config", ...)` -> (exit code, out, err)."""
    import importlib

    from ldm_lab.errors import run_program

    def call(name: str, *args: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        with pytest.raises(SystemExit) as exit_:
            run_program(importlib.import_module(name).main)
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return call
