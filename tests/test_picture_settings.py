"""What pictures say of how they were made, and pictures that are made again by it."""

import json
import struct
import time
import zlib
from pathlib import Path

import pytest
import tiny_glide
from PIL import Image, PngImagePlugin
from tiny import DENOISER, embedding, make_parts

from ldm_lab.checkpoints.native import save_model
from ldm_lab.config import build
from ldm_lab.errors import UserError
from ldm_lab.io.metadata import LARGEST_TEXT, PNG, texts_of
from ldm_lab.sampling.aliases import syntax_hints
from ldm_lab.sampling.names import FileRecord, model_name, public_name
from ldm_lab.sampling.parameters import Parameters, escaped, read_prompt, unescaped, written_prompt
from ldm_lab.sampling.recorded import read_recorded

FAST = ("--steps", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with a model of 16 pixels, and a second model beside it."""
    folder = tmp_path_factory.mktemp("private") / "secret_user" / "my_run"
    folder.mkdir(parents=True)
    config = {"task": "diffusion", **make_parts(folder), "denoiser": DENOISER, "objective": {"name": "v_cosine"}}
    config["conditioner"]["dropout"] = 0.2
    for name in ("ema.safetensors", "worse.safetensors"):
        state = build("denoiser", DENOISER, 4, embedding(16)).state_dict()
        save_model(folder / name, state, config, {"image_size": "16"})
    (folder / "config.yaml").write_text("task: diffusion\n")
    return folder


@pytest.fixture
def call(program, monkeypatch, tmp_path, run):
    """Run sample.py in an empty folder: (exit code, out, err); the model is the run's unless another is given."""
    monkeypatch.chdir(tmp_path)
    return lambda *args, model=True: program("sample", *(["--checkpoint", run] if model else []), *args)


@pytest.fixture
def files(tmp_path):
    """Images in a folder of their own, as somebody keeps them."""
    folder = tmp_path / "home" / "somebody"
    folder.mkdir(parents=True)
    Image.effect_noise((20, 20), 90).convert("RGB").save(folder / "dog.png")
    mask = Image.new("L", (20, 20), 0)
    mask.paste(255, (4, 4, 12, 12))
    mask.save(folder / "mask.png")
    return folder


def pixels(path):
    with Image.open(path) as image:
        return image.tobytes()


def entry(path):
    with Image.open(path) as image:
        return json.loads(image.text["ldm_lab"])


# ------------------------------------------------------------------------------------------------------- no paths


def test_no_path_of_this_machine_is_in_a_picture(call, files, run, tmp_path):
    code, _, err = call(
        *FAST, "a red fox", "--images", files / "dog.png:0.5", "--init-image", files / "dog.png", "--mask",
        files / "mask.png", "--guide-model", run / "worse.safetensors", "--autoencoder",
        run / "autoencoder.safetensors", "--conditioner", run / "conditioner.safetensors", "-n", "2", "--out", "out",
    )  # fmt: skip
    assert code == 0, err
    assert call(*FAST, "a fox", "a dog", "--interpolate", "2", "--out", "out")[0] == 0
    made = sorted(path for path in (tmp_path / "out").iterdir())
    assert [path.name for path in made] == [
        "00000.png", "00001.png", "00002.png", "00003.png", "film_00002.gif", "grid.png", "samples.json",
        "strip_00002.png",
    ]  # fmt: skip
    for path in made:
        data = path.read_bytes()
        for secret in (str(tmp_path), str(run), "somebody", "secret_user", str(Path.home()), "/work", "/tmp"):
            assert secret.encode() not in data, (path.name, secret)
        for text in texts_of(data).values():
            assert "/" not in text and "\\" not in text, (path.name, text)
    first = json.loads((tmp_path / "out" / "samples.json").read_text())[0]
    assert (first["init_image"], first["mask"], first["guide_model"]) == ("dog.png", "mask.png", "worse.safetensors")
    assert (first["checkpoint"], first["autoencoder"]) == ("my_run", "autoencoder.safetensors")
    named = [key for key in first if key + "_sha256" in first]
    assert named == ["init_image", "mask", "guide_model", "autoencoder", "conditioner", "checkpoint"]
    assert all(len(first[f"{key}_sha256"]) == 64 for key in named)


def test_what_the_init_image_says_of_itself_is_not_in_a_picture(call, files, tmp_path):
    told = PngImagePlugin.PngInfo()
    told.add_text("ldm_lab", '{"checkpoint": "/home/somebody/x.ckpt"}')
    with Image.open(files / "dog.png") as image:
        image.save(files / "told.png", pnginfo=told, dpi=(300, 300))
    masked = ["--init-image", files / "told.png", "--mask", files / "mask.png"]
    assert call(*FAST, "a fox", *masked, "--out", "out")[0] == 0
    assert call(*FAST, "a fox", "--init-image", files / "told.png", "--out", "plain")[0] == 0
    masked, plain = entry(tmp_path / "out/00000.png"), entry(tmp_path / "plain/00000.png")
    assert set(masked) - set(plain) == {"mask", "mask_sha256"}
    assert b"somebody" not in (tmp_path / "out/00000.png").read_bytes()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/home/me/dog.png", "dog.png"),
        ("~/dog.png", "dog.png"),
        ("C:\\Users\\me\\dog.png", "dog.png"),
        ("dog.png", "dog.png"),
        ("https://me:secret@example.org/a/dog.png?token=1#x", "https://example.org/a/dog.png"),
        ("glide/base", "glide/base"),
        ("hf://owner/repository/model.safetensors", "hf://owner/repository/model.safetensors"),
    ],
)
def test_names_of_files(path, name):
    assert public_name(path) == name


def test_names_of_models(run, tmp_path, monkeypatch):
    assert model_name(run) == model_name(run / "ema.safetensors") == model_name(f"{run}/") == "my_run"
    assert model_name(run / "worse.safetensors") == "worse.safetensors"
    monkeypatch.chdir(run)
    assert model_name(".") == model_name("ema.safetensors") == "my_run"
    (tmp_path / "last.ckpt").write_bytes(b"x")
    assert model_name(tmp_path / "last.ckpt") == "last.ckpt"  # in no run's folder: that has another meaning
    assert model_name("glide/base") == "glide/base"


# --------------------------------------------------------------------------------------- as other programs read it


def test_the_text_that_other_programs_read(call, tmp_path):
    code, _, err = call(
        "a red (fox):2", "rain:1", "--negative", "blurry, old", "--sampler", "dpmpp_2m", "--spacing", "karras", *FAST,
        "--guidance", "2", "--seed", "7", "-n", "1", "--size", "32x16",
    )  # fmt: skip
    assert code == 0, err
    with Image.open("samples/00000.png") as image:
        assert next(iter(image.text)) == "parameters"
        text, sha256 = image.text["parameters"], json.loads(image.text["ldm_lab"])["checkpoint_sha256"]
    lines = text.split("\n")
    assert lines[:2] == ["a red \\(fox\\) :1 AND rain :0.5", "Negative prompt: blurry, old"]
    assert lines[2].startswith(
        "Steps: 2, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 2, Seed: 7, Size: 32x16, Model hash: "
        f"{sha256[:10]}, Model: my_run, Version: ldm_lab"
    )
    assert Parameters.parse(text) == Parameters(lines[0], "blurry, old", Parameters.parse(lines[2]).fields)


@pytest.mark.parametrize(
    ("texts", "guidance", "written"),
    [
        ([("a fox", 3.0)], 3.0, ("a fox", 3.0)),
        ([("a fox", 5.0)], 3.0, ("a fox", 5.0)),
        ([("a fox", 3.0), ("rain", -1.5)], 3.0, ("a fox :1 AND rain :-0.5", 3.0)),
        ([("a fox", 2.0), ("rain", 1.0)], 0.0, ("a fox :2 AND rain :1", 1.0)),
        ([("[a] fox (2)", 3.0)], 3.0, ("\\[a\\] fox \\(2\\)", 3.0)),
    ],
)
def test_prompts_in_their_notation(texts, guidance, written):
    assert written_prompt(texts, guidance) == written


def test_several_prompts_of_their_notation_are_several_here(tmp_path):
    texts = [("a fox", 4.0), ("rain: (heavy)", 2.0), ("old", -1.0)]
    written, scale = written_prompt(texts, 4.0)
    assert read_prompt(written, scale) == texts
    assert read_prompt("a cat AND a dog :1.5 AND x : -.5", 2.0) == [("a cat", 2.0), ("a dog", 3.0), ("x", -1.0)]
    assert read_prompt("one :2", 3.0) == [("one :2", 3.0)] and read_prompt("SAND and AND", 1.0)[0] == ("SAND and", 1.0)
    path = png(tmp_path / "theirs.png", parameters=f"{written}\nSteps: 3, CFG scale: 4, Seed: 1, Size: 16x16")
    assert [(prompt.text, prompt.weight) for prompt in read_recorded(path).prompts] == texts
    with pytest.raises(UserError, match="prompts: 100 at most"):
        read_recorded(png(tmp_path / "many.png", parameters=" AND ".join("a" * 200)))


def test_that_text_is_read_back():
    for negative in ("", "blurry\nold"):
        fields = {"Steps": "20", "Sampler": "Euler a", "Odd": 'a "b", c: d', "Seed": "5", "Size": "64x64"}
        text = str(Parameters("a fox\nin: the snow, Steps", negative, fields))
        assert Parameters.parse(text) == Parameters("a fox\nin: the snow, Steps", negative, fields)
    assert unescaped(escaped("a (b) [c] \\ d")) == "a (b) [c] \\ d"
    assert Parameters.parse("just: a prompt") == Parameters("just: a prompt", "", {})
    assert Parameters.parse("") == Parameters("", "", {})


# ---------------------------------------------------------------------------------------------------- made once more


DOG, MASK = ("--init-image", "home/somebody/dog.png"), ("--mask", "home/somebody/mask.png")
REPEATED = [
    ("a red fox", "-n", "3"),
    ("a fox:2", "rain", "--negative", "old", "--guidance-interval", ".1", ".9", "--guidance-rescale", ".5", "-n", "3"),
    ("a fox", "--sampler", "ddim", "--eta", ".7", "--size", "32x16", "-n", "2", "--precision", "bf16-mixed"),
    ("a fox", "--images", "home/somebody/dog.png:0.5", "-n", "2"),
    ("a fox", *DOG, "--strength", "0.5", "-n", "2"),
    ("a fox", *DOG, *MASK, "--mask-blur", "1", "-n", "2"),
    ("a fox:2", "--rerank", "2", "-n", "2"),
    ("a fox", "--sampler", "ddpm", "--temperature", "0.9", "-n", "1"),
]  # fmt: skip


@pytest.mark.parametrize("args", REPEATED, ids=lambda args: " ".join(args)[:50])
def test_a_picture_is_made_once_more_bit_for_bit(call, files, tmp_path, caplog, args):
    code, _, err = call(*FAST, *args, "--out", "out")
    assert code == 0, err
    last = sorted(path for path in (tmp_path / "out").glob("0*.png"))[-1]
    for name in ("dog.png", "mask.png"):
        (files / name).rename(last.parent / name)  # beside the picture
    code, out, err = call("--from", last, "--device", "cpu", "--out", "again")
    assert code == 0 and "1 pictures from 00000.png" in out, err
    assert pixels("again/00000.png") == pixels(last)
    assert "without effect" not in caplog.text
    before, after = entry(last), entry("again/00000.png")
    for changed in ("file", "rerank", "similarity"):
        before.pop(changed, None), after.pop(changed, None)
    assert after == before


def test_what_is_given_beside_it_is_changed(call, tmp_path):
    assert (
        call(*FAST, "a red fox", "--sampler", "ddim", "--eta", "0.5", "-n", "3", "--out", "out", "--seed", "4")[0] == 0
    )

    def again(*args):
        code, _, err = call("--from", "out/00001.png", "--device", "cpu", *args, "--out", "again")
        assert code == 0, err
        assert ("whose steps 2, eta 0.5 are left out" in err) == ("--sampler" in args)
        made = json.loads((tmp_path / "again" / "samples.json").read_text())
        (tmp_path / "again").rename(tmp_path / f"again_{len(list(tmp_path.iterdir()))}")
        return made

    (made,) = again("--guidance", "5", "--seed", "9")
    assert (made["guidance"], made["prompts"][0]["weight"], made["seed"], made["eta"]) == (5.0, 5.0, 9, 0.5)
    made = again("a blue dog", "-n", "2")
    assert [(e["prompts"][0]["text"], e["seed"], e["batch"]) for e in made] == [
        ("a blue dog", 5, [0, 2]), ("a blue dog", 6, [1, 2]),
    ]  # fmt: skip
    (made,) = again("--batch-size", "1")
    assert made["batch"] == [0, 1] and made["seed"] == 5
    (made,) = again("--sampler", "euler")
    assert made["sampler"] == "euler" and "eta" not in made and made["steps"] == 30  # the options were ddim's
    (made,) = again("--steps", "3")
    assert (made["sampler"], made["steps"], made["eta"]) == ("ddim", 3, 0.5)


def test_the_model_is_found_by_its_checksum(call, run, tmp_path):
    assert call(*FAST, "a fox", "-n", "1", "--out", "out")[0] == 0
    code, _, err = call("--from", "out/00000.png", "--out", "again", model=False)
    assert code == 2 and "checkpoint my_run (sha256 " in err and "is not here; give one by --checkpoint FILE" in err
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "my_run").symlink_to(run)
    code, _, err = call("--from", "out/00000.png", "--out", "again", "--device", "cpu", model=False)
    assert code == 0 and pixels("again/00000.png") == pixels("out/00000.png"), err
    code, _, err = call(
        "--from", "out/00000.png", "--checkpoint", run / "worse.safetensors", "--out", "other", "--device", "cpu",
        model=False,
    )  # fmt: skip
    assert code == 0 and "note: --checkpoint is another model than the picture's (my_run" in err
    assert pixels("other/00000.png") != pixels("out/00000.png")
    code, _, err = call("a fox", model=False)
    assert code == 2 and "required: --checkpoint" in err


def test_files_that_are_not_there_or_others(call, files, tmp_path):
    args = (*FAST, "a fox", "--init-image", files / "dog.png", "--mask", files / "mask.png", "-n", "1", "--out", "out")
    assert call(*args)[0] == 0
    code, _, err = call("--from", "out/00000.png")
    assert code == 2 and "init image dog.png (sha256" in err and "is not here; give one by --init-image FILE" in err
    Image.new("RGB", (20, 20), "red").save(tmp_path / "dog.png")  # of the name, but another picture
    code, _, err = call("--from", "out/00000.png")
    assert code == 2 and f"is not here ({tmp_path / 'dog.png'} is another one); give one by --init-image" in err
    code, _, err = call(
        "--from", "out/00000.png", "--init-image", "dog.png", "--mask", files / "mask.png", "--device", "cpu"
    )
    assert code == 0 and "note: --init-image is another file than the picture's" in err and "--mask is" not in err
    assert call(*FAST, "--images", files / "dog.png", "-n", "1", "--out", "prompted")[0] == 0
    code, _, err = call("--from", "prompted/00000.png")
    assert code == 2 and "its image prompt dog.png" in err and "--images FILE" in err


def test_pages_and_films_are_not_repeated(call, tmp_path):
    assert call(*FAST, "a fox", "a dog", "--interpolate", "2", "--out", "out")[0] == 0
    code, _, err = call("--from", "out/00000.png")
    assert code == 2 and "on the way between prompts: --interpolate makes all of them again" in err
    code, _, err = call("--from", "out/strip.png")
    assert code == 2 and "this is a page of 2 pictures; each of them has its own settings, such as 00000.png" in err
    code, _, err = call("--from", "out/00000.png", "--interpolate", "3")
    assert code == 2 and "--from does not go with --interpolate" in err


def test_a_cascade_is_repeated(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = tiny_glide.write(tmp_path / "base.safetensors")
    large = tiny_glide.write(tmp_path / "large.safetensors", upsampler=True)
    args = ("--checkpoint", base, "--upsampler", large, "--device", "cpu", "a cat", "-n", 2, "--steps", 2)
    assert program("sample", *args, "--upsampler-steps", 2, "--out", "out")[0] == 0
    for picture in ("00001.png", "00001_base.png"):
        code, _, err = program("sample", "--from", f"out/{picture}", "--device", "cpu", "--out", picture[:-4])
        assert code == 0, err  # both models lie here
        assert pixels(f"{picture[:-4]}/00000.png") == pixels("out/00001.png")
        assert pixels(f"{picture[:-4]}/00000_base.png") == pixels("out/00001_base.png")


# ------------------------------------------------------------------------------------------------ strangers' files


def png(path, **texts):
    info = PngImagePlugin.PngInfo()
    for keyword, text in texts.items():
        info.add_text(keyword, text)
    Image.new("RGB", (16, 16)).save(path, pnginfo=info)
    return path


GOOD = {"prompts": [{"text": "a fox", "weight": 3.0}], "seed": 1, "sampler": "ddim", "steps": 2, "guidance": 3.0,
        "checkpoint": "my_run", "width": 16, "height": 16}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "os.system"}, "no sampler 'os.system' here; if it is of your own, --imports"),
        ({"sampler": ["ddim"]}, "no sampler"),
        ({"steps": 10**9}, "steps: 10000 at most"),
        ({"steps": "999999999,999999999"}, "steps: 10000 at most"),
        ({"upsampler_steps": 10**9}, "upsampler_steps: 10000 at most"),
        ({"width": 10**6}, "width: a whole number from 1 to 16384 is needed"),
        ({"width": 0}, "width: a whole number"),
        ({"height": "16"}, "height: a whole number"),
        ({"base": []}, "base: its width and height"),
        ({"seed": -5}, "seed: a whole number"),
        ({"seed": True}, "seed: a whole number"),
        ({"batch": [3, 3]}, "batch: a place and a number"),
        ({"batch": [0, 10**6]}, "batch: a place and a number"),
        ({"prompts": []}, "prompts: a list of 1 to 100"),
        ({"prompts": [{"text": "a"}] * 101}, "prompts: a list of 1 to 100"),
        ({"prompts": ["a"]}, "prompts: each is a text or an image"),
        ({"prompts": [{"text": "a", "weight": "high"}]}, "weight: a finite number is needed"),
        ({"prompts": [{"text": "a", "weight": float("inf")}]}, "weight: a finite number is needed"),
        ({"prompts": [{"image": 5}]}, "image: the name of a file is needed"),
        ({"guidance_interval": [0, "1"]}, "last: a finite number is needed"),
        ({"guidance_interval": [0]}, "last: a finite number is needed"),
        ({"guidance_rescale": "much"}, "--guidance-rescale: "),
        ({"eta": 7}, "a number from 0 to 1 is needed"),
        ({"tile": -3}, "--tile: "),
        ({"precision": "fp3"}, "precision: "),
        ({"checkpoint": "/etc/passwd"}, "--checkpoint FILE"),
        ({"checkpoint": "glide/base"}, "--checkpoint glide/base"),
        ({"init_image": "../../etc/passwd", "init_image_sha256": "0" * 64}, "is not here; give one by --init-image"),
        ({"init_image": "..", "init_image_sha256": None}, "is not here; give one by --init-image"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(call, tmp_path, change, message):
    path = png(tmp_path / "strange.png", ldm_lab=json.dumps({**GOOD, **change}))
    code, _, err = call("--from", path, model="checkpoint" not in change)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '"x"', "null"])
def test_damaged_settings(call, tmp_path, text):
    code, _, err = call("--from", png(tmp_path / "strange.png", ldm_lab=text))
    assert code == 2 and "strange.png: its settings are damaged" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "text", [" " * 10**6, "(" * 10**6, 'a:"' * 10**5, "a: 1, " * 10**5, "_" * 10**6, "AND" * 10**5]
)
@pytest.mark.parametrize("kind", ["parameters", "prompt", "negative"])
def test_texts_that_would_take_for_ever_take_no_time(tmp_path, text, kind):
    entry = {**GOOD, **({"prompts": [{"text": text}]} if kind == "prompt" else {"negative": text})}
    texts = {"parameters": f"x{text}x\nNegative prompt: {text}x"} if kind == "parameters" else {}
    path = png(tmp_path / "long.png", **(texts or {"ldm_lab": json.dumps(entry)}))
    start = time.monotonic()
    with pytest.raises(UserError, match="prompts: 5000 characters at most"):
        read_recorded(path)
    Parameters.parse(text)
    syntax_hints([text])
    assert time.monotonic() - start < 5


def test_what_is_not_known_is_said(call, tmp_path):
    odd = {**GOOD, "magic": 1, "imports": ["os"], "nothing": None, "tile": None}
    path = png(tmp_path / "strange.png", ldm_lab=json.dumps(odd))
    code, _, err = call("--from", path, "--device", "cpu")
    assert code == 0 and "note: not known here, and left out: magic, imports\n" in err


def test_files_without_settings(call, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_bytes(b"no picture")
    png(tmp_path / "comfy.png", prompt="{}", workflow="{}")
    for name, message in (
        ("plain.png", "no settings in this file"), ("text.png", "no settings"), ("none.png", "no such picture"),
        ("comfy.png", "a workflow of ComfyUI's"), (".", "cannot be read"),
    ):  # fmt: skip
        code, _, err = call("--from", tmp_path / name)
        assert code == 2 and message in err and len(err.splitlines()) == 1, err


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_texts_of_odd_files():
    bomb = zlib.compress(b"x" * 50_000_000)
    data = PNG + b"".join([
        chunk(b"tEXt", b"parameters\0caf\xe9"), chunk(b"zTXt", b"bomb\0\0" + bomb), chunk(b"zTXt", b"bad\0\0xx"),
        chunk(b"zTXt", b"packed\0\0" + zlib.compress(b"a fox")), chunk(b"iTXt", b"wide\0\0\0\0\0" + "猫".encode()),
        chunk(b"iTXt", b"packed wide\0\1\0\0\0" + zlib.compress("猫".encode())), chunk(b"iTXt", b"short\0"),
        chunk(b"tEXt", b"nothing"), chunk(b"IDAT", b""), chunk(b"tEXt", b"late\0yes"), b"\xff\xff\xff\xfftEXt",
    ])  # fmt: skip
    assert texts_of(data) == {
        "parameters": "café", "packed": "a fox", "wide": "猫", "packed wide": "猫", "short": "", "late": "yes",
    }  # fmt: skip
    for odd in (
        b"",
        PNG,
        PNG + b"\0" * 7,
        b"RIFF\0\0\0\0WEBPEXIF\xff\xff\xff\xff",
        b"\xff\xd8\xff\xe1\0\x10Exif\0\0MM",
    ):
        assert texts_of(odd) == {}


@pytest.mark.parametrize("keyword", ["ldm_lab", "other{}"], ids=["one", "many"])
def test_a_picture_full_of_packed_texts_costs_little(keyword):
    """Four mebibytes of them unpack to four gibibytes; what comes first is read, and no more than some."""
    packed = zlib.compress(b"a" * (LARGEST_TEXT - 1), 9)
    chunks = [chunk(b"zTXt", keyword.format(number).encode() + b"\0\0" + packed) for number in range(1000)]
    begun = time.process_time()
    found = texts_of(PNG + chunk(b"tEXt", b"parameters\0a fox") + b"".join(chunks))
    assert time.process_time() - begun < 2 and found["parameters"] == "a fox"
    assert sum(map(len, found.values())) <= 69 * 2**20 and len(found) <= 18


A1111 = (
    "a (red:1.3) fox \\(animal\\)\nNegative prompt: blurry, [old]\n"
    "Steps: 3, Sampler: DPM++ 2M Karras, CFG scale: 6.5, Seed: 41, Size: 32x16, Model hash: 0123456789, Model: other, "
    'Clip skip: 2, Lora hashes: "a: b, c: d", Version: v1.9.4'
)


def test_settings_of_another_program(call, tmp_path, caplog):
    path = png(tmp_path / "theirs.png", parameters=A1111)
    recorded = read_recorded(path)
    assert recorded.prompts[0].text == "a (red:1.3) fox (animal)"
    code, _, err = call("--from", path, "--device", "cpu")
    assert code == 0, err
    assert "settings of another program; taken: prompt, negative, steps 3, sampler dpmpp_2m, spacing karras" in err
    assert "not taken: Model hash, Model, Clip skip, Lora hashes\n" in err
    (made,) = json.loads((tmp_path / "samples" / "samples.json").read_text())
    for key, value in (
        ("negative", "blurry, [old]"), ("steps", 3), ("sampler", "dpmpp_2m"), ("spacing", "karras"), ("guidance", 6.5),
        ("seed", 41), ("width", 32), ("height", 16),
    ):  # fmt: skip
        assert made[key] == value
    assert "is taken as plain words" in caplog.text
    code, _, err = call("--from", path, model=False)
    assert code == 2 and "names no model of this program's; give one by --checkpoint" in err


@pytest.mark.parametrize(
    ("field", "left"),
    [
        ("Sampler: Euler a", "Sampler"), ("Seed: -1", "Seed"), ("Seed: 99999999999999999999", "Seed"),
        ("CFG scale: nan", "CFG scale"), ("Size: 99999x1", "Size"), ("Size: big", "Size"), ("Size: 0x16", "Size"),
        ("Steps: 0", "Steps"), ("Steps: 999999999999", "Steps"), ("Steps: ²", "Steps"),
        ("Steps: 00000000199999999999", "Steps"), ("Steps: 000000001" + "9" * 5000, "Steps"),
    ],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_values_of_another_program_that_are_not_taken(tmp_path, field, left):
    recorded = read_recorded(png(tmp_path / "t.png", parameters=f"a fox\n{field}, A b: 1, C d: 2"))
    assert recorded.left_out == [left, "A b", "C d"] and not recorded.values


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + A1111.encode("utf-16-be"), b"UNICODE\0" + A1111.encode("utf-16-le"),
        b"ASCII\0\0\0" + A1111.encode(), A1111.encode(),
    ],
    ids=["be", "le", "ascii", "bare"],
)  # fmt: skip
def test_settings_in_jpeg_and_webp(tmp_path, kind, comment):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment
    Image.new("RGB", (16, 16)).save(tmp_path / f"a.{kind}", exif=exif)
    assert read_recorded(tmp_path / f"a.{kind}").values["seed"] == 41


# ---------------------------------------------------------------------------------------------------------- inspect


def test_inspect_shows_the_settings(call, program, tmp_path):
    assert call(*FAST, "ein Bär:2", "-n", "1", "--negative", "old", "--out", "out")[0] == 0
    code, out, err = program("ldm_lab.__main__", "inspect", "out/00000.png")
    assert code == 0, err
    lines = [line.split(maxsplit=1) for line in out.splitlines()[1:]]
    assert "a picture of sample.py" in out and ["prompt", "ein Bär : 2.0"] in lines
    assert ["negative", "old"] in lines and ["checkpoint", "my_run"] in lines and ["width", "16"] in lines
    _, out, _ = program("ldm_lab.__main__", "inspect", "out/00000.png", "--json")
    assert json.loads(out) == entry("out/00000.png")
    theirs = png(tmp_path / "theirs.png", parameters=A1111.replace("fox", "\x1b[31mfox"))
    _, out, _ = program("ldm_lab.__main__", "inspect", theirs)
    assert "settings in A1111's notation" in out and "CFG scale: 6.5" in out and "\x1b" not in out
    for path in (png(tmp_path / "plain.png"), "out/grid.png"):
        code, _, err = program("ldm_lab.__main__", "inspect", path)
        assert code == 2 and len(err.splitlines()) == 1


def test_a_file_is_found_by_its_content(tmp_path):
    (tmp_path / "dog.png").write_bytes(b"dog")
    record = FileRecord.of(tmp_path / "dog.png")
    assert record.find([tmp_path / "no", tmp_path]) == tmp_path / "dog.png"
    (tmp_path / "dog.png").write_bytes(b"cat")
    assert record.find([tmp_path]) is None and not record.is_content_of(tmp_path / "dog.png")
    assert FileRecord("dog.png", None).find([tmp_path]) is None  # nobody knows what it was
    with pytest.raises(UserError, match="no such picture"):
        read_recorded(tmp_path / "none.png")
