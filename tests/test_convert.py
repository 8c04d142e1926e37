"""`python -m ldm_lab inspect` and `convert`: what is said of a file, what is written, what is not overwritten."""

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CLOOB, DENOISER, KL_F8, embedding

from ldm_lab.checkpoints.files import FORMAT, read_safetensors
from ldm_lab.checkpoints.importer import detect_format
from ldm_lab.checkpoints.models import read_model
from ldm_lab.checkpoints.native import save_part
from ldm_lab.checkpoints.parts import load_part
from ldm_lab.config import build

COMMAND = "ldm_lab.__main__"
MODEL = {
    "task": "diffusion",
    "autoencoder": {"name": "identity"},
    "conditioner": {"name": "none"},
    "denoiser": DENOISER,
    "objective": {"name": "v_cosine"},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a part of each role, a released autoencoder and a run's checkpoint in it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    autoencoder, unet = build("autoencoder", KL_F8), build("denoiser", DENOISER, 3, embedding(0))
    save_part("ae.safetensors", autoencoder, KL_F8, {"step": "12"})
    save_part("cloob.safetensors", build("conditioner", CLOOB), CLOOB)
    state = {name: value for name, value in autoencoder.state_dict().items() if not name.startswith("latent_")}
    torch.save({"state_dict": {**state, "loss.logvar": torch.zeros(())}, "global_step": 5}, "kl.ckpt")
    state = {f"model.{name}": value + 1 for name, value in unet.state_dict().items()}
    state |= {f"model_ema.{name}": value for name, value in unet.state_dict().items()}
    run = {
        "config": {**MODEL, "data": {"name": "webdataset", "shards": "pipe:x"}},
        "frozen": {"autoencoder": "ab" * 32},
    }
    torch.save({"state_dict": state, "global_step": 7, FORMAT: run}, "last.ckpt")
    return tmp_path


def size(module: torch.nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def inspect(program, file: str) -> dict:
    code, out, err = program(COMMAND, "inspect", "--json", file)
    assert code == 0, err
    return json.loads(out)


# ----------------------------------------------------------------------------------------------------------- inspect


def test_what_is_said_of_files(folder, program):
    autoencoder = size(build("autoencoder", KL_F8))
    for file, expected in {
        "ae.safetensors": {
            "kind": "part",
            "parameters": autoencoder,
            "step": "12",
            "latent_std": "1",
            "config": {"autoencoder": KL_F8},
        },
        "cloob.safetensors": {"kind": "part", "parameters": size(build("conditioner", CLOOB))},
        "kl.ckpt": {"kind": "compvis", "parameters": autoencoder, "step": 5},
        "last.ckpt": {"kind": "run", "step": 7, "config": MODEL, "frozen": {"autoencoder": "ab" * 32}},
    }.items():
        report = inspect(program, file)
        assert {key: report.get(key) for key in expected} == expected
        assert report["sha256"] == hashlib.sha256((folder / file).read_bytes()).hexdigest()
        assert report["dtypes"] == {"float32": report["tensors"]}
        code, out, _ = program(COMMAND, "inspect", file)
        assert code == 0
        assert f"{report['parameters']:,}" in out
        assert report["sha256"] in out
    assert inspect(program, "last.ckpt")["parameters"] == size(build("denoiser", DENOISER, 3, embedding(0)))
    assert inspect(program, "kl.ckpt")["config"]["autoencoder"]["ch_mult"] == KL_F8["ch_mult"]
    save_file({"a.b": torch.zeros(3, dtype=torch.bfloat16)}, "other.safetensors", {"x": "y"})
    report = inspect(program, "other.safetensors")
    assert (report["kind"], report["dtypes"], report["metadata"]) == ("unknown", {"bfloat16": 1}, {"x": "y"})


def test_a_file_cannot_speak_to_the_terminal(folder, program):
    save_file({"a": torch.zeros(1)}, "x.safetensors", {"note": "\x1b]0;owned\x07", "\x1b[2J": "\u202e"})
    code, out, _ = program(COMMAND, "inspect", "x.safetensors")
    assert code == 0
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "owned" in out


def test_what_is_not_understood(folder, program):
    for name, content in (
        ("empty.bin", b""),
        ("text.txt", b"hello"),
        ("half.ckpt", (folder / "kl.ckpt").read_bytes()[:500]),
    ):
        (folder / name).write_bytes(content)
        code, _, err = program(COMMAND, "inspect", name)
        assert (code, err.count("\n")) == (2, 1), err
    assert "no such file" in program(COMMAND, "inspect", "nothing")[2]


# ----------------------------------------------------------------------------------------------------------- convert


def test_a_run_becomes_a_model(folder, program):
    unet = detect_format("last.ckpt")
    for out, options, shift in (("ema.safetensors", [], 0), ("raw.safetensors", ["--raw"], 1)):
        code, _, err = program(COMMAND, "convert", "last.ckpt", out, *options)
        assert code == 0, err
        config, state, extra = read_model(out)
        assert config == MODEL, "without the data section, which may hold a shell command"
        assert extra["step"] == "7"
        assert extra["autoencoder"] == "ab" * 32
        assert 2 * len(state) == len(unet.file.tensors)
        stored = torch.load("last.ckpt", weights_only=True)["state_dict"]
        assert all(torch.equal(value, stored[f"model_ema.{name}"] + shift) for name, value in state.items())


def test_half_size(folder, program):
    save_part("scaled.safetensors", build("autoencoder", KL_F8), KL_F8)
    assert program(COMMAND, "convert", "kl.ckpt", "half.safetensors", "--half", "--scale", "5.489981")[0] == 0
    state, _ = read_safetensors("half.safetensors")
    assert {value.dtype for name, value in state.items() if not name.startswith("latent_")} == {torch.float16}
    assert state["latent_std"].item() == pytest.approx(5.489981, rel=1e-6), "a single number stays exact"
    assert os.path.getsize("half.safetensors") < 0.6 * os.path.getsize("scaled.safetensors")
    assert load_part("autoencoder", {"name": "kl_f8", "weights": "half.safetensors"}).latent_std.dtype == torch.float32


def test_nothing_is_overwritten_unasked(folder, program):
    (folder / "out.safetensors").write_text("mine")
    code, _, err = program(COMMAND, "convert", "kl.ckpt", "out.safetensors")
    assert code == 2
    assert err == "error: out.safetensors: is there already; --force replaces it\n"
    assert (folder / "out.safetensors").read_text() == "mine"
    assert program(COMMAND, "convert", "kl.ckpt", "out.safetensors", "--force")[0] == 0
    (folder / "vae").mkdir()
    (folder / "vae" / "thesis.txt").write_text("mine")
    for options in ([], ["--force"]):
        code, _, err = program(COMMAND, "convert", "kl.ckpt", "vae", "--format", "diffusers", *options)
        assert code == 2
        assert "with other things in it (thesis.txt)" in err
    assert [path.name for path in (folder / "vae").iterdir()] == ["thesis.txt"]


def test_a_folder_is_replaced_as_a_whole(folder, program, monkeypatch):
    before = set(os.listdir())
    command = (COMMAND, "convert", "ae.safetensors", "vae", "--format", "diffusers")
    assert program(*command, "--scale", "2")[0] == 0
    code, _, err = program(*command)
    assert (code, err) == (2, "error: vae: is there already; --force replaces it\n")
    (folder / "vae" / "diffusion_pytorch_model.bin").write_text("of an earlier time")
    assert program(*command, "--force", "--scale", "4")[0] == 0
    assert sorted(os.listdir("vae")) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"] == 0.25
    assert set(os.listdir()) == {*before, "vae"}

    replace = os.replace

    def fail(source, target):
        if str(target) == "vae":
            monkeypatch.setattr(os, "replace", replace)
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    code, _, err = program(*command, "--force", "--scale", "8")
    assert (code, err) == (2, "error: vae: cannot be written: No space left on device\n")
    assert json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"] == 0.25, "the old one is back"
    assert set(os.listdir()) == {*before, "vae"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["kl.ckpt", "x.ckpt"], "its name has to end in .safetensors"),
        (["kl.ckpt", "x.safetensors", "--format", "diffusers"], "--format diffusers writes a folder"),
        (["ae.safetensors", "ae.safetensors", "--force"], "IN and OUT are the same"),
        (["last.ckpt", "vae", "--format", "diffusers"], "--format diffusers: is for autoencoders"),
        (["cloob.safetensors", "vae", "--format", "diffusers"], "is for autoencoders of kl_f8's kind"),
        (["cloob.safetensors", "x.safetensors", "--scale", "2"], "--scale: is for autoencoders"),
        (["kl.ckpt", "x.safetensors", "--scale", "-1"], "--scale: a number above 0 is needed, not -1.0"),
        (["kl.ckpt", "x.safetensors", "--raw"], "--raw: is for training checkpoints"),
        (["kl.ckpt", "x.safetensors", "--part", "autoencoder"], "--part: is for training checkpoints of cloob"),
        (["kl.ckpt", "x.safetensors", "ch=64"], "autoencoder.ch: 64 is asked for"),
        (["kl.ckpt", "x.safetensors", "chh=64"], "Did you mean 'ch'?"),
        (["last.ckpt", "x.safetensors", "ch=64"], "ch=64: is for files with a part or a network of GLIDE's in them"),
        (["nothing", "x.safetensors"], "no such file"),
    ],
)
def test_what_cannot_be_converted(folder, program, args, message):
    before = set(os.listdir())
    code, _, err = program(COMMAND, "convert", *args)
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err
    assert set(os.listdir()) == before


@pytest.mark.parametrize(
    ("ch_mult", "embed_dim", "attended"),
    [([1, 2, 4], 3, []), ([1, 1, 2, 2, 4], 16, [16]), ([1, 1, 2, 2, 4, 4], 64, [16, 8])],
    ids=["kl-f4", "kl-f16", "kl-f32"],
)
def test_the_other_autoencoders_of_compvis(tmp_path, program, ch_mult, embed_dim, attended):
    """Their released architectures, thinner: levels, channels of a latent and attention come out of the file."""
    options = {"ch": 4, "ch_mult": ch_mult, "num_res_blocks": 2, "z_channels": embed_dim, "embed_dim": embed_dim}
    torch.manual_seed(0)
    net = build("autoencoder", {"name": "kl_f8", **options, "attn_resolutions": attended, "norm_groups": 4})
    state = {name: value for name, value in net.state_dict().items() if not name.startswith("latent_")}
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    out = tmp_path / "out.safetensors"
    assert program(COMMAND, "convert", tmp_path / "model.ckpt", out, "norm_groups=4")[0] == 0
    same = load_part("autoencoder", {"name": "kl_f8", "weights": str(out)})
    assert (same.downscale, same.channels) == (2 ** (len(ch_mult) - 1), embed_dim)
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    assert torch.equal(same.encode(image), net.encode(image))
    assert load_file(out).keys() == net.state_dict().keys()
