"""sample.py as a user meets it: files, metadata, numbering, one line for each mistake."""

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from tiny import DENOISER, ROOT, embedding, make_parts, run_program, shipped

from ldm_lab.checkpoints.native import save_model
from ldm_lab.commands import sample
from ldm_lab.config import build, parts, signature_options
from ldm_lab.io.images import center_crop_to
from ldm_lab.sampling import SamplingOptions, flat

FAST = ("--sampler", "plms2", "--steps", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model trained at 16 pixels, with dropped conditions."""
    return make_checkpoint(tmp_path_factory.mktemp("model"), dropout=0.2)


def make_checkpoint(folder, dropout):
    config = {"task": "diffusion", **make_parts(folder), "denoiser": DENOISER, "objective": {"name": "v_cosine"}}
    config["conditioner"]["dropout"] = dropout
    denoiser = build("denoiser", DENOISER, 4, embedding(16))
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
            {
                "image": "fox.png",
                "image_sha256": hashlib.sha256((tmp_path / "fox.png").read_bytes()).hexdigest(),
                "weight": 0.75,
            },
        ],
        "seed": 8,
        "batch": [0, 1],
        "sampler": "plms2",
        "steps": 2,
        "guidance": 2.0,
        "device": "cpu",
        "checkpoint": "ema.safetensors",
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
        _, high = zip(*ImageChops.difference(first, second).getextrema())
        assert max(high) <= 1, "the same seed; in another batch"


def test_eta_is_ddim_s(call, tmp_path):
    assert call("--sampler", "ddim", "--steps", "2", "--eta", "1", "red", "-n", "1", "--device", "cpu")[0] == 0
    (entry,) = json.loads((tmp_path / "samples" / "samples.json").read_text())
    assert (entry["sampler"], entry["steps"], entry["eta"]) == ("ddim", 2, 1.0)


def test_help_names_every_option_of_every_sampler():
    text = " ".join(sample.parser().format_help().split())
    for name, sampler in parts("sampler").items():
        for option in signature_options(sampler):
            assert f"--{option.replace('_', '-')} " in text and f"--upsampler-{option.replace('_', '-')} " in text
        assert name in text
    for option in fields(SamplingOptions):
        assert f"--{option.name.replace('_', '-')}" in text


def test_the_docs_name_every_flag():
    docs = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")
    flags = {flag for action in sample.parser()._actions for flag in action.option_strings if "upsampler-" not in flag}
    ours = {name for sampler in shipped("sampler") for name in signature_options(parts("sampler")[sampler])}
    flags -= {f"--{name}" for name in flat.sampler_names() if name not in ours}  # of other tests' samplers
    assert {flag for flag in flags - {"-h", "--help"} if not re.search(rf"`{re.escape(flag)}\b", docs)} == set()


def test_help_is_told_without_torch():
    code = (
        "import sys; from ldm_lab.commands.sample import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'pytorch_lightning', 'webdataset'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--guidance" in done.stdout, done.stderr


def test_any_option_of_any_sampler(call, tmp_path):
    for options in (
        ("--sampler", "unipc", "--order", "1"), ("--sampler", "heun", "--churn", "0.5"), ("--spacing", "karras"),
    ):  # fmt: skip
        assert call("red", "-n", "1", "--device", "cpu", "--steps", "2", *options)[0] == 0
    made = json.loads((tmp_path / "samples" / "samples.json").read_text())
    assert [entry["sampler"] for entry in made] == ["unipc", "heun", "unipc"]
    assert (made[0]["order"], made[1]["churn"], made[2]["spacing"]) == (1, 0.5, "karras")


def test_a_seed_is_drawn_and_told(call, tmp_path):
    _, out, _ = call(*FAST, "red", "-n", "2", "--seed", "-1")
    seeds = [entry["seed"] for entry in json.loads((tmp_path / "samples" / "samples.json").read_text())]
    assert seeds[1] == seeds[0] + 1 and f"(seed {seeds[0]})" in out


def test_a_folder_stands_for_its_model(call, checkpoint, tmp_path):
    assert call("--checkpoint", checkpoint.parent, *FAST, "red", "-n", "1")[0] == 0
    (entry,) = json.loads((tmp_path / "samples" / "samples.json").read_text())
    assert entry["checkpoint_sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()


def test_no_negative_prompt_is_none(call, tmp_path):
    for out, negative in (("without", ()), ("empty", ("--negative", ""))):
        assert call(*FAST, "red", "-n", "1", "--out", out, *negative)[0] == 0
    assert (tmp_path / "without/grid.png").read_bytes() == (tmp_path / "empty/grid.png").read_bytes()


def test_parts_of_one_s_own(call, tmp_path):
    (tmp_path / "my_samplers_for_a_test.py").write_text(
        "from ldm_lab.config import register\n"
        "from ldm_lab.samplers.ddim import DDIM\n\n"
        "@register('sampler', 'mine')\n"
        "class Mine(DDIM):\n"
        "    def __init__(self, *, steps: int = 2, loudness: float = 1.0) -> None:\n"
        "        super().__init__(steps=steps)\n"
    )
    options = ("--imports", "my_samplers_for_a_test", "--sampler", "mine", "--loudness", "2", "--device", "cpu")
    code, _, err = call("red", "-n", "1", *options)
    assert code == 0, err
    (entry,) = json.loads((tmp_path / "samples" / "samples.json").read_text())
    assert (entry["sampler"], entry["loudness"]) == ("mine", 2.0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["red", "--cfg-scale", "7"], "--cfg-scale: here it is --guidance"),
        (["red", "--scale=7"], "--scale: here it is --guidance"),
        (["red", "--negative_prompt", "old"], "--negative_prompt: here it is --negative"),
        (["red", "--width", "256", "--height", "256"], "--width: here it is --size, as in --size 384x256"),
        (["red", "--num-images", "3"], "--num-images: here it is -n"),
        (["red", "--n_samples", "3"], "--n_samples: here it is -n"),
        (["red", "--denoising-strength", "1"], "--denoising-strength: here it is --strength"),
        (["--prompt", "red"], "--prompt: here it is no flag at all"),
        (["--ckpt", "x.ckpt", "red"], "--ckpt: here it is --checkpoint"),
        (["red", "--num-inference-steps", "3"], "--num-inference-steps: here it is --steps"),
        (["red", "--low-memory"], "--low-memory: here it is --offload"),
        (["red", "--sampler", "DPM++ 2M Karras"], "here it is --sampler dpmpp_2m --spacing karras"),
        (["red", "--sampler", "euler_a"], "here it is --sampler ddpm, the ancestral one"),
        (["red", "--sampler", "DPM2 a Karras"], "--sampler euler --churn 1\n"),
        (["red", "--sampler", "LMS Karras"], "here it is --sampler iplms\n"),
        (["red", "--sampler", "DPM++ 2M SDE Exponential"], "here it is --sampler dpmpp_2m_sde\n"),
        (["red", "--sampler", "k_euler"], "here it is --sampler euler"),
        (["red", "--sampler", "K_HEUN"], "here it is --sampler heun"),
        (["red", "--sampler", "DDIMScheduler"], "here it is --sampler ddim"),
        (["red", "--sampel", "plms"], "unknown flag: --sampel; is --sampler meant?"),
        (["red", "--neg", "old"], "--neg: here it is --negative"),
        (["--images", "fox.png", "a red car:1"], "a red car: no such image file; texts go before --images"),
    ],
)
def test_names_of_other_programs_are_answered_with_ours(call, tmp_path, args, message):
    Image.new("RGB", (20, 30), "red").save(tmp_path / "fox.png")
    code, _, err = call(*args)
    assert code == 2 and len(err.splitlines()) == 1 and err.startswith("error: ") and message in err


def test_a_weight_inside_a_prompt_is_noticed(call, caplog):
    caplog.set_level("WARNING")
    assert call(*FAST, "(a red car:1.2) in the rain", "-n", "1")[0] == 0
    assert "is taken as plain words; here a whole prompt has a weight: 'a red car:1.2'" in caplog.text


MISTAKES = [
    ((), "no prompt"),
    (("red:nan",), "a weight must be finite"),
    (("red", "-n", "0"), "-n: "),
    (("red", "--steps", "many"), "steps: a number, or a respacing such as fast27"),
    (("red", "--guidance", "nan"), "--guidance: number is needed, not nan"),
    (("red", "--seed", "-2"), "--seed: "),
    (("red", "--seed", "x"), "--seed: "),
    (("red", "--sampel", "plms"), "unknown flag: --sampel"),
    (("red", "--size", "big"), "write pixels as 256 or as WIDTHxHEIGHT"),
    (("red", "--size", "20"), "multiples of 16 pixels, such as 16x16"),
    (("red", "--sampler", "plsm"), "no such sampler: 'plsm'. Did you mean 'plms'?"),
    (("red", "--eta", "1"), "sampler.eta: no such key: 'eta' of sampler.name=unipc"),
    (("red", "--imports", "no_such_module_here"), "imports: no module 'no_such_module_here'"),
    (("red", "--sampler", "ddim", "--eta", "2"), "a number from 0 to 1 is needed"),
    (("--prompts", "missing.txt"), "missing.txt: no such prompts file"),
    (("--prompts", "empty.txt"), "empty.txt: no prompt in this file"),
    (("--images", "missing.png"), "missing.png: no such image file"),
    (("red", "--checkpoint", "missing.safetensors"), "missing.safetensors: no such file"),
    (("red", "--checkpoint", "empty.txt"), "empty.txt: not a readable checkpoint"),
    (("red", "--autoencoder", "missing.ckpt"), "missing.ckpt: no such file (autoencoder)"),
    (("red", "--device", "gpu"), "device gpu:"),
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

    monkeypatch.setattr("ldm_lab.sampling.pipeline.stack", fail)
    code, _, err = call(*FAST, "red")
    assert code == 2 and "out of the device's memory while" in err and "less than --batch-size 16" in err
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
    command = (
        "-m",
        "ldm_lab",
        "sample",
        "red",
        "--checkpoint",
        checkpoint,
        *FAST,
        "-n",
        "1",
        "--out",
        "other",
        "blue:2",
    )
    assert run_program(*command, cwd=tmp_path).returncode == 0
    assert len(json.loads((tmp_path / "other" / "samples.json").read_text())[0]["prompts"]) == 2
    failed = run_program(script, "--checkpoint", checkpoint, "red", "-n", "none", cwd=tmp_path)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: -n: ") and len(failed.stderr.splitlines()) == 1


# ------------------------------------------------------------------------------------------- pictures to begin with


@pytest.fixture
def dog(tmp_path):
    rows = Image.effect_noise((30, 24), 90).convert("RGB")
    rows.save(tmp_path / "dog.png")
    mask = Image.new("L", rows.size, 0)
    mask.paste(255, (10, 8, 18, 16))
    mask.save(tmp_path / "mask.png")
    return rows


def entries(tmp_path):
    return json.loads((tmp_path / "samples" / "samples.json").read_text())


def test_image_to_image(call, tmp_path, dog):
    code, _, _ = call(*FAST, "a dog", "--init-image", "dog.png", "-n", "2", "--strength", "0.5")
    assert code == 0
    assert [(e["init_image"], e["strength"]) for e in entries(tmp_path)] == [("dog.png", 0.5)] * 2
    code, _, _ = call(*FAST, "a dog", "--init-image", "dog.png", "-n", "1")
    assert code == 0 and entries(tmp_path)[2]["strength"] == 0.7 and "mask" not in entries(tmp_path)[2]


def test_inpainting(call, tmp_path, dog):
    code, _, _ = call(*FAST, "a hat", "--init-image", "dog.png", "--mask", "mask.png", "-n", "1")
    assert code == 0
    (entry,) = entries(tmp_path)
    assert (entry["mask"], entry["strength"]) == ("mask.png", 1.0)
    kept = center_crop_to(dog, 16, 16)
    with Image.open("samples/00000.png") as image:
        changed = [(x, y) for x in range(16) for y in range(16) if image.getpixel((x, y)) != kept.getpixel((x, y))]
    assert changed and all(4 <= x <= 12 and 4 <= y <= 12 for x, y in changed)  # 30x24 covers 16x16: 20x16, its middle


def test_masks_as_they_are_asked_for(call, tmp_path, dog):
    args = ("a hat", "--init-image", "dog.png", "--mask", "mask.png", "-n", "1")
    code, _, _ = call(*FAST, *args, "--resize", "stretch", "--invert-mask", "--mask-blur", "0.5")
    (entry,) = entries(tmp_path)
    assert code == 0 and (entry["resize"], entry["invert_mask"], entry["mask_blur"]) == ("stretch", True, 0.5)
    kept = np.asarray(dog.resize((16, 16), Image.Resampling.LANCZOS))
    with Image.open("samples/00000.png") as image:
        change = np.abs(np.asarray(image).astype(int) - kept)  # [16, 16, 3]
    assert change[7:9, 7].mean() < change[:2].mean() / 4  # white: x from 5.3 to 9.6, y from 5.3 to 10.7
    code, _, err = call(*FAST, "a hat", "--init-image", "dog.png", "--resize", "fill")
    assert code == 2 and "--resize" in err
    Image.new("RGB", (30, 24), "red").save(tmp_path / "red.png")
    code, _, err = call(*FAST, "a hat", "--init-image", "dog.png", "--mask", "red.png")
    assert code == 2 and "mask: it is a picture in color" in err


def test_interpolation(call, tmp_path):
    code, out, _ = call(*FAST, "a dog", "a fox:2", "--interpolate", "5")
    assert code == 0 and "5 pictures from 00000.png on, strip.png and film.gif in samples" in out
    assert [entry["frame"] for entry in entries(tmp_path)] == list(range(5))
    assert entries(tmp_path)[0]["prompts"][1] == {"text": "a fox", "weight": 2.0}
    with Image.open("samples/strip.png") as strip, Image.open("samples/film.gif") as film:
        assert strip.size == (5 * 16, 16) and film.n_frames >= 2
    code, out, _ = call(*FAST, "a dog", "a fox", "--interpolate", "3")
    assert code == 0 and "3 pictures from 00005.png on, strip_00005.png and film_00005.gif" in out


def test_reranking_and_the_options_of_guidance(call, tmp_path, checkpoint):
    code, _, _ = call(
        *FAST, "a dog", "-n", "2", "--rerank", "3", "--negative", "blurry", "--guidance-interval", "0.1", "0.9",
        "--guidance-rescale", "0.5", "--precision", "bf16-mixed", "--offload", "--tile", "32",
    )  # fmt: skip
    assert code == 0
    for i, entry in enumerate(entries(tmp_path)):
        assert -1 <= entry["similarity"] <= 1 and entry["seed"] in (i, i + 2, i + 4)
        assert (entry["negative"], entry["rerank"], entry["precision"]) == ("blurry", 3, "bf16-mixed")
        assert (entry["guidance_interval"], entry["guidance_rescale"]) == ([0.1, 0.9], 0.5)
    code, _, _ = call(*FAST, "a dog", "-n", "1", "--guide-model", str(checkpoint))
    assert code == 0 and entries(tmp_path)[2]["guide_model"] == "ema.safetensors"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a", "--strength", "0.5"], "--strength: belongs to init_image"),
        (["a", "--init-image", "dog.png", "--strength", "1.5"], "--strength: "),
        (["a", "--init-image", "none.png"], "none.png: no such image file"),
        (["a", "--init-image", "dog.png", "--mask", "small.png"], "mask: it is 3x3 pixels, the image 30x24"),
        (["a", "--init-image", "dog.png", "--mask", "black.png"], "nothing in it is white"),
        (["a", "--interpolate", "4"], "two or more keyframes"),
        (["a", "b", "c", "--interpolate", "2"], "2 frames are fewer than the 3 prompts"),
        (["a", "b", "--interpolate", "4", "-n", "2"], "--interpolate does not go with -n"),
        (["a", "b", "--interpolate", "4", "--negative", "c"], "--interpolate does not go with --negative"),
        (["a", "--guidance-interval", "0.9", "0.1"], "--guidance-interval: two times 0 <= first <= last <= 1"),
        (["a", "--guidance-rescale", "2"], "--guidance-rescale: "),
        (["a", "--tile", "12"], "tile: a multiple of 8 pixels from 32 on is needed, not 12"),
        (["a", "--rerank", "0"], "--rerank: at least 1 is needed, not 0"),
        (["a", "--sampler", "unipc", "--spacing", "cosine"], "spacing"),
        (
            ["a", "--sampler", "plms", "--spacing", "karras"],
            "sampler.spacing: no such key: 'spacing' of sampler.name=plms",
        ),
        (["a", "--precision", "fp8"], "--precision"),
        (["a", "--guide-model", "none.safetensors"], "none.safetensors: no such file"),
    ],
)
def test_one_line_for_each_mistake_of_these(call, tmp_path, dog, args, message):
    Image.new("L", (3, 3), 255).save(tmp_path / "small.png")
    Image.new("L", dog.size, 0).save(tmp_path / "black.png")
    code, _, err = call("--device", "cpu", *args)
    assert code == 2 and message in err and "Traceback" not in err
    assert len([line for line in err.splitlines() if line.strip()]) == 1
    assert not (tmp_path / "samples").exists()


# ------------------------------------------------------------------------------------------------------------ captions


def beside(folder="samples") -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).glob("*.txt"))}


@pytest.mark.parametrize(
    ("words", "captions"),
    [
        (("a red fox", "-n", 2), {"00000.txt": "a red fox", "00001.txt": "a red fox"}),
        (("a fox:2", "blurry:-0.5", "meet at 12\\:30", "-n", 1), {"00000.txt": "a fox, meet at 12:30"}),
        (("a fox\n  in   snow \ufeff", "-n", 1), {"00000.txt": "a fox in snow"}),
        (("ein Füchslein 狐", "--images", "fox.png", "-n", 1), {"00000.txt": "ein Füchslein 狐"}),
        (("--images", "fox.png", "-n", 1), {}),
        (("a fox:0", "", "-n", 1), {}),
        (("--prompts", "lines.txt", "watercolor"), {"00000.txt": "one, watercolor", "00001.txt": "two, watercolor"}),
    ],
    ids=["one", "weights", "lines", "image beside", "image alone", "nothing", "file"],
)
def test_captions_lie_beside_the_pictures(call, words, captions):
    Image.new("RGB", (20, 30), "red").save("fox.png")
    Path("lines.txt").write_text("one\ntwo:2\n")
    code, out, err = call(*FAST, *words, "--captions")
    assert code == 0, err
    assert beside() == captions and not Path("samples/grid.png").exists()
    pictures = len(list(Path("samples").glob("*.png")))
    assert f"{pictures} pictures from 00000.png on and {len(captions)} captions in samples" in out
    assert ("have no text that they are guided toward" in out) == (pictures > len(captions))


def test_a_folder_of_captioned_pictures_is_read_as_it_is(call, program, tmp_path):
    from test_captions import texts

    assert call(*FAST, "a red fox", "-n", 1)[0] == 0 and Path("samples/grid.png").exists()
    code, out, _ = call(*FAST, "a cat:2", "-n", 2, "--captions")
    assert code == 0 and "note: samples/grid.png was there before" in out
    assert beside() == {"00001.txt": "a cat", "00002.txt": "a cat"}
    for name in ("samples/grid.png", "samples/00000.png", "samples/00001.png"):
        os.unlink(name)
    Path("samples/00001.txt").rename("samples/00007.txt")
    assert call(*FAST, "a dog", "-n", 1, "--captions")[0] == 0
    assert beside() == {"00002.txt": "a cat", "00007.txt": "a cat", "00008.txt": "a dog"}, "nothing is overwritten"
    assert texts({"name": "folder", "path": "samples"}) == {"00002.png": "a cat", "00008.png": "a dog"}
    clip = ("--clip", "name=cloob", f"weights={ROOT}/assets/quickstart/cloob.safetensors")
    code, out, err = program(
        "ldm_lab.__main__", "score", "--images", "samples", "--out", "scores", "--workers", 0, *clip
    )
    assert code == 0 and "2 images scored" in out, err
    import pyarrow.parquet as pq

    (file,) = Path("scores").glob("*.parquet")
    assert pq.read_table(file).column("similarity").null_count == 0


def test_bytes_that_are_no_text_are_no_prompt(call):
    code, _, err = call(*FAST, "a fox \udce9", "-n", 1)
    assert code == 2 and "'a fox \\udce9': a prompt is text in UTF-8" in err and not Path("samples").exists()


def test_captions_do_not_go_with_interpolation(call):
    code, _, err = call(*FAST, "a", "b", "--interpolate", 3, "--captions")
    assert code == 2 and "--interpolate does not go with --captions" in err
