"""Training the autoencoder: what a run leaves behind, the discriminator's part, LPIPS, wrong input."""

import csv
import json
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint
from tiny import AUTOENCODER, ROOT, run_program
from torch import nn
from torchmetrics.functional.image import lpips as reference
from torchvision.models import VGG16_Weights

from ldm_lab.batch import Batch
from ldm_lab.checkpoints.files import read_pickled, read_safetensors
from ldm_lab.checkpoints.native import save_part
from ldm_lab.checkpoints.parts import load_part
from ldm_lab.config import build, load, part_class, to_yaml
from ldm_lab.data.shapes import write_shards
from ldm_lab.errors import UserError
from ldm_lab.evaluation import perceptual
from ldm_lab.training import autoencoder as training_autoencoder
from ldm_lab.training.autoencoder import ReconstructionLoss, psnr
from ldm_lab.training.discriminator import Discriminator, adaptive_weight
from ldm_lab.training.scale import measure_scale

NETWORK = {**AUTOENCODER, "ch": 16, "ch_mult": [1, 1], "norm_groups": 8}  # f=2
GAN = {"start": 2, "weight": 0.5, "layers": 1, "base_channels": 8}


def make_run(folder: Path, **sections: dict | None) -> Path:
    """Write a tiny autoencoder run on drawn shapes; return the path of its YAML. `sections` are laid over it."""
    write_shards(folder / "shards", count=40, shards=2, size=32, seed=0)
    config = {
        "task": "autoencoder", "run": "tiny", "seed": 1,
        "data": {"name": "webdataset", "shards": str(folder / "shards" / "*.tar"), "image_size": 16, "batch_size": 4,
                 "workers": 0},
        "autoencoder": NETWORK, "loss": {"name": "reconstruction"},
        "optim": {"lr": 2e-3, "betas": [0.5, 0.9], "weight_decay": 0.0},
        "trainer": {"accelerator": "cpu", "max_steps": 4, "threads": 1},
        "checkpoint": {"every": 2, "keep": 1}, "logging": {"every": 1},
    }  # fmt: skip
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section} if isinstance(section, dict) else section
    path = folder / "tiny.yaml"
    path.write_text(to_yaml(config))
    return path


def make_task(folder: Path, **sections: dict | None):
    config = load(make_run(folder, **sections))
    return part_class("task", {"name": "autoencoder"})(config)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Runs go under the test's own folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def column(run: Path, name: str) -> list[float | None]:
    with open(run / "metrics.csv") as file:
        return [float(row[name]) if row.get(name) else None for row in csv.DictReader(file)]


def test_a_run_learns_and_leaves_a_usable_autoencoder(here, program):
    lengths = {"data": {"image_size": 32, "batch_size": 8}, "trainer": {"max_steps": 30}, "checkpoint": {"every": 30}}
    yaml = make_run(here, **lengths, optim={"lr": 5e-3}, reconstructions={"every": 20, "images": 3})
    code, _, err = program("train", "--config", yaml)
    assert code == 0, err
    run = here / "runs" / "tiny"
    losses, quality = column(run, "train/loss"), column(run, "train/psnr")
    assert len(losses) == 30 and np.mean(losses[-5:]) < 0.75 * np.mean(losses[:3])
    assert np.mean(quality[-5:]) > np.mean(quality[:3]) + 1.5
    assert all(kl > 0 for kl in column(run, "train/kl"))
    assert column(run, "train/loss")[0] == pytest.approx(
        column(run, "train/l1")[0] + 1e-6 * column(run, "train/kl")[0] / (3 * 32 * 32), rel=1e-5
    )
    grids = sorted((run / "reconstructions").glob("*.png"))
    assert [g.name for g in grids] == ["step=00000001.png", "step=00000020.png"]
    assert Image.open(grids[0]).size == (3 * 32, 2 * 32), "images above, reconstructions below"

    trained = load_part("autoencoder", {"name": "kl_f8", "weights": str(run / "autoencoder.safetensors")})
    tensors, metadata = read_safetensors(run / "autoencoder.safetensors")
    assert (metadata["step"], metadata["scale_images"]) == ("30", "240")
    assert "latent_std" in tensors and float(trained.latent_std) != 1.0
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1  # noise, not shapes
    assert trained.encode(images).shape == (16, 4, 16, 16)


def test_the_exported_scale_is_that_of_the_last_batches(here, program):
    yaml = make_run(here, ema={"from_step": [0], "decay": [0.5]})
    code, out, err = program("train", "--config", yaml)
    assert code == 0, err
    run = here / "runs" / "tiny"
    trained = load_part("autoencoder", {"name": "kl_f8", "weights": str(run / "autoencoder.safetensors")})
    assert f"autoencoder.safetensors: latent std {float(trained.latent_std):.4f}, measured on the last " in out
    averaged = read_pickled(run / "last.ckpt")["state_dict"]
    assert torch.equal(trained.decoder.conv_out.weight, averaged["model_ema.decoder.conv_out.weight"])
    assert averaged["model_ema.latent_std"] == averaged["model.latent_std"] == 1.0, "training itself goes on unscaled"

    data = build("data", load(yaml)["data"])
    from ldm_lab.data.datamodule import DataModule

    module = DataModule(data, seed=1)
    module.setup()
    batches = (batch.image for batch, _ in zip(module.train_dataloader(), range(4)))
    assert float(trained.latent_std) == pytest.approx(measure_scale(trained, batches), rel=1e-5)


def test_the_discriminator_starts_when_it_is_told_to(here, program):
    yaml = make_run(here, discriminator=GAN, checkpoint={"every": 1, "keep": 5})
    assert program("train", "--config", yaml)[0] == 0
    run = here / "runs" / "tiny"
    for name in ("discriminator", "generator", "adaptive_weight", "logits_real", "logits_fake"):
        assert [v is not None for v in column(run, f"train/{name}")] == [False, False, True, True], name
    states = [read_pickled(run / f"step={step:08d}.ckpt")["state_dict"] for step in (1, 2, 3)]
    names = [n for n in states[0] if n.startswith("discriminator.") and n.endswith(("weight", "bias"))]
    assert len(names) == 7
    assert all(torch.equal(states[0][n], states[1][n]) for n in names), "it waits untouched"
    names.remove("discriminator.main.5.bias")  # at first, images and reconstructions pull it equally hard apart
    assert all(not torch.equal(states[1][n], states[2][n]) for n in names), "then all of it learns"
    weight = [0.5 * 1e4 >= v > 0 for v in column(run, "train/adaptive_weight")[2:]]
    assert weight == [True, True]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_stopped_and_resumed_is_bit_for_bit_the_uninterrupted_run(here, program, accumulate):
    yaml = make_run(here, discriminator=GAN, reconstructions={"every": 2, "images": 2})
    options = [f"trainer.accumulate_grad_batches={accumulate}"]
    assert program("train", "--config", yaml, "run=whole", *options)[0] == 0
    assert program("train", "--config", yaml, "run=parts", "trainer.max_steps=3", *options)[0] == 0
    assert program("train", "--config", yaml, "run=parts", "resume.checkpoint=last", *options)[0] == 0
    whole, parts = here / "runs" / "whole", here / "runs" / "parts"
    assert column(whole, "train/loss") == column(parts, "train/loss")
    ours, theirs = (read_pickled(run / "last.ckpt")["state_dict"] for run in (parts, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    last = "reconstructions/step=00000004.png"
    assert (whole / last).read_bytes() == (parts / last).read_bytes(), "the same images are drawn"


@pytest.mark.slow
def test_two_processes_train_with_a_waiting_and_a_playing_discriminator(here):
    yaml = make_run(here, discriminator=GAN, trainer={"devices": 2}, reconstructions={"every": 4})
    done = run_program(ROOT / "train.py", "--config", yaml, cwd=here)
    assert done.returncode == 0, done.stderr
    run = here / "runs" / "tiny"
    assert column(run, "train/adaptive_weight")[3] > 0
    assert read_pickled(run / "last.ckpt")["global_step"] == 4
    assert len(list((run / "reconstructions").glob("*.png"))) == 2


def test_adaptive_weight_is_the_ratio_of_two_separate_gradients():
    torch.manual_seed(0)
    body, last = nn.Linear(4, 6), nn.Linear(6, 3)
    critic = nn.Linear(3, 1)
    x, target = torch.randn(5, 4), torch.randn(5, 3)

    def losses():
        output = last(torch.tanh(body(x)))
        return (output - target).abs().sum(), -critic(output).mean()

    norms = []
    for i in range(2):
        last.zero_grad()
        losses()[i].backward()
        norms.append(float(last.weight.grad.norm()))
    by_hand = norms[0] / (norms[1] + 1e-4)
    graph = losses()
    assert float(adaptive_weight(*graph, last.weight)) == pytest.approx(by_hand, rel=1e-5)
    assert float(adaptive_weight(*graph, last.weight, loss_scale=1024.0)) == pytest.approx(by_hand, rel=1e-4)
    assert float(adaptive_weight(1e6 * graph[0], graph[1], last.weight)) == 1e4
    graph[0].backward()  # the graph is still there


def test_the_total_is_the_sum_that_the_recipe_says(here, monkeypatch):
    task = make_task(here, discriminator={**GAN, "start": 0}, loss={"kl_weight": 0.1})
    logged = {}
    monkeypatch.setattr(task, "log_means", lambda values, size: logged.update(values))
    task._trainer = type("Trainer", (), {"global_step": 0, "precision_plugin": None})()
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    total = task.training_step(Batch([""] * len(image), [""] * len(image), image), 0)
    values = 3 * 16 * 16
    by_hand = logged["l1"] * values + 0.1 * logged["kl"] + logged["adaptive_weight"] * logged["generator"]
    torch.testing.assert_close(total, by_hand / values + logged["discriminator"])
    total.backward()
    assert all(p.grad is not None for module in (task.model, task.discriminator) for p in module.parameters())


def test_a_gradient_scaler_s_factor_is_not_waited_for(here, monkeypatch):
    task = make_task(here, discriminator={**GAN, "start": 0})
    monkeypatch.setattr(task, "log_means", lambda values, size: None)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monkeypatch.setattr(type(task), "scaler", property(lambda task: scaler))
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", None)
    scales = []
    weigh = training_autoencoder.adaptive_weight
    monkeypatch.setattr(training_autoencoder, "adaptive_weight", lambda *args: scales.append(args[3]) or weigh(*args))
    task._trainer = type("Trainer", (), {"global_step": 0, "precision_plugin": None})()
    task.training_step(Batch([""] * 2, [""] * 2, torch.rand(2, 3, 16, 16) * 2 - 1), 0)
    assert [float(scale) for scale in scales] == [pytest.approx(1024.0 / (3 * 16 * 16))]


def test_each_network_is_taught_by_its_own_loss_alone():
    judge = Discriminator(layers=1, base_channels=4)
    image = torch.randn(2, 3, 16, 16, requires_grad=True)
    judge.frozen_logits(image).mean().backward()
    assert image.grad.abs().sum() > 0
    assert all(p.grad is None for p in judge.parameters())
    loss = judge.loss(judge(torch.randn(2, 3, 16, 16)), judge(image.detach()))
    loss.backward()
    assert all(p.grad is not None for p in judge.parameters())


def test_discriminator_losses():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert float(Discriminator(loss="hinge").loss(real, fake)) == pytest.approx(0.5 * (0.25 + 0.5))
    softplus = np.log1p(np.exp([-2.0, -0.5])).mean() + np.log1p(np.exp([-3.0, 0.0])).mean()
    assert float(Discriminator(loss="vanilla").loss(real, fake)) == pytest.approx(0.5 * softplus)


def test_a_released_discriminator_loads(tmp_path):
    names = json.loads((ROOT / "tests/data/golden/kl_autoencoder_keys.json").read_text())["ignore"]
    prefix = "loss.discriminator."
    torch.manual_seed(0)
    state = {n: torch.randn(shape) for n, shape in names.items() if n.startswith(prefix)}
    path = tmp_path / "released.ckpt"
    bookkeeping = {ModelCheckpoint: {"best_model_score": np.float64(0.5)}}  # as the released files have it
    torch.save({"state_dict": {**state, "encoder.conv_in.bias": torch.zeros(3)}, "callbacks": bookkeeping}, path)
    with zipfile.ZipFile(tmp_path / "released.zip", "w") as archive:
        archive.write(path, "model.ckpt")
    for file in (path, tmp_path / "released.zip"):
        loaded = build("discriminator", {"weights": str(file)}).state_dict()
        assert len(loaded) == len(state) == 22
        for name, expected in state.items():
            value = loaded[name.removeprefix(prefix)]
            assert torch.equal(value, expected.to(value)), name
    torch.save({"state_dict": {"encoder.conv_in.bias": torch.zeros(3)}}, path)
    with pytest.raises(UserError, match="holds no discriminator"):
        build("discriminator", {"weights": str(path)})


def test_clipping_one_network_leaves_the_other_alone(here):
    task = make_task(here, discriminator=GAN)
    for p in task.parameters():
        p.grad = torch.full_like(p, 100.0) if p.requires_grad else None
    for p in task.discriminator.parameters():
        p.grad = torch.full_like(p, 1e-4)
    norm = task.clip(task.clipped_apart(None), 1.0)
    assert float(norm) > 100
    norms = [torch.cat([p.grad.flatten() for p in m.parameters()]).norm() for m in (task.model, task.discriminator)]
    assert float(norms[0]) == pytest.approx(1.0, rel=1e-3)
    assert all(torch.equal(p.grad, torch.full_like(p, 1e-4)) for p in task.discriminator.parameters())


def test_reconstruction_loss_by_hand():
    image, other = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)
    distance = torch.tensor([0.0, 0.25])
    assert ReconstructionLoss()(image, other, distance).tolist() == pytest.approx([24, 36])
    assert ReconstructionLoss(pixels="l2")(image, other, distance).tolist() == pytest.approx([12, 24])
    learned = ReconstructionLoss(learn_logvar=True)
    with torch.no_grad():
        learned.logvar.fill_(1.0)
    value = learned(image, other, distance)
    assert value.tolist() == pytest.approx([24 / np.e + 48, 36 / np.e + 48])
    value.sum().backward()
    assert float(learned.logvar.grad) == pytest.approx(-60 / np.e + 96)


def test_psnr():
    image = torch.zeros(1, 3, 8, 8)
    assert psnr(image, image + 0.02).tolist() == pytest.approx([40.0], abs=1e-3)
    assert psnr(image + 1, image + 3).tolist() == pytest.approx([106.0206]), "clamped to what can be shown"


def test_lpips_is_the_reference_s():
    torch.manual_seed(0)
    theirs = reference._LPIPS(pretrained=True, net="vgg", pnet_rand=True)
    groups = [getattr(theirs.net, f"slice{i}") for i in range(1, 6)]
    ours = perceptual.LPIPS(nn.Sequential(*(layer for group in groups for layer in group)), weight=2.0)
    a, b = torch.rand(2, 3, 32, 32) * 2 - 1, (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
    torch.testing.assert_close(ours(a, b), theirs(a, b).flatten(), rtol=1e-5, atol=1e-7)
    ours(a, b).sum().backward()
    assert b.grad.abs().sum() > 0
    assert all(p.grad is None for p in ours.parameters())


def test_without_network_the_missing_file_is_named(here, program, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(VGG16_Weights.IMAGENET1K_V1.__class__, "get_state_dict", offline)
    code, _, err = program("train", "--config", make_run(here, perceptual={"weight": 1.0}))
    announced, error = err.strip().splitlines()
    assert code == 2 and announced.startswith("to be downloaded: perceptual: torchvision's VGG16, 527.8 MiB")
    assert "vgg16-397923af.pth" in error and "perceptual=null" in error


def test_lpips_takes_part_in_the_loss(here, program, monkeypatch):
    tiny = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 1, 1, 1) for i in range(30)))
    widths = dict(zip(perceptual.GROUP_ENDS, perceptual.GROUP_WIDTHS))
    before = 3
    for i in range(30):  # the five groups must end at VGG's widths
        after = widths.get(i + 1, 2)
        tiny[i], before = nn.Conv2d(before, after, 1), after
    monkeypatch.setattr("ldm_lab.training.autoencoder.pretrained_features", lambda: tiny)
    assert program("train", "--config", make_run(here, perceptual={"weight": 0.5}))[0] == 0
    run = here / "runs" / "tiny"
    for loss, l1, lpips in zip(*(column(run, f"train/{n}") for n in ("loss", "l1", "lpips"))):
        assert lpips > 0 and loss == pytest.approx(l1 + lpips, rel=1e-3)
    assert not [name for name in read_pickled(run / "last.ckpt")["state_dict"] if "perceptual" in name]


def test_initial_weights_come_from_a_part_or_a_run(here, program):
    task = make_task(here)
    part = here / "part.safetensors"
    save_part(part, task.model, NETWORK)
    yaml = make_run(here, ema={"from_step": [0], "decay": [0.5]})
    options = ["run=still", f"init_from={part}", "optim.lr=0.0", "trainer.max_steps=2", "seed=7"]
    code, out, _ = program("train", "--config", yaml, *options)
    assert code == 0 and f"init_from: weights of {part}" in out
    still, _ = read_safetensors(here / "runs" / "still" / "autoencoder.safetensors")
    torch.testing.assert_close(still["decoder.conv_out.weight"], task.model.decoder.conv_out.weight.detach())

    assert program("train", "--config", yaml)[0] == 0
    checkpoint = here / "runs" / "tiny" / "last.ckpt"
    state, note = task.initial_weights(str(checkpoint))
    averaged = read_pickled(checkpoint)["state_dict"]["model_ema.decoder.conv_out.weight"]
    assert torch.equal(state["decoder.conv_out.weight"], averaged) and "step 4" in note
    with pytest.raises(UserError, match="no such file"):
        task.initial_weights("nowhere.safetensors")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"autoencoder": {"weights": "x.safetensors"}}, r"autoencoder\.weights: .* init_from"),
        ({"autoencoder": {"latent_std": 2.0}}, r"autoencoder\.latent_std: .* this task trains it"),
        ({"loss": {"name": "infoloob"}}, r"loss\.name: 'infoloob' is not this task's: 'reconstruction'"),
        ({"data": {"image_size": 17}}, r"data\.image_size: 17 is no multiple of .*2"),
        ({"discriminator": {"layers": 3}}, r"data\.image_size: 16 is too small .* needs 24"),
        ({"discriminator": {"layers": 0}}, r"discriminator\.layers: at least 1"),
        ({"reconstructions": {"images": 0}}, r"reconstructions\.images: at least 1 is needed, not 0"),
        ({"loss": {"kl_weight": -1}}, r"loss\.kl_weight: at least 0 is needed, not -1"),
    ],
)
def test_wrong_options_are_named(here, sections, message):
    with pytest.raises(UserError, match=message):
        make_task(here, **sections)
