"""`python -m ldm_lab cache`: what it writes trains like the images it was made from, and nothing else is mixed in."""

import os

import pytest
import yaml as yaml_reader
from data_sets import write_files
from tiny import make_run

from ldm_lab.checkpoints.files import read_pickled
from ldm_lab.config import load, to_yaml
from ldm_lab.data.file_facts import FileFacts, read_facts, write_facts
from ldm_lab.errors import UserError
from ldm_lab.training.caching import training_data


@pytest.fixture
def cached(tmp_path, monkeypatch, program):
    """A tiny run whose data are a cache of its drawn images; returns the path of its YAML."""
    monkeypatch.chdir(tmp_path)
    yaml = make_run(tmp_path, images=24)
    code, out, err = program("ldm_lab.__main__", "cache", "--config", yaml, "--out", "cache")
    assert code == 0, err
    assert "cache: 24 samples. data: 24 samples read, none skipped" in out
    config = yaml_reader.safe_load(yaml.read_text())
    config["data"] = {"name": "cache", "path": "cache", "batch_size": 4, "workers": 0}
    path = tmp_path / "cached.yaml"
    path.write_text(to_yaml(config))
    return path


def test_a_run_trains_on_a_cache_and_resumes_exactly(cached, program):
    assert program("train", "--config", cached, "run=whole")[0] == 0
    assert program("train", "--config", cached, "run=parts", "trainer.max_steps=2")[0] == 0
    assert program("train", "--config", cached, "run=parts", "resume.checkpoint=last")[0] == 0
    whole, parts = (
        read_pickled(cached.parent / "runs" / run / "last.ckpt")["state_dict"] for run in ("whole", "parts")
    )
    assert all(whole[name].equal(parts[name]) for name in whole)


def test_a_cache_of_other_weights_is_refused(cached, program):
    other = cached.parent / "other.safetensors"
    content = (cached.parent / "autoencoder.safetensors").read_bytes()
    other.write_bytes(content[:-4] + b"\x00\x00\x00\x3f")  # the last value of the last tensor
    code, _, err = program("train", "--config", cached, f"autoencoder.weights={other}")
    assert code == 2
    assert "this cache was made with another autoencoder" in err


def test_a_complete_cache_is_not_written_again(cached, program):
    code, _, err = program("ldm_lab.__main__", "cache", "--config", cached.parent / "tiny.yaml", "--out", "cache")
    assert code == 2
    assert "complete already (24 samples)" in err


def test_a_cache_of_nothing_is_an_error(tmp_path, program):
    yaml = make_run(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/broken.png").write_bytes(b"no image")
    data = ["data.name=folder", f"data.path={tmp_path / 'photos'}", "data.workers=0"]
    code, _, err = program("ldm_lab.__main__", "cache", "--config", yaml, "--out", tmp_path / "cache", *data)
    assert code == 2
    assert "cache: no image to encode. data: 1 samples read, 1 skipped (100.0%): undecodable image 1" in err
    code, _, err = program("ldm_lab.__main__", "cache", "--config", yaml, "--out", tmp_path / "cache", *data)
    assert code == 2, "what it left is no cache"


def test_a_run_makes_its_cache_at_the_first_start(cached, program):
    yaml = cached.parent / "tiny.yaml"
    code, out, _ = program("train", "--config", yaml, "run=first", "cache.folder=own")
    assert code == 0 and "own: 24 samples" in out
    code, out, _ = program("train", "--config", yaml, "run=second", "cache.folder=own")
    assert code == 0 and "encoding" not in out, "the second start finds it"
    assert program("train", "--config", cached, "run=given")[0] == 0
    folder = cached.parent / "runs"
    runs = [read_pickled(folder / run / "last.ckpt")["state_dict"] for run in ("first", "second", "given")]
    for name, weights in runs[0].items():
        assert weights.equal(runs[1][name]) and weights.equal(runs[2][name])
    code, _, err = program("train", "--config", yaml, "run=third", "cache.folder=own", "seed=5")
    assert code == 2 and "made with another seed" in err


# ------------------------------------------------------------------------------------------------------------- stale


@pytest.fixture(scope="module")
def of_a_folder(tmp_path_factory):
    """A tiny run on a folder of images, and the cache that it has made; returns the YAML's path."""
    root = tmp_path_factory.mktemp("stale")
    yaml = make_run(root, images=4)
    write_files(root / "images", 12)
    config = yaml_reader.safe_load(yaml.read_text())
    config["data"] = {"name": "folder", "path": str(root / "images"), "image_size": 64, "batch_size": 4, "workers": 0}
    config["cache"] = {"folder": str(root / "cache")}
    yaml.write_text(to_yaml(config))
    training_data(load(yaml))
    return yaml


def stale(yaml, *overrides) -> str:
    """Return what is said of the cache of a config; "" if it is taken."""
    try:
        assert training_data(load(yaml, overrides)).name == "cache"
    except UserError as error:
        return str(error)
    return ""


def test_a_cache_knows_its_folder_however_it_is_written(of_a_folder, monkeypatch, capsys):
    root = of_a_folder.parent
    (root / "link").symlink_to(root / "images")
    monkeypatch.chdir(root)
    for path in (f"{root}/images/", "images", "./images/", "link", f"{root}/cache/../images"):
        assert stale(of_a_folder, f"data.path={path}") == "", path
    assert stale(of_a_folder, "data.crop=center", "data.resize=fast", "data.batch_size=2", "data.max_skipped=0.3") == ""
    assert "encoding" not in capsys.readouterr().out
    assert "made with another data.crop;" in stale(of_a_folder, "data.crop=random")
    assert "made with another data.resize;" in stale(of_a_folder, "data.resize=exact")
    assert "made with another data.captions" in stale(of_a_folder, "data.captions.endings=.caption")
    (root / "link").unlink()


def test_a_cache_knows_its_files(of_a_folder):
    images = of_a_folder.parent / "images" / "sub0"
    one, other, text = images / "00000.png", images / "00002.png", images / "00004.txt"
    content, times = one.read_bytes(), one.stat().st_mtime

    def put(data: bytes) -> None:
        one.write_bytes(data)
        os.utime(one, (times, times))

    (images / "new.png").write_bytes(content)
    other.rename(images / "renamed.jpg")
    told = stale(of_a_folder)
    gone = "3 gone (sub0/00002.json, sub0/00002.png, sub0/00002.txt)"
    assert f"made of other files: 2 new (sub0/new.png, sub0/renamed.jpg), {gone}; delete it" in told
    assert "cache.check" not in told
    (images / "new.png").unlink()
    (images / "renamed.jpg").rename(other)
    assert stale(of_a_folder) == ""
    put(content + b"more")
    assert "1 of another size (sub0/00000.png)" in stale(of_a_folder)
    put(content)
    os.utime(one, (times, times + 60))
    told = stale(of_a_folder)
    assert "1 changed since (sub0/00000.png)" in told and "cache.check=size if they are mere copies" in told
    assert stale(of_a_folder, "cache.check=size") == ""
    put(content)
    before = text.read_bytes()
    text.write_bytes(b"another caption")
    assert "sub0/00004.txt" in stale(of_a_folder) and stale(of_a_folder, "cache.check=none") == ""
    text.write_bytes(before)
    assert stale(of_a_folder, "cache.check=size") == ""


def test_a_cache_without_its_images_is_taken_as_it_is(of_a_folder, capsys):
    images = of_a_folder.parent / "images"
    images.rename(images.with_name("elsewhere"))
    try:
        assert stale(of_a_folder) == ""
        assert "is taken as it is, the images cannot be compared with it" in capsys.readouterr().out
    finally:
        images.with_name("elsewhere").rename(images)


def test_lists_of_files_keep_every_name(tmp_path):
    names = ["a\tb.png", "c\nd.png", "e\\nf.png", b"g\xe9.png".decode(errors="surrogateescape")]
    files = {name: FileFacts(n, n) for n, name in enumerate(names)}
    write_facts(tmp_path, files)
    assert read_facts(tmp_path) == files
    (tmp_path / "files.tsv").write_text("x")
    with pytest.raises(UserError, match=r"files\.tsv: damaged"):
        read_facts(tmp_path)
