"""The benchmark of the gap: rows differ in the conditioner alone, a result is known by all that decides it."""

import contextlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from tiny import ROOT

from ldm_lab.checkpoints.gap_files import GapFile
from ldm_lab.checkpoints.native import save_part
from ldm_lab.conditioners.gap import Gap
from ldm_lab.config import build, load
from ldm_lab.data.shapes import write_shards
from ldm_lab.errors import UserError


@pytest.fixture(scope="module")
def module():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gap

    return gap


@pytest.fixture
def bench(module, tmp_path, monkeypatch):
    """Return what makes a benchmark of a command line, as if the CLIP, the caches and the means were there."""
    (tmp_path / "clip.safetensors").write_bytes(b"weights")
    cache = SimpleNamespace(meta=SimpleNamespace(shards=[SimpleNamespace(sha256="of a shard")]), encoded_by={})
    monkeypatch.setattr(module.Bench, "opened", lambda bench, row: cache)
    monkeypatch.setattr(module, "weights_sha256", lambda role, section: (tmp_path / "clip.safetensors").read_text())
    means = Gap(torch.ones(4), torch.zeros(4), 0.25)

    def make(*words):
        made = module.Bench(module.arguments(["--out", str(tmp_path), *words]))
        made.measured = GapFile(means, {}, {})
        return made

    return make


def test_rows_are_alike_in_all_but_the_conditioner(module, bench):
    made = bench("--noise", "0.5")
    trained = {
        name: load(ROOT / module.CONFIG, made.overrides(name, 0)) for name, row in module.ROWS.items() if not row.of
    }
    assert len({config["conditioner"]["weights"] for config in trained.values()}) == 2, "the CLIP, and CLOOB"
    for name, config in trained.items():
        for section in ("denoiser", "objective", "optim", "ema", "trainer"):
            assert config[section] == trained["nothing"][section]
        assert ("cloob" in config["data"]["path"]) == (name == "CLOOB")
        assert {**config["data"].options, "path": ""} == {**trained["nothing"]["data"].options, "path": ""}
    gaps = {name: config["conditioner"].get("gap") for name, config in trained.items()}
    assert gaps["noise alone"] == {"shift": False, "noise": 0.5} and gaps["shift"]["noise"] == 0
    assert gaps["shift and noise"] == {"means": str(made.means), "noise": 0.5}
    assert gaps["nothing"] is gaps["CLOOB"] is None
    assert trained["trained on text"]["conditioner"]["train_on"] == "text"


def test_the_noise_is_the_measured_one_unless_it_is_asked_for(bench):
    assert bench().noise == 0.25 and bench("--noise", "0.1").noise == 0.1


def test_shards_are_judged_by_any_clip_through_the_autoencoder_of_their_config(module, bench):
    made = bench(
        *("--shards", "data/{00000..00003}.tar", "--clip", "model=ViT-B-32", "pretrained=laion2b_s34b_b79k"),
        *("--data", "image_size=128", "batch_size=32", "--set", "denoiser.base_channels=32"),
    )
    config = load(ROOT / made.config, made.overrides("nothing", 1))
    both = load(ROOT / made.config, made.overrides("shift and noise", 1))
    assert both["conditioner"]["gap"] == {"means": str(made.means), "noise": 0.25}
    assert config["conditioner"]["model"] == "ViT-B-32" and "gap" not in config["conditioner"]
    assert config["data"]["batch_size"] == 32 and config["denoiser"]["base_channels"] == 32
    assert config["autoencoder"]["weights"].startswith("hf://"), "not the quickstart's, which knows shapes alone"
    encoded = load(ROOT / made.config, [*made.images(), *made.settings(module.CLIP_ROW)])
    assert encoded["data"]["shards"] == "data/{00000..00003}.tar" and encoded["data"]["image_size"] == 128
    assert "CLOOB" not in made.args.rows


def test_maps_of_shards_are_fitted_on_pairs_that_are_not_judged(module, bench):
    """As many as asked, while there are others; the built-in shapes are judged by prompts in words of their own."""
    captions = [f"caption {number % 150}" for number in range(1000)]
    made = bench("--shards", "data/x.tar", "--clip", "model=ViT-B-32")
    made.pairs = torch.zeros(1000, 4), captions
    fitted = {captions[number] for number in made.chosen(0.1, 0)}
    assert len(made.chosen(0.1, 0)) == 100 and len(made.prompts()) == 96 and not fitted & {*made.prompts()}
    assert len(made.chosen(1.0, 0)) == sum(caption not in made.prompts() for caption in captions)
    shapes = bench()
    shapes.pairs = made.pairs
    assert sorted(shapes.chosen(1.0, 0)) == [*range(1000)]


CHANGES = {
    "seed": ((), 1),
    "steps": (("--steps", "7"), 0),
    "guidance": (("--guidance", "2"), 0),
    "noise": (("--noise", "0.1"), 0),
    "U-Net": (("--set", "denoiser.base_channels=32"), 0),
}


@pytest.mark.parametrize("change", [*CHANGES])
def test_a_result_of_something_else_is_another_file(bench, change):
    words, seed = CHANGES[change]
    assert bench(*words).result("shift and noise", seed) != bench().result("shift and noise", 0)


def test_a_result_of_other_weights_or_means_is_another_file_and_of_other_hardware_is_not(bench, tmp_path):
    before = {name: bench().result(name, 0) for name in ("nothing", "shift and noise")}
    assert len({*before.values(), bench().result("map on 1 % of the pairs", 0)}) == 3
    same = bench("--threads", "3", "--workers", "2", "--device", "cuda", "--jobs", "4")
    assert {name: same.result(name, 0) for name in before} == before
    other = bench()
    other.measured = GapFile(Gap(torch.ones(4), torch.ones(4), 0.25), {}, {})
    assert other.result("shift and noise", 0) != before["shift and noise"]
    assert other.result("nothing", 0) == before["nothing"]
    (tmp_path / "clip.safetensors").write_bytes(b"other weights")
    assert all(bench().result(name, 0) != path for name, path in before.items())


def test_what_is_missing_is_trained_once_for_all_rows_that_draw_with_it_and_a_failure_leaves_the_others(
    module, bench, monkeypatch, capsys
):
    made = bench()
    rows, done = ["shift and noise", "map on 1 % of the pairs", "CLOOB"], made.result("CLOOB", 0)
    done.parent.mkdir()
    done.write_text(json.dumps({"right": {"all": 1.0, "color": 1.0}}))
    tasks = module.missing(made, rows, [0, 1])
    assert tasks == {("shift and noise", 0): rows[:2], ("shift and noise", 1): rows[:2], ("CLOOB", 1): rows[2:]}

    def work(args, trained, seed, rows):
        if trained == "CLOOB":
            raise ValueError("no memory")
        return dict.fromkeys(rows, 0.5), []

    monkeypatch.setattr(module, "work", work)
    monkeypatch.setattr(module, "ProcessPoolExecutor", lambda jobs, mp_context: ThreadPoolExecutor(jobs))
    assert not module.measure_all(made.args, tasks)
    said = capsys.readouterr().out
    assert "CLOOB, seed 1: failed: ValueError: no memory" in said and said.count("50.0%") == 4
    assert module.results_of(made, rows, [0, 1]) == {"CLOOB": {0: {"all": 1.0, "color": 1.0}}}


def test_a_row_that_fails_leaves_those_that_draw_with_the_same_model(module, bench, monkeypatch, capsys):
    def write(made, name, seed):
        if "1 %" in name:
            raise UserError("8 images with captions are too few")
        return 0.5

    rows = ["map on 1 % of the pairs", "map on 10 % of the pairs"]
    made = bench("--threads", "1")
    monkeypatch.setattr(module.Bench, "write", write)
    monkeypatch.setattr(module, "ProcessPoolExecutor", lambda jobs, mp_context: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(module, "output_to", lambda path: contextlib.nullcontext())
    monkeypatch.chdir(ROOT)
    assert not module.measure_all(made.args, {("shift and noise", 0): rows})
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{rows[1]}, seed 0: 50.0%", f"{rows[0]}, seed 0: failed: 8 images with captions are too few"]


def test_what_a_training_prints_goes_into_its_log(module, tmp_path, capfd):
    with module.output_to(tmp_path / "logs" / "a.log"):
        os.write(1, b"of a process\n")
    os.write(1, b"of ours\n")
    assert (tmp_path / "logs" / "a.log").read_text() == "of a process\n" and capfd.readouterr().out == "of ours\n"


def test_the_table_says_how_many_seeds_a_row_has(module):
    results = {"shift": {0: {"all": 0.5, "color": 0.5}, 2: {"all": 0.75, "color": 1.0}}, "CLOOB": {0: {"all": 1.0}}}
    results["CLOOB"][0]["color"] = 1.0
    lines = module.table(results).splitlines()
    assert lines[0] == "|  | all right | spread | seeds | color |"
    assert lines[2] == "| shift | 62.5 % | 17.7 | 50.0, 75.0 | 75.0 % |"
    assert lines[3] == "| CLOOB | 100.0 % | - | 100.0 | 100.0 % |"


ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 1},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.mark.slow
def test_any_clip_and_any_shards_from_the_images_to_the_table(module, tmp_path, monkeypatch):
    clip = build("conditioner", {"name": "clip", "architecture": ARCHITECTURE})
    save_part(tmp_path / "clip.safetensors", clip, {"name": "clip", "architecture": ARCHITECTURE})
    write_shards(tmp_path / "shards", count=200, shards=2, size=64, seed=0)
    (tmp_path / "texts.txt").write_text("a cat\na red star\nthe sea at night\n")
    network = {"denoiser.base_channels": 16, "denoiser.multipliers": [1, 2], "denoiser.blocks_per_level": 1}
    network |= {"denoiser.mapping_width": 16, "denoiser.head_width": 16, "autoencoder.latent_std": "null"}
    network["autoencoder.weights"] = ROOT / "assets/quickstart/autoencoder.safetensors"
    words = [
        *("--out", tmp_path / "out", "--shards", tmp_path / "shards/*.tar", "--texts", tmp_path / "texts.txt"),
        *("--clip", f"weights={tmp_path / 'clip.safetensors'}", "model=null", "pretrained=null"),
        *("--data", "image_size=64", "batch_size=8", "workers=0", "--set"),
        *(f"{key}={value}" for key, value in network.items()),
        *("--steps", "2", "--device", "cpu", "--threads", "1"),
    ]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(module, "SAMPLER", {"name": "ddim", "steps": 2})
    made = module.Bench(module.arguments([*map(str, words)]))
    made.prepare()
    rows = ["nothing", "shift and noise", "map on 10 % of the pairs", "trained on text"]
    for name in rows:
        assert 0 <= made.write(name, 0) <= 0.1, "an untrained CLIP finds about one of 96"
    found = module.results_of(made, rows, [0])
    assert [*found] == rows and module.table(found).count(" | - | ") == 4
    assert len(made.prompts()) == 96 and len(list((tmp_path / "out/runs").glob("*/ema.safetensors"))) == 3
