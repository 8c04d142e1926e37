"""`evaluate` in a run: metrics of pictures in the log, on any number of processes; the best weights by a metric."""

import contextlib
import csv
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import make_run, run_program

from ldm_lab.__main__ import main
from ldm_lab.checkpoints.files import read_pickled
from ldm_lab.data.shapes import write_shards
from ldm_lab.errors import NotFiniteError, UserError
from ldm_lab.sampling import Pipeline
from ldm_lab.training.best import Best, BestState, read_best
from ldm_lab.training.evaluate import Evaluate, Made
from ldm_lab.training.measuring import OutOfTime

SAMPLING = {"sampler": {"name": "ddim", "steps": 2}, "batch_size": 2}


def evaluate(folder: Path, **options) -> dict:
    write_shards(folder / "real", count=9, shards=1, size=64, seed=5)
    data = {"name": "webdataset", "shards": str(folder / "real" / "*.tar"), "image_size": 64, "batch_size": 4}
    section = {"data": {**data, "workers": 0}, "every": 2, "images": 9, "pictures": 5, "sampling": SAMPLING}
    return {**section, **options}


def logged(path: Path) -> dict[int, dict[str, float]]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        int(row["step"]): {name: float(value) for name, value in row.items() if name.startswith("evaluate/")}
        for row in rows
        if row.get("evaluate/cmmd")
    }


def best(folder: Path) -> dict[str, str]:
    with safe_open(folder / "best.safetensors", "pt") as file:
        return file.metadata()


def test_metrics_are_logged_and_the_best_weights_by_one_kept(tmp_path, capsys):
    """A run that is stopped and goes on measures, and keeps, what one does that was not."""
    config = make_run(tmp_path, images=16, evaluate=evaluate(tmp_path), checkpoint={"best": "cmmd"})
    with contextlib.chdir(tmp_path):
        assert not main(["train", "--config", str(config)])
        said = capsys.readouterr().out
        assert not main(["train", "--config", str(config), "run=halves", "trainer.max_steps=3"])
        assert not main(["train", "--config", str(config), "run=halves", "resume.checkpoint=last"])
    found = logged(tmp_path / "runs/tiny/metrics.csv")
    assert [*found] == [1, 3, 5]  # after 2, 4 and 6 steps
    names = ["evaluate/fd", "evaluate/cmmd", "evaluate/precision", "evaluate/recall", "evaluate/clip_score"]
    assert all([*values] == names for values in found.values())
    halves = logged(tmp_path / "runs/halves/metrics.csv")
    assert [*halves] == [1, 2, 3, 5]  # the last step of its first half, too
    assert {step: halves[step] for step in found} == found
    assert "evaluate: fd " in said and "covariances are singular" in said
    for run, own in (("tiny", found), ("halves", halves)):
        lowest = min(own, key=lambda step: own[step]["evaluate/cmmd"])
        kept = best(tmp_path / "runs" / run)
        assert float(kept["evaluate/cmmd"]) == own[lowest]["evaluate/cmmd"] and int(kept["step"]) == lowest + 1


def test_the_first_metric_of_a_run_is_the_default_and_none_keeps_none(tmp_path):
    config = make_run(
        tmp_path, images=16, evaluate=evaluate(tmp_path, metrics=["clip_score"]), trainer={"max_steps": 2}
    )
    with contextlib.chdir(tmp_path):
        assert not main(["train", "--config", str(config)])
        assert not main(["train", "--config", str(config), "run=none", "checkpoint.best=none"])
    assert "evaluate/clip_score" in best(tmp_path / "runs/tiny")
    assert not (tmp_path / "runs/none/best.safetensors").exists()


def test_prompts_of_a_file_another_judge_and_pictures_that_are_not_finite(tmp_path, capsys, monkeypatch):
    clip = {"name": "cloob", "weights": str(tmp_path / "conditioner.safetensors")}
    section = evaluate(tmp_path, prompts=str(tmp_path / "prompts.txt"), clip=clip, metrics=["cmmd"], pictures=2)
    config = make_run(tmp_path, images=16, evaluate=section, trainer={"max_steps": 2})
    with contextlib.chdir(tmp_path):
        assert not main(["train", "--config", str(config)])
        assert [*logged(tmp_path / "runs/tiny/metrics.csv")] == [1]
        capsys.readouterr()

        def broken(*_, **__):
            raise NotFiniteError("not finite")

        monkeypatch.setattr(Pipeline, "__call__", broken)
        assert not main(["train", "--config", str(config), "run=broken"])
    assert "evaluate: pictures at step 2 are not finite; nothing is measured" in capsys.readouterr().out
    assert not (tmp_path / "runs/broken/best.safetensors").exists()


def test_every_prompt_is_looked_at_before_training(tmp_path):
    """Here the third: a model without dropped conditions takes weights alone that add up to 1."""
    (tmp_path / "p.txt").write_text("a star:1\na cat:1\na dog:2\n")
    section = evaluate(tmp_path, prompts=str(tmp_path / "p.txt"), metrics=["cmmd"])
    config = make_run(tmp_path, images=16, evaluate=section, trainer={"max_steps": 2})
    told = r"evaluate: prompt 'a dog:2': guidance needs a model that was trained with dropped conditions"
    with contextlib.chdir(tmp_path), pytest.raises(UserError, match=told):
        main(["train", "--config", str(config), "conditioner.dropout=0"])


def test_the_last_step_is_measured_and_metrics_without_finite_features_are_left_out(tmp_path, capsys, monkeypatch):
    section = evaluate(tmp_path, every=100, metrics=["cmmd", "clip_score"], pictures=2)
    config = make_run(tmp_path, images=16, evaluate=section, trainer={"max_steps": 2})
    seen = Evaluate.seen

    def broken(self, task, pictures, texts, with_texts):
        rows = seen(self, task, pictures, texts, with_texts)
        if with_texts:
            rows.features("embedding")[0] = torch.nan
        return rows

    with contextlib.chdir(tmp_path), monkeypatch.context() as patch:
        patch.setattr(Evaluate, "seen", broken)
        assert not main(["train", "--config", str(config)])
    assert "features of 1 of 2 images are not finite at step 2; cmmd is left out" in capsys.readouterr().out
    with open(tmp_path / "runs/tiny/metrics.csv", newline="") as file:
        (last,) = [row for row in csv.DictReader(file) if row.get("evaluate/clip_score")]
    assert last["step"] == "1" and not last.get("evaluate/cmmd")


def test_a_measurement_is_given_up_where_a_signal_leaves_no_time(tmp_path):
    section = Evaluate(tmp_path, **evaluate(tmp_path))
    strategy = SimpleNamespace(broadcast=lambda value: value)
    trainer = SimpleNamespace(world_size=1, global_rank=0, strategy=strategy)
    made = []
    section.make = lambda *args: made.append(args) or Made(args[-1], None)
    section.deadline = time.monotonic() + 1000
    assert len(section.made_parts(trainer, None)) == 3
    section.deadline = time.monotonic() - 1
    with pytest.raises(OutOfTime):
        section.made_parts(trainer, None)
    assert len(made) == 3


def test_networks_are_on_the_device_only_while_they_are_needed(tmp_path):
    """The run trains in the memory that they would take, and plan counts none; its own conditioner stays there."""

    class Moved(torch.nn.Module):
        def __init__(self, part):
            super().__init__()
            self.part, self.places = part, []

        def to(self, device):
            self.places.append(str(device))

        def cpu(self):
            self.places.append("cpu")

    section, conditioner = Evaluate(tmp_path, **evaluate(tmp_path)), torch.nn.Linear(1, 1)
    own, judge = section.networks = [Moved(conditioner), Moved(torch.nn.Linear(1, 1))]
    task = SimpleNamespace(device=torch.device("meta"), conditioner=conditioner)
    with pytest.raises(OutOfTime), section.on_device(task):
        assert judge.places == ["meta"]
        raise OutOfTime
    assert judge.places == ["meta", "cpu"] and own.places == []


def test_what_the_best_so_far_depends_on(tmp_path):
    own, prompts = evaluate(tmp_path), tmp_path / "some.txt"
    prompts.write_text("a red circle\n")

    def described(**options) -> str:
        return Evaluate(tmp_path, **{**own, "prompts": str(prompts), **options}).described

    first = described()
    for key, value in {"workers": 1, "batch_size": 3, "shards": str(tmp_path / "./real/*.tar")}.items():
        assert described(data={**own["data"], key: value}) == first
    assert described(sampling={**SAMPLING, "batch_size": 1}) == first
    assert described(sampling={**SAMPLING, "seed": 1}) != first and described(pictures=6) != first
    prompts.write_text("a blue square\n")
    assert described() != first


def kept_best(folder: Path, **own) -> tuple[Best, dict]:
    """Return the best so far of a run that goes on, and what it remembers."""
    kept = Best(folder, None)
    kept.metric = "evaluate/cmmd"
    state = BestState(metric="evaluate/cmmd", value=1.5, step=4, measured_on="x")
    kept.take_over({"best": state, "training": "this"})
    return kept, {**state, "training": "this", **own}


def begun(kept: Best) -> BestState | None:
    strategy = SimpleNamespace(broadcast=lambda value: value)
    kept.begin(SimpleNamespace(strategy=strategy, is_global_zero=True))
    return kept.state


def write_best(folder: Path, fact: str | None) -> None:
    metadata = {"format": "ldm_lab"} if fact is None else {"format": "ldm_lab", "best": fact}
    save_file({"w": torch.zeros(1)}, folder / "best.safetensors", metadata)


def test_the_best_so_far_is_what_its_file_says(tmp_path, capsys):
    kept, told = kept_best(tmp_path)
    before = kept.state
    write_best(tmp_path, json.dumps(told))
    assert begun(kept) == before and not capsys.readouterr().out


@pytest.mark.parametrize(
    ("fact", "message"),
    [
        (None, "does not say what it is the best of"),
        ("{", "does not say what it is the best of"),
        ({"value": "nan"}, "does not say what it is the best of"),
        ({"step": -1}, "does not say what it is the best of"),
        ({"measured_on": ["x"]}, "does not say what it is the best of"),
        ({"training": "another"}, "is of another training, and will be replaced"),
    ],
    ids=["nothing", "no-json", "nan", "step", "list", "training"],
)
def test_a_file_that_is_no_best_of_this_training_does_not_count(tmp_path, capsys, fact, message):
    kept, told = kept_best(tmp_path)
    write_best(tmp_path, json.dumps({**told, **fact}) if isinstance(fact, dict) else fact)
    assert begun(kept) is None
    said = capsys.readouterr().out
    assert "evaluate/cmmd 1.5 at step 4 does not count any more: " in said and message in said


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 40], ids=["missing", "empty", "damaged"])
def test_weights_that_are_not_there_or_damaged_do_not_count(tmp_path, capsys, content):
    kept, _ = kept_best(tmp_path)
    if content is not None:
        (tmp_path / "best.safetensors").write_bytes(content)
    assert begun(kept) is None
    why = ", are not there" if content is None else " cannot be read, and will be replaced"
    assert f"at step 4 does not count any more: {'its weights, ' * (content is None)}" in (
        said := capsys.readouterr().out
    )
    assert f"best.safetensors{why}" in said


def test_a_cut_off_file_does_not_count(tmp_path, capsys):
    kept, told = kept_best(tmp_path)
    write_best(tmp_path, json.dumps(told))
    path = tmp_path / "best.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert begun(kept) is None and "cannot be read" in capsys.readouterr().out


def test_weights_that_are_newer_or_older_than_the_checkpoint_count_as_what_they_are(tmp_path, capsys):
    """A run that was killed had measured on; a file may have been put back by hand."""
    for step, value in ((6, 1.25), (2, 3.5)):
        kept, told = kept_best(tmp_path)
        write_best(tmp_path, json.dumps({**told, "step": step, "value": value}))
        assert begun(kept) == BestState(metric="evaluate/cmmd", value=value, step=step, measured_on="x")
        assert f"is of step {step}: evaluate/cmmd {value} at step {step} is the best so far" in capsys.readouterr().out


def test_a_fresh_run_says_that_it_replaces_the_weights_of_another(tmp_path, capsys):
    write_best(tmp_path, json.dumps(kept_best(tmp_path)[1]))
    fresh = Best(tmp_path, None)
    fresh.metric = "evaluate/cmmd"
    fresh.state = BestState(metric="evaluate/cmmd", value=1.5, step=0, measured_on="x")  # before the first step
    assert begun(fresh) is not None and len(fresh.training) == 16
    said = capsys.readouterr().out
    assert "is of another training, and will be replaced" in said and "does not count" not in said


def test_a_run_that_ends_between_two_measurements_measures_its_last_step(tmp_path, capsys):
    """By the patience of `held_out`, before the first measurement of `evaluate`; the best weights know of it."""
    data = evaluate(tmp_path)["data"]
    held_out = {"data": data, "every": 1, "samples": 4, "levels": 1, "patience": 1}
    section = evaluate(tmp_path, every=100, metrics=["clip_score"], pictures=2)
    config = make_run(
        tmp_path, images=16, evaluate=section, held_out=held_out, optim={"lr": 0.0}, checkpoint={"best": "clip_score"}
    )
    with contextlib.chdir(tmp_path):
        assert not main(["train", "--config", str(config)])
        assert "evaluate: step 1 is measured, too, as the run ends there; it is saved" in capsys.readouterr().out
        with open("runs/tiny/metrics.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["evaluate/clip_score"]]
        assert [row["step"] for row in rows] == ["0"]
        state = read_pickled(Path("runs/tiny/last.ckpt"))["callbacks"]["Checkpointing"]["best"]
        assert state["step"] == 1 and read_best(Path("runs/tiny/best.safetensors"))[0] == state
        assert not main(["train", "--config", str(config), "resume.checkpoint=last"])
    said = capsys.readouterr().out
    assert "nothing was left to do" in said and "is measured" not in said and "checkpoint.best" not in said


def test_a_check_evaluates_once(tmp_path, capsys):
    config = make_run(tmp_path, images=16, evaluate=evaluate(tmp_path, every=1000, images=1000, pictures=500))
    with contextlib.chdir(tmp_path):
        assert not main(["train", "--config", str(config), "--check"])
        assert not (tmp_path / "runs").exists()
    assert "evaluate: fd " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"checkpoint": {"best": "fdd"}}, "checkpoint.best: no such metric of this run: 'fdd'. Did you mean 'fd'"),
        ({"checkpoint": {"best": "loss"}}, "checkpoint.best: no such metric of this run: 'loss'"),
        ({"evaluate": {"metrics": ["fidd"]}}, "evaluate.metrics: no such metric: 'fidd'"),
        ({"evaluate": {"metrics": ["psnr"]}}, "evaluate.metrics: psnr: looks at no picture"),
        ({"evaluate": {"pictures": 3}}, "evaluate.pictures: 3; precision needs at least 4"),
        ({"evaluate": {"metrics": ["fd"], "images": 1}}, "evaluate.images: 1; fd needs at least 2"),
        ({"evaluate": {"metrics": ["fid"], "inception": "none.pth"}}, "none.pth: no such file"),
        ({"evaluate": {"prompts": "none.txt"}}, "none.txt: no such prompts file"),
        (
            {"evaluate": {"data": {"name": "folder", "path": "none", "image_size": 64, "batch_size": 2}}},
            "evaluate.data",
        ),
        ({"evaluate": {"sampling": {"seed": -1}}}, "evaluate.sampling.seed"),
    ],
    ids=["best", "unmeasured", "metric", "data-metric", "pictures", "images", "inception", "prompts", "data", "seed"],
)
def test_what_cannot_be_measured_is_told_before_the_run(tmp_path, sections, message):
    own = evaluate(tmp_path)
    made = {name: {**(own if name == "evaluate" else {}), **its} for name, its in sections.items()}
    config = make_run(tmp_path, images=16, **{"evaluate": own, **made})
    with contextlib.chdir(tmp_path), pytest.raises(UserError, match=message):
        main(["train", "--config", str(config)])
    assert not (tmp_path / "runs/tiny/last.ckpt").exists()


def test_best_without_anything_that_is_measured(tmp_path):
    config = make_run(tmp_path, images=16, checkpoint={"best": "cmmd"})
    with contextlib.chdir(tmp_path), pytest.raises(UserError, match="`held_out` measures the loss"):
        main(["train", "--config", str(config)])


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    """With a learning rate of 0 the two runs have the same weights, whatever their batches are."""
    section = evaluate(tmp_path, every=1)
    config = make_run(tmp_path, images=16, evaluate=section, optim={"lr": 0.0}, trainer={"max_steps": 1})
    for run, devices in (("one", 1), ("two", 2)):
        done = run_program(
            "-m", "ldm_lab", "train", "--config", config, f"run={run}", f"trainer.devices={devices}", cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
    one, two = (logged(tmp_path / "runs" / run / "metrics.csv") for run in ("one", "two"))
    assert one == two and len(one) == 1
    assert torch.tensor([*one[0].values()]).isfinite().all()
