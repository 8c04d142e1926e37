"""`python -m ldm_lab plan`: what a run will need, counted from its config."""

import json
from pathlib import Path

import pytest
import torch
from test_configs import RECIPES, load_filled
from tiny import make_run

from ldm_lab.__main__ import main
from ldm_lab.checkpoints.parts import read_part
from ldm_lab.config import load
from ldm_lab.errors import UserError
from ldm_lab.estimate import CARDS
from ldm_lab.training.caching import make_cache, options_of_run
from ldm_lab.training.cost import config_cost
from ldm_lab.training.going_on import with_options
from ldm_lab.training.planning import LAUNCHING, OWN, plan

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_largest_batch_is_the_one_whose_step_is_counted_to_fit(tmp_path):
    config = load(make_run(tmp_path, images=8), ["trainer.accelerator=gpu"])
    for role in ("autoencoder", "conditioner"):
        there = read_part(config[role]["weights"], role, config[role].name).config
        config = with_options(config, role, {key: value for key, value in there.items() if key != "name"})
    found = plan(config)
    fit = found.fits([8])[0]
    for batch, checkpointing in ((fit.batch, False), (fit.with_checkpointing, True)):
        larger = with_options(config, "data", {"batch_size": batch})
        counted = config_cost(with_options(larger, "denoiser", {"gradient_checkpointing": checkpointing}))
        assert counted.peak == pytest.approx(8 * 2**30 - OWN, rel=0.1)
    assert fit.with_checkpointing >= fit.batch > 4
    assert (
        plan(with_options(config, "denoiser", {"gradient_checkpointing": True})).fits([8])[0].with_checkpointing is None
    )


@pytest.mark.parametrize("devices", [1, 4])
def test_speed_and_days_follow_from_the_share_of_the_peak(tmp_path, devices):
    config = load(CONFIGS / "own_images_8gb.yaml", [
        "data.path=photos", f"trainer.devices={devices}", "trainer.accumulate_grad_batches=2",
        "denoiser.blocks_per_level=1",
    ])  # fmt: skip
    found = plan(config)
    speed = found.speeds(["RTX 3090"], 0.4)[0]
    seconds = found.cost.flops / (0.4 * CARDS["RTX 3090"].half * 1e12)
    assert seconds > LAUNCHING
    assert speed.images == pytest.approx(devices * found.cost.batch_size / seconds)
    steps = config["trainer"]["max_steps"]
    assert speed.days == pytest.approx(2 * steps * seconds / 86400)
    assert found.images_per_step == 2 * devices * found.cost.batch_size


@pytest.mark.parametrize(("said", "count"), [("2", 2), ("'2'", 2), ("'0,1,3'", 3), ("'5,'", 1), ("auto", 1), ("-1", 1)])
def test_devices_are_counted_as_lightning_takes_them(tmp_path, said, count):
    found = plan(load(make_run(tmp_path, images=8), [f"trainer.devices={said}", "trainer.num_nodes=2"]))
    assert (found.devices, found.images_per_step) == (2 * count, 4 * 2 * count)


def test_devices_that_share_a_network_hold_as_little_of_it_with_checkpointing(tmp_path):
    path = make_run(tmp_path, images=8)
    alone = plan(load(path))
    shared = plan(load(path, ["trainer.devices=2", "trainer.num_nodes=2", "trainer.strategy=fsdp2"]))
    assert shared.cost.weights == alone.cost.weights // 4
    assert shared.checkpointed == alone.checkpointed.shared_by(4)
    assert shared.checkpointed.lasting == shared.cost.lasting


def test_checkpoints_of_lora_are_without_the_base_model(tmp_path):
    path = make_run(tmp_path, images=8)
    whole, lora = plan(load(path)), plan(load(path, ["lora.rank=2", "init_from=runs/base"]))
    additions = 4 * lora.cost.trained  # bytes; their average and the optimizer's two besides
    assert lora.checkpoint == 4 * additions < whole.checkpoint / 2
    assert lora.exported == additions


def test_a_small_network_is_bound_by_its_launches_and_a_run_may_have_no_end(tmp_path):
    found = plan(load(make_run(tmp_path, images=8), ["trainer.max_steps=-1", "trainer.precision=bf16-mixed"]))
    speed = found.speeds(["H100"], 0.5)[0]
    assert (speed.images, speed.days, speed.is_small) == (4 / LAUNCHING, None, True)
    assert found.images is None


def test_data_are_listed_and_of_shards_one_is_counted(tmp_path):
    path = make_run(tmp_path, images=12)
    assert plan(load(path)).data.said.startswith("4 shards; 3 samples, ")
    assert plan(load(path)).data.images == 12, "as many in each as in the first"
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"")
    assert plan(load(path, [f"data={{name: folder, path: {folder}, image_size: 64}}"])).data.images == 1
    there = plan(load(path, ["data.shards=nowhere/*.tar"])).data
    assert there.images is None and "nowhere" in there.said
    remote = plan(load(path, ["data.shards=https://127.0.0.1:9/{00000..00009}.tar"])).data
    assert (remote.images, remote.said) == (None, "10 shards, none of which is here to be counted")


def test_a_cache_takes_what_is_counted_for_it(tmp_path):
    config = load(make_run(tmp_path, images=8), [f"cache.folder={tmp_path}/cache"])
    each = plan(config).cached_image
    make_cache(config, options_of_run(config))
    meta = json.loads((tmp_path / "cache" / "meta.json").read_text())
    rows = sum(2 * torch.Size(c["shape"]).numel() for c in meta["columns"].values())  # all in half precision
    assert each == rows
    assert plan(with_options(config, "cache", {"crops": 3, "flip": True})).cached_image == 6 * each


def test_frozen_parts_count_as_the_files_of_their_weights_say(tmp_path):
    config = load(make_run(tmp_path, images=8))
    without = {name: value for name, value in config["conditioner"].to_dict().items() if name in ("name", "weights")}
    bare = load(make_run(tmp_path, images=8, conditioner=without))
    assert plan(bare).cost.frozen == plan(config).cost.frozen


def test_the_command_prints_a_page_or_json_and_runs_nothing(tmp_path, capsys, monkeypatch):
    path = str(make_run(tmp_path, images=8))
    before = sorted(tmp_path.rglob("*"))
    assert main(["plan", "--config", path, "--gpu", "RTX 3060", "--mfu", "0.2", "trainer.max_steps=7"]) is None
    said = capsys.readouterr().out
    assert "7 steps of 4 images at 20% of what a card can do in 32-true" in said
    assert "| RTX 3060 | 200 |" in said and "| 24 GB | " in said
    main(["plan", "--config", path, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["cost"]["batch_size"] == 4 and len(found["speeds"]) > 3 and found["fits"][0]["gigabytes"] == 8
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "Voodoo 2"], "--gpu Voodoo 2: nothing is known of its speed at trainer.precision=32-true"),
        (["--gpu", "T4", "trainer.precision=bf16-mixed"], "--gpu T4: nothing is known of its speed at"),
        (["--mfu", "35"], "--mfu: a share between 0 and 1"),
        (["data={name: cache, path: somewhere}"], "data: has no image_size"),
        (["--gp", "A100"], "unrecognized arguments: --gp"),
    ],
    ids=["unknown card", "unknown precision", "percent", "no size", "abbreviation"],
)
def test_what_cannot_be_planned(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        main(["plan", "--config", str(make_run(tmp_path, images=8)), *words])


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_can_be_planned(path):
    found = plan(load_filled(path))
    assert found.speeds(["A100"], 0.35)[0].images > 0
    assert found.fits()[-1].batch >= found.cost.batch_size
