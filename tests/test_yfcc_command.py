"""The project's main command, as its users know it: these names stay."""

import json

import pytest
import torch
from tiny import ROOT, make_parts, run_program

from ldm_lab.checkpoints.files import read_pickled, read_safetensors
from ldm_lab.config import load
from ldm_lab.data.shapes import write_shards
from ldm_lab.training.diffusion import DiffusionTask


@pytest.fixture
def small(tmp_path) -> list[str]:
    """Overrides that make the networks and the images small, and change nothing else of the recipe."""
    write_shards(tmp_path / "shards", count=32, shards=4, size=64, seed=0)
    weights = {role: section["weights"] for role, section in make_parts(tmp_path).items()}
    return [
        "data.image_size=64", "data.batch_size=2", "data.workers=0", "denoiser.base_channels=16",
        "denoiser.multipliers=[1,2]", "denoiser.mapping_width=32", "denoiser.head_width=16", "demo=null",
        *(f"{role}.weights={path}" for role, path in weights.items()),
        "logging.wandb=none", "logging.every=1", "trainer.accelerator=cpu", "trainer.threads=1",
    ]  # fmt: skip


def test_train_on_two_devices_resume_in_full_precision_lower_the_rate_and_fine_tune(tmp_path, small):
    command = [ROOT / "train.py", "--config", ROOT / "configs/yfcc_cfg.yaml"]
    data = f"data.shards={tmp_path}/shards/{{00000..00003}}.tar"

    def train(*overrides: str) -> str:
        result = run_program(*command, data, *small, *overrides, cwd=tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    run = tmp_path / "runs" / "yfcc_cfg"
    train("trainer.devices=2", "trainer.precision=bf16-mixed", "trainer.max_steps=2")
    state = read_pickled(run / "last.ckpt")
    assert state["global_step"] == 2 and len(state["ldm_lab"]["data"]) == 2
    assert state["optimizer_states"][0]["param_groups"][0]["lr"] == 3e-5
    out = train(
        "trainer.devices=2", "trainer.precision=32-true", "resume.checkpoint=last", "resume.lr=3e-6",
        "trainer.max_steps=4",
    )  # fmt: skip
    assert "trainer.precision: 'bf16-mixed' -> '32-true'" in out and "learning rate: 3e-05 -> 3e-06" in out
    state = read_pickled(run / "last.ckpt")
    assert state["global_step"] == 4
    assert state["optimizer_states"][0]["param_groups"][0]["lr"] == 3e-6
    assert all(value.dtype != torch.bfloat16 for value in state["state_dict"].values())
    _, metadata = read_safetensors(run / "ema.safetensors")
    assert json.loads(metadata["config"])["autoencoder"]["latent_std"] == pytest.approx(2.55)
    out = train("run=fine_tuned", "init_from=runs/yfcc_cfg/ema.safetensors", "trainer.devices=1", "trainer.max_steps=1")
    assert "init_from: weights of runs/yfcc_cfg/ema.safetensors (step 4)" in out


def test_the_recipe_is_the_original_s_1_174_321_228_parameters():
    config = load(ROOT / "configs/yfcc_cfg.yaml", ["data.shards=x.tar"])
    with torch.device("meta"):
        task = DiffusionTask(config, read_weights=False)
    assert sum(parameter.numel() for parameter in task.model.parameters()) == 1_174_321_228
