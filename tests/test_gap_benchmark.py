"""The benchmark of the gap: its rows are runs that differ in the conditioner's section alone."""

import argparse
import sys

import pytest
from tiny import ROOT

from ldm_lab.config import load


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gap

    folder = tmp_path_factory.mktemp("gap")
    (folder / "clip.safetensors").touch()  # as if it had been trained
    words = {"shards": None, "clip": [], "clip_steps": 1, "noise": 0.5, "steps": 10, "guidance": 3.0, "texts": None}
    return gap, gap.Bench(argparse.Namespace(out=str(folder), one_thread=True, **words)), words


def test_rows_are_alike_in_all_but_the_conditioner(bench):
    module, made, _ = bench
    trained = {
        name: load(ROOT / module.CONFIG, made.overrides(name, 0)) for name, row in module.ROWS.items() if not row.of
    }
    assert len({config["conditioner"]["weights"] for config in trained.values()}) == 2, "the CLIP, and CLOOB"
    for config in trained.values():
        for section in ("data", "denoiser", "objective", "optim", "ema", "trainer"):
            assert config[section] == trained["nothing"][section]
    gaps = {name: config["conditioner"].get("gap") for name, config in trained.items()}
    assert gaps["noise alone"] == {"shift": False, "noise": 0.5} and gaps["shift"]["noise"] == 0
    assert gaps["shift and noise"] == {"means": str(made.means), "noise": 0.5}
    assert gaps["nothing"] is gaps["CLOOB"] is None
    assert trained["trained on text"]["conditioner"]["train_on"] == "text"


def test_any_clip_and_any_shards(bench, tmp_path):
    module, _, words = bench
    clip = ["model=ViT-B-32", "pretrained=laion2b_s34b_b79k"]
    args = {**words, "shards": "data/{00000..00003}.tar", "clip": clip, "out": str(tmp_path), "one_thread": False}
    config = load(ROOT / module.CONFIG, module.Bench(argparse.Namespace(**args)).overrides("nothing", 1))
    assert config["data"]["name"] == "webdataset" and config["data"]["shards"] == "data/{00000..00003}.tar"
    assert config["conditioner"]["model"] == "ViT-B-32" and config["data"]["batch_size"] == 32


def test_the_table_says_how_many_seeds_a_row_has(bench):
    lines = bench[0].table({"shift": {"0": 0.5, "1": 0.75}, "CLOOB": {"0": 1.0}}).splitlines()
    assert lines[1].split() == ["shift", "62.5%", "17.7%", "50.0%,", "75.0%"]
    assert lines[2].split() == ["CLOOB", "100.0%", "-", "100.0%"]
