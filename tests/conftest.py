"""What all tests share: one thread per process, no network, the programs called in-process."""

import gc
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
pytest_plugins = ["pytester"]


def pytest_configure(config):
    from left_out import LeftOut

    config.pluginmanager.register(LeftOut())


def pytest_collection_finish():
    """What was imported stays: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    """What is left at the end libraries would complain of."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def own_state(tmp_path_factory):
    """What tests train is not noted among the runs of whoever starts them; programs that they start inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LDM_LAB_STATE", str(tmp_path_factory.mktemp("state")))
        yield


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
            run_program(importlib.import_module(name if "." in name else f"ldm_lab.commands.{name}").main)
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def golden_heads() -> Path:
    """Return the folder of LAION's released heads and rating embeddings."""
    return ROOT / "tests" / "data" / "golden" / "aesthetic_heads"


@pytest.fixture(scope="module")
def parts():
    """The parts of a tiny diffusion model with random weights, as `Model` takes them."""
    from tiny import AUTOENCODER, CLOOB, DENOISER

    from ldm_lab.config import build

    torch.manual_seed(0)
    autoencoder = build("autoencoder", AUTOENCODER).eval().requires_grad_(False)
    conditioner = build("conditioner", CLOOB).eval().requires_grad_(False)
    return {
        "denoiser": build("denoiser", DENOISER, autoencoder.channels, conditioner.spec),
        "objective": build("objective", {"name": "v_cosine"}),
        "autoencoder": autoencoder,
        "conditioner": conditioner,
    }


@pytest.fixture
def pipeline(parts):
    """A pipeline of 32-pixel pictures over these parts."""
    from ldm_lab.sampling import Model, Pipeline

    return Pipeline(Model(**parts, dropout=0.2, image_size=(32, 32)))
