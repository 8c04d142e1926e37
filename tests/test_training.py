"""Training as a user starts it: what a run leaves behind, stops and resumes, changed settings, wrong input."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import warm
from filelock import FileLock
from PIL import Image
from tiny import DENOISER, ROOT, WARM, make_parts, make_run, program_environment, run_program
from torch.quasirandom import SobolEngine

from ldm_lab.checkpoints.files import FORMAT, read_pickled, read_safetensors
from ldm_lab.config import build, load
from ldm_lab.errors import UserError
from ldm_lab.pretrained.own_runs import MARK
from ldm_lab.training.task import batch_seed
from ldm_lab.training.timesteps import SobolTimesteps


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Runs go under the test's own folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def losses(folder) -> list[str]:
    with open(folder / "metrics.csv") as file:
        return [row["train/loss"] for row in csv.DictReader(file)]


def weights(path) -> dict[str, torch.Tensor]:
    return read_pickled(path)["state_dict"]


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_run_leaves_its_config_logs_checkpoints_and_model(here, program):
    yaml = make_run(here)
    code, out, err = program("train", "--config", yaml)
    assert code == 0, err
    run = here / "runs" / "tiny"
    assert "base_channels: 16" in out and "trained parameters" in out
    assert "base_channels: 16" in (run / "config.yaml").read_text()
    assert "resize: fast" in out and read_pickled(run / "last.ckpt")[FORMAT]["config"]["data"]["resize"] == "fast"
    assert len(losses(run)) == 6
    assert sorted(p.name for p in run.glob("*.ckpt")) == ["last.ckpt", "step=00000003.ckpt", "step=00000006.ckpt"]
    tensors, metadata = read_safetensors(run / "ema.safetensors")
    assert metadata["step"] == "6" and "data" not in json.loads(metadata["config"])
    assert_equal(
        tensors, {k.removeprefix("model_ema."): v for k, v in weights(run / "last.ckpt").items() if "_ema." in k}
    )
    assert not [name for name in weights(run / "last.ckpt") if not name.startswith(("model.", "model_ema."))]
    assert not list(run.rglob("*.part"))


@pytest.mark.parametrize(("workers", "accumulate"), [(0, 1), (2, 1), (0, 2)])
def test_stopped_and_resumed_is_bit_for_bit_the_uninterrupted_run(here, program, workers, accumulate):
    yaml = make_run(here, images=40)  # 10 batches an epoch: six steps of two batches go into the second one
    options = [f"data.workers={workers}", f"trainer.accumulate_grad_batches={accumulate}"]
    assert program("train", "--config", yaml, "run=whole", *options)[0] == 0
    assert (
        program("train", "--config", yaml, "run=parts", "trainer.max_steps=2", "checkpoint.every=1", *options)[0] == 0
    )
    code, out, _ = program("train", "--config", yaml, "run=parts", "resume.checkpoint=last", *options)
    assert code == 0
    assert "trainer.max_steps: 2 -> 6" in out
    whole, parts = here / "runs" / "whole", here / "runs" / "parts"
    assert losses(parts) == losses(whole)
    assert_equal(weights(parts / "last.ckpt"), weights(whole / "last.ckpt"))


def test_the_learning_rate_of_a_resume_holds_from_the_first_step_on(here, program):
    yaml = make_run(here, optim={"lr": 1e-3, "warmup_steps": 2})
    assert program("train", "--config", yaml, "trainer.max_steps=3")[0] == 0
    code, out, _ = program("train", "--config", yaml, "resume.checkpoint=last", "resume.lr=1e-5")
    assert code == 0
    assert "learning rate: 0.001 -> 1e-05" in out
    with open(here / "runs" / "tiny" / "metrics.csv") as file:
        rates = [float(row["train/lr"]) for row in csv.DictReader(file)]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 1e-5, 1e-5, 1e-5])
    state = read_pickled(here / "runs" / "tiny" / "last.ckpt")["optimizer_states"][0]
    assert all(group["lr"] == pytest.approx(1e-5) for group in state["param_groups"])
    assert state["state"], "the optimizer's averages came along"


def test_without_resume_lr_the_checkpoint_s_rate_holds_and_is_said(here, program):
    yaml = make_run(here)
    program("train", "--config", yaml, "trainer.max_steps=3")
    code, out, _ = program("train", "--config", yaml, "resume.checkpoint=last", "optim.lr=5e-4")
    assert code == 0
    assert "optim.lr: 0.0005 is not used, the checkpoint's 0.001 holds" in out


@pytest.mark.parametrize(("first", "second"), [("bf16-mixed", "32-true"), ("32-true", "bf16-mixed")])
def test_the_precision_may_change_on_resume(here, program, first, second):
    yaml = make_run(here)
    assert program("train", "--config", yaml, "trainer.max_steps=3", f"trainer.precision={first}")[0] == 0
    code, out, _ = program("train", "--config", yaml, "resume.checkpoint=last", f"trainer.precision={second}")
    assert code == 0
    assert f"trainer.precision: '{first}' -> '{second}'" in out
    assert weights(here / "runs/tiny/last.ckpt")["model.net.0.main.0.weight"].dtype == torch.float32


def test_init_from_takes_the_weights_and_nothing_else(here, program):
    yaml = make_run(here)
    assert program("train", "--config", yaml, "run=first")[0] == 0
    code, out, _ = program(
        "train", "--config", yaml, "run=second", "init_from=runs/first/ema.safetensors", "optim.lr=0.0",
        "optim.weight_decay=0.0", "trainer.max_steps=1",
    )  # fmt: skip
    assert code == 0 and "fresh optimizer" in out
    first, _ = read_safetensors(here / "runs/first/ema.safetensors")
    second = weights(here / "runs/second/last.ckpt")
    assert_equal(first, {k.removeprefix("model."): v for k, v in second.items() if k.startswith("model.")})
    assert read_pickled(here / "runs/second/last.ckpt")["global_step"] == 1


def test_demo_grids_from_images_show_them_beside_what_is_drawn(here, program):
    yaml = make_run(here, images=8)
    for number, color in enumerate(("red", "blue", "green")):
        Image.new("RGB", (90 + 30 * number, 70), color).save(here / f"{color}.png")
    (here / "demo.txt").write_text("red.png\nblue.png\ngreen.png\n")
    few = ("trainer.max_steps=1", "demo.sampling.sampler={name: ddim, steps: 2}")
    code, _, err = program("train", "--config", yaml, *few, "demo.images=demo.txt", "--check")
    assert code == 0, err
    code, _, err = program("train", "--config", yaml, *few, "demo.images=demo.txt")
    assert code == 0, err
    with Image.open(here / "runs/tiny/demo/step=00000001.png") as image:
        assert image.text["prompts"] == "red.png\nblue.png\ngreen.png"
        colors = [image.getpixel((80 + 2 * column * (image.width // 4), 80 + row * (image.height // 2)))
                  for row, column in ((0, 0), (0, 1), (1, 0))]  # fmt: skip
    assert colors == [(255, 0, 0), (0, 0, 255), (0, 128, 0)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "demo: prompts (a file of texts) or images (a list of image files) is needed, one of the two"),
        (["demo.images=none.txt"], "demo.images: none.txt: No such file"),
        (["demo.images=demo.txt"], "gone.png"),
        (["demo.images=demo.txt", "demo.prompts=prompts.txt"], "one of the two"),
    ],
    ids=["neither", "no list", "no image", "both"],
)
def test_mistakes_in_demo_images_are_told(here, program, given, message):
    (here / "demo.txt").write_text("gone.png\n")
    code, _, err = program("train", "--config", make_run(here, images=8), "demo.every=1", *given)
    assert code == 2 and message in err and err.count("\n") == 1, err


def test_demo_grids_do_not_disturb_the_training(here, program):
    yaml = make_run(here)
    demo = {"prompts": "prompts.txt", "every": 2, "sampling.sampler": "{name: ddim, steps: 3}"}
    assert program("train", "--config", yaml, "run=plain")[0] == 0
    assert program("train", "--config", yaml, "run=demo", *(f"demo.{k}={v}" for k, v in demo.items()))[0] == 0
    grids = sorted((here / "runs/demo/demo").glob("*.png"))
    assert [p.name for p in grids] == [f"step={s:08d}.png" for s in (1, 2, 4, 6)]
    with Image.open(grids[-1]) as image:
        assert "a blue square" in image.text["prompts"]
    assert losses(here / "runs/demo") == losses(here / "runs/plain")
    assert_equal(weights(here / "runs/demo/last.ckpt"), weights(here / "runs/plain/last.ckpt"))


def test_wandb_online_without_an_account_is_one_line(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    logging = build("logging", {"wandb": "online"})
    with pytest.raises(UserError, match="online did not start"):
        logging.loggers(here / "runs", "tiny", None, None)


def test_a_run_that_is_at_its_end_says_so(here, program):
    yaml = make_run(here)
    assert program("train", "--config", yaml, "trainer.max_steps=1")[0] == 0
    again = ["run=other", "resume.checkpoint=runs/tiny/last.ckpt", "trainer.max_steps=1"]
    code, out, err = program("train", "--config", yaml, *again)
    assert code == 0, err
    assert "step 1: nothing was left to do, trainer.max_steps=1 is reached" in out


@pytest.mark.parametrize(("option", "value"), [("seed", -1), ("rerank", 2)])
def test_grids_of_a_run_can_be_compared(here, program, option, value):
    yaml = make_run(here, demo={"prompts": "prompts.txt", "sampling": {option: value}})
    code, _, err = program("train", "--config", yaml)
    assert code == 2 and f"demo.sampling.{option}: " in err


SLURM = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "run", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
         "SLURM_NODEID": "0", "SLURM_NTASKS_PER_NODE": "1"}  # fmt: skip


def started(here: Path, yaml: Path, environment: dict[str, str], fresh: bool) -> subprocess.Popen | warm.Program:
    """Start train.py in a session of its own; what it prints goes to `said`. Fresh: with nothing imported at first."""
    words = [str(ROOT / "train.py"), "--config", str(yaml)]
    with (here / "said").open("w") as said:
        if fresh or not WARM:
            return subprocess.Popen(
                [sys.executable, *words], cwd=here, stdout=said, stderr=said, start_new_session=True,
                env={**os.environ, **environment},
            )  # fmt: skip
        return warm.Program(words, here, program_environment(environment), (said, said))


@pytest.mark.parametrize(
    ("number", "accumulate", "environment", "fresh"),
    [
        pytest.param(signal.SIGTERM, 1, {}, True, id="SIGTERM"),
        pytest.param(signal.SIGINT, 3, {}, False, id="SIGINT-accumulated"),
        pytest.param(signal.SIGHUP, 1, {}, False, id="SIGHUP", marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 1, {}, False, id="SIGUSR1", marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 2, SLURM, False, id="SIGUSR1-SLURM-accumulated"),
        pytest.param(signal.SIGTERM, 1, SLURM, False, id="SIGTERM-SLURM", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_before_leaving(here, number, accumulate, environment, fresh):
    trainer = {"max_steps": 100_000, "accumulate_grad_batches": accumulate}
    yaml = make_run(here, trainer=trainer, checkpoint={"every": 50_000})
    run = here / "runs" / "tiny"
    with started(here, yaml, environment, fresh) as process:
        deadline = time.monotonic() + 120
        while not (run / "metrics.csv").exists() or len(losses(run)) < 3:
            assert process.poll() is None and time.monotonic() < deadline, (here / "said").read_text()
            time.sleep(0.02)
        process.send_signal(number)
        process.wait(60)
    out = (here / "said").read_text()
    assert process.returncode == 75, out
    assert "and saved" in out
    assert sorted(path.name for path in run.glob("*.ckpt")) == ["last.ckpt"], "no checkpoint of Lightning's own"
    saved = read_pickled(run / "last.ckpt")
    assert saved["global_step"] >= 3
    assert saved["global_step"] * accumulate == saved["ldm_lab"]["batches_seen"], "no step is cut in two"
    assert (run / "ema.safetensors").exists()


def test_max_time_is_this_job_s(here, program):
    yaml = make_run(here, trainer={"max_steps": 100_000}, checkpoint={"every": 50_000})
    done = 0
    for again in ([], ["resume.checkpoint=last"]):  # the second job has as long as the first one
        code, out, err = program("train", "--config", yaml, "trainer.max_time=00:00:02", *again)
        assert code == 75, err
        step = read_pickled(here / "runs/tiny/last.ckpt")["global_step"]
        assert "stopped by trainer.max_time" in out and step > done
        done = step


@pytest.mark.parametrize(
    ("written", "length"),
    [
        ("10:00:00:00", 864_000),
        ("11:30:00", 41_400),
        ("08:30:00", 30_600),
        ("90m", 5400),
        ("1.5h", 5400),
        ("2d", 172_800),
    ],
)
def test_how_long_a_job_is_may_be_written_in_many_ways(here, written, length):
    config = load(make_run(here), [f"trainer.max_time={written}"])
    assert config.part("trainer").build().max_seconds == length


@pytest.mark.parametrize("written", ["tomorrow", "0m", "90", "1:2:3:4:5"])
def test_a_duration_that_is_none_is_refused(here, program, written):
    code, _, err = program("train", "--config", make_run(here), f"trainer.max_time={written}")
    assert code == 2 and "trainer.max_time: a duration such as 90m" in err


def test_a_run_is_trained_by_one_process_at_a_time_and_cleared_of_half_files(here, program):
    yaml = make_run(here)
    run = here / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / ".last.ckpt.abc.part").write_bytes(b"half")
    with FileLock(here / "runs" / ".tiny.lock"):
        code, _, err = program("train", "--config", yaml)
        assert code == 2 and "another process trains this run" in err
        assert (run / ".last.ckpt.abc.part").exists()
    assert program("train", "--config", yaml, "trainer.max_steps=1")[0] == 0
    assert [file.name for file in run.glob(".*")] == [MARK]


def test_a_fresh_start_instead_of_a_resume_is_said(here, program):
    code, out, _ = program(
        "train", "--config", make_run(here), "resume.checkpoint=last", "resume.lr=1e-5", "trainer.max_steps=1"
    )
    assert code == 0
    assert "resume.checkpoint=last: there is no runs/tiny/last.ckpt: a fresh start; resume.lr=1e-05 is not used" in out


def test_kill_minus_nine_leaves_a_whole_checkpoint(here, program):
    yaml = make_run(here, trainer={"max_steps": 100_000}, checkpoint={"every": 1, "keep": 2})
    run = here / "runs" / "tiny"
    with started(here, yaml, {}, fresh=False) as process:
        deadline = time.monotonic() + 120
        while not (run / "metrics.csv").exists() or len(losses(run)) < 4:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    step = read_pickled(run / "last.ckpt")["global_step"]
    code, _, err = program(
        "train", "--config", yaml, "resume.checkpoint=last", f"trainer.max_steps={step + 2}", "checkpoint.every=2"
    )
    assert code == 0, err
    assert read_pickled(run / "last.ckpt")["global_step"] == step + 2
    steps = [int(row["step"]) for row in csv.DictReader(open(run / "metrics.csv"))]  # noqa: SIM115
    assert steps == sorted(set(steps)), "rows past the checkpoint were dropped, not doubled"


def test_checkpoints_by_the_clock(here, program):
    yaml = make_run(here, trainer={"max_steps": 6})
    often = ["checkpoint={every: null, seconds: 0.001, keep: 3}", "run=often"]
    assert program("train", "--config", yaml, *often)[0] == 0
    assert sorted(path.name for path in (here / "runs/often").glob("*.ckpt")) == [
        "last.ckpt", *(f"step={step:08d}.ckpt" for step in (4, 5, 6)),
    ]  # fmt: skip
    seldom = ["checkpoint={every: null, seconds: 10000, keep: 3}", "run=seldom"]
    assert program("train", "--config", yaml, *seldom)[0] == 0
    assert [path.name for path in sorted((here / "runs/seldom").glob("*.ckpt"))] == ["last.ckpt", "step=00000006.ckpt"]
    both = ["checkpoint={every: 4, seconds: 10000, keep_every: 4}", "run=both"]
    assert program("train", "--config", yaml, *both)[0] == 0
    assert [path.name for path in sorted((here / "runs/both").glob("*.ckpt"))] == ["last.ckpt", "step=00000004.ckpt"]
    code, _, err = program("train", "--config", yaml, "run=never", "checkpoint={seconds: 0}")
    assert code == 2 and "checkpoint.seconds: a number above 0 is needed, not 0" in err


SPY = """
import json, sys, torch
from pytorch_lightning import Callback
from ldm_lab.config import load
from ldm_lab.errors import run_program
from ldm_lab.training import diffusion, runner

class Spy(Callback):
    keys = []
    def on_train_batch_end(self, trainer, task, outputs, batch, index):
        self.keys += batch.key
    def on_train_end(self, trainer, task):
        total = {n: p.detach().double().sum().item() for n, p in task.state_dict().items()}
        rates = [g["lr"] for g in trainer.optimizers[0].param_groups]
        with open(f"{task.run_config.run}_{trainer.global_rank}.json", "w") as file:
            json.dump({"keys": self.keys, "total": total, "rates": rates, "world": trainer.world_size}, file)

own = diffusion.DiffusionTask.callbacks
diffusion.DiffusionTask.callbacks = lambda task, folder: [*own(task, folder), Spy()]
run_program(lambda: runner.run(load(sys.argv[1], sys.argv[2:])))
"""


def test_two_processes_share_weights_and_demos_but_not_samples(here, program):
    yaml = make_run(
        here,
        images=96,
        demo={"prompts": "prompts.txt", "every": 20, "sampling": {"sampler": {"name": "ddim", "steps": 2}}},
    )
    (here / "spy.py").write_text(SPY)
    ddp = "trainer.ddp={bucket_mb: 0.01, static_graph: true, gradient_compression: bf16}"
    two = ["trainer.devices=2", "trainer.strategy=ddp", ddp]
    clock = ["checkpoint={every: null, seconds: 0.001, keep: 2}"]
    result = run_program("spy.py", yaml, "trainer.max_steps=20", *clock, *two, cwd=here)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "data: 160 samples read, none skipped" in result.stdout, "both processes' samples"
    numbered = sorted(path.name for path in (here / "runs/tiny").glob("step=*.ckpt"))
    assert numbered == ["step=00000010.ckpt", "step=00000020.ckpt"]
    zero, one = (json.loads((here / f"tiny_{rank}.json").read_text()) for rank in (0, 1))
    assert zero["world"] == 2
    assert zero["total"] == one["total"]
    assert len(zero["keys"]) == len(one["keys"]) == 80
    assert not set(zero["keys"][:44]) & set(one["keys"][:44]), "within an epoch the ranks read different samples"
    assert sorted(p.name for p in (here / "runs/tiny/demo").iterdir()) == ["step=00000001.png", "step=00000020.png"]

    # on with one process, another learning rate and another precision
    code, _, err = program(
        "train", "--config", yaml, "resume.checkpoint=last", "trainer.max_steps=22", "resume.lr=2e-5",
        "trainer.precision=bf16-mixed",
    )  # fmt: skip
    assert code == 0, err
    state = read_pickled(here / "runs/tiny/last.ckpt")
    assert state["global_step"] == 22
    assert state["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(2e-5)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.shards=nothing/*.tar"], "nothing/*.tar"),
        (["autoencoder.weights=none.safetensors"], "none.safetensors: no such file"),
        (["conditioner.weights=tiny.yaml"], "tiny.yaml"),
        (["conditioner.weights=autoencoder.safetensors"], "holds the weights of the role autoencoder, not conditioner"),
        (["autoencoder.ch=64"], "autoencoder.ch: 64 is asked for"),
        (["init_from=autoencoder.safetensors"], "not a trained model"),
        (["resume.checkpoint=nothing.ckpt"], "nothing.ckpt: no such file"),
        (["resume.checkpoint=tiny.yaml"], "tiny.yaml: no weights: it is a text that begins"),
        (["resume.lr=1e-5"], "resume.lr: needs resume.checkpoint"),
        (["demo.prompts=nowhere.txt"], "nowhere.txt"),
        (["demo.prompts=empty.txt"], "empty.txt"),
        (["data.image_size=72"], "72"),
        (["data.workers=5"], "shards"),
        (["trainer.devices=0"], "trainer"),
        (["denoiser.multipliers=[1]"], "multipliers"),
        (["demo.prompts=prompts.txt", "demo.sampling.size=20"], "demo: size 20x20: this model takes multiples of 16"),
        (["demo.prompts=prompts.txt", "conditioner.dropout=0"], "demo: guidance needs a model that was trained with"),
    ],
)
def test_a_user_s_mistake_is_one_line_and_exit_code_2(here, program, overrides, words):
    yaml = make_run(here)
    (here / "empty.txt").write_text("\n")
    code, _, err = program("train", "--config", yaml, *overrides)
    assert code == 2
    assert words in err and len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert not (here / "runs").exists()


def test_a_run_is_never_overwritten_unasked(here, program):
    yaml = make_run(here)
    assert program("train", "--config", yaml, "trainer.max_steps=1")[0] == 0
    code, _, err = program("train", "--config", yaml)
    assert code == 2 and "already holds a run" in err


def test_a_checkpoint_of_another_architecture_is_refused(here, program):
    yaml = make_run(here)
    assert program("train", "--config", yaml, "trainer.max_steps=1")[0] == 0
    code, _, err = program("train", "--config", yaml, "resume.checkpoint=last", "denoiser.base_channels=32")
    assert code == 2 and "denoiser.base_channels was 16, the config says 32" in err
    code, _, err = program(
        "train", "--config", yaml, "run=b", "init_from=runs/tiny/ema.safetensors", "denoiser.base_channels=32"
    )
    assert code == 2 and "weights of another architecture" in err


def test_a_full_disk_stops_the_run_with_the_old_checkpoint_intact(here, program, monkeypatch):
    yaml = make_run(here, checkpoint={"every": 2})
    from ldm_lab.training import checkpointing

    real, calls = torch.save, []

    class Full:
        """A file on a disk that is full after the first 100,000 bytes."""

        def __init__(self, file):
            self.file, self.left = file, 100_000

        def write(self, data):
            self.left -= len(data)
            if self.left < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

        def flush(self):
            self.file.flush()

    def full_at_the_second_time(content, file):
        calls.append(file)
        real(content, Full(file) if len(calls) == 2 else file)

    monkeypatch.setattr(checkpointing.torch, "save", full_at_the_second_time)
    code, _, err = program("train", "--config", yaml)
    assert code == 2 and "No space left on device" in err
    assert read_pickled(here / "runs/tiny/last.ckpt")["global_step"] == 2
    assert not list((here / "runs").rglob("*.part"))


def test_a_hostile_checkpoint_is_refused_and_does_not_run(here, program):
    yaml = make_run(here)

    class Bomb:
        def __reduce__(self):
            return (open, (str(here / "marker"), "w"))

    torch.save({"state_dict": {}, "ldm_lab": Bomb()}, here / "bomb.ckpt")
    code, _, err = program("train", "--config", yaml, "resume.checkpoint=bomb.ckpt")
    assert code == 2 and "refused" in err
    assert not (here / "marker").exists()


def test_batch_seeds_differ_by_rank_and_batch():
    seeds = {batch_seed(s, r, b) for s in range(3) for r in range(4) for b in range(50)}
    assert len(seeds) == 600 and max(seeds) < 2**63


def test_sobol_timesteps_cover_evenly_and_restart_anywhere():
    ranks = [SobolTimesteps(3, rank, 2) for rank in range(2)]
    batches = torch.stack([torch.stack([r(16 * batch, 8) for r in ranks]) for batch in range(4)])  # [4, 2, 8]
    assert batches.min() >= 0 and batches.max() < 1
    per_cell = torch.histc(batches.flatten(), 64, 0, 1)  # [64]
    assert per_cell.tolist() == [1] * 64, "64 Sobol points fill 64 cells"
    assert torch.equal(SobolTimesteps(3, 1, 2)(32, 8), batches[2, 1]), "a resumed run draws the same"
    assert torch.equal(batches.flatten(), SobolEngine(1, scramble=True, seed=3).draw(64)[:, 0]), "torch's own points"
    late = SobolTimesteps.PERIOD + 16
    assert not torch.equal(SobolTimesteps(3, 0, 2)(late, 8), batches[1, 0]), "a new scramble after the period"


def test_sobol_timesteps_go_on_with_another_topology():
    """Three ranks of five in place of two of eight take the points behind: none twice, none left out."""
    whole = SobolTimesteps(3, 0, 1)(0, 31)
    parts = [SobolTimesteps(3, rank, 2)(0, 8) for rank in range(2)]
    parts += [SobolTimesteps(3, rank, 3)(16, 5) for rank in range(3)]
    assert torch.equal(torch.cat(parts), whole)
    end = SobolTimesteps.PERIOD
    across = SobolTimesteps(3, 0, 1)(end - 3, 8)
    assert torch.equal(across, torch.cat([SobolTimesteps(3, 0, 1)(end - 3, 3), SobolTimesteps(3, 0, 1)(end, 5)]))
    start = time.perf_counter()
    SobolTimesteps(3, 0, 1)(end - 64, 64)
    assert time.perf_counter() - start < 0.5


def test_timesteps_are_below_one():
    """In float32 the largest of the points are 1."""
    sobol = SobolTimesteps(0, 0, 1)
    sobol(0, 1)
    sobol.shift = torch.full((1,), sobol.PERIOD - 1)
    assert sobol(0, 1).item() == 1 - 2**-24


def test_frozen_parts_of_the_wrong_kind_are_found_before_training(here):
    sections = make_parts(here)
    from ldm_lab.checkpoints.parts import load_part

    with pytest.raises(UserError, match=r"conditioner\.name is 'none'"):
        load_part("conditioner", {"name": "none", "embed_dim": 16, "weights": sections["conditioner"]["weights"]})
    assert DENOISER["name"] == "ccld_unet"
