"""What may change when a run goes on: the learning rate's schedule, the optimizer's options, the average, batches."""

import csv
import itertools
from pathlib import Path

import pytest
import torch
from tiny import CLOOB, make_run

from ldm_lab.checkpoints.files import read_pickled
from ldm_lab.checkpoints.native import save_part
from ldm_lab.config import build
from ldm_lab.errors import UserError
from ldm_lab.training.optim import Began, Optim
from ldm_lab.training.run_state import checked

COSINE = ["optim.schedule=cosine", "optim.lr=1e-3"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Runs go under the test's own folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rates(run: Path) -> list[float]:
    with open(run / "metrics.csv") as file:
        return [float(row["train/lr"]) for row in csv.DictReader(file)]


def test_a_longer_schedule_goes_on_without_a_jump_or_begins_anew(here, program):
    yaml = make_run(here)
    often = [*COSINE, "checkpoint={every: 2, keep: 9}"]
    assert program("train", "--config", yaml, *often, "trainer.max_steps=4")[0] == 0
    middle = ["resume.checkpoint=runs/tiny/step=00000002.ckpt", "trainer.max_steps=8"]
    last = ["resume.checkpoint=runs/tiny/last.ckpt", "trainer.max_steps=8"]

    code, out, _ = program("train", "--config", yaml, *often, *middle, "run=bent")
    words = "learning rate: cosine over 4 steps to 0 -> cosine over 8 steps to 0"
    assert code == 0 and f"{words}: it goes on from 0.0005 at step 2, without a jump (resume.schedule=restart" in out
    bent = rates(here / "runs/bent")
    assert bent[0] == pytest.approx(5e-4) and len(bent) == 6
    assert all(one > other for one, other in itertools.pairwise(bent)) and bent[-1] < 1e-4

    code, out, _ = program("train", "--config", yaml, *often, *last, "run=ended", "resume.schedule=continue")
    assert code == 0 and f"{words}: it had ended, and stays at 0 (resume.schedule=restart begins it anew)" in out
    assert rates(here / "runs/ended") == pytest.approx([0] * 4, abs=1e-12)

    # begun anew: once, however often the same command starts again
    restart = [*often, "resume.schedule=restart"]
    code, out, _ = program("train", "--config", yaml, *restart, *last, "run=anew")
    assert code == 0 and f"{words}, begun at step 4: it goes from 0 to 0.001 (resume.schedule=restart)" in out
    anew = rates(here / "runs/anew")
    assert anew == pytest.approx([1e-3, 8.5355e-4, 5e-4, 1.4645e-4], rel=1e-4)
    again = ["resume.checkpoint=runs/anew/step=00000006.ckpt", "trainer.max_steps=8"]
    code, out, _ = program("train", "--config", yaml, *restart, *again, "run=again")
    assert code == 0 and "begun at step" not in out
    assert rates(here / "runs/again") == anew[2:]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_place_in_a_schedule_is_found_again(schedule):
    optim = Optim(lr=1e-3, schedule=schedule, final_lr=1e-4)
    for step in (0, 3, 50, 99, 100):
        assert optim.progress_at(optim.decay(step, 100)) == pytest.approx(step / 100, abs=1e-6)
    assert optim.progress_at(2.0) == 0 and optim.progress_at(-1.0) == 1


def test_a_schedule_that_was_bent():
    optim = Optim(lr=1.0, schedule="linear", warmup_steps=10)
    optim.began = Began(origin=100, step=120, progress=0.5)
    assert optim.factor(104, 200) < optim.factor(109, 200), "the warm-up counts from where the schedule began"
    assert optim.factor(120, 200) == 0.5 and optim.factor(160, 200) == 0.25 and optim.factor(500, 200) == 0
    optim = Optim(lr=1.0, schedule="linear", schedule_steps=40)
    optim.began = Began(origin=100, step=100)
    assert optim.factor(120, 999) == 0.5, "schedule_steps count from there, too"
    assert Began.of(optim.began.state()) == optim.began


def test_the_end_of_a_schedule_is_a_rate_whatever_the_peak(here, program):
    yaml = make_run(here)
    slope = [*COSINE, "optim.final_lr=1e-5", "optim.schedule_steps=4"]
    assert program("train", "--config", yaml, *slope, "trainer.max_steps=2")[0] == 0
    code, out, _ = program(
        "train", "--config", yaml, *slope, "resume.checkpoint=last", "resume.lr=2e-4", "trainer.max_steps=6"
    )
    assert code == 0 and "learning rate: 0.001 -> 0.0002 (resume.lr)" in out
    assert rates(here / "runs/tiny")[-1] == pytest.approx(1e-5)


def test_what_may_change_is_printed_and_holds(here, program):
    yaml = make_run(here)
    assert program("train", "--config", yaml, "trainer.max_steps=3", "optim.decay_on=matrices")[0] == 0
    code, out, err = program(
        "train", "--config", yaml, "resume.checkpoint=last", "trainer.max_steps=5", "trainer.accumulate_grad_batches=2",
        "optim.decay_on=matrices", "optim.weight_decay=0.3", "optim.betas=[0.8, 0.95]", "optim.eps=1e-6",
        "trainer.precision=bf16-mixed", "data.batch_size=3", "ema.decay=[0.25, 0.5]", "conditioner.dropout=0.5",
        "trainer.gradient_clip_val=1.0", "denoiser.gradient_checkpointing=true",
    )  # fmt: skip
    assert code == 0, err
    for line in (
        "optim.weight_decay: None -> 0.3", "optim.betas: None -> [0.8, 0.95]", "optim.eps: None -> 1e-06",
        "trainer.precision: None -> 'bf16-mixed'", "data.batch_size: 4 -> 3", "ema.decay: [0.5, 0.9] -> [0.25, 0.5]",
        "conditioner.dropout: None -> 0.5", "trainer.accumulate_grad_batches: None -> 2",
        "trainer.gradient_clip_val: None -> 1.0", "denoiser.gradient_checkpointing: None -> True",
    ):  # fmt: skip
        assert line in out, line
    saved = read_pickled(here / "runs/tiny/last.ckpt")
    groups = saved["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert [group["betas"] for group in groups] == [(0.8, 0.95)] * 2 and groups[0]["eps"] == 1e-6
    assert saved["global_step"] == 5
    assert saved["ldm_lab"]["batches_seen"] == 3 + 2 * 2, "the first step after the change is a whole one"
    assert saved["ldm_lab"]["samples_seen"] == 3 * 4 + 2 * 2 * 3


def test_an_average_may_come_and_go(here, program):
    yaml = make_run(here)
    assert program("train", "--config", yaml, "trainer.max_steps=2")[0] == 0
    code, out, err = program("train", "--config", yaml, "resume.checkpoint=last", "trainer.max_steps=3", "ema=null")
    assert code == 0, err
    assert "ema: null: the checkpoint's average of the weights is not kept" in out
    assert not [name for name in read_pickled(here / "runs/tiny/last.ckpt")["state_dict"] if "_ema." in name]
    code, out, err = program("train", "--config", yaml, "resume.checkpoint=last", "trainer.max_steps=4")
    assert code == 0, err
    assert "ema: the checkpoint has no average of the weights; it begins with them" in out


def test_other_groups_of_weights_are_refused(here, program):
    yaml = make_run(here)
    assert program("train", "--config", yaml, "trainer.max_steps=1")[0] == 0
    code, _, err = program("train", "--config", yaml, "resume.checkpoint=last", "optim.decay_on=matrices")
    assert code == 2 and "optim.decay_on was None, the config says 'matrices'" in err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"course": None}, "its counts are none"),
        ({"samples_seen": "x"}, "its counts are none"),
        ({"batches_seen": -1}, "its counts are none"),
    ],
)
def test_damaged_counts_are_told(change, words):
    sound = {"batches_seen": 1, "samples_seen": 4, "course": Began().state(), "data": []}
    assert checked(sound) == sound
    with pytest.raises(UserError, match=words):
        checked({**sound, **change})
    for name in sound:
        with pytest.raises(UserError, match=f"has no {name}"):
            checked({key: value for key, value in sound.items() if key != name})


@pytest.mark.parametrize(
    "state", [{}, {"origin": 5, "step": 3, "progress": 0.0}, {"origin": 0, "step": 0, "progress": float("nan")}]
)
def test_a_damaged_schedule_is_told(state):
    with pytest.raises(UserError, match="the learning rate's schedule is damaged"):
        Began.of(state)


def test_other_weights_of_frozen_parts_are_said(here, program):
    """The same file name, another content: latents or conditions are others from here on."""
    yaml = make_run(here)
    assert program("train", "--config", yaml, "trainer.max_steps=1")[0] == 0
    torch.manual_seed(7)
    save_part(here / "conditioner.safetensors", build("conditioner", CLOOB), CLOOB)
    code, out, err = program("train", "--config", yaml, "resume.checkpoint=last", "trainer.max_steps=2")
    assert code == 0, err
    assert out.count("conditioner.weights: other weights than those that this run was trained with so far") == 1
    assert "autoencoder.weights" not in out
