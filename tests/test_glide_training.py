"""Training GLIDE as a user does: captions, an upsampler, frozen parts, stop and resume, what does not fit together."""

import csv
import io
import tarfile

import pytest
import torch
from PIL import Image
from tiny import ROOT, run_program
from tiny_glide import TEXT, UNET, conditions

from ldm_lab import ema
from ldm_lab.checkpoints.files import read_pickled, read_safetensors
from ldm_lab.checkpoints.models import read_model
from ldm_lab.checkpoints.native import save_model
from ldm_lab.condition_sources.low_res import LowRes, shrink
from ldm_lab.config import RunConfig, build, check, load, to_yaml
from ldm_lab.data.shapes import write_shards
from ldm_lab.errors import UserError
from ldm_lab.io.images import to_images, to_tensor
from ldm_lab.training.diffusion import DiffusionTask
from ldm_lab.training.runner import build_task

UPSAMPLER = {"condition_sources": {"low_res": {"scale_factor": 2}}, "objective": {"betas": "linear"}}
INPAINT = {"condition_sources": {"inpaint": {}}}


def glide_config(folder, **sections) -> dict:
    """Return the config of a tiny run on shapes below `folder`; `sections` are laid over it."""
    if not (folder / "shards").exists():
        write_shards(folder / "shards", count=32, shards=2, size=32, seed=0)
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    config = {
        "task": "diffusion", "run": "tiny", "seed": 1,
        "data": {"name": "webdataset", "shards": str(folder / "shards" / "*.tar"), "image_size": 16, "batch_size": 4,
                 "workers": 0, "require_text": True},
        "autoencoder": {"name": "identity"},
        "conditioner": {**TEXT, "dropout": 0.2},
        "denoiser": {**UNET, "dropout": 0.1},
        "objective": {"name": "eps_hybrid", "timesteps": 100},
        "optim": {"lr": 1e-3},
        "ema": {"from_step": [0], "decay": [0.5]},
        "trainer": {"accelerator": "cpu", "max_steps": 3, "threads": 1},
        "checkpoint": {"every": 3, "keep": 0}, "logging": {"every": 1},
    }  # fmt: skip
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section} if isinstance(section, dict) else section
    return config


def write(folder, **sections):
    path = folder / "tiny.yaml"
    path.write_text(to_yaml(glide_config(folder, **sections)))
    return path


def train(folder, *overrides, **sections):
    return run_program(ROOT / "train.py", "--config", write(folder, **sections), *overrides, cwd=folder)


def model_of(folder, run="tiny", name="model"):
    state = read_pickled(folder / "runs" / run / "last.ckpt")["state_dict"]
    return {n.removeprefix(f"{name}."): t for n, t in state.items() if n.startswith(f"{name}.")}


@pytest.mark.slow
def test_a_base_model_is_trained_and_sampled_in_words(tmp_path):
    demo = {"prompts": str(tmp_path / "prompts.txt"), "every": 3, "sampling": {"sampler": {"name": "ddpm", "steps": 2}}}
    done = train(tmp_path, demo=demo)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "runs/tiny/metrics.csv").open()))
    assert float(rows[0]["train/mse"]) > 0 and float(rows[0]["train/bound"]) > 0
    assert len(list((tmp_path / "runs/tiny/demo").glob("*.png"))) == 2
    config, state, extra = read_model(tmp_path / "runs/tiny/ema.safetensors")
    assert config["conditioner"] == {**TEXT, "dropout": 0.2} and extra["image_size"] == "16"
    assert "token_embedding.weight" in state
    sampled = run_program(
        ROOT / "sample.py", "--checkpoint", "runs/tiny/ema.safetensors", "a red circle", "-n", "2", "--steps", "2",
        "--out", "out", cwd=tmp_path,
    )  # fmt: skip
    assert sampled.returncode == 0, sampled.stderr
    assert Image.open(tmp_path / "out/00001.png").size == (16, 16)
    cut = run_program(
        ROOT / "sample.py", "--checkpoint", "runs/tiny/ema.safetensors", "one two three four five six seven", "-n", "1",
        "--steps", "2", "--out", "out", cwd=tmp_path,
    )  # fmt: skip
    assert cut.returncode == 0 and "is cut" in cut.stderr
    asked = run_program(
        ROOT / "sample.py", "--checkpoint", "runs/tiny/ema.safetensors", "--images", "out/00000.png", cwd=tmp_path
    )
    assert asked.returncode == 2 and "prompted with text" in asked.stderr and "Traceback" not in asked.stderr


def test_an_upsampler_is_trained_and_draws_what_it_makes(tmp_path):
    drawn = {"every": 3, "images": 6, "sampling": {"sampler": {"name": "ddim", "steps": 2}}}
    done = train(tmp_path, **UPSAMPLER, enlargements=drawn)
    assert done.returncode == 0, done.stderr
    grid = Image.open(tmp_path / "runs/tiny/enlargements/step=00000003.png")
    assert grid.width > grid.height, "six columns, three rows"
    config = read_model(tmp_path / "runs/tiny/ema.safetensors")[0]
    assert config["condition_sources"] == {"low_res": {"scale_factor": 2}} and "enlargements" not in config
    refused = run_program(ROOT / "sample.py", "--checkpoint", "runs/tiny/ema.safetensors", "a red circle", cwd=tmp_path)
    assert refused.returncode == 2 and "upsampler" in refused.stderr and refused.stderr.count("\n") == 1


def test_an_upsampler_is_not_shown_images_that_are_smaller_than_what_it_makes(tmp_path, program, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(20):
        folder = tmp_path / "pairs"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (16, 24) if i % 2 else (15, 40)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a cat")
    overrides = {"name": "folder", "path": str(folder), "image_size": 16, "batch_size": 2, "workers": 0}
    config = {**glide_config(tmp_path, **UPSAMPLER), "data": {**overrides, "max_skipped": 0.9}}
    (tmp_path / "up.yaml").write_text(to_yaml(config))
    warning = (
        "data.min_size: 8: images of less than 16 px are enlarged first, and an upsampler learns to make blurred ones"
    )
    code, out, err = program("train", "--config", "up.yaml", "data.min_size=8")
    assert code == 0 and f"{warning}; data.min_size=16 skips them" in out + err
    code, out, err = program("train", "--config", "up.yaml", "run=skips", "data.min_size=16")
    assert code == 0 and "data.min_size: " not in out + err and "too small" in out + err
    code, out, err = program("train", "--config", "up.yaml", "run=base", "condition_sources=null", "data.min_size=8")
    assert code == 0 and "data.min_size: " not in out + err, "a base model's are as they are"
    for recipe in ("glide_finetune_upsampler", "glide_quickstart_upsampler"):
        given = ["data.path=/data"] if "finetune" in recipe else []
        data = load(ROOT / f"configs/{recipe}.yaml", [*given, "data.image_size=128"])["data"]
        assert data["min_size"] == data["image_size"] == 128


@pytest.mark.slow
def test_stop_resume_and_lower_lr(tmp_path):
    whole = train(tmp_path, "trainer.max_steps=4", "run=whole")
    part = train(tmp_path, "trainer.max_steps=2", "run=part")
    rest = train(tmp_path, "trainer.max_steps=4", "run=part", "resume.checkpoint=last")
    assert [run.returncode for run in (whole, part, rest)] == [0, 0, 0], rest.stderr
    for name in ("model", "model_ema"):
        wanted, got = model_of(tmp_path, "whole", name), model_of(tmp_path, "part", name)
        assert all(torch.equal(wanted[key], got[key]) for key in wanted), "dropout and dropped captions repeat, too"
    lower = train(tmp_path, "trainer.max_steps=5", "run=part", "resume.checkpoint=last", "resume.lr=1e-4")
    assert lower.returncode == 0 and "0.001 -> 0.0001" in lower.stderr + lower.stdout
    frozen = train(tmp_path, "run=part", "resume.checkpoint=last", "optim.freeze=[unet]")
    assert frozen.returncode == 2 and "optim.freeze was" in frozen.stderr


@pytest.mark.slow
def test_two_processes_train_alike(tmp_path):
    done = train(tmp_path, "trainer.devices=2", "trainer.max_steps=2", "optim.freeze=[text_transformer]")
    assert done.returncode == 0, done.stderr
    assert read_pickled(tmp_path / "runs/tiny/last.ckpt")["global_step"] == 2


def test_checkpoints_by_the_clock_keep_the_last_three(tmp_path):
    timed = {"every": None, "seconds": 0.001, "keep": 3}
    done = train(tmp_path, "trainer.max_steps=6", checkpoint=timed)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in sorted((tmp_path / "runs/tiny").glob("step=*.ckpt"))] == [
        f"step={step:08d}.ckpt" for step in (4, 5, 6)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["text_transformer", "unet"])
def test_frozen_parts_are_bit_equal_before_and_after(tmp_path, part):
    assert train(tmp_path, "run=first").returncode == 0
    start = model_of(tmp_path, "first", "model_ema")
    done = train(tmp_path, f"optim.freeze=[{part}]", "run=tuned", "init_from=runs/first/last.ckpt")
    assert done.returncode == 0, done.stderr
    net = build("denoiser", UNET, 3, conditions())
    ids = {id(p) for p in net.freeze_groups()[part]}
    kept = {name for name, p in net.named_parameters() if id(p) in ids}
    for name in ("model", "model_ema"):
        tuned = model_of(tmp_path, "tuned", name)
        moved = {key for key in tuned if not torch.equal(tuned[key], start[key])}
        assert kept and not kept & moved
        assert any(key.endswith("encoder_kv.weight") for key in moved), "by which the U-Net reads the text"
    trained = f"{sum(p.numel() for p in net.parameters() if id(p) not in ids):,} trained parameters"
    assert trained in done.stdout


def test_the_average_of_frozen_parameters_does_not_drift():
    model = torch.nn.Linear(50, 50)
    model.weight.requires_grad_(False)
    average = ema.averaged_copy(model)
    for _ in range(100):
        ema.update(average, model, 0.999)
    assert torch.equal(average.weight, model.weight)


def test_a_dataset_without_captions_is_one_line(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (i * 50, 0, 0)).save(folder / f"{i}.png")
    data = {"name": "folder", "path": str(folder), "shards": None}
    config = glide_config(tmp_path, data=data)
    del config["data"]["shards"]
    (tmp_path / "tiny.yaml").write_text(to_yaml(config))
    done = run_program(ROOT / "train.py", "--config", "tiny.yaml", cwd=tmp_path)
    assert done.returncode == 2 and "none of the 3 images has a caption" in done.stderr
    assert "Traceback" not in done.stderr


def test_captionless_samples_are_counted(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(40):
            picture = io.BytesIO()
            Image.new("RGB", (32, 32), (i, 0, 0)).save(picture, "PNG")
            for extension, data in (("png", picture.getvalue()), ("txt", b"a dog" if i else b" ")):
                member = tarfile.TarInfo(f"{i:05d}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    done = train(tmp_path, "trainer.max_steps=20", data={"shards": str(tmp_path / "a.tar")})
    assert done.returncode == 0, done.stderr
    assert "no caption" in done.stdout


# -------------------------------------------------------------------------------------------------- what fits together


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"conditioner": {"name": "none"}},
            "denoiser.name: glide_unet takes token_ids (TokenIds), and the conditioner and condition sources give "
            "embed (embedding of 64)",
        ),
        ({"objective": {"name": "v_cosine"}}, "objective.name: this denoiser reads timesteps, and the objective's"),
        (
            {"condition_sources": {"low_res": {"scale_factor": 3}}},
            "data.image_size: 16 is not a multiple of condition_sources.low_res.scale_factor, 3",
        ),
        ({"condition_sources": {"low_rse": {}}}, "condition_sources.low_rse: no such condition source: 'low_rse'"),
        ({"condition_sources": {"low_res": {"factor": 3}}}, "condition_sources.low_res.factor: no such key: 'factor'"),
        (
            {"condition_sources": {"inpaint": {"channels": 4}}},
            "glide_unet takes token_ids (6 token ids of a vocabulary of 600), and the conditioner and condition "
            "sources give token_ids (6 token ids of a vocabulary of 600) and inpaint_image (image of 4 channels) and "
            "inpaint_mask (image of 1 channels)",
        ),
        ({"optim": {"freeze": ["text"]}}, "optim.freeze: no such part of this network"),
        ({"optim": {"freeze": ["unet", "text_transformer"]}, "denoiser": {"attention": []}}, None),
    ],
)
def test_what_does_not_fit_together(tmp_path, sections, message):
    config = glide_config(tmp_path, **sections)
    if sections.get("conditioner", {}).get("name") == "none":
        config["conditioner"] = {"name": "none"}
    if sections.get("objective", {}).get("name") == "v_cosine":
        config["objective"] = {"name": "v_cosine"}
    if message is None:  # the middle has attention in any case: what reads the text is left to be trained
        task = DiffusionTask(RunConfig.from_dict(config))
        assert {n.split(".")[-2] for n, p in task.model.named_parameters() if p.requires_grad} == {"encoder_kv"}
        return
    with pytest.raises(UserError) as error:
        DiffusionTask(RunConfig.from_dict(config))
    assert message.lower() in str(error.value).lower()


def test_an_upsampler_as_base_is_refused_and_more_channels_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = DiffusionTask(RunConfig.from_dict(glide_config(tmp_path))).model
    torch.save({"model": {f"module.{n}": t for n, t in base.state_dict().items()}, "epoch": 1}, "base.pt")
    task = build_task(RunConfig.from_dict({**glide_config(tmp_path), "init_from": "base.pt"}))
    assert all(torch.equal(t, task.model.state_dict()[n]) for n, t in base.state_dict().items())
    upsampler = DiffusionTask(RunConfig.from_dict(glide_config(tmp_path, **UPSAMPLER))).model
    torch.save(upsampler.state_dict(), "sr.pt")
    with pytest.raises(
        UserError, match=r"init_from: sr\.pt is an upsampler, and condition_sources of this config make a base model"
    ):
        build_task(RunConfig.from_dict({**glide_config(tmp_path), "init_from": "sr.pt"}))
    painter = DiffusionTask(RunConfig.from_dict(glide_config(tmp_path, **INPAINT))).model
    torch.save(painter.state_dict(), "inpaint.pt")
    with pytest.raises(
        UserError, match=r"init_from: inpaint\.pt takes inpaint_image and inpaint_mask, which no entry of"
    ):
        build_task(RunConfig.from_dict({**glide_config(tmp_path), "init_from": "inpaint.pt"}))
    build_task(RunConfig.from_dict({**glide_config(tmp_path, **INPAINT), "init_from": "base.pt"}))
    assert "stays as initialized" not in "".join(capsys.readouterr())


BOTH = {"condition_sources": {**INPAINT["condition_sources"], **UPSAMPLER["condition_sources"]}}


@pytest.mark.parametrize(
    ("before", "after"), [({}, INPAINT), ({}, UPSAMPLER), ({}, BOTH), (INPAINT, BOTH), (UPSAMPLER, BOTH)]
)
def test_what_is_told_more_begins_as_what_is_told_less(tmp_path, monkeypatch, capsys, before, after):
    """GLIDE's inpainting models began as its base model, the new input channels at zero (arXiv 2112.10741, 4.3)."""
    monkeypatch.chdir(tmp_path)
    trained = DiffusionTask(RunConfig.from_dict(glide_config(tmp_path, **before))).model.eval()
    for value in trained.parameters():
        torch.nn.init.normal_(value, std=0.1)
    torch.save(trained.state_dict(), "before.pt")
    task = build_task(RunConfig.from_dict({**glide_config(tmp_path, **after), "init_from": "before.pt"}))
    assert "its first convolution is kept, their channels begin at zero" in capsys.readouterr().out
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 16, 16, generator=generator)
    text = trained.spec["token_ids"]
    token_ids = torch.randint(text.vocabulary, (2, text.length), generator=generator)
    given = {"token_ids": token_ids, "token_ids_mask": torch.ones_like(token_ids, dtype=torch.bool)}
    images = {
        "low_res": torch.randn(2, 3, 4, 4, generator=generator),
        "inpaint_image": torch.randn(2, 3, 16, 16, generator=generator),
        "inpaint_mask": torch.ones(2, 1, 16, 16),
    }
    told = [{name: image for name, image in images.items() if name in net.spec} for net in (trained, task.model)]
    assert len(told[0]) < len(told[1])
    with torch.no_grad():
        outputs = [
            net.eval()(x, torch.tensor([3.0, 5.0]), **given, **more) for net, more in zip((trained, task.model), told)
        ]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("sections", "lines"),
    [
        ({}, []),
        (
            {"objective": {"betas": "linear", "timesteps": 50}},
            ["its betas is squaredcos_cap_v2, objective.betas is linear"],
        ),
        ({"objective": {"timesteps": 50}}, ["its timesteps is 1000, objective.timesteps is 50"]),
        ({"denoiser": {"head_width": 8}}, ["denoiser.head_width is 8"]),
        ({"denoiser": {"text_heads": 4}}, ["denoiser.text_heads is 4"]),
        ({"denoiser": {"norm_groups": 16}}, ["denoiser.norm_groups is 16"]),
        ({"denoiser": {"dropout": 0.3, "gradient_checkpointing": True}}, []),
        (
            {"autoencoder": {"name": "identity", "zero_to_one": True}},
            ["its pixels are in [-1, 1], this run's in [0, 1]"],
        ),
        ({"autoencoder": {"name": "identity", "latent_std": 0.5}}, ["latents divided by 1, this run divides by 0.5"]),
        ({"autoencoder": {"name": "identity", "latent_mean": 0.2}}, ["from which was taken 0, this run takes 0.2"]),
        ({"condition_sources": {"low_res": {"scale_factor": 2}}}, ["its scale_factor is 4, condition_sources.low_res"]),
        ({"conditioner": {"vocabulary": "gpt2"}}, ["its vocabulary is clip, conditioner.vocabulary is gpt2"]),
    ],
)
def test_what_no_shape_tells_is_said(tmp_path, monkeypatch, capsys, sections, lines):
    """A model of ours, with all it was made for in its config."""
    monkeypatch.chdir(tmp_path)
    first = glide_config(tmp_path, **{"condition_sources": {"low_res": {"scale_factor": 4}}})
    first["objective"] |= {"timesteps": 1000}
    task = DiffusionTask(RunConfig.from_dict(first))
    save_model("ema.safetensors", task.model.state_dict(), task.model_config().to_dict(), {})
    second = {**first, "init_from": "ema.safetensors"}
    for role, options in sections.items():
        second[role] = {**first[role], **options}
    build_task(RunConfig.from_dict(second))
    said = [line for line in capsys.readouterr().out.splitlines() if "ema.safetensors: " in line]
    for line in lines:
        assert any(line in one for one in said), said
    assert bool(said) == bool(lines), said


@pytest.mark.parametrize(
    ("denoiser", "message"),
    [
        ({"base_channels": 64}, "its base_channels is 32, denoiser.base_channels is 64"),
        ({"multipliers": [1, 1, 1]}, "its multipliers is [1, 1], denoiser.multipliers is [1, 1, 1]"),
        ({"blocks_per_level": 2, "attention": [1, 2]}, "denoiser.blocks_per_level is 2; its attention is [2]"),
        ({"text_width": 32, "text_layers": 2}, "denoiser.text_width is 32; its text_layers is 1"),
    ],
)
@pytest.mark.parametrize("file", ["base.pt", "ema.safetensors"])
def test_a_checkpoint_of_another_size_is_one_line(tmp_path, monkeypatch, denoiser, message, file):
    monkeypatch.chdir(tmp_path)
    config = glide_config(tmp_path)
    state = DiffusionTask(RunConfig.from_dict(config)).model.state_dict()
    torch.save(state, "base.pt") if file == "base.pt" else save_model(file, state, config, {})
    with pytest.raises(UserError) as error:
        build_task(RunConfig.from_dict({**glide_config(tmp_path, denoiser=denoiser), "init_from": file}))
    assert f"init_from: {file} is of another size" in str(error.value) and message in str(error.value)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_weights_in_half_precision_are_refused(tmp_path, precision):
    """Their average would never move: a step of it is below what the type can tell apart."""
    with pytest.raises(
        UserError,
        match=rf"trainer\.precision: one of '32-true', '16-mixed', 'bf16-mixed', .* is needed, not '{precision}'",
    ):
        check(glide_config(tmp_path, trainer={"precision": precision}))


def test_small_images_are_made_in_levels():
    image = torch.rand(2, 3, 12, 8) * 2 - 1
    low = shrink(image, 4)
    assert low.shape == (2, 3, 3, 2)
    levels = (low + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    pictures = to_images(image + 1e-3)  # cuts fractions off
    exact = torch.stack([to_tensor(picture) for picture in pictures])  # [2, 3, 12, 8]
    wanted = [to_tensor(picture.resize((2, 3), Image.Resampling.BICUBIC)) for picture in pictures]
    assert ((shrink(exact, 4) - torch.stack(wanted)) * 127.5).abs().max() < 1.01, "Pillow's, but for one level of 255"
    torch.manual_seed(0)
    noised, blurred = (
        LowRes(scale_factor=4, noise=0.5).reduce(image),
        LowRes(scale_factor=2, blur=3.0).reduce(torch.rand(4, 3, 24, 24)),
    )
    assert (noised - low).abs().max() > 0.01
    assert blurred.std() < shrink(torch.rand(4, 3, 24, 24), 2).std()
    assert torch.equal(LowRes(scale_factor=4).reduce(image), low)


def test_sections_may_be_taken_back(tmp_path):
    (tmp_path / "tiny.yaml").write_text(to_yaml(glide_config(tmp_path, demo={"prompts": "prompts.txt"})))
    (tmp_path / "other.yaml").write_text("defaults: tiny.yaml\ndemo: null\n")
    assert "demo" not in load(tmp_path / "other.yaml")
    with pytest.raises(UserError, match="data"):
        check({**glide_config(tmp_path), "data": None})


# ----------------------------------------------------------------------------------------------------- 8-bit optimizer


def test_eight_bits_without_bitsandbytes_are_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"optim\.state: 8 bits need bitsandbytes"):
        build("optim", {"state": "8bit"}).optimizer(torch.nn.Linear(2, 2))


def test_eight_bits():
    pytest.importorskip("bitsandbytes")
    optimizer = build("optim", {"state": "8bit"}).optimizer(torch.nn.Linear(128, 128))
    assert type(optimizer).__name__ == "AdamW8bit"


def test_the_exported_model_is_the_average(tmp_path):
    assert train(tmp_path).returncode == 0
    exported, _ = read_safetensors(tmp_path / "runs/tiny/ema.safetensors")
    average = model_of(tmp_path, name="model_ema")
    assert all(torch.equal(exported[name], average[name]) for name in average)
