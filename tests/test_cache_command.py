"""`python -m ldm_lab cache`: what it writes trains like the images it was made from, and nothing else is mixed in."""

import pytest
import yaml as yaml_reader
from tiny import make_run

from ldm_lab.checkpoints.files import read_pickled
from ldm_lab.config import to_yaml


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
