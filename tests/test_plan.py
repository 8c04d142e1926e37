"""`python -m ldm_lab plan`: what a run will need, counted from its config."""

import json
from pathlib import Path

import pytest
import torch
from test_configs import RECIPES, load_filled
from test_estimate import measured_peak
from tiny import make_run

from ldm_lab.__main__ import main
from ldm_lab.checkpoints.parts import read_part
from ldm_lab.config import PartConfig, load
from ldm_lab.errors import UserError
from ldm_lab.estimate import CARDS, in_units, module_bytes
from ldm_lab.training.caching import make_cache, options_of_run
from ldm_lab.training.cost import config_cost, postponed_bytes
from ldm_lab.training.going_on import with_options
from ldm_lab.training.plan_table import TABLE, Asked, asked_rows, table_lines, with_table
from ldm_lab.training.planning import LAUNCHING, OWN, in_words, note_of_encoder, plan

CONFIGS = Path(__file__).parents[1] / "configs"
DOCS = CONFIGS.parent / "docs" / "recipes.md"
MOST_RUN = 3 * 10**9  # bytes of a step that is made, to compare what it takes


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


def test_the_best_weights_take_room_in_single_precision_where_a_run_keeps_them(tmp_path):
    config = load(make_run(tmp_path, images=8), ["trainer.accelerator=gpu", "checkpoint.half_export=true"])
    without = plan(config)
    measured = config.with_part("held_out", PartConfig.from_dict("held_out", {"data": config["data"].to_dict()}))
    found, none = plan(measured), plan(with_options(measured, "checkpoint", {"best": "none"}))
    assert found.best == 2 * found.exported and found.on_disk - without.on_disk == found.best
    assert without.best == none.best == 0 and none.on_disk == without.on_disk
    assert f"the best weights, {in_units(found.best)}" in in_words(found, [], 0.3)


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


def test_a_text_encoder_counts_where_it_may_have_to_be_loaded(tmp_path, monkeypatch):
    path, store = CONFIGS / "imagen_quickstart_base.yaml", f"conditioner.store={tmp_path}/states"

    def counted(*words: str) -> tuple[int | None, str]:
        config = load(path, words)
        with torch.device("meta"):
            task = config.task_class()(config, read_weights=False)
        return postponed_bytes(task), note_of_encoder(config, task)

    minilm = 4 * 22_565_376
    size, note = counted(store, "conditioner.missing=encode")
    assert size == minilm and "the text encoder, 90.3 MB, is loaded as soon as a text has to be encoded" in note
    assert counted(store, "conditioner.missing=skip") == (0, "")
    assert counted("conditioner.store=null") == (minilm, "")
    found = plan(load(path, ["denoiser.base_channels=16", "denoiser.gradient_checkpointing=true"]))
    assert found.cost.text_encoder == minilm and "the text encoder 90.3 MB" in found.cost.in_words()
    assert found.note in in_words(found, [], 0.3)
    assert minilm < found.cost.lasting < found.cost.peak
    monkeypatch.setattr("ldm_lab.conditioners.t5.encoder_parameters", lambda model: None)
    size, note = counted()
    assert size is None and "its size not known: its weights are not counted" in note


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


def test_the_table_by_the_size_of_the_gpu_is_written_into_a_file(tmp_path, capsys):
    path, file = make_run(tmp_path, images=8), tmp_path / "page.md"
    asked = f"<!-- plan table\n8 GB | RTX 3060 | {path} trainer.max_steps=9 data.path=x\n-->\n"
    file.write_text(f"# Before\n{asked.replace(' data.path=x', '')}old\n<!-- end of plan table -->\nafter\n")
    assert main(["plan", "--table", str(file), "--mfu", "0.2"]) is None
    found = plan(load(path, ["trainer.max_steps=9"]))
    heads, _, row = file.read_text().split("-->\n")[1].splitlines()[:3]
    assert "| images/s at 20% |" in heads and file.read_text().startswith("# Before\n<!-- plan table\n8 GB")
    assert row.startswith("| 8 GB, RTX 3060 | `tiny.yaml` `trainer.max_steps=9` | ") and ", from scratch |" in row
    assert f"| {found.fits([8])[0].batch:,} | 200 |" in row and "old" not in file.read_text()
    assert file.read_text().endswith("<!-- end of plan table -->\nafter\n")
    assert asked_rows(asked + "<!-- end of plan table -->", "x")[0].recipe == "`tiny.yaml` `trainer.max_steps=9`"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "has no <!-- plan table"),
        ("<!-- plan table\n8 GB, x\n-->\n<!-- end of plan table -->", "a line such as '8 GB"),
        (
            "<!-- plan table\n1 GB | T4 | a.yaml data.path='x\n-->\n<!-- end of plan table -->",
            "no closing quotation in the",
        ),
        (b"gr\xff\xfe", "is no UTF-8 text"),
        ("<!-- plan table\n1 GB | T4 | gone.yaml\n-->\n<!-- end of plan table -->", "gone.yaml"),
    ],
    ids=["no table", "no row", "quote", "bytes", "no config"],
)
def test_a_file_whose_table_cannot_be_counted_stays_as_it_is(tmp_path, text, message):
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "page.md").write_bytes(content)
    with pytest.raises(UserError, match=message):
        main(["plan", "--table", str(tmp_path / "page.md")])
    assert (tmp_path / "page.md").read_bytes() == content


def test_a_recipe_that_does_not_fit_its_card_is_refused(tmp_path):
    row = Asked(1, "RTX 3060", make_run(tmp_path, images=8), ("data.batch_size=512",))
    with pytest.raises(UserError, match=r"does not fit 1 GB; data.batch_size=\d+ would"):
        list(table_lines([row], 0.3))


def test_plan_wants_a_config_or_a_table(tmp_path):
    for words in ([], ["--table", "x", "--json"], ["--table", "x", "a=b"]):
        with pytest.raises(UserError, match=r"^--(config|table): "):
            main(["plan", *words])


def test_the_table_of_the_docs_has_the_rows_that_it_asks_for():
    text = DOCS.read_text()
    rows = [line.split(" | ")[:2] for line in TABLE.search(text)["table"].splitlines()[2:]]
    asked = asked_rows(text, "docs/recipes.md")
    assert rows == [[f"| {its.gigabytes} GB, {its.card}", its.recipe] for its in asked] and len(rows) > 5


@pytest.mark.slow
def test_the_table_of_the_docs_is_what_the_command_writes(monkeypatch):
    monkeypatch.chdir(DOCS.parents[1])
    assert with_table(DOCS.read_text(), "docs/recipes.md", 0.35) == DOCS.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_memory_of_a_recipe_is_within_a_tenth_of_what_torch_s_profiler_counts(path):
    """With batches of two, in single precision, where all of it is there on a CPU; the largest ones are left out."""
    config = load_filled(path, "data.batch_size=2", "trainer.precision=32-true")
    if config.part("optim").option("state") != "32bit":
        pytest.skip("its optimizer runs on GPUs alone")
    with torch.device("meta"):
        task = config.task_class()(config, read_weights=False)
    if (least := module_bytes(task, *task.frozen.values())) > MOST_RUN:
        pytest.skip(f"its weights take {in_units(least)}, and {in_units(MOST_RUN)} are taken here")
    cost = config_cost(config)
    if cost.peak > MOST_RUN:
        pytest.skip(f"a step takes {in_units(cost.peak)}, and {in_units(MOST_RUN)} are taken here")
    assert cost.peak - cost.text_encoder == pytest.approx(measured_peak(config), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_can_be_planned(path):
    found = plan(load_filled(path))
    assert found.speeds(["A100"], 0.35)[0].images > 0
    assert found.fits()[-1].batch >= found.cost.batch_size
