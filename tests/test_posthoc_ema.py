"""Power-function averages: their decay and profile, and averages of any width put together of snapshots."""

import contextlib
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import make_run

from ldm_lab.__main__ import main
from ldm_lab.ema import PowerAverage, combination

T = 400


def walk() -> np.ndarray:
    return np.cumsum(np.random.default_rng(0).normal(size=(T, 5)), axis=0)


def averages(width: float, points: np.ndarray) -> dict[int, np.ndarray]:
    """The average of a width after each update, as training calculates it."""
    average, found = np.zeros(points.shape[1]), {}
    for update, point in enumerate(points, start=1):
        decay = PowerAverage(width, update).decay()
        average = average * decay + point * (1 - decay)
        found[update] = average
    return found


@pytest.mark.parametrize(("width", "exponent"), [(0.05, 16.97), (0.1, 6.94)])
def test_exponents_are_those_of_the_paper(width, exponent):
    assert PowerAverage(width, 1).exponent == pytest.approx(exponent, abs=0.01)
    weights = averages(width, np.eye(T))[T]  # [T]: what each update counts
    place = (np.arange(T) + 1) / T
    mean = (weights * place).sum()
    assert weights.sum() == pytest.approx(1) and PowerAverage(width, 1).decay() == 0
    assert np.sqrt((weights * (place - mean) ** 2).sum()) == pytest.approx(width, rel=0.03)


@pytest.mark.parametrize("width", [0.06, 0.08, 0.15])
@pytest.mark.parametrize("end", [T, 330])
def test_an_average_of_another_width_is_put_together(width, end):
    points = walk()
    snapshots = {
        PowerAverage(kept, update): value
        for kept in (0.05, 0.1)
        for update, value in averages(kept, points).items()
        if update % 10 == 0 and update <= end
    }
    factors, missing = combination(list(snapshots), PowerAverage(width, end))
    made = sum(factor * value for factor, value in zip(factors, snapshots.values(), strict=True))
    assert missing < 0.06
    wanted, nearest = averages(width, points)[end], averages(0.1, points)[end]
    assert np.abs(made - wanted).max() < 0.1 * np.abs(nearest - wanted).max()


def test_what_cannot_be_put_together_is_far_off():
    _, missing = combination([PowerAverage(0.1, 100)], PowerAverage(0.01, 100))
    assert missing > 0.5
    factors, missing = combination([PowerAverage(0.1, 100)], PowerAverage(0.1, 100))
    assert factors == pytest.approx([1]) and missing < 1e-6


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 6 steps with snapshots every 2, stopped at 4 and gone on with."""
    folder = tmp_path_factory.mktemp("run")
    config = make_run(folder, images=16, ema_snapshots={"every": 2, "widths": [0.1, 0.2]}, checkpoint={"every": 2})
    with contextlib.chdir(folder):
        for words in (["trainer.max_steps=4"], ["resume.checkpoint=last"], ["run=whole"]):
            assert not main(["train", "--config", str(config), *words])
    return folder


def test_snapshots_of_a_resumed_run_are_those_of_a_whole_one(trained):
    names = [f"{step:08d}-{width}.safetensors" for step in (2, 4, 6) for width in ("0.1", "0.2")]
    for run in ("tiny", "whole"):
        assert sorted(path.name for path in (trained / "runs" / run / "ema_snapshots").iterdir()) == names
    for name in names:
        one, other = (load_file(trained / "runs" / run / "ema_snapshots" / name) for run in ("tiny", "whole"))
        assert all(torch.equal(one[key], other[key]) and one[key].dtype == torch.float16 for key in one)


def test_the_command_writes_a_model_that_samples(trained, program, monkeypatch):
    monkeypatch.chdir(trained)
    code, out, err = program("ldm_lab.__main__", "ema", "runs/tiny", "--width", "0.15", "--out", "made.safetensors")
    assert code == 0, err
    assert "made.safetensors: width 0.15 as of step 6, of 6 snapshots" in out
    with safe_open("made.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["ema_width"] == "0.15" and "ema_snapshots" not in json.loads(metadata["config"])
    code, _, err = program("sample", "--checkpoint", "made.safetensors", "a red circle", "--steps", "2", "--out", "out")
    assert code == 0, err
    code, out, err = program("ldm_lab.__main__", "ema", "runs/tiny", "--width", "0.1", "--out", "same.safetensors")
    assert code == 0, err
    same = load_file("same.safetensors")
    kept = load_file("runs/tiny/ema_snapshots/00000006-0.1.safetensors")
    assert all(torch.allclose(same[name], kept[name].float(), atol=2e-3) for name in kept)


def test_snapshots_of_another_course_are_removed_and_said_so(trained, program, monkeypatch):
    monkeypatch.chdir(trained)
    words = ["run=whole", "trainer.max_steps=5", "resume.checkpoint=runs/whole/step=00000004.ckpt"]
    code, out, err = program("train", "--config", "tiny.yaml", *words)
    assert code == 0, err
    assert "runs/whole/ema_snapshots: 2 snapshots after step 4 removed" in out
    left = sorted(path.name for path in (trained / "runs/whole/ema_snapshots").iterdir())
    assert [name[:8] for name in left] == ["00000002", "00000002", "00000004", "00000004"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/tiny", "--width", "0.15", "--step", "7"], "the last snapshot in runs/tiny is of step 6, not 7"),
        (["runs/tiny", "--width", "0.15", "--step", "1"], "the first snapshot in runs/tiny is of step 2, not 1"),
        (["runs/none", "--width", "0.15"], "runs/none: has no snapshots of averages; a section `ema_snapshots`"),
        (["runs/tiny", "--width", "0.3"], "a width above 0, at most 0.28, is needed, not 0.3"),
    ],
)
def test_what_there_is_not(trained, program, monkeypatch, words, message):
    monkeypatch.chdir(trained)
    code, _, err = program("ldm_lab.__main__", "ema", *words, "--out", "none.safetensors")
    assert code == 2 and message in err
