"""The app over HTTP: its options are those that are declared, its users are strangers, each gets their own pictures."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import requests
import tiny_app
import warm
from PIL import Image
from tiny import ROOT, WARM, program_environment, run_program
from tiny_app import Refused, ask, begin, events, upload

from ldm_lab.app import endpoints, work
from ldm_lab.app.choices import base_choices, upsampler_choices
from ldm_lab.app.followers import Followers, Following
from ldm_lab.app.hosts import Hosts
from ldm_lab.app.limits import Limits
from ldm_lab.app.recall import recall
from ldm_lab.app.shelf import Kind, Shelf
from ldm_lab.app.store import Store, temporary_folder
from ldm_lab.config.registry import part_info
from ldm_lab.errors import UserError
from ldm_lab.prompts import Prompt, parse_prompt, write_prompt
from ldm_lab.sampling import flat
from ldm_lab.sampling.names import FileRecord
from ldm_lab.sampling.options import BELONGS, OptionValues

FAST = {"sampler": "plms2", "steps": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny_app.make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def address(models):
    with tiny_app.served(models) as address:
        yield address


@pytest.fixture
def dog(tmp_path):
    """An image as somebody has it."""
    Image.effect_noise((24, 16), 90).convert("RGB").save(tmp_path / "dog.png")
    return tmp_path / "dog.png"


def picture(address, answer, number=0):
    data = requests.get(answer["pictures"][number]["url"], timeout=60)
    assert data.status_code == 200 and answer["pictures"][number]["url"].startswith(address)
    return Image.open(io.BytesIO(data.content))


def told(found):
    """Return the kinds and data of events, those of errors by what they say alone."""
    return [(kind, {"error": data["error"]} if kind == "error" else data) for kind, data in found]


# ------------------------------------------------------------------------------------------------------ what is offered


def test_every_option_is_a_parameter(address):
    told = requests.get(f"{address}/gradio_api/info", timeout=60).json()["named_endpoints"]
    assert sorted(told) == ["/models", "/options", "/sample", "/settings"]
    parameters = {entry["parameter_name"] for entry in told["/sample"]["parameters"]}
    assert {*flat.base_names(), *(f"upsampler_{name}" for name in flat.upsampler_names())} <= parameters
    options = {entry["name"]: entry for entry in ask(address, "options")}
    assert set(options) < parameters and options["guidance_rescale"]["type"] == "number (from 0 to 1)"
    assert options["guidance"]["meaning"] == part_info("sampling", None).options["guidance"].meaning


def test_an_option_that_is_declared_is_in_the_help_the_page_and_the_interface(tmp_path):
    """One line in `SamplingOptions`, and its meaning, in a copy of the program."""
    shutil.copytree(ROOT / "ldm_lab", tmp_path / "ldm_lab", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "ldm_lab" / "sampling" / "options.py"
    text = file.read_text()
    field = "    guidance: float | None = None\n"
    assert text.count(field) == 1 and "sharpness" not in text
    text = text.replace(field, f"    sharpness: Share = 0.25\n{field}", 1)
    file.write_text(text.replace("    Attributes:\n", "    Attributes:\n        sharpness: of all edges, 0 to 1\n", 1))
    (tmp_path / "models").mkdir()
    tiny_app.make_models(tmp_path / "models")
    (tmp_path / "look.py").write_text(LOOK)
    done = run_program(tmp_path / "look.py", cwd=tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT / 'tests'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "help: --sharpness X of all edges, 0 to 1 (default: 0.25)",
        "page: Sharpness, of all edges, 0 to 1 (default: 0.25)",
        "interface: of all edges, 0 to 1 (default: 0.25)",
        "refused: sharpness: a number from 0 to 1 is needed, not 2",
        "drawn: 0.5",
        "refused on the page: sharpness: a number from 0 to 1 is needed, not 3.0",
        "drawn by the page: 0.75",
    ]


LOOK = """
import json, re, sys
from dataclasses import asdict
from pathlib import Path

import requests
import tiny_app
from PIL import Image

from ldm_lab.commands import sample

print("help:", " ".join(re.search(r"--sharpness X +[^-]*", sample.parser().format_help())[0].split()))
with tiny_app.served(Path("models")) as address:
    page = requests.get(f"{address}/config").json()
    (field,) = [c["props"] for c in page["components"] if c["props"].get("elem_id") == "option-sharpness"]
    print(f"page: {field['label']}, {field['info']}")
    options = {entry["name"]: entry for entry in tiny_app.ask(address, "options")}
    print("interface:", options["sharpness"]["meaning"])
    try:
        tiny_app.ask(address, prompts=["a"], sharpness=2)
    except tiny_app.Refused as error:
        print("refused:", error)
    made = tiny_app.ask(address, prompts=["a"], sharpness=0.5, steps=1)
    with Image.open(made["pictures"][0]["path"]) as image:
        print("drawn:", json.loads(image.text["ldm_lab"])["sharpness"])
    try:
        tiny_app.press(address, "draw", prompts="a", sharpness="3")
    except tiny_app.Refused as error:
        print("refused on the page:", error)
    _, gallery, _, _ = tiny_app.press(address, "draw", prompts="a", sharpness="0.75", steps="1")
    with Image.open(gallery[0]["image"]["path"]) as image:
        print("drawn by the page:", json.loads(image.text["ldm_lab"])["sharpness"])
"""


def test_choices_are_read_as_they_are_written():
    choices = {choice.name: choice for choice in (*base_choices(), *upsampler_choices())}
    read = {
        "guidance": ("2.5", 2.5), "seed": ("7", 7), "steps": ("fast27", "fast27"), "size": ("24x16", "24x16"),
        "guidance_interval": ("0.2, 0.8", (0.2, 0.8)), "clip_denoised": ("off", False), "negative": ("12", "12"),
        "order": ("2", 2), "sampler": ("", None), "strength": (None, None), "upsampler_steps": ("20", 20),
    }  # fmt: skip
    for name, (written, value) in read.items():
        found = choices[name].read(written)
        assert found == value and type(found) is type(value), name
        if value is not None:
            assert choices[name].read(choices[name].shown(found)) == value, name
    with pytest.raises(UserError, match=r"guidance_interval: numbers are needed, such as 0.2 0.8, not 'x'"):
        choices["guidance_interval"].read("x 1")


def test_new_files_are_seen_and_others_are_not_opened(models, tmp_path, caplog):
    folder = tmp_path / "shelf"
    shutil.copytree(models / "tiny", folder / "runs" / "first")
    (folder / "notes.safetensors").write_bytes(b"no weights")
    (folder / ".hidden").mkdir()
    shutil.copy(models / "other.safetensors", folder / ".hidden" / "other.safetensors")
    shelf = Shelf([models / "other.safetensors"], folder)
    assert shelf.names(Kind.MODEL) == ["other.safetensors", "runs/first"]
    assert caplog.text.count("notes.safetensors: not offered") == 1
    tiny_app.make_stages(folder)
    assert shelf.names(Kind.MODEL) == ["other.safetensors", "base.safetensors", "runs/first"]
    assert shelf.names(Kind.UPSAMPLER) == ["larger.safetensors"]
    (folder / "base.safetensors").unlink()
    assert shelf.names(Kind.MODEL) == ["other.safetensors", "runs/first"]
    for name in ("../other.safetensors", "/etc/passwd", str(models / "other.safetensors"), "runs/../runs/first", ""):
        with pytest.raises(UserError, match="no such model"):
            shelf.path(Kind.MODEL, name)
    record = FileRecord.of(models / "tiny" / "ema.safetensors")
    assert shelf.find(Kind.MODEL, record) == "runs/first"
    assert shelf.find(Kind.MODEL, FileRecord(record.name, "0" * 64)) is None


# ------------------------------------------------------------------------------------------------------------- pictures


def test_a_picture_is_the_one_that_sample_py_makes(address, models, program, tmp_path, monkeypatch):
    given = {"prompts": ["a red star:2", "blurry:-0.5"], "seed": 7, "guidance_rescale": 0.3, "count": 2, **FAST}
    answer = ask(address, model="tiny", **given)
    assert answer["seeds"] == [7, 8] and answer["remarks"] == []
    monkeypatch.chdir(tmp_path)
    program(
        "sample", "--checkpoint", models / "tiny", "a red star:2", "blurry:-0.5", "-n", "2", "--seed", "7",
        "--guidance-rescale", "0.3", "--sampler", "plms2", "--steps", "2", "--device", "cpu",
    )  # fmt: skip
    for number in (0, 1):
        ours = picture(address, answer, number)
        with Image.open(tmp_path / "samples" / f"0000{number}.png") as theirs:
            assert ours.tobytes() == theirs.tobytes() and ours.text == theirs.text
    again = ask(address, "settings", picture=upload(address, tmp_path / "samples" / "00001.png"))
    once_more = picture(address, ask(address, **again["settings"]))
    assert once_more.tobytes() == ours.tobytes() and again["remarks"] == []


def test_images_and_what_is_in_color(address, dog, tmp_path):
    mask = Image.new("L", (24, 16), 0)
    mask.paste(255, (4, 4, 12, 12))
    mask.save(tmp_path / "mask.png")
    answer = ask(
        address, prompts=["a hat"], image_prompts=[upload(address, dog)], image_weights=[0.5],
        init_image=upload(address, dog), mask=upload(address, tmp_path / "mask.png"), strength=0.5,
        size=16, **FAST,
    )  # fmt: skip
    made = picture(address, answer)
    with Image.open(dog) as image:
        assert made.size == (16, 16) and made.getpixel((14, 14)) == image.getpixel((18, 14)), "what is black stays"
        assert made.tobytes() != image.crop((4, 0, 20, 16)).tobytes()
    assert '"image": "dog.png"' in made.text["ldm_lab"] and "/tmp" not in made.text["ldm_lab"]


def test_models_in_a_row(tmp_path):
    tiny_app.make_stages(tmp_path)
    with tiny_app.served(tmp_path) as address:
        assert ask(address, "models")["upsamplers"] == ["larger.safetensors"]
        answer = ask(address, prompts=["a cat"], upsamplers=["larger.safetensors"], steps=2, upsampler_steps=2)
        assert picture(address, answer).size == (32, 32)
        own = ask(address, prompts=["a cat"], upsamplers=["larger.safetensors"], steps=2, each_upsampler=[{"steps": 3}])
        assert '"upsampler.1.steps": 3' in picture(address, own).text["ldm_lab"]
        with pytest.raises(Refused, match=r"each_upsampler: no such option: 'stepz'\. Did you mean 'steps'"):
            ask(address, prompts=["a"], upsamplers=["larger.safetensors"], each_upsampler=[{"stepz": 3}])
        with pytest.raises(Refused, match=r"size: 160x160 pixels are too many; a side has 128 at most here"):
            ask(address, prompts=["a"], upsamplers=["larger.safetensors"], size=80, steps=1, upsampler_steps=1)
        with pytest.raises(Refused, match="upsampler_steps belongs to an upsampler"):
            ask(address, prompts=["a"], upsampler_steps=3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": "12x"}, "steps"),
        ({"guidance_rescale": 2}, "guidance_rescale: a number from 0 to 1 is needed, not 2"),
        ({"guidance": "much"}, "guidance: number or null is needed, not 'much'"),
        ({"stepz": 3}, "400: no such parameter: 'stepz'. Did you mean 'steps'?"),
        ({"sampler": "dim"}, "no such sampler: 'dim'"),
        ({"sampler": {"name": "ddim"}}, "sampler"),
        ({"eta": 0.5}, "eta"),
        ({"strength": 0.5}, "strength: belongs to init_image, which is not given"),
        ({"prompts": []}, "no prompt"),
        ({"prompts": "a"}, "prompts: a list of texts is needed, not a"),
        ({"prompts": [{"text": 1}]}, "prompts: a list of texts is needed"),
        ({"prompts": ["a:inf"]}, "a weight must be finite"),
        ({"image_weights": [1]}, "image_weights: 1 for 0 image_prompts"),
        ({"count": "2"}, "count: a whole number from 1 on is needed, not '2'"),
        ({"count": True}, "count: a whole number from 1 on is needed, not True"),
        ({"model": "../tiny/ema.safetensors"}, "no such model: '../tiny/ema.safetensors'"),
        ({"loras": ["/etc/passwd:0.5"]}, "no such LoRA: 'passwd'"),
        ({"aesthetic": 9, "aesthetic_embeddings": "/etc/passwd"}, "no such set of rating embeddings: 'passwd'"),
        ({"init_image": "/etc/passwd"}, "init_image: an uploaded file is needed"),
        ({"init_image": {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}}, "init_image: an uploaded file"),
        ({"init_image": {"path": "/etc/passwd"}}, "init_image: an uploaded file is needed"),
        ({"image_prompts": [{"path": "../../etc/passwd"}]}, "image_prompts: an uploaded file is needed"),
        ({"clip_guidance": 3}, "is not on this machine, and requests download nothing|CLIP"),
        ({"negative": "\udfff"}, "negative: '\\udfff': a prompt is text in UTF-8; these bytes are none"),
        ({"prompts": ["\ud800"]}, "'\\ud800': a prompt is text in UTF-8; these bytes are none"),
        ({"guidance_interval": [1, 0]}, "guidance_interval: two times 0 <= first <= last <= 1 are needed, not 1 0"),
        # too much
        ({"loras": ["x"] * 17}, "loras: 16 at most are taken for one request, not 17"),
        ({"upsamplers": ["x"] * 5}, "upsamplers: 4 at most are taken for one request, not 5"),
        ({"count": 5}, "count: 5 pictures are too many for one request; 4 at most are made here"),
        ({"count": 2, "rerank": 3}, "too many for one request"),
        ({"steps": 10**9}, "steps: 1000000000 are too many; 400 at most here"),
        ({"count": 4, "steps": 400, "size": 48}, "work: 4 (pictures x steps x megapixels x prompts) is too much"),
        ({"prompts": ["a"] * 32, "steps": 400}, "work: 4 (pictures x steps"),
        ({"rerank": 4, "steps": 400, "size": 48}, "work: 4 (pictures x steps"),
        ({"tile_denoiser": 64, "tile_overlap": 48, "size": 128, "steps": 100}, "work: 11 (pictures x steps"),
        ({"size": 10**6}, "size: 1000000x1000000 pixels are too many; a side has 128 at most here"),
        ({"size": "16x4000"}, "size: 16x4000 pixels are too many"),
        ({"prompts": ["a"] * 40}, "prompts: 32 at most are mixed in a picture here, not 40"),
        ({"prompts": ["a" * 9000]}, "prompts: 5000 characters at most are read here, not 9000"),
        ({"negative": "a" * 9000}, "prompts: 5000 characters at most are read here, not 9000"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_is_wrong_is_told_in_a_line(address, capfd, given, said):
    asked = {"prompts": ["a"], **FAST, **given}
    with pytest.raises(Refused) as error:
        ask(address, **asked)
    assert re.search(said if "|" in said else re.escape(said), str(error.value)), error.value
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", BELONGS)
def test_what_belongs_to_another_option_is_refused_and_on_the_page_left_out(name):
    """By one table: what sample.py and the interface refuse, a form with its old values leaves out, and says."""
    values = {"mask": "m.png", "resize": "pad", "aesthetic_embeddings": "x", "invert_mask": True}
    given = OptionValues({name: values.get(name, 1)})
    with pytest.raises(UserError, match=rf"{name}: belongs to {BELONGS[name]}, which is not given"):
        flat.base_options(given, str)
    assert flat.idle(given, 0) == {name: f"belongs to {BELONGS[name]}, which is not given"}
    there = OptionValues({**given, BELONGS[name]: 1, "init_image": "dog.png"})
    assert flat.idle(there, 0) == {}


@pytest.mark.parametrize(("given", "upsamplers", "found"), [
    ({"eta": 0.5}, 0, {"eta": "the sampler unipc has no such option"}),
    ({"eta": 0.5, "sampler": "ddim"}, 0, {}),
    ({"eta": 0.5, "sampler": "plms"}, 0, {"eta": "the sampler plms has no such option"}),
    ({"upsampler_eta": 0.5}, 1, {}),
    ({"upsampler_eta": 0.5, "upsampler_sampler": "plms"}, 2, {"upsampler_eta": "the sampler plms has no such option"}),
    ({"upsampler_steps": 9}, 0, {"upsampler_steps": "belongs to an upsampler, and there is none"}),
    ({"invert_mask": True, "mask": "m"}, 0,
     dict.fromkeys(("invert_mask", "mask"), "belongs to init_image, which is not given")),
    ({"upsampler_tile_overlap": 8}, 1,
     {"upsampler_tile_overlap": "belongs to upsampler_tile_denoiser, which is not given"}),
], ids=str)  # fmt: skip
def test_what_has_no_effect_is_found(given, upsamplers, found):
    assert flat.idle(OptionValues(given), upsamplers) == found
    if found:
        with pytest.raises(UserError):
            flat.base_options(OptionValues(given), str)
            flat.upsampler_options(OptionValues(given), upsamplers, 1, str)


def test_the_page_says_what_was_set_without_effect(address):
    status, gallery, _, _ = tiny_app.press(
        address, "draw", prompts="a", steps="2", eta="0.5", strength="0.3", invert_mask="on", strength_1=0.5,
        weight_2="3", upsampler_steps="9", tile_overlap="8",
    )  # fmt: skip
    with Image.open(gallery[0]["image"]["path"]) as image:
        settings = json.loads(image.text["ldm_lab"])
    assert settings["steps"] == 2 and not {"eta", "strength", "invert_mask", "tile_overlap"} & set(settings)
    assert sorted(re.findall("<li>(.*?)</li>", status)) == [
        "eta: without effect: the sampler unipc has no such option",
        "invert_mask: without effect: belongs to mask, which is not given",
        "strength: without effect: LoRA 1 is not chosen",
        "strength: without effect: belongs to init_image, which is not given",
        "tile_overlap: without effect: belongs to tile_denoiser, which is not given",
        "upsampler_steps: without effect: belongs to an upsampler, and there is none",
        "weight: without effect: image 2 is not chosen",
    ]
    status, *_ = tiny_app.press(address, "draw", prompts="a", sampler="plms2", steps="2")
    assert "<li>" not in status


def test_a_remark_is_given_to_each_user(address):
    for _ in range(2):
        answer = ask(address, prompts=["a:2"], guidance=5.0, **FAST)
        assert answer["remarks"] == ["guidance: 5 is without effect, since every prompt has a weight of its own"]


# ------------------------------------------------------------------------------------------------------------ strangers


def test_uploads_have_limits(address, tmp_path, capfd):
    Image.new("L", (10_000, 10_000)).save(tmp_path / "bomb.png")
    (tmp_path / "words.png").write_text("no image at all")
    (tmp_path / "large.png").write_bytes(os.urandom(1_200_000))
    bomb, words = (upload(address, tmp_path / name) for name in ("bomb.png", "words.png"))
    for key in ("init_image", "image_prompts"):
        for file, said in ((bomb, "bomb.png: too many pixels"), (words, "words.png: not an image that can be read")):
            with pytest.raises(Refused, match=said):
                ask(address, prompts=["a"], **{key: [file] if key == "image_prompts" else file}, **FAST)
    with pytest.raises(Refused, match="413"):
        upload(address, tmp_path / "large.png")
    with pytest.raises(Refused, match="413"):
        ask(address, prompts=["a" * 5_000_000])
    with pytest.raises(Refused, match="no settings in this file"):
        ask(address, "settings", picture=words)
    assert "Traceback" not in capfd.readouterr().err


def test_all_images_of_a_request_have_a_limit(address, tmp_path):
    Image.new("L", (1000, 990)).save(tmp_path / "large.png")
    file = upload(address, tmp_path / "large.png")
    with pytest.raises(Refused, match="image_prompts: 4 megapixels together are taken here at most"):
        ask(address, image_prompts=[file] * 5, **FAST)
    assert ask(address, image_prompts=[file] * 4, **FAST)["seeds"] == [0]


def test_uploads_in_all_have_a_limit(address, dog, caplog):
    """Seventeen MiB here: the oldest files go, those of a job that is under way last."""
    files = []
    for _ in range(20):
        (dog.parent / "noise.png").write_bytes(os.urandom(1_000_000))
        files.append(Path(upload(address, dog.parent / "noise.png")["path"]))
    there = [file.exists() for file in files]
    assert there == sorted(there) and 5 < sum(there) <= 17 and there[-1]
    assert "deleted the oldest" in caplog.text and "--max-stored" in caplog.text
    folder = files[0].parents[1]
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 18 * 2**20


def test_many_small_files_count_and_those_of_a_job_stay(tmp_path):
    store = Store(tmp_path, 10 * 65_536)
    for number in range(20):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "a.png").write_bytes(b"x")
        os.utime(tmp_path / f"{number}" / "a.png", (number, number))
    with store.holding([tmp_path / "0" / "a.png"]):
        assert store.make_room() == 10 and (tmp_path / "0" / "a.png").exists()
    assert store.make_room(65_536) == 1 and not (tmp_path / "0").exists()
    assert len(list(tmp_path.iterdir())) == 9


def test_the_uploads_of_who_waits_stay(address, steps, dog, caplog):
    """Others' uploads do not push out the image of a request that is in the queue."""
    first = events(address, begin(address, prompts=["first"], steps=120, sampler="ddim"))
    next(first)
    file = upload(address, dog)
    waits = begin(address, prompts=["a"], init_image=file, size=16, **FAST)
    for _ in range(20):
        (dog.parent / "noise.png").write_bytes(os.urandom(1_000_000))
        upload(address, dog.parent / "noise.png")
    assert "deleted the oldest" in caplog.text and Path(file["path"]).exists()
    first.close()
    assert [kind for kind, _ in events(address, waits)][-1] == "complete"


def test_so_many_uploads_at_once(address, dog):
    """Those that are sent slowly do not add up to more than the disk has."""
    body = b"--x\r\n" + b'Content-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    host, port = address.removeprefix("http://").split(":")
    head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(16):
            slow = stack.enter_context(socket.create_connection((host, int(port))))
            slow.sendall(f"{head}Content-Length: 900000\r\n\r\n".encode() + body)
        for _ in range(100):
            with contextlib.suppress(Refused):
                upload(address, dog)
                time.sleep(0.02)
                continue
            break
        with pytest.raises(Refused, match="429: too many uploads at once; try again later"):
            upload(address, dog)
    for _ in range(100):
        with contextlib.suppress(Refused):
            upload(address, dog)
            break
        time.sleep(0.05)
    else:
        raise AssertionError("places are not free again")


@pytest.mark.parametrize("path", [
    "monitoring", "monitoring/summary", "gradio_api/process_recording", "gradio_api/deep_link", "gradio_api/runs",
    "gradio_api/stream/x", "gradio_api/proxy=http://example.com", "gradio_api/dev/reload", "gradio_api/vibe-code",
    "gradio_api/custom_component/x/client/y/z", "gradio_api/run-history/buckets",
])  # fmt: skip
def test_what_nobody_needs_is_closed(address, path):
    for method in ("GET", "POST"):
        answer = requests.request(method, f"{address}/{path}", timeout=60)
        assert answer.status_code in (403, 404) and len(answer.text) < 100, method


def test_what_a_killed_program_has_left_goes_at_the_next_start(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import os; from ldm_lab.app.store import temporary_folder as t\nwith t() as f: (f / 'a').touch(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}).returncode == 9
    (left,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "ldm_lab_app_link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "ldm_lab_app_link.lock").touch()
    (tmp_path / "ldm_lab_app_other").mkdir()
    with pytest.raises(ValueError, match="of the program"), temporary_folder():
        raise ValueError("of the program")
    with temporary_folder() as first:
        assert not left.exists() and f"deleted {left}" in caplog.text
        with temporary_folder() as second:
            assert first.is_dir() and second.is_dir() and first != second
            assert second.stat().st_mode & 0o077 == 0
    assert (tmp_path / "elsewhere").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "elsewhere", "ldm_lab_app_link", "ldm_lab_app_link.lock", "ldm_lab_app_other",
    ]  # fmt: skip


def test_files_of_the_server_are_not_read(address, models, tmp_path, capfd):
    (tmp_path / "secret.png").write_bytes(b"secret")
    secret = models / "tiny" / "ema.safetensors"
    here = os.path.relpath(secret)
    for path in (secret, tmp_path / "secret.png", "/etc/passwd", here, f"../{here}", ROOT / "README.md", "README.md"):
        assert requests.get(f"{address}/gradio_api/file={path}", timeout=60).status_code in (403, 404), path
    made = ask(address, prompts=["a"], **FAST)["pictures"][0]["url"]
    assert requests.get(f"{made}/../../../../../../../etc/passwd", timeout=60).status_code in (403, 404)
    with pytest.raises(Refused, match=r"None|400|403"):
        ask(address, "settings", picture={"path": str(secret), "meta": {"_type": "gradio.FileData"}})


def test_a_path_of_the_servers_is_refused_in_a_line(address, capfd):
    meta = {"_type": "gradio.FileData"}
    with pytest.raises(Refused, match="400: picture: an uploaded file is needed; paths and addresses"):
        ask(address, "settings", picture={"path": "/etc/passwd", "meta": meta})
    with pytest.raises(Refused, match="400: picture: an uploaded file is needed; this is no path"):
        ask(address, "settings", picture={"path": "/a\0b", "meta": meta})
    with pytest.raises(Refused, match="picture: an uploaded file is needed"):
        ask(address, "settings", picture="/etc/passwd")
    assert capfd.readouterr().err == ""


def test_an_upload_that_was_cleared_away_is_told(address, dog):
    file = upload(address, dog)
    Path(file["path"]).unlink()
    with pytest.raises(Refused, match=r"400: init_image: dog.png: is not there any more; upload it again"):
        ask(address, prompts=["a"], init_image=file, **FAST)
    with pytest.raises(UserError, match=r"dog\.png: is not there any more; upload it again"):
        Limits().open_upload(Path(file["path"]))


def test_only_the_names_of_the_page_are_answered(address):
    """A page of elsewhere whose name leads to this machine is not let in (DNS rebinding)."""
    port = address.rpartition(":")[2]
    evil = {"Host": "evil.example", "Origin": "http://evil.example"}
    for headers in (evil, {"Host": f"evil.example:{port}"}, {"Origin": "http://evil.example"}, {"Origin": "null"}):
        answer = requests.post(f"{address}/gradio_api/call/v2/models", json={}, headers=headers, timeout=60)
        assert answer.status_code == 403 and "--allow-host NAME" in answer.text, headers
        assert "access-control-allow-origin" not in answer.headers
    preflight = {**evil, "Access-Control-Request-Method": "POST"}
    assert requests.options(f"{address}/gradio_api/call/v2/models", headers=preflight, timeout=60).status_code == 403
    for host in (f"localhost:{port}", "127.0.0.1", f"[::1]:{port}"):
        headers = {"Host": host, "Origin": f"http://{host}"}
        assert requests.get(f"{address}/gradio_api/info", headers=headers, timeout=60).status_code == 200


@pytest.mark.parametrize(("hosts", "host", "is_answered"), [
    (Hosts(), "192.168.0.7:7860", False), (Hosts("0.0.0.0"), "192.168.0.7:7860", True), (Hosts("::"), "[::2]", True),
    (Hosts("0.0.0.0"), "evil.example", False), (Hosts("gpu.lan"), "GPU.lan.:80", True), (Hosts(), "", False),
    (Hosts(others=["art.example"]), "art.example", True), (Hosts(), "localhost.evil.example", False),
    (Hosts(), "evil.example@127.0.0.1.evil.example", False), (Hosts(), "[::1", False),
], ids=str)  # fmt: skip
def test_names_of_the_page(hosts, host, is_answered):
    assert (hosts.refusal(host, None) == "") is is_answered


def test_the_server_fetches_no_address(address, monkeypatch):
    asked = []
    connect = socket.socket.connect

    def watched(self, place):
        if isinstance(place, tuple) and place[0] not in ("127.0.0.1", "::1", "localhost"):
            asked.append(place)
            raise OSError("no network")
        return connect(self, place)

    monkeypatch.setattr(socket.socket, "connect", watched)
    for path in ("file=http://example.com/a.png", "file=https://example.com", "proxy=http://example.com/"):
        assert requests.get(f"{address}/gradio_api/{path}", timeout=60).status_code == 403
    for path in ("http://example.com/a.png", "//example.com/a.png", "FILE:///etc/passwd"):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        with pytest.raises(Refused, match="400: init_image: addresses are not fetched here; upload the file"):
            ask(address, prompts=["a"], init_image=file, **FAST)
    ask(address, prompts=["a"], **FAST)
    page = requests.get(address, timeout=60)
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert not re.findall(r'(?:src|href)="(?:https?:)?//(?!127)[^"]*"', page.text.replace("https://gradio.app", ""))
    assert not asked


BODIES = {"deep": b"[" * 100_000, "broken": b"{", "odd": b'{"data": 3}', "bytes": b"\xff"}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_odd_bodies_are_refused(address, body):
    for path in ("call/sample", "call/v2/sample", "queue/join", "run/sample"):
        answer = requests.post(
            f"{address}/gradio_api/{path}", data=body, headers={"content-type": "application/json"}, timeout=60
        )
        assert 400 <= answer.status_code < 500, path


def test_the_queue_cannot_be_passed(address):
    data = {"data": [["a"]]}
    for path in ("run/sample", "api/sample", "api/sample/"):
        assert requests.post(f"{address}/gradio_api/{path}", json=data, timeout=60).status_code == 404


def test_a_password_is_asked_for(models, caplog):
    with tiny_app.served(models, password="geheim é") as address:
        assert requests.get(f"{address}/gradio_api/info", timeout=60).status_code == 401
        for path in ("call/sample", "call/v2/sample", "upload", "queue/join"):
            body = {} if "v2" in path else {"data": []}
            assert requests.post(f"{address}/gradio_api/{path}", json=body, timeout=60).status_code == 401, path
        for path in ("cancel", "reset", "reset/"):
            body = {"session_hash": "x", "fn_index": 0, "event_id": "x"}
            assert requests.post(f"{address}/gradio_api/{path}", json=body, timeout=60).status_code == 401, path
        session = requests.Session()
        begun = time.monotonic()
        for wrong in ("", "geheim", "geheim é "):
            answer = session.post(f"{address}/login", data={"username": "me", "password": wrong}, timeout=60)
            assert answer.status_code in (400, 422) and not session.cookies
        assert time.monotonic() - begun > 0.3 and "a wrong password from 127.0.0.1, the 2. in a row" in caplog.text
        answer = session.post(f"{address}/login", data={"username": "me", "password": "geheim é"}, timeout=60)
        assert answer.status_code == 200
        assert session.get(f"{address}/gradio_api/info", timeout=60).status_code == 200
        assert session.post(f"{address}/gradio_api/reset", json=body, timeout=60).status_code == 200


# ----------------------------------------------------------------------------------------------------- several at once


@pytest.fixture
def steps(monkeypatch):
    """Slow steps, counted: (time, thread) of each; nobody enters the models twice at once."""
    seen, door, inner = [], threading.Lock(), work.Job._step

    def step(self, done, total):
        assert door.acquire(blocking=False), "two threads in one pipeline"
        time.sleep(0.02)
        seen.append((time.monotonic(), threading.get_ident()))
        door.release()
        inner(self, done, total)

    monkeypatch.setattr(work.Job, "_step", step)
    return seen


def test_two_users_at_once_both_get_their_own_in_their_order(address, steps):
    seeds, ended, answers = [3, 5, 9], [], {}

    def user(seed, event):
        for kind, data in events(address, event):
            if kind == "complete":
                ended.append(seed)
                answers[seed] = data[0]

    threads = []
    for seed in seeds:
        event = begin(address, prompts=[f"number {seed}"], seed=seed, steps=8, sampler="ddim")
        threads.append(threading.Thread(target=user, args=(seed, event)))
        threads[-1].start()
    for thread in threads:
        thread.join(60)
    assert ended == seeds, "first come, first served"
    for seed in seeds:
        assert answers[seed]["seeds"] == [seed]
        assert f'"text": "number {seed}"' in picture(address, answers[seed]).text["ldm_lab"]
    assert len(steps) == 24


def test_who_leaves_ends_the_job_at_its_next_step(address, steps):
    for kind, data in events(address, begin(address, prompts=["a"], steps=400, sampler="ddim")):
        assert kind in ("generating", "heartbeat")
        if data and data[0]["step"] >= 3:
            break  # which closes the connection
    left = time.monotonic()
    answer = ask(address, prompts=["next"], steps=2, sampler="ddim")
    assert answer["seeds"] == [0] and len(steps) < 150
    assert max(when for when, _ in steps[:-2]) - left < 2


def test_a_job_begins_when_somebody_follows_it(address, steps, monkeypatch):
    monkeypatch.setattr(Followers, "may_come", lambda self, keys, asked: time.monotonic() < asked + 2)
    late = begin(address, prompts=["late"], steps=2, sampler="ddim")
    never = begin(address, prompts=["never"], steps=2, sampler="ddim")
    time.sleep(0.4)
    assert not steps
    assert [kind for kind, _ in events(address, late)][-1] == "complete"
    assert ask(address, prompts=["next"], steps=3, sampler="ddim")["seeds"] == [0]
    assert len(steps) == 2 + 3, "nothing was drawn for the one that nobody followed"
    assert ("error", {"error": "ended: nobody has followed it for 10 seconds"}) in told(events(address, never))


@pytest.mark.parametrize("where", ["call/sample", "queue/data"])
def test_a_killed_curl_ends_the_job_at_its_next_step(address, steps, where):
    """The connection ends without a word of the program's, as when a machine goes down."""
    if where == "call/sample":
        target = f"call/sample/{begin(address, prompts=['a'], steps=400, sampler='ddim')}"
    else:
        page = requests.get(f"{address}/config", timeout=60).json()
        (number,) = [its["id"] for its in page["dependencies"] if its["api_name"] == "sample"]
        names = list(endpoints.sample_types())
        values = {"prompts": ["a"], "steps": 400, "sampler": "ddim"}
        joined = {"data": [values.get(name) for name in names], "fn_index": number, "session_hash": "killed"}
        assert requests.post(f"{address}/gradio_api/queue/join", json=joined, timeout=60).status_code == 200
        target = "queue/data?session_hash=killed"
    curl = subprocess.Popen(["curl", "-sN", f"{address}/gradio_api/{target}"], stdout=subprocess.DEVNULL)
    while len(steps) < 3:
        time.sleep(0.02)
    curl.kill()
    curl.wait()
    left = time.monotonic()
    answer = ask(address, prompts=["next"], steps=2, sampler="ddim")
    assert answer["seeds"] == [0] and len(steps) < 150
    assert max(when for when, _ in steps[:-2]) - left < 2


def test_who_leaves_the_queue_is_in_nobodys_way(address, steps):
    first = events(address, begin(address, prompts=["first"], steps=60, sampler="ddim"))
    next(first)
    leaves = requests.get(
        f"{address}/gradio_api/call/sample/{begin(address, prompts=['a'], steps=400, sampler='ddim')}",
        stream=True, timeout=60,
    )  # fmt: skip
    leaves.close()
    assert [kind for kind, _ in first][-1] == "complete"
    ask(address, prompts=["next"], steps=2, sampler="ddim")
    assert len(steps) == 60 + 2


def test_too_many_that_wait_are_refused_and_who_left_does_not_count(address, steps, monkeypatch):
    working = events(address, begin(address, prompts=["a"], steps=60, sampler="ddim"))
    next(working)
    waiting = [begin(address, prompts=["a"], steps=30, sampler="ddim") for _ in range(8)]
    with pytest.raises(Refused, match=r"^429: 8 requests wait already, and no more are taken; try again later$"):
        begin(address, prompts=["a"], steps=30, sampler="ddim")
    page = requests.get(f"{address}/config", timeout=60).json()
    (number,) = [its["id"] for its in page["dependencies"] if its["api_name"] == "sample"]
    for written in (number, str(number), float(number)):
        joined = {"data": [None], "fn_index": written, "session_hash": "other"}
        answer = requests.post(f"{address}/gradio_api/queue/join", json=joined, timeout=60)
        assert answer.status_code == 429 and "8 requests wait already" in answer.text, written
    assert ask(address, "options"), "what needs no turn is answered"
    monkeypatch.setattr(Followers, "may_come", lambda self, keys, asked: False)
    waiting.append(begin(address, prompts=["a"], steps=30, sampler="ddim"))
    monkeypatch.undo()
    working.close()


@pytest.mark.parametrize(("open_at", "closed_at", "now", "there", "may_come"), [
    (None, None, 9, False, True), (None, None, 11, False, False), (2, None, 100, True, False),
    (2, 5, 5.5, False, True), (2, 5, 7, False, False), (-5, -1, 9, False, True), (-5, -1, 11, False, False),
], ids=["soon", "never", "follows", "again", "left", "earlier-soon", "earlier-never"])  # fmt: skip
def test_who_may_still_come(monkeypatch, open_at, closed_at, now, there, may_come):
    """Of what was asked for at 0, with ten seconds to follow it."""
    clock = [0.0]
    monkeypatch.setattr("ldm_lab.app.followers.time.monotonic", lambda: clock[0])
    followers, stack = Followers(patience=10), contextlib.ExitStack()
    if open_at is not None:
        stack.enter_context(followers.following("event"))
    if closed_at is not None:
        clock[0] = closed_at
        stack.close()
    clock[0] = now
    assert followers.are_there(["session", "event"]) is there
    assert followers.may_come(["session", "event"], 0) is may_come
    assert Following(followers, ["other"], 0).is_over is (now > 10)
    stack.close()


# ------------------------------------------------------------------------------------------------------------- settings


def test_the_settings_of_another_program_and_of_missing_files(models, tmp_path):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    fields = "Steps: 20, Sampler: Euler, CFG scale: 3, Seed: 7, Size: 16x16, Hires: 2"
    info.add_text("parameters", f"a star\nNegative prompt: blurry\n{fields}")
    Image.new("RGB", (16, 16)).save(tmp_path / "theirs.png", pnginfo=info)
    known = [choice.name for choice in (*base_choices(), *upsampler_choices())]
    found = recall(tmp_path / "theirs.png", Shelf(folder=models), known)
    assert found.values["steps"] == 20 and found.values["sampler"] == "euler" and found.values["negative"] == "blurry"
    assert found.model is None and found.remarks == ["not taken: Hires"]
    with pytest.raises(UserError, match=r"^odd\.png: prompts: '\\ud800' is no text$"):
        odd = PngInfo()
        odd.add_text("ldm_lab", '{"seed": 0, "width": 8, "height": 8, "prompts": [{"text": "\\ud800"}]}')
        Image.new("RGB", (16, 16)).save(tmp_path / "odd.png", pnginfo=odd)
        recall(tmp_path / "odd.png", Shelf(folder=models), known)
    with pytest.raises(UserError, match=r"^none\.png: no settings"):
        Image.new("RGB", (16, 16)).save(tmp_path / "none.png")
        recall(tmp_path / "none.png", Shelf(folder=models), known)


def test_a_dropped_picture_sets_every_control_of_the_page(address, dog):
    """Those that it cannot bring are emptied, and what is drawn next is it once more."""
    page = requests.get(f"{address}/config", timeout=60).json()
    named = {its["id"]: its["props"].get("elem_id") for its in page["components"]}
    by_target = {tuple(target): its for its in page["dependencies"] for target in its["targets"] if its["backend_fn"]}
    number = {name: component for component, name in named.items()}
    draw, drop = by_target[number["draw"], "click"], by_target[number["dropped"], "upload"]
    assert drop["outputs"] == draw["inputs"], "every control that is drawn from, none is left as it was"
    made = picture(address, ask(address, prompts=["a red star"], seed=5, **FAST))
    made.save(dog.parent / "made.png", pnginfo=_texts(made))
    values = tiny_app.press(address, "dropped", "upload", dropped=upload(address, dog.parent / "made.png"))
    told = dict(zip([named[component] for component in drop["outputs"]], values, strict=True))
    assert all(told[name] is None for name in ("image-1", "image-2", "image-3", "begin", "editor"))
    assert [told[f"weight-{place}"] for place in (1, 2, 3)] == [""] * 3 and told["count"] == 1
    assert told["prompts"] == "a red star" and told["option-seed"] == "5" and told["upsampler"] == []


def _texts(image):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in image.text.items():
        info.add_itxt(key, value)
    return info


@pytest.mark.parametrize("prompt", [
    Prompt("a star"), Prompt("a star", 1.5), Prompt("meet at 12:30"), Prompt("a photo: of a cat", -0.5), Prompt("a: b"),
    Prompt("12:30", 2.0), Prompt(""),
], ids=str)  # fmt: skip
def test_a_prompt_is_written_as_it_is_read(prompt):
    assert parse_prompt(write_prompt(prompt)) == prompt


# -------------------------------------------------------------------------------------------------------- the program


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "error: --checkpoint FILE or --models DIR is needed (--help explains)"),
        (("--models", "nowhere"), "error: --models nowhere: no such folder"),
        (("--checkpoint", "nowhere"), "error: nowhere: "),
        (("--models", ".", "--port", "70000"), "error: --port: up to 65535, not 70000"),
        (("--models", ".", "--password", "abc"), "error: --password: 4 characters at least are needed, not 3"),
        (("--models", ".", "--password", "abcd", "--password-file", "x"), "error: --password and --password-file"),
        (("--models", ".", "--password-file", "x"), "error: --password-file x: cannot be read: No such file"),
        (("--models", ".", "--host", "no.such.host.example"), "error: --host no.such.host.example: no machine of this"),
        (("--models", ".", "--host", "192.0.2.1"), "error: --host 192.0.2.1: no address of this machine"),
        (("--models", ".", "--max-stored", "8"), "error: --max-stored: 8 MiB are too few: 16 files of 32"),
        (("--models", ".", "--max-side", "0"), "error: --max-side: at least 1 is needed, not 0"),
    ],
    ids=lambda value: "-".join(value)[:30] if isinstance(value, tuple) else "",
)
def test_wrong_words_are_one_line(program, monkeypatch, tmp_path, words, said):
    monkeypatch.chdir(tmp_path)
    code, _, err = program("ldm_lab.__main__", "app", *words)
    assert code == 2 and said in err and err.count("\n") == 1


def test_without_gradio_it_is_one_line(program, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, err = program("ldm_lab.__main__", "app", "--models", tmp_path)
    assert code == 2 and err.startswith("error: the app needs the package gradio: make setup EXTRAS=app, or pip")


def test_a_port_that_is_taken_is_one_line(program, models):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = program("ldm_lab.__main__", "app", "--models", models, "--port", port)
    assert code == 2 and err.startswith(f"error: --port {port}: not free") and err.count("\n") == 1


@pytest.mark.skipif(not WARM, reason="programs are copies of a process")
@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM], ids=["int", "term"]
)
def test_a_signal_ends_it_cleanly(models, tmp_path, number):
    words = ["-m", "ldm_lab", "app", "--models", str(models), "--port", "0", "--device", "cpu"]
    with warm.Program(words, tmp_path, program_environment({"TMPDIR": str(tmp_path)})) as process:
        while not (said := process.printed()[0].split()):
            assert process.poll() is None, process.printed()
            time.sleep(0.1)
        address = said[0].rstrip("/")
        event = begin(address, prompts=["a"], steps=400, sampler="ddim")
        for kind, data in events(address, event):
            if kind == "generating" and data[0]["step"] >= 1:
                break
        process.send_signal(number)
        code = process.wait(60)
        out, err = process.printed()
    assert code == 0 and err == "", err
    assert "ending: the job that is under way stops at its next step" in out
    assert not list(tmp_path.glob("ldm_lab_app_*")), "nothing is left"


def test_gradio_leaves_no_file_beside_ours():
    assert not list((ROOT / "ldm_lab").rglob("*.pyi"))


# --------------------------------------------------------------------------------------------------------------- docs


PAGE = (ROOT / "docs" / "app.md").read_text()
LINES = re.findall(r"^curl .+$", PAGE, re.MULTILINE)


def run_line(line, address, folder):
    """Run a line of the docs in a shell, at this address."""
    line = line.replace("http://127.0.0.1:7860", address)
    done = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_the_curl_lines_of_the_docs_work(address, models, dog, tmp_path):
    sampling, uploading, login, info, locked_sampling = LINES
    told = run_line(sampling, address, tmp_path)
    kind, data = told.strip().splitlines()[-2:]
    assert kind == "event: complete" and '"seeds": [7]' in data and re.search(r"step \d+ of 20", told)
    with Image.open(io.BytesIO(requests.get(re.search(r'"url": "([^"]+)"', data)[1], timeout=60).content)) as image:
        assert '"steps": 20' in image.text["ldm_lab"]
    (path,) = json.loads(run_line(uploading, address, tmp_path))
    assert Path(path).read_bytes() == dog.read_bytes()
    (tmp_path / "secret.txt").write_text("geheim +&\n")
    with tiny_app.served(models, password="geheim +&") as locked:
        assert json.loads(run_line(login, locked, tmp_path)) == {"success": True}
        assert "/sample" in json.loads(run_line(info, locked, tmp_path))["named_endpoints"]
        assert "event: complete" in run_line(locked_sampling, locked, tmp_path)
        (tmp_path / "cookies.txt").write_text("")
        with pytest.raises(AssertionError):  # of curl: what it is to follow is no address
            run_line(locked_sampling, locked, tmp_path)


def test_the_python_of_the_docs_works(address, dog, monkeypatch, capsys):
    monkeypatch.chdir(dog.parent)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code.replace("http://127.0.0.1:7860/", address).replace("strength=0.6", "strength=0.6, steps=4"), {})
    assert ".png" in capsys.readouterr().out


def test_the_limits_of_the_docs_are_the_defaults():
    told = dict(re.findall(r"`--max-(\w+)` \| (\d+)", PAGE))
    assert {name: int(value) for name, value in told.items()} == asdict(Limits())
