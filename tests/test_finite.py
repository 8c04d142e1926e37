"""Runs whose numbers stop being finite: they stop, say where, and write nothing of it."""

import pytest
import torch
from tiny import make_run

from ldm_lab.checkpoints.files import read_pickled, read_safetensors, write_safetensors

NAN = float("nan")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Runs go under the test's own folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def all_finite(path) -> bool:
    content = read_pickled(path)
    tensors = [*content["state_dict"].values()]
    tensors += [v for s in content["optimizer_states"][0]["state"].values() for v in s.values()]
    return all(torch.isfinite(t).all() for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_that_diverges_stops_with_exit_code_3_and_keeps_the_good_checkpoint(here, program, precision):
    yaml = make_run(here)
    options = [f"trainer.precision={precision}", "checkpoint.every=1"]
    assert program("train", "--config", yaml, "trainer.max_steps=2", *options)[0] == 0
    code, _, err = program(
        "train", "--config", yaml, "resume.checkpoint=last", "resume.lr=1e30", "trainer.max_steps=9", *options
    )
    assert code == 3
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "is not finite" in line and "step" in line and "resume.checkpoint=last goes on" in line
    run = here / "runs" / "tiny"
    for path in run.glob("*.ckpt"):
        assert all_finite(path), path
    assert all(torch.isfinite(t).all() for t in read_safetensors(run / "ema.safetensors")[0].values())
    assert not list(run.rglob("*.part"))


def test_the_first_bad_step_and_its_samples_are_named_at_the_end_of_a_window(here, program):
    code, _, err = program(
        "train", "--config", make_run(here), "optim.lr=1e30", "logging.every=4", "checkpoint.every=100"
    )
    assert code == 3
    assert "the loss is not finite at step 2 (samples " in err and "last.ckpt holds the state before it" in err
    assert [path.name for path in (here / "runs" / "tiny").glob("*.ckpt")] == ["last.ckpt"]
    assert all_finite(here / "runs" / "tiny" / "last.ckpt")


def test_weights_that_are_not_finite_are_refused_everywhere(here, program):
    yaml = make_run(here)
    assert program("train", "--config", yaml, "trainer.max_steps=2")[0] == 0
    run = here / "runs" / "tiny"
    tensors, metadata = read_safetensors(run / "ema.safetensors")
    name = next(name for name, value in tensors.items() if value.ndim > 1)
    tensors[name].flatten()[0] = NAN
    write_safetensors(here / "bad.safetensors", tensors, metadata)
    code, _, err = program("sample", "--checkpoint", "bad.safetensors", "a circle", "-n", "1")
    assert code == 2 and f"bad.safetensors: {name} holds numbers that are not finite" in err
    code, _, err = program("train", "--config", yaml, "run=other", "init_from=bad.safetensors")
    assert code == 2 and f"bad.safetensors: {name} holds numbers that are not finite" in err
    content = read_pickled(run / "last.ckpt")
    content["state_dict"][f"model.{name}"].flatten()[0] = NAN
    torch.save(content, run / "last.ckpt")
    code, _, err = program("train", "--config", yaml, "resume.checkpoint=last")
    assert code == 2 and "not finite" in err
