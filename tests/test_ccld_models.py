"""Models of cloob-latent-diffusion, sampled and fine-tuned from files in its own layouts."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import CLOOB, KL_F8, ROOT, embedding, make_run, run_program

from ldm_lab.checkpoints.files import read_pickled, read_safetensors
from ldm_lab.checkpoints.native import save_part
from ldm_lab.checkpoints.parts import load_fitting, load_part
from ldm_lab.config import build
from ldm_lab.errors import UserError

# Widths at which heads are 64 wide and one per 64, as in all that was released: the files do not say it.
UNET = {"name": "ccld_unet", "base_channels": 64, "multipliers": [1, 2], "blocks_per_level": 1, "mapping_width": 32}
TOWERS = {**CLOOB, "image_width": 64, "image_heads": 1, "text_width": 64, "text_heads": 1}
SCALE = 1.7


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of three steps, with parts of the originals' proportions."""
    return train_original(tmp_path_factory.mktemp("ccld"))


def train_original(folder: Path) -> Path:
    """Train such a run in a folder, and return that."""
    sections = {"denoiser": {**UNET, "head_width": 64}, "autoencoder": {"latent_std": SCALE}}
    yaml = make_run(folder, trainer={"max_steps": 3}, checkpoint={"every": 3}, **sections)
    torch.manual_seed(1)
    save_part(folder / "autoencoder.safetensors", build("autoencoder", KL_F8), KL_F8)
    save_part(folder / "conditioner.safetensors", build("conditioner", TOWERS), TOWERS)
    done = run_program(ROOT / "train.py", "--config", yaml, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def layouts(trained, tmp_path, monkeypatch):
    """The run's model as the original would have written it: `{layout: path}`, in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_layouts(trained, Path())
    return {"slim": Path("slim.pth"), "training": Path("training.ckpt")}


def write_layouts(trained: Path, folder: Path) -> None:
    """Write the run's model and its autoencoder as the originals would have: slim.pth, training.ckpt, kl-f8.ckpt."""
    run = read_pickled(trained / "runs/tiny/last.ckpt")["state_dict"]
    averaged = {n.removeprefix("model_ema."): t for n, t in run.items() if n.startswith("model_ema.")}
    raw = {n.removeprefix("model."): t for n, t in run.items() if n.startswith("model.")}
    scale = torch.tensor(SCALE)
    torch.save({**averaged, "autoencoder_scale": scale}, folder / "slim.pth")
    autoencoder, _ = read_safetensors(trained / "autoencoder.safetensors")
    cloob, _ = read_safetensors(trained / "conditioner.safetensors")
    del autoencoder["latent_mean"], autoencoder["latent_std"]
    tensors = {"scale_factor": scale}
    tensors |= {f"ae_model.{name}": value for name, value in autoencoder.items()}
    tensors |= {"ae_model.loss.logvar": torch.zeros(())}
    tensors |= {f"cloob.{name}": value for name, value in cloob.items()}
    for prefix, weights in (("model.", raw), ("model_ema.", averaged)):
        tensors |= {prefix + name: value for name, value in weights.items()} | {f"{prefix}autoencoder_scale": scale}
    bookkeeping = {"epoch": 0, "global_step": 2, "hyper_parameters": argparse.Namespace(base_channels=64)}
    torch.save({"state_dict": tensors, "optimizer_states": [{"state": {}}], **bookkeeping}, folder / "training.ckpt")
    torch.save({**autoencoder, "loss.logvar": torch.zeros(())}, folder / "kl-f8.ckpt")


def pictures(program, *args: str | Path, out: str) -> list[bytes]:
    common = ["--steps", 4, "-n", 2, "--seed", 3, "--size", 64, "--guidance", 2]
    code, _, err = program("sample", "a red circle", *args, *common, "--out", out)
    assert code == 0, err
    return [Image.open(path).tobytes() for path in sorted(Path(out).glob("0*.png"))]


def test_the_original_s_layouts_sample_the_very_images_of_the_run(program, trained, layouts):
    conditioner = trained / "conditioner.safetensors"
    ours = pictures(program, "--checkpoint", trained / "runs/tiny/ema.safetensors", out="ours")
    assert len(ours) == 2 and ours[0] != ours[1]
    frozen = ["--autoencoder", "kl-f8.ckpt", "--conditioner", conditioner]
    assert pictures(program, "--checkpoint", layouts["slim"], *frozen, out="slim") == ours
    assert pictures(program, "--checkpoint", layouts["training"], out="training") == ours  # its parts are in it
    assert pictures(program, "--checkpoint", trained / "runs/tiny/last.ckpt", out="last") == ours
    (settings, _) = json.loads(Path("slim/samples.json").read_text())
    assert settings["checkpoint"] == "slim.pth"


def test_a_sampling_checkpoint_does_not_say_what_its_frozen_parts_were(program, trained, layouts):
    code, _, err = program("sample", "a red circle", "--checkpoint", layouts["slim"])
    assert code == 2 and err.count("\n") == 1
    assert "autoencoder of the checkpoint: the file does not say where its weights are; --autoencoder FILE" in err
    code, _, err = program("sample", "a", "--checkpoint", layouts["slim"], "--autoencoder", "kl-f8.ckpt")
    assert code == 2 and "--conditioner FILE" in err


def test_a_training_checkpoint_brings_its_cloob(trained, layouts):
    part = load_part("conditioner", {"name": "cloob", "weights": str(layouts["training"])})
    expected, _ = read_safetensors(trained / "conditioner.safetensors")
    assert part.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in part.state_dict().items())


def test_fine_tuning_a_ccld_model(program, trained, layouts):
    """Nothing moves at learning rate 0, so the first checkpoint shows what was taken over."""
    still = ["optim.lr=0.0", "optim.weight_decay=0.0", "trainer.max_steps=1", "checkpoint.every=1"]
    yaml = trained / "tiny.yaml"
    for layout, path in layouts.items():
        code, out, err = program("train", "--config", yaml, f"run={layout}", f"init_from={path}", *still)
        assert code == 0, err
        assert f"init_from: weights of {path}" in out and "stays as initialized" not in out
        now = read_pickled(f"runs/{layout}/last.ckpt")["state_dict"]
        before, _ = read_safetensors(trained / "runs/tiny/ema.safetensors")
        assert all(torch.equal(now[f"model.{name}"], value) for name, value in before.items())
    code, out, _ = program(
        "train", "--config", yaml, "run=b", "init_from=slim.pth", "autoencoder.latent_std=5.0", *still
    )
    assert code == 0 and "trained on latents divided by 1.7, this run divides by 5" in out


def test_the_recipe_on_a_small_model(program, trained, layouts):
    """`configs/ccld_finetune.yaml` as it stands, with small weights in the places of the released ones."""
    images = Path("images")
    images.mkdir()
    for i in range(8):
        Image.new("RGB", (80, 70), (30 * i, 128, 200)).save(images / f"{i}.png")
    small = [f"denoiser.{key}={value}" for key, value in UNET.items() if key != "name"]
    here = ["data.image_size=64", "data.batch_size=2", "data.workers=0", "trainer.accelerator=cpu", "demo.every=2"]
    released = [
        "init_from=slim.pth", f"autoencoder.latent_std={SCALE}", "autoencoder.weights=kl-f8.ckpt",
        f"conditioner.weights={trained / 'conditioner.safetensors'}",
    ]  # fmt: skip
    run = ["trainer.max_steps=2", "trainer.accumulate_grad_batches=2", "trainer.precision=32-true"]
    recipe = ROOT / "configs/ccld_finetune.yaml"
    prompts = f"demo.prompts={ROOT / 'configs/demo_prompts.txt'}"
    code, out, err = program(
        "train",
        "--config",
        recipe,
        "data.path=images",
        *small,
        *here,
        *released,
        *run,
        prompts,
        "demo.sampling.sampler.steps=2",
    )
    assert code == 0, err
    assert "stays as initialized" not in out
    assert Path("runs/ccld_finetune/ema.safetensors").exists()


def test_another_embedding_width_loads_what_fits(program, trained, layouts):
    wide = {**TOWERS, "embed_dim": 24}
    save_part("wide.safetensors", build("conditioner", wide), wide)
    still = ["optim.lr=0.0", "optim.weight_decay=0.0", "trainer.max_steps=1", "checkpoint.every=1"]
    options = ["run=wide", "init_from=slim.pth", "conditioner.weights=wide.safetensors", *still]
    code, out, err = program("train", "--config", trained / "tiny.yaml", *options)
    assert code == 0, err
    told = [line for line in out.splitlines() if "stays as initialized" in line]
    assert told == [
        "init_from: mapping.0.main.0.weight stays as initialized: [32, 144] in the file, [32, 152] here",
        "init_from: mapping.0.skip.weight stays as initialized: [32, 144] in the file, [32, 152] here",
    ]
    now = read_pickled("runs/wide/last.ckpt")["state_dict"]
    before, _ = read_safetensors(trained / "runs/tiny/ema.safetensors")
    same = {name for name, value in before.items() if torch.equal(now[f"model.{name}"].flatten(), value.flatten())}
    assert before.keys() - same == {"mapping.0.main.0.weight", "mapping.0.skip.weight"}


def test_other_latent_channels_load_what_fits():
    four, five = (build("denoiser", UNET, channels, embedding(16)) for channels in (4, 5))
    left = load_fitting(five, four.state_dict(), "four.safetensors")
    ends = ("net.0.main.0.weight", "net.0.skip.weight", "net.2.main.4.weight", "net.2.main.4.bias", "net.2.skip.weight")
    assert sorted(line.split()[0] for line in left) == sorted(ends)
    assert torch.equal(five.net[0].main[4].weight, four.net[0].main[4].weight)


def test_too_little_in_common_is_another_architecture():
    small, large = (build("denoiser", {**UNET, "base_channels": base}, 4, embedding(16)) for base in (64, 128))
    with pytest.raises(UserError, match="weights of another architecture"):
        load_fitting(large, small.state_dict(), "small.safetensors")
