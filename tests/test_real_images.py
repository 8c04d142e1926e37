"""Photographs and transparent emoji through the training of all three models, whole and broken.

They lie beside a checkout at `../shared/data`, where there is such a folder; elsewhere these tests are skipped. The
same paths are covered with small drawn images by `test_data_*.py`.
"""

import contextlib
import io
import math
import re
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from tiny import AUTOENCODER, CLOOB, ROOT, make_run

from ldm_lab.checkpoints.files import read_pickled
from ldm_lab.config import to_yaml

DATA = ROOT.parent / "shared" / "data"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not DATA.is_dir(), reason="no real images beside this checkout")]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """The first shard of each set as a folder of files, and as a list of its images."""
    folder = tmp_path_factory.mktemp("unpacked")
    for name in ("photos", "emoji"):
        with tarfile.open(DATA / name / "00000.tar") as shard:
            shard.extractall(folder / name, filter="data")
        images = sorted(p for p in (folder / name).iterdir() if p.suffix in (".jpg", ".png"))
        (folder / f"{name}.txt").write_text("\n".join(map(str, images)))
    return folder


def data_section(source: str, name: str, unpacked: Path) -> dict:
    where = {
        "webdataset": {"shards": str(DATA / name / "*.tar")},
        "image_list": {"path": str(unpacked / f"{name}.txt")},
        "folder": {"path": str(unpacked / name)},
    }
    return {"name": source, **where[source], "image_size": 64, "batch_size": 8, "workers": 0, "crop": "random"}


def task_yaml(task: str, folder: Path, data: dict) -> Path:
    if task == "diffusion":
        path = make_run(folder)
        text = path.read_text()
        return _with_data(path, text, data)
    part = {"autoencoder": ("autoencoder", AUTOENCODER), "cloob": ("conditioner", CLOOB)}[task]
    config = {
        "task": task, "run": "tiny", part[0]: part[1], "data": data, "optim": {"lr": 1e-4},
        "trainer": {"accelerator": "cpu", "max_steps": 3, "threads": 1}, "logging": {"every": 1},
    }  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(to_yaml(config))
    return path


def _with_data(path: Path, text: str, data: dict) -> Path:
    head, tail = text.split("data:\n", 1)
    rest = re.sub(r"\A(  .*\n)+", "", tail)
    indented = "".join(f"  {line}\n" for line in to_yaml(data).splitlines())
    path.write_text(f"{head}data:\n{indented}{rest}")
    return path


@pytest.mark.parametrize("name", ["photos", "emoji"])
@pytest.mark.parametrize("source", ["webdataset", "image_list", "folder"])
@pytest.mark.parametrize("task", ["diffusion", "autoencoder", "cloob"])
def test_real_images_train_every_model(tmp_path, monkeypatch, program, unpacked, task, source, name):
    monkeypatch.chdir(tmp_path)
    data = data_section(source, name, unpacked)
    if task == "cloob" and source == "image_list":  # captions lie beside the images, as everywhere
        data["require_text"] = True
    code, out, err = program("train", "--config", task_yaml(task, tmp_path, data), "trainer.max_steps=3")
    assert code == 0, err
    assert "24 samples read, none skipped" in out
    assert read_pickled(tmp_path / "runs" / "tiny" / "last.ckpt")["global_step"] == 3


def test_a_broken_copy_trains_on_with_the_right_counts(tmp_path, monkeypatch, program):
    monkeypatch.chdir(tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    damaged = break_shard(DATA / "photos" / "00000.tar", broken / "00000.tar")
    whole = (DATA / "photos" / "00001.tar").read_bytes()
    (broken / "00001.tar").write_bytes(whole[: int(len(whole) * 0.6)])  # truncated in the middle of a sample
    data = {
        "name": "webdataset", "shards": str(broken / "*.tar"), "image_size": 64, "batch_size": 8, "workers": 0,
        "require_text": True, "max_skipped": 0.5,
    }  # fmt: skip
    yaml = task_yaml("cloob", tmp_path, data)
    code, out, err = program("train", "--config", yaml, "trainer.max_steps=50")
    assert code == 0, err
    report = next(line for line in out.splitlines() if line.startswith("data: ") and "samples read" in line)
    read = int(re.search(r"([\d,]+) samples read", report)[1].replace(",", ""))
    passes = read / (100 + whole_samples(broken / "00001.tar") + 1)  # the break counts as a sample
    assert passes > 2
    for reason, count in {**damaged, "broken shard": 1}.items():
        found = int(re.search(rf"{reason} (\d+) ", report)[1])
        assert math.floor(passes) * count <= found <= math.ceil(passes) * count, report


def whole_samples(truncated: Path) -> int:
    """Return the number of samples of a truncated shard that are whole, with image, caption and metadata."""
    names = []
    with contextlib.suppress(tarfile.ReadError), tarfile.open(truncated) as shard:
        for member in shard:
            if len(shard.extractfile(member).read()) == member.size:
                names.append(member.name)
    return len(names) // 3


def break_shard(source: Path, target: Path) -> dict[str, int]:
    """Copy a shard with some of its samples damaged; return how many of them for which reason."""
    reasons = {"truncated image": 3, "no caption": 2, "too small": 1}
    with tarfile.open(source) as whole, tarfile.open(target, "w") as out:
        members = [(m, whole.extractfile(m).read()) for m in whole.getmembers() if m.isfile()]
        jpegs = [m.name for m, _ in members if m.name.endswith(".jpg")]
        for member, content in members:
            place = jpegs.index(f"{member.name.split('.')[0]}.jpg")
            if member.name.endswith(".jpg") and place < 3:
                content = content[: len(content) // 2]
            elif member.name.endswith(".jpg") and place == 10:
                pixel = io.BytesIO()
                Image.new("RGB", (1, 1)).save(pixel, "JPEG")
                content = pixel.getvalue()
            elif member.name.endswith(".txt") and place in (20, 21):
                continue
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    return reasons
