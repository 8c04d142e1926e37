"""`train.py --check` leaves nothing behind; what a run says of its memory and its speed."""

import csv
import re

import pytest
import torch
from tiny import ROOT, make_run, run_program

from ldm_lab.config import load
from ldm_lab.errors import told_in_one_line
from ldm_lab.training import speed
from ldm_lab.training.check import trial
from ldm_lab.training.cost import RunCost
from ldm_lab.training.runner import less_memory, training_now


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Runs go under the test's own folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in folder.rglob("*")}


DEMO = {"prompts": "prompts.txt", "every": 100, "sampling": {"sampler": {"name": "ddim", "steps": 2}}}


def test_a_check_makes_a_step_and_a_picture_and_leaves_nothing(here):
    """As a user starts it, with a loader process and wandb, which is not started."""
    yaml = make_run(here, images=16, demo=DEMO, data={"workers": 1}, logging={"wandb": "online"})
    before = files(here)
    done = run_program(ROOT / "train.py", "--config", yaml, "--check", cwd=here)
    assert done.returncode == 0, done.stderr
    assert files(here) == before and "Epoch" not in done.stdout + done.stderr
    assert "check: one batch of 4 was read, step 1 made, one picture of demo drawn; nothing is kept" in done.stdout
    assert re.search(r"check: [\d.]+ [MG]B of main memory, .* were taken at most", done.stdout)
    assert re.search(
        r"check: counted, a step takes about [\d.]+ MB: weights .*, intermediate results of 4 images", done.stdout
    )


def test_a_check_of_a_resume_reads_the_checkpoint_and_changes_nothing(here, program):
    yaml = make_run(here, images=16, trainer={"max_steps": 2})
    assert program("train", "--config", yaml)[0] == 0
    before = files(here)
    options = ["resume.checkpoint=last", "resume.lr=1e-4", "trainer.max_steps=9", "data.batch_size=2"]
    code, out, err = program("train", "--config", yaml, "--check", *options)
    assert code == 0, err
    assert "step 3 made" in out and "trainer.max_steps: 2 -> 9" in out and "learning rate" in out
    assert files(here) == before
    code, _, err = program("train", "--config", yaml, "--check")
    assert code == 2 and "already holds a run" in err, "as in a real start"


def test_a_check_says_that_data_would_be_drawn_and_encoded_first(here, program):
    data = {
        "name": "shapes",
        "folder": "drawn",
        "count": 200,
        "shards": 2,
        "image_size": 64,
        "batch_size": 4,
        "workers": 0,
    }
    yaml = make_run(here, images=8, data={**data, "crop": None, "flip": None}, cache={"folder": "encoded"})
    text = yaml.read_text()
    yaml.write_text(re.sub(r"  (shards: .*tar|crop: null|flip: null)\n", "", text))
    before = files(here)
    code, out, err = program("train", "--config", yaml, "--check")
    assert code == 0, err
    assert "the run would encode its data first, into encoded/" in out
    assert "the run would draw its data first, into drawn/" in out and "step 1 made" in out
    assert files(here) == before


def test_a_check_measures_a_held_out_loss_at_once(here):
    """Not of all images at all times, but a set-up that cannot be measured shows."""
    held_out = {
        "data": {"name": "folder", "path": "images", "image_size": 64, "batch_size": 4},
        "every": 500,
        "samples": 512,
    }
    tried = trial(load(make_run(here, images=8, held_out=held_out), []), here, 0)["held_out"]
    assert [tried.option(key) for key in ("every", "samples", "levels")] == [1, 1, 1]


def test_memory_that_a_resumed_or_shared_run_cannot_save_is_not_offered(here):
    yaml = make_run(here, images=8)
    for override in ("resume.checkpoint=last", "trainer.strategy=fsdp2", "seed=2"):
        config = load(yaml, [override])
        assert ("optim.state=8bit" in less_memory(config.task_class()(config))) == (override == "seed=2")


def test_a_check_fails_as_a_start_does(here, program):
    yaml = make_run(here, images=8, demo={**DEMO, "prompts": "nowhere.txt"})
    code, _, err = program("train", "--config", yaml, "--check")
    assert code == 2 and "nowhere.txt" in err and not (here / "runs").exists()


def test_a_run_says_what_it_holds_and_how_fast_it_is(here, program, monkeypatch):
    monkeypatch.setattr(speed, "FIRST_RATE", 3)
    yaml = make_run(here, images=16, trainer={"max_steps": 6})
    code, out, err = program("train", "--config", yaml)
    assert code == 0, err
    assert re.search(r"trained parameters, frozen ones: .*autoencoder, .*conditioner", out)
    assert re.search(r"memory: weights .*, gradients .*, the optimizer .*; train.py --check counts the rest", out)
    assert re.search(r"speed: [\d.]+ images/s, \d+% of the time waiting for data; at this speed", out)
    assert "step 6 is reached in 0:00:0" in out
    rows = list(csv.DictReader((here / "runs/tiny/metrics.csv").read_text().splitlines()))
    later = [row for row in rows if row["speed/images_per_s"]]
    assert 4 <= len(later) < 6, "the first step warms up"
    assert all(float(row["speed/images_per_s"]) > 0 and 0 <= float(row["speed/waiting"]) <= 1 for row in later)
    assert re.search(r"waiting=\d+%", err)


def test_mfu_is_the_counted_operations_over_what_the_cards_can_do(here):
    config = load(make_run(here, images=8), ["trainer.precision=bf16-mixed"])
    task = config.task_class()(config)
    measured = speed.Speed(RunCost(task), tf32=True)
    measured.flops_at_most = 1e12

    class Trainer:
        world_size = 2
        datamodule = type("Data", (), {"waited": 3.0})

    cost = measured.cost.step
    measured.images = 100
    mark = speed.Mark(seconds=speed.time.monotonic() - 10, images=0, waited=1.0)
    rates = measured.since(mark, Trainer)
    assert rates.images == pytest.approx(10, rel=0.01) and rates.waiting == pytest.approx(0.2, rel=0.01)
    assert rates.mfu == pytest.approx(10 * cost.flops / 4 / 2e12, rel=0.01)
    assert rates.in_words().endswith("images/s, 20% of the time waiting for data, MFU 0%")


def test_out_of_memory_says_what_is_needed(here):
    config = load(make_run(here, images=8), ["optim.state=8bit"])
    task = config.task_class()(config)

    class Trainer:
        global_step = 4
        datamodule = type("Data", (), {"source": type("Source", (), {"batch_size": 4, "image_size": 64})})
        strategy = type("Strategy", (), {"root_device": torch.device("cpu")})

    with (
        pytest.raises(Exception) as raised,
        told_in_one_line(lambda: training_now(Trainer, RunCost(task)), less_memory(task)),
    ):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    said = str(raised.value)
    assert said.startswith(
        "out of the device's memory (2.00 GiB more were asked for) while training at step 5 with batches"
    )
    assert re.search(r"of 4, which take about [\d.]+ MB: weights .*, intermediate results of 4 images", said)
    assert "trainer.precision=bf16-mixed or denoiser.gradient_checkpointing=true need less" in said
    assert "optim.state=8bit" not in said, "it has that"
