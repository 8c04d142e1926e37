"""The held-out loss: the same numbers whatever the batches and processes are, early stopping, the best weights."""

import contextlib
import csv
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from tiny import DENOISER, embedding, make_run, run_program

from ldm_lab.__main__ import main
from ldm_lab.checkpoints.files import read_pickled
from ldm_lab.config import build
from ldm_lab.data.shapes import write_shards
from ldm_lab.errors import UserError
from ldm_lab.evaluation.held_out import HeldOutBatch, loss_sums


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
    assert losses(tmp_path / "runs/halves/metrics.csv") == found
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
    assert "held_out: other images or times than before: the lowest loss so far" in said
    assert "the run ends at step 5, the lowest" in said


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
    assert "held-out loss" not in capsys.readouterr().out
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
    config = make_run(tmp_path, images=16, held_out=held_out(tmp_path), trainer={"max_steps": 2})
    for run, devices in (("one", 1), ("two", 2)):
        done = run_program(
            "-m", "ldm_lab", "train", "--config", config, f"run={run}", f"trainer.devices={devices}", cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
    one, two = (losses(tmp_path / "runs" / run / "metrics.csv") for run in ("one", "two"))
    assert two[0] == pytest.approx(one[0], rel=1e-5)
