"""Networks that the processes of a run share: their blocks, the shares, and what comes out of training them so."""

import csv
import json
import multiprocessing.connection
import os
import random
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from pytorch_lightning import Callback
from test_glide_training import UPSAMPLER, write
from tiny import DENOISER, ROOT, embedding, make_run, run_program
from tiny_glide import UNET, conditions
from torch.distributed.fsdp import fully_shard

from ldm_lab.checkpoints.files import read_pickled, read_safetensors
from ldm_lab.config import build, load
from ldm_lab.data.shapes import write_shards
from ldm_lab.pretrained.own_runs import MARK
from ldm_lab.sharded import local
from ldm_lab.training import diffusion, runner

SHARDED = "trainer.strategy=fsdp2"


@pytest.mark.parametrize(("section", "given"), [(DENOISER, embedding(16)), (UNET, conditions())])
def test_blocks_hold_nearly_all_of_a_network_and_none_holds_another(section, given):
    with torch.device("meta"):
        net = build("denoiser", section, 4, given)
    blocks = net.block_modules()
    held = [id(p) for block in blocks for p in block.parameters()]
    assert len(held) == len({*held}), "no parameter is in two blocks"
    assert sum(p.numel() for block in blocks for p in block.parameters()) > 0.7 * sum(
        p.numel() for p in net.parameters()
    )


class Weigh(Callback):
    """Notes how many bytes a process holds of what it trains, in `RUN_RANK.json`."""

    def on_before_optimizer_step(self, trainer, task, optimizer):
        self.gradients = sum(local(p.grad).nbytes for p in task.model.parameters() if p.grad is not None)

    def on_train_end(self, trainer, task):
        states = [v for state in trainer.optimizers[0].state.values() for v in state.values()]
        held = {
            "parameters": sum(local(p.detach()).nbytes for p in task.model.parameters()),
            "average": sum(local(p.detach()).nbytes for p in task.best_model.parameters()),
            "gradients": self.gradients,
            "optimizer": sum(local(value).nbytes for value in states),
        }
        Path(f"{task.run_config.run}_{trainer.global_rank}.json").write_text(json.dumps(held))


class Poison(Callback):
    """Makes the second process's loss of one optimizer step not finite."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, task, batch, index):
        if trainer.global_step + 1 == self.step and trainer.global_rank == 1:
            batch.image = batch.image * float("nan")


def train(rank: int, folder: Path, yaml: Path, runs: list[list[str]], port: int, poison_step: int) -> None:
    """Be one of two processes that train several runs, one after the other; what is printed goes to `said_RANK`."""
    os.chdir(folder)
    os.environ.update(LOCAL_RANK=str(rank), WORLD_SIZE="2", NODE_RANK="0", MASTER_ADDR="127.0.0.1")
    said = os.open(f"said_{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout, sys.stderr = (open(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))  # noqa: SIM115
    own = diffusion.DiffusionTask.callbacks
    diffusion.DiffusionTask.callbacks = lambda task, folder: [*own(task, folder), Weigh(), Poison(poison_step)]
    for i, overrides in enumerate(runs):
        os.environ["MASTER_PORT"] = str(port + i)  # the meeting of the run before is not quite over
        assert runner.run(load(yaml, overrides)) == 0


def train_in_two_processes(folder: Path, yaml: Path, runs: list[list[str]], poison_step: int = -1) -> None:
    """Train several runs in one pair of processes, copies of one that has imported torch and has done nothing else."""
    port = str(random.SystemRandom().randrange(20_000, 30_000))
    done = run_program(__file__, yaml, json.dumps(runs), port, str(poison_step), cwd=folder, timeout=500)
    said = "".join((folder / f"said_{rank}").read_text()[-3000:] for rank in range(2))
    assert done.returncode == 0, said + done.stderr


def main(yaml: str, runs: str, port: str, poison_step: str) -> int:
    """Start the two processes and wait for them. Returns 1 if one of them fails."""
    context = multiprocessing.get_context("fork")
    options = Path.cwd(), Path(yaml), json.loads(runs), int(port), int(poison_step)
    pair = [context.Process(target=train, args=(rank, *options)) for rank in range(2)]
    for process in pair:
        process.start()
    multiprocessing.connection.wait([process.sentinel for process in pair])
    for process in pair:
        process.join(30)
        process.kill()
        process.join()
    return int(any(process.exitcode for process in pair))


def two_process_run(folder: Path, **sections: dict) -> Path:
    """Write a run in two processes with all that is clipped, averaged and drawn; return its YAML."""
    trainer = {"devices": 2, "max_steps": 3, "gradient_clip_val": 0.5, "strategy": "ddp"}
    return make_run(
        folder,
        images=96,
        demo={"prompts": "prompts.txt", "every": 100, "sampling": {"sampler": {"name": "ddim", "steps": 1}}},
        optim={"lr": 1e-4},
        ema_snapshots={"every": 3, "widths": [0.1]},
        checkpoint={"every": 3, "half_export": True, **sections.pop("checkpoint", {})},
        trainer={**trainer, **sections.pop("trainer", {})},
        **sections,
    )


def losses(folder: Path, run: str) -> dict[int, float]:
    with open(folder / "runs" / run / "metrics.csv") as file:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file)}


def tensors(content, path: str = "") -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint by their places."""
    if isinstance(content, torch.Tensor):
        return {path: content}
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return {name: tensor for key, value in items for name, tensor in tensors(value, f"{path}/{key}").items()}


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return the largest distance of two tensors of one name, as a share of the largest magnitude in them."""
    assert a.keys() == b.keys()
    return max(((a[n] - b[n]).abs().max() / a[n].abs().max().clamp_min(1e-12)).item() for n in a if a[n].ndim)


def test_two_processes_share_a_network_and_learn_the_same_as_with_ddp(tmp_path):
    yaml = two_process_run(tmp_path)
    train_in_two_processes(tmp_path, yaml, [["run=ddp"], ["run=shared", SHARDED]])
    expected = losses(tmp_path, "ddp")
    assert losses(tmp_path, "shared") == {step: pytest.approx(loss, rel=1e-5) for step, loss in expected.items()}
    whole, shared = (tensors(read_pickled(tmp_path / f"runs/{run}/last.ckpt")) for run in ("ddp", "shared"))
    assert any("exp_avg_sq" in name for name in whole) and any("averages" in name for name in whole)
    assert furthest(whole, shared) < 1e-2, "AdamW makes much of the rounding of the smallest gradients"
    check_files(tmp_path, shared)
    for rank in (0, 1):
        alone, half = (json.loads((tmp_path / f"{name}_{rank}.json").read_text()) for name in ("ddp", "shared"))
        for what in ("parameters", "gradients", "average", "optimizer"):
            assert 0.45 * alone[what] < half[what] < 0.55 * alone[what], what


def check_files(folder: Path, checkpoint: dict[str, torch.Tensor]) -> None:
    """Check that what a shared network leaves behind is there, and whole."""
    run = folder / "runs/shared"
    there = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert there == {
        *(
            "config.yaml",
            "metrics.csv",
            "events.jsonl",
            "index.html",
            "last.ckpt",
            "step=00000003.ckpt",
            "ema.safetensors",
            MARK,
        ),
        *("demo/step=00000001.png", "ema_snapshots/00000003-0.1.safetensors"),
    }
    exported, _ = read_safetensors(run / "ema.safetensors")
    average = {name: checkpoint[f"/state_dict/model_ema.{name}"] for name in exported}
    assert all(torch.equal(exported[name], average[name].half()) for name in exported)
    drawn = [Image.open(folder / f"runs/{name}/demo/step=00000001.png").tobytes() for name in ("ddp", "shared")]
    assert max(abs(a - b) for a, b in zip(*drawn)) <= 2


@pytest.mark.slow
def test_a_run_changes_over_between_strategies_and_to_one_process(tmp_path, program, monkeypatch):
    yaml = two_process_run(tmp_path, trainer={"max_steps": 20}, checkpoint={"every": 10})
    shared, ddp = ("resume.checkpoint=runs/shared/step=00000010.ckpt", "resume.checkpoint=runs/ddp/step=00000010.ckpt")
    train_in_two_processes(
        tmp_path,
        yaml,
        [
            ["run=ddp"],
            ["run=shared", SHARDED],
            ["run=ddp_to_shared", SHARDED, ddp],
            ["run=shared_to_ddp", shared],
            ["run=shared_to_shared", SHARDED, shared],
        ],
    )
    expected = losses(tmp_path, "ddp")
    assert losses(tmp_path, "shared") == {step: pytest.approx(loss, rel=1e-5) for step, loss in expected.items()}
    for begun, resumed in (("ddp", "ddp_to_shared"), ("shared", "shared_to_ddp")):
        expected = {step: loss for step, loss in losses(tmp_path, begun).items() if step >= 10}
        assert losses(tmp_path, resumed) == {step: pytest.approx(loss, rel=1e-5) for step, loss in expected.items()}
        before, after = (tensors(read_pickled(tmp_path / f"runs/{run}/last.ckpt")) for run in (begun, resumed))
        assert furthest(before, after) < 1e-4
    before, after = (read_pickled(tmp_path / f"runs/{run}/last.ckpt") for run in ("shared", "shared_to_shared"))
    assert before["optimizer_states"][0]["param_groups"] == after["optimizer_states"][0]["param_groups"]
    before, after = tensors(before), tensors(after)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    monkeypatch.chdir(tmp_path)
    alone = ["run=alone", shared, "trainer.devices=1", "trainer.max_steps=11"]
    code, out, err = program("train", "--config", yaml, *alone)
    assert code == 0, err
    assert "trainer.strategy: 'fsdp2' -> 'ddp'" in out
    stored = read_pickled(tmp_path / "runs/shared/step=00000010.ckpt")["optimizer_states"][0]["state"]
    resumed = read_pickled(tmp_path / "runs/alone/last.ckpt")["optimizer_states"][0]["state"]
    assert {place: state["step"] + 1 for place, state in stored.items()} == {p: s["step"] for p, s in resumed.items()}


@pytest.mark.slow
def test_a_step_of_a_shared_network_is_left_out_or_undone_by_all_processes(tmp_path):
    yaml = two_process_run(tmp_path, trainer={"max_steps": 6}, logging={"every": 2})
    for policy in ("skip", "rollback"):
        overrides = [f"guard.on_nonfinite={policy}", "guard.snapshot_every=2"]
        train_in_two_processes(
            tmp_path,
            yaml,
            [[f"run=ddp_{policy}", *overrides], [f"run=shared_{policy}", SHARDED, *overrides]],
            poison_step=3,
        )
        ddp, shared = (read_pickled(tmp_path / f"runs/{name}_{policy}/last.ckpt") for name in ("ddp", "shared"))
        assert ddp["callbacks"]["Guard"] == shared["callbacks"]["Guard"]
        assert ddp["callbacks"]["Guard"]["skipped" if policy == "skip" else "rollbacks"] == 1
        assert furthest(tensors(ddp["state_dict"]), tensors(shared["state_dict"])) < 1e-2


@pytest.mark.slow
def test_a_shared_network_in_bfloat16_with_few_results_kept_and_batches_gathered(tmp_path):
    yaml = two_process_run(tmp_path, trainer={"precision": "bf16-mixed", "accumulate_grad_batches": 2}, ema=None)
    several = ["denoiser.gradient_checkpointing=true"]
    train_in_two_processes(tmp_path, yaml, [[*several, "run=ddp"], [*several, "run=shared", SHARDED]])
    expected = losses(tmp_path, "ddp")
    assert losses(tmp_path, "shared") == {step: pytest.approx(loss, rel=5e-3) for step, loss in expected.items()}


@pytest.mark.slow
def test_blocks_that_are_compiled_can_be_shared(tmp_path):
    gradients = []
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for shared in (False, True):
            torch.manual_seed(0)
            net = build("denoiser", {**DENOISER, "blocks_per_level": 1}, 4, embedding(16))
            for block in net.block_modules() if shared else ():
                block.compile(backend="aot_eager", dynamic=False)
            for module in (*net.block_modules(), net) if shared else ():
                fully_shard(module, mesh=mesh, reshard_after_forward=True)
            net(torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 16)).square().mean().backward()
            gradients.append({name: local(p.grad) for name, p in net.named_parameters() if p.grad is not None})
    finally:
        torch.distributed.destroy_process_group()
    assert furthest(*gradients) < 1e-5


@pytest.mark.slow
def test_a_shared_upsampler_with_a_frozen_part_draws_and_measures_what_ddp_s_does(tmp_path):
    sections = {
        **UPSAMPLER,
        "optim": {"lr": 1e-4, "freeze": ["text_transformer"]},
        "enlargements": {"every": 100, "images": 3, "sampling": {"sampler": {"name": "ddim", "steps": 2}}},
        "held_out": {
            "data": {"name": "webdataset", "shards": str(tmp_path / "held_out" / "*.tar"), "image_size": 16,
                     "batch_size": 4, "require_text": True},
            "every": 3,
        },
        "trainer": {"devices": 2, "max_steps": 3, "strategy": "ddp"},
    }  # fmt: skip
    write_shards(tmp_path / "held_out", count=12, shards=1, size=32, seed=5)  # three batches for two processes
    yaml = write(tmp_path, **sections)
    train_in_two_processes(tmp_path, yaml, [["run=ddp"], ["run=shared", SHARDED]])
    expected = losses(tmp_path, "ddp")
    assert losses(tmp_path, "shared") == {step: pytest.approx(loss, rel=1e-5) for step, loss in expected.items()}
    drawn = [Image.open(tmp_path / f"runs/{run}/enlargements/step=00000001.png") for run in ("ddp", "shared")]
    assert max(abs(a - b) for a, b in zip(*(picture.tobytes() for picture in drawn))) <= 2
    measured = [float(read_safetensors(tmp_path / f"runs/{run}/best.safetensors")[1]["held_out/loss"])
                for run in ("ddp", "shared")]  # fmt: skip
    assert measured[0] == pytest.approx(measured[1], rel=1e-5)


@pytest.mark.parametrize(
    ("trainer", "optim", "said"),
    [
        ({"precision": "16-mixed"}, {}, "trainer.precision: 16-mixed does not go with strategy=fsdp2"),
        ({"channels_last": True}, {}, "trainer.channels_last: does not go with strategy=fsdp2"),
        ({}, {"state": "8bit"}, "optim.state: 8bit does not go with trainer.strategy=fsdp2"),
        ({"strategy": "fsdp"}, {}, "trainer.strategy: auto, ddp or fsdp2 is needed, not 'fsdp'"),
    ],
)
def test_what_does_not_go_with_a_shared_network_is_said_at_once(tmp_path, monkeypatch, program, trainer, optim, said):
    monkeypatch.chdir(tmp_path)
    yaml = make_run(tmp_path, images=8, trainer={"strategy": "fsdp2", **trainer}, optim=optim)
    code, _, err = program("train", "--config", yaml)
    assert code == 2 and said in err and not (tmp_path / "runs").exists()


def test_tasks_whose_network_cannot_be_shared_say_so(tmp_path, monkeypatch, program):
    monkeypatch.chdir(tmp_path)
    code, _, err = program("train", "--config", ROOT / "configs/autoencoder_kl_f8.yaml", "data.shards=x.tar", SHARDED)
    assert code == 2 and "trainer.strategy: fsdp2 is for the denoiser of task=diffusion" in err
    code, _, err = program("train", "--config", make_run(tmp_path, images=8), SHARDED, "lora={rank: 4}")
    assert code == 2 and "trainer.strategy: fsdp2 is for networks that are trained as a whole" in err


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
