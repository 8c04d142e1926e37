"""The held-out loss: the same numbers whatever the batches and processes are, early stopping, the best weights."""

import contextlib
import csv
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from pytorch_lightning import Callback
from safetensors import safe_open
from tiny import DENOISER, embedding, make_run, run_program

from ldm_lab.__main__ import main
from ldm_lab.checkpoints.files import read_pickled
from ldm_lab.config import build
from ldm_lab.data.shapes import write_shards
from ldm_lab.errors import UserError
from ldm_lab.evaluation.held_out import HeldOutBatch, loss_sums
from ldm_lab.training import measuring
from ldm_lab.training.callbacks import RunCallbacks
from ldm_lab.training.guard import Guard
from ldm_lab.training.held_out import HeldOut
from ldm_lab.training.interrupt import Interrupt
from ldm_lab.training.measuring import Measuring


def held_out(folder, **options):
    write_shards(folder / "held_out", count=13, shards=2, size=64, seed=5)
    data = {"name": "webdataset", "shards": str(folder / "held_out" / "*.tar"), "image_size": 64, "batch_size": 4}
    return {
        "data": {**data, "workers": 0, **options.pop("data", {})},
        "every": 2,
        "samples": 13,
        "levels": 2,
        **options,
    }


def losses(path):
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {int(row["step"]): float(row["held_out/loss"]) for row in rows if row["held_out/loss"]}


@pytest.mark.parametrize("name", ["v_cosine", "flow_matching"])
def test_sums_do_not_depend_on_the_batches(name):
    torch.manual_seed(0)
    denoiser = build("denoiser", DENOISER, 4, embedding(16)).eval()
    objective = build("objective", {"name": name})
    x0, embed = torch.randn(6, 4, 8, 8), torch.randn(6, 16)
    whole = HeldOutBatch(x0, {"embed": embed}, 0, 6)
    parts = [HeldOutBatch(x0[i : i + 4], {"embed": embed[i : i + 4]}, i, len(x0[i : i + 4])) for i in (0, 4)]
    unwanted = replace(parts[0], count=0)
    sums = loss_sums(denoiser, objective, [whole], 3, 1)
    torch.testing.assert_close(loss_sums(denoiser, objective, [*parts, unwanted], 3, 1), sums, rtol=1e-5, atol=1e-6)
    assert sums[1].sum() == 18
    if name == "v_cosine":
        assert sums[1].min() >= 3  # times are even, those of flow matching gather in the middle
    assert not torch.equal(loss_sums(denoiser, objective, [whole], 3, 2)[0], sums[0])


def test_losses_are_logged_and_the_best_weights_kept(tmp_path, capsys):
    config = make_run(tmp_path, images=16, held_out=held_out(tmp_path))
    with contextlib.chdir(tmp_path):
        assert not main(["train", "--config", str(config)])
        assert not main(["train", "--config", str(config), "run=halves", "trainer.max_steps=3"])
        assert not main(["train", "--config", str(config), "run=halves", "resume.checkpoint=last"])
        assert not main(["train", "--config", str(config), "run=batches", "held_out.data.batch_size=13"])
    found = losses(tmp_path / "runs/tiny/metrics.csv")
    assert [*found] == [0, 1, 3, 5] and found[5] < found[0]  # before the first step, and after 2, 4 and 6
    halves = losses(tmp_path / "runs/halves/metrics.csv")
    assert [*halves] == [0, 1, 2, 3, 5] and {
        step: halves[step] for step in found
    } == found  # the last one of its first half, too
    assert losses(tmp_path / "runs/batches/metrics.csv")[0] == pytest.approx(found[0], rel=0.05)  # other latents
    assert "held-out loss" in capsys.readouterr().out
    with safe_open(tmp_path / "runs/tiny/best.safetensors", "pt") as file:
        assert float(file.metadata()["held_out/loss"]) == pytest.approx(min(found.values()))


def test_a_run_ends_when_the_loss_does_not_fall(tmp_path, capsys):
    section = held_out(tmp_path, every=1, patience=2)
    config = make_run(tmp_path, images=16, held_out=section, optim={"lr": 0.0}, trainer={"max_steps": 9})
    with contextlib.chdir(tmp_path):
        assert not main(["train", "--config", str(config)])
    assert "no lower held-out loss in 2 measurements; the run ends at step 2" in capsys.readouterr().out
    last = tmp_path / "runs/tiny/last.ckpt"
    written, again = last.stat().st_mtime_ns, ["train", "--config", str(config), "resume.checkpoint=last"]
    with contextlib.chdir(tmp_path):
        assert not main(again)
        said = capsys.readouterr().out
        assert "held_out.patience=2: this run has ended at step 2: 2 measurements were not below the lowest" in said
        assert "step 2: nothing was left to do\n" in said and "encoding" not in said
        assert last.stat().st_mtime_ns == written
        assert not main([*again, "--check"])
        said = capsys.readouterr().out
        assert "step 3 made" in said and "other images" not in said and "held_out.patience" not in said
        assert not main([*again, "held_out.patience=3"])
        assert "in 3 measurements; the run ends at step 3" in capsys.readouterr().out
        assert not main([*again, "held_out.patience=null", "trainer.max_steps=5"])
        assert "has ended" not in capsys.readouterr().out and read_pickled(last)["global_step"] == 5


class Stop(Callback):
    """Sends this process a signal in the midst of a step, or lets its time be up."""

    def __init__(self, step, number=None):
        self.step, self.number = step, number

    def on_train_batch_start(self, trainer, task, batch, index):
        if trainer.global_step == self.step - 1:
            interrupt = next(its for its in trainer.callbacks if isinstance(its, Interrupt))
            if self.number is None:
                interrupt.max_time = 0.0
            else:
                interrupt.handle(self.number, None)


def stopped_run(config, folder, monkeypatch, stop, *words):
    """Train until a callback stops it; return the exit code."""
    in_order = RunCallbacks.in_order
    with contextlib.chdir(folder), monkeypatch.context() as patch:
        patch.setattr(RunCallbacks, "in_order", lambda self: [stop, *in_order(self)])
        return main(["train", "--config", str(config), *words])


@pytest.mark.parametrize("number", [signal.SIGTERM, None], ids=["signal", "time"])
def test_a_run_that_is_told_to_stop_measures_where_it_ends(tmp_path, capsys, monkeypatch, number):
    config = make_run(tmp_path, images=16, held_out=held_out(tmp_path, every=100, patience=1))
    assert stopped_run(config, tmp_path, monkeypatch, Stop(4, number)) == 75
    said = capsys.readouterr().out
    assert "held_out: step 4 is measured, too, as the run ends there; it is saved" in said
    found = losses(tmp_path / "runs/tiny/metrics.csv")
    assert [*found] == [0, 3]
    kept = read_pickled(tmp_path / "runs/tiny/last.ckpt")
    assert kept["global_step"] == 4 and kept["callbacks"]["Checkpointing"]["best"]["step"] == 4
    assert kept["callbacks"]["HeldOut"]["best_step"] == 4 and kept["callbacks"]["HeldOut"]["since"] == 0
    with contextlib.chdir(tmp_path):
        assert not main(["train", "--config", str(config), "resume.checkpoint=last", "optim.lr=0.0"])
    said = capsys.readouterr().out  # not lower at its end, and yet no measurement that the patience counts
    assert "checkpoint.best: " not in said and "held_out.patience" not in said and "held-out loss" in said


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_a_signal_leaves_no_time_for_a_long_measurement(tmp_path, capsys, monkeypatch, known):
    """Whether or not the session has measured before, and so knows how long it takes."""
    config = make_run(tmp_path, images=16, held_out=held_out(tmp_path, every=100))

    def measure_late(self, *args):
        self.deadline = self.deadline and 0.0
        self.measure(*args)

    if known:
        monkeypatch.setattr(measuring, "PATIENCE", 0.0)
    else:
        monkeypatch.setattr(Measuring, "measure_now", measure_late)
    assert stopped_run(config, tmp_path, monkeypatch, Stop(4, signal.SIGTERM)) == 75
    said = capsys.readouterr().out
    assert "held_out: step 4, where the run was told to stop, is not measured: it is not done within" in said
    assert ("step 4 is measured, too" in said) == (not known)
    assert [*losses(tmp_path / "runs/tiny/metrics.csv")] == [0]
    assert read_pickled(tmp_path / "runs/tiny/last.ckpt")["global_step"] == 4


def interrupted(ago):
    """Return what a rank knows of a signal that came so many seconds ago; None of none."""
    interrupt = Interrupt()
    if ago is not None:
        interrupt.received, interrupt.received_at = signal.SIGTERM, time.monotonic() - ago
    return interrupt


@pytest.mark.parametrize(
    ("ago", "took", "others", "is_measured"),
    [
        (None, 60.0, {"ago": None, "took": 60.0}, True),
        (0.0, None, {"ago": 0.0, "took": 1.0}, True),
        (0.0, 1.0, {"ago": 0.0, "took": 60.0}, False),
        (None, 60.0, {"ago": 1.0, "took": 50.0}, False),
        (0.0, 18.0, {"ago": 0.0, "took": 18.0}, True),
        (15.0, 18.0, {"ago": None, "took": 18.0}, False),
    ],
    ids=["no signal", "unknown", "slower rank", "another rank's signal", "in time", "another section took it"],
)
def test_after_a_signal_ranks_measure_alike_what_they_have_time_for(monkeypatch, ago, took, others, is_measured):
    """Within 20 seconds of the signal, not of each section."""
    other = {list: [others["ago"]], float: others["took"]}
    monkeypatch.setattr(measuring, "gather", lambda value: [value, other[type(value)]])
    callback, measured = Measuring(), []
    callback.section, callback.seconds = "x", took
    callback.measure = lambda *_: measured.append(callback.deadline)
    callback.on_train_end(SimpleNamespace(global_step=3, callbacks=[interrupted(ago)]), None)
    assert len(measured) == is_measured
    if measured and ago is not None:
        assert 0 < measured[0] - time.monotonic() <= 20 - ago


def test_ranks_agree_on_what_the_loss_is_measured_on_and_run_the_network_equally_often(tmp_path, monkeypatch):
    """Also where one of them has had an error in reading that has passed."""
    batch = HeldOutBatch(torch.zeros(4, 4, 8, 8), {}, 0, 4)
    section = HeldOut(tmp_path, data=held_out(tmp_path)["data"])
    monkeypatch.setattr(section, "encode_batch", lambda *_: batch)
    task, strategy = SimpleNamespace(seed=1), SimpleNamespace(broadcast=lambda _: "of the first rank")
    trainer = SimpleNamespace(
        world_size=2, global_rank=1, global_step=5, strategy=strategy, datamodule=SimpleNamespace(source=section.source)
    )
    monkeypatch.setattr("ldm_lab.training.held_out.gather", lambda value: [7 if value == 1 else value, value])
    section.samples = 8
    section.source.open()
    section.on_train_start(trainer, task)
    assert section.measured_on == "of the first rank" and [its.count for its in section.encoded] == [4, 0, 0, 0]


def test_what_is_measured_does_not_wait_for_a_checkpoint_where_the_run_goes_on_in_another_precision(tmp_path):
    measured, trainer = [], SimpleNamespace(global_step=3, callbacks=[guard := Guard(tmp_path, 1)])
    callback = Measuring()
    callback.measure = lambda *_: measured.append(1)
    guard.leaves_for = "32-true"
    callback.on_train_end(trainer, None)
    assert not measured


def test_the_order_of_held_out_images_depends_on_the_buffer_that_they_are_drawn_from(tmp_path):
    """So the first samples, and each one's noise, are others; but not where nothing is drawn, as in a folder."""
    trainer = SimpleNamespace(
        is_global_zero=True, strategy=SimpleNamespace(barrier=lambda: None, broadcast=lambda value: value)
    )

    def measured_on(data):
        section = HeldOut(tmp_path, data=data)
        section.setup(trainer, SimpleNamespace(seed=1, check_encoded_by=lambda *_: None), "fit")
        return section.measured_on

    shards = held_out(tmp_path)["data"]
    first = measured_on(shards)
    assert measured_on({**shards, "shuffle_buffer": 2}) != first
    assert measured_on({**shards, "captions": {"endings": [".cap"]}}) != first
    for key, value in {"workers": 1, "timeout": 9.0, "shards": str(tmp_path / "./held_out/*.tar")}.items():
        assert measured_on({**shards, key: value}) == first


def test_losses_on_other_images_do_not_count(tmp_path, capsys):
    """Replaced under the same names, or others of the same: the lowest loss and the patience begin anew."""
    section = held_out(tmp_path, every=1, patience=2)
    config = make_run(tmp_path, images=16, held_out=section, optim={"lr": 0.0}, trainer={"max_steps": 9})
    with contextlib.chdir(tmp_path):
        assert not main(["train", "--config", str(config)])
        for path in (tmp_path / "held_out").glob("*.tar"):
            path.unlink()
        (tmp_path / "held_out").rename(tmp_path / "gone")
        write_shards(tmp_path / "held_out", count=13, shards=2, size=64, seed=6)
        capsys.readouterr()
        assert not main(["train", "--config", str(config), "resume.checkpoint=last"])
        said = capsys.readouterr().out
    assert "held_out: other images, captions or times than before: the lowest loss so far" in said
    assert "the run ends at step 5, the lowest" in said


def test_captions_that_have_changed_are_other_conditions(tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (80 * number, 0, 0)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text("a red circle")
    data = {"name": "folder", "path": str(pictures), "image_size": 64, "batch_size": 4, "workers": 0}
    config = make_run(tmp_path, images=16, held_out={"data": data, "every": 1, "samples": 3, "levels": 2})
    with contextlib.chdir(tmp_path):
        assert not main(["train", "--config", str(config), "trainer.max_steps=1"])
        again = ["train", "--config", str(config), "resume.checkpoint=last"]
        assert not main([*again, "trainer.max_steps=2"])
        assert "does not count" not in capsys.readouterr().out
        (pictures / "1.txt").write_text("a blue square")
        assert not main([*again, "trainer.max_steps=3"])
    said = capsys.readouterr().out
    assert "held_out: other images, captions or times than before" in said
    assert "does not count any more: another metric, other images or captions" in said


def test_what_a_checkpoint_s_step_came_to_is_not_measured_and_drawn_again(tmp_path, capsys):
    """The first batch of a resumed run's first step comes while the step before is still the last one."""
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    demo = {"prompts": str(tmp_path / "prompts.txt"), "every": 2, "sampling": {"sampler": {"name": "ddim", "steps": 2}}}
    trainer = {"accumulate_grad_batches": 2, "max_steps": 2}
    config = make_run(tmp_path, images=16, held_out=held_out(tmp_path), trainer=trainer, demo=demo)
    with contextlib.chdir(tmp_path):
        assert not main(["train", "--config", str(config)])
        drawn = (tmp_path / "runs/tiny/demo/step=00000002.png").stat().st_mtime_ns
        assert "at step 2" in capsys.readouterr().out
        assert not main(["train", "--config", str(config), "resume.checkpoint=last", "trainer.max_steps=3"])
    assert capsys.readouterr().out.count("held-out loss ") == 1  # of step 3, where it ends
    assert (tmp_path / "runs/tiny/demo/step=00000002.png").stat().st_mtime_ns == drawn


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"image_size": 32}, "held_out.data.image_size: 32; data.image_size is 64"),
        ({"shards": "nothing/*.tar"}, "held_out.data.shards: "),
    ],
)
def test_data_that_cannot_be_measured_are_refused(tmp_path, data, message):
    config = make_run(tmp_path, images=16, held_out=held_out(tmp_path, data=data))
    with contextlib.chdir(tmp_path), pytest.raises(UserError, match=message):
        main(["train", "--config", str(config)])


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    config = make_run(tmp_path, images=16, held_out=held_out(tmp_path), trainer={"max_steps": 3})
    for run, devices in (("one", 1), ("two", 2)):
        done = run_program(
            "-m", "ldm_lab", "train", "--config", config, f"run={run}", f"trainer.devices={devices}", cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
    one, two = (losses(tmp_path / "runs" / run / "metrics.csv") for run in ("one", "two"))
    assert two[0] == pytest.approx(one[0], rel=1e-5) and [*one] == [*two] == [0, 1, 2]
