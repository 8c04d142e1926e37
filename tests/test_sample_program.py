"""sample.py as a user meets it: files, metadata, numbering, one line for each mistake."""

import hashlib
import json
import os

import pytest
import torch
from PIL import Image
from tiny import DENOISER, make_parts, run_program

import sample
from ldm_lab.checkpoints.models import save_model
from ldm_lab.config import build, parts

ROOT = sample.Path(sample.__file__).parent
FAST = ("--sampler", "plms2", "--steps", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model trained at 16 pixels, with dropped conditions."""
    return make_checkpoint(tmp_path_factory.mktemp("model"), dropout=0.2)


def make_checkpoint(folder, dropout):
    config = {"task": "diffusion", **make_parts(folder), "denoiser": DENOISER, "objective": {"name": "v_cosine"}}
    config["conditioner"]["dropout"] = dropout
    denoiser = build("denoiser", DENOISER, 4, 16)
    save_model(folder / "ema.safetensors", denoiser.state_dict(), config, {"image_size": "16"})
    return folder / "ema.safetensors"


@pytest.fixture
def call(program, monkeypatch, tmp_path, checkpoint):
    """Run sample.py in an empty folder with the tiny checkpoint: (exit code, out, err)."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: program("sample", *(args if "--checkpoint" in args else ("--checkpoint", checkpoint, *args)))


def test_a_mix_of_texts_and_images(call, checkpoint, tmp_path):
    Image.new("RGB", (20, 30), "red").save(tmp_path / "fox.png")
    code, out, _ = call(
        *FAST, "a red fox:1.5", "watercolor", "blurry:-0.5", "--images", "fox.png:0.75", "-n", "2", "--guidance", "2",
        "--seed", "7", "--batch-size", "1",
    )  # fmt: skip
    assert code == 0
    assert "2 pictures from 00000.png on and grid.png in samples" in out
    assert sorted(os.listdir("samples")) == ["00000.png", "00001.png", "grid.png", "samples.json"]
    entries = json.loads((tmp_path / "samples" / "samples.json").read_text())
    assert entries[1] == {
        "file": "00001.png",
        "prompts": [
            {"text": "a red fox", "weight": 1.5},
            {"text": "watercolor", "weight": 2.0},
            {"text": "blurry", "weight": -0.5},
            {"image": "fox.png", "weight": 0.75},
        ],
        "seed": 8,
        "sampler": "plms2",
        "steps": 2,
        "guidance": 2.0,
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "width": 16,
        "height": 16,
    }
    with Image.open("samples/00001.png") as image:
        assert image.size == (16, 16)
        assert json.loads(image.text["ldm_lab"]) == entries[1]
        assert image.text["Description"] == "a red fox:1.5 + watercolor + blurry:-0.5 + fox.png:0.75"


def test_a_file_of_prompts_makes_a_picture_for_each_line(call, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue square:2\n")
    assert call(*FAST, "--prompts", "prompts.txt", "blurry:-1", "-n", "2", "--size", "32x16")[0] == 0
    entries = json.loads((tmp_path / "samples" / "samples.json").read_text())
    assert [(entry["seed"], [(p["text"], p["weight"]) for p in entry["prompts"]]) for entry in entries] == [
        (0, [("a red circle", 3.0), ("blurry", -1.0)]),
        (1, [("a red circle", 3.0), ("blurry", -1.0)]),
        (2, [("a blue square", 2.0), ("blurry", -1.0)]),
        (3, [("a blue square", 2.0), ("blurry", -1.0)]),
    ]
    assert (entries[0]["width"], entries[0]["height"]) == (32, 16)


def test_numbers_go_on_and_nothing_is_overwritten(call, tmp_path):
    call(*FAST, "red", "-n", "2", "--out", "out/deep")
    out = tmp_path / "out" / "deep"
    before = {name: (out / name).read_bytes() for name in os.listdir(out) if name != "samples.json"}
    assert call(*FAST, "red", "-n", "1", "--out", "out/deep", "--seed", "1")[0] == 0
    assert set(os.listdir(out)) - set(before) == {"samples.json", "00002.png", "grid_00002.png"}
    assert all((out / name).read_bytes() == content for name, content in before.items())
    assert [entry["file"] for entry in json.loads((out / "samples.json").read_text())] == [
        "00000.png", "00001.png", "00002.png",
    ]  # fmt: skip
    with Image.open(out / "00001.png") as first, Image.open(out / "00002.png") as second:
        assert first.tobytes() == second.tobytes()  # the same seed


def test_eta_is_ddim_s(call, tmp_path):
    assert call("--sampler", "ddim", "--steps", "2", "--eta", "1", "red", "-n", "1", "--device", "cpu")[0] == 0
    (entry,) = json.loads((tmp_path / "samples" / "samples.json").read_text())
    assert (entry["sampler"], entry["steps"], entry["eta"]) == ("ddim", 2, 1.0)


def test_help_names_every_sampler():
    text = sample.parser().format_help()
    assert ", ".join(sorted(parts("sampler"))) in " ".join(text.split())


MISTAKES = [
    ((), "no prompt"),
    (("red:nan",), "a weight must be finite"),
    (("red", "-n", "0"), "argument -n: a whole number from 1 on is needed, not '0'"),
    (("red", "--steps", "many"), "argument --steps: a whole number from 1 on"),
    (("red", "--guidance", "nan"), "argument --guidance: a number is needed"),
    (("red", "--seed", "-1"), "argument --seed: a whole number from 0 on"),
    (("red", "--sampel", "plms"), "unrecognized arguments: --sampel"),
    (("red", "--size", "big"), "write pixels as 256 or as WIDTHxHEIGHT"),
    (("red", "--size", "20"), "multiples of 16 pixels, such as 16x16"),
    (("red", "--sampler", "plsm"), "no such sampler: 'plsm'. Did you mean 'plms'?"),
    (("red", "--eta", "1"), "sampler.eta: no such key"),
    (("red", "--sampler", "ddim", "--eta", "2"), "a number from 0 to 1 is needed"),
    (("--prompts", "missing.txt"), "missing.txt: no such prompts file"),
    (("--prompts", "empty.txt"), "empty.txt: no prompt in this file"),
    (("--images", "missing.png"), "missing.png: no such image file"),
    (("red", "--checkpoint", "missing.safetensors"), "missing.safetensors: no such file"),
    (("red", "--checkpoint", "empty.txt"), "empty.txt: not a readable checkpoint"),
    (("red", "--autoencoder", "missing.ckpt"), "autoencoder of the checkpoint: missing.ckpt: no such file"),
    (("red", "--device", "gpu"), "--device gpu:"),
    (("red", "--out", "empty.txt"), "this is a file, not a folder"),
    (("red", "--out", "odd"), "odd/samples.json: not a list of samples"),
]


@pytest.mark.parametrize(("args", "message"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, tuple) else "")
def test_mistakes_are_one_line_and_leave_nothing(call, tmp_path, args, message):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "samples.json").write_text("{}")
    code, out, err = call(*args)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert message in line
    assert "Traceback" not in err and not out
    assert sorted(os.listdir()) == ["empty.txt", "odd"]
    assert os.listdir("odd") == ["samples.json"]


def test_guidance_without_dropped_conditions(call, tmp_path_factory):
    plain = make_checkpoint(tmp_path_factory.mktemp("plain"), dropout=0.0)
    code, _, err = call("--checkpoint", plain, "red")
    assert code == 2 and "guidance needs a model that was trained with dropped conditions" in err
    assert call("--checkpoint", plain, *FAST, "red", "-n", "1", "--guidance", "1")[0] == 0


def test_too_little_memory_is_one_line(call, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("ldm_lab.sampling.Sampler.latents", fail)
    code, _, err = call(*FAST, "red")
    assert code == 2 and "cpu: out of memory; try less than --batch-size 16" in err
    assert not os.path.exists("samples")


def test_a_long_prompt_is_cut_with_a_warning(call, caplog):
    assert call(*FAST, "red " * 100, "-n", "1")[0] == 0
    assert "is cut" in caplog.text


def test_as_a_program(checkpoint, tmp_path):
    script = ROOT / "sample.py"
    done = run_program(script, "--checkpoint", checkpoint, *FAST, "a red circle", "-n", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 pictures" in done.stderr  # the progress bar
    assert (tmp_path / "samples" / "00000.png").exists()
    failed = run_program(script, "--checkpoint", checkpoint, "red", "-n", "none", cwd=tmp_path)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == "error: argument -n: a whole number from 1 on is needed, not 'none' (--help explains)\n"
