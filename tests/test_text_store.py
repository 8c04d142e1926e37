"""States of captions stored once: what is stored trains as what is encoded, bit for bit."""

import json
import logging
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from language_models import write_language_model
from tiny import run_program

from ldm_lab.batch import Batch
from ldm_lab.checkpoints.files import read_pickled
from ldm_lab.checkpoints.importer import Section
from ldm_lab.checkpoints.parts import load_part
from ldm_lab.checkpoints.stored_texts import with_known_width
from ldm_lab.conditioners.t5_models import identity
from ldm_lab.config import PartConfig, RunConfig, load, to_yaml
from ldm_lab.data import shard_source
from ldm_lab.data.cache_files import META, read_meta
from ldm_lab.data.jobs import PassOptions
from ldm_lab.data.samples import UNREACHABLE, SkippedSample
from ldm_lab.data.shapes import write_shards
from ldm_lab.data.text_store import LACKING, TextStore, store_columns, text_key
from ldm_lab.errors import UserError
from ldm_lab.training.embed_texts import embed_texts, tag_of
from ldm_lab.training.texts import load_conditioner, prompts_of, text_callbacks

COLUMNS = store_columns("float16", 8, 48)
MADE_BY = {"kind": '"texts"', "conditioner.sha256": '"a"', "conditioner.model": '"b"', "conditioner.text_size": "8"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a tiny T5, drawn shapes with captions, and the YAML of a run on them."""
    folder = tmp_path_factory.mktemp("texts")
    write_language_model(folder / "t5")
    (folder / "prompts.txt").write_text("a red circle\na star:2\n")
    config = {
        "task": "diffusion", "run": "texts", "seed": 0,
        "data": {"name": "shapes", "folder": str(folder / "shapes"), "count": 16, "shards": 2, "image_size": 16,
                 "batch_size": 4, "workers": 0},
        "autoencoder": {"name": "identity"},
        "conditioner": {"name": "t5", "model": str(folder / "t5"), "text_size": 12, "dropout": 0.1},
        "denoiser": {"name": "imagen_unet", "base_channels": 8, "multipliers": [1, 2], "blocks_per_level": [1],
                     "heads": 2, "head_width": 4, "attention_levels": [1], "text_levels": [1], "text_latents": 2},
        "objective": {"name": "continuous"}, "ema": {"from_step": [0], "decay": [0.5]},
        "trainer": {"accelerator": "cpu", "max_steps": 4, "threads": 1},
        "checkpoint": {"every": 2}, "logging": {"every": 1},
        "demo": {"prompts": str(folder / "prompts.txt"), "every": 4,
                 "sampling": {"sampler": {"name": "ddim", "steps": 1}}},
    }  # fmt: skip
    (folder / "texts.yaml").write_text(to_yaml(config))
    return folder


@pytest.fixture
def yaml(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return made / "texts.yaml"


def losses(run: str) -> list[str]:
    lines = [line.split(",") for line in Path("runs", run, "metrics.csv").read_text().splitlines()]
    place = lines[0].index("train/loss")
    return [line[place] for line in lines[1:] if line[place]]


def weights(run: str) -> dict[str, torch.Tensor]:
    return read_pickled(Path("runs", run, "last.ckpt"))["state_dict"]


def embed(yaml, folder, *overrides: str, batch_size: int = 8, workers: int = 0):
    config = load(yaml, [f"conditioner.store={folder}", *overrides])
    return embed_texts(config, PassOptions(batch_size, workers, accelerator="cpu"))


def test_stored_and_online_are_the_same_bit_for_bit_and_resume_exactly(yaml, program):
    code, out, err = program("ldm_lab.__main__", "embed-text", "--config", yaml, "--out", "store", "--workers", "0")
    assert code == 0, err
    assert "store: 19 texts of " in out and "data: 16 samples read, none skipped" in out, out
    runs = {
        "live": [],
        "stored": ["conditioner.store=store", "conditioner.missing=skip"],
        "filled": ["conditioner.store=filled"],
    }
    for run, overrides in runs.items():
        code, out, err = program("train", "--config", yaml, f"run={run}", *overrides)
        assert code == 0, err
        assert ("texts added by the first process" in out) == (run == "filled"), out
    assert len(set(losses("live"))) == 4 and all(losses(run) == losses("live") for run in runs)
    assert program("train", "--config", yaml, "run=parts", "conditioner.store=parts", "trainer.max_steps=2")[0] == 0
    code, out, err = program(
        "train", "--config", yaml, "run=parts", "conditioner.store=parts", "resume.checkpoint=last"
    )
    assert code == 0, err
    live = weights("live")
    for run in (*runs, "parts"):
        its = weights(run)
        assert all(its[name].equal(live[name]) for name in live), run
    texts = {run: set(read_store(folder)) for run, folder in (("stored", "store"), ("filled", "filled"))}
    assert texts["filled"] <= texts["stored"] and "a star" in texts["stored"] and "" in texts["stored"]


def read_store(folder: str) -> list[str]:
    store = TextStore(Path(folder), read_meta(Path(folder)).description, dict(read_meta(Path(folder)).columns))
    shards = [store._open(number, path) for number, path in enumerate(store._shards)]
    return [shard.text[row] for shard in shards for row in range(shard.samples)]


def test_a_model_s_file_names_no_store(yaml, program):
    embed(yaml, "store")
    assert program("train", "--config", yaml, "conditioner.store=store", "trainer.max_steps=1")[0] == 0
    code, out, _ = program("ldm_lab.__main__", "inspect", "runs/texts/ema.safetensors")
    assert code == 0 and "t5" in out and "store" not in out.replace("stored", "")


@pytest.mark.slow
def test_with_a_full_store_training_never_imports_the_language_model(yaml, made):
    """Nor is it there: the folder with its files has gone."""
    embed(yaml, "store")
    words = ["train", "--config", str(yaml), "conditioner.store=store", "trainer.max_steps=2"]
    script = (
        "import sys; from ldm_lab.__main__ import main\n"
        f"assert main({words!r}) == 0\n"
        "print('loaded:', sorted(name for name in sys.modules if name.split('.')[0] in ('transformers', 'tokenizers')))"
    )
    away = made / "away"
    (made / "t5").rename(away)
    try:
        done = run_program("-c", script, cwd=Path.cwd())
    finally:
        away.rename(made / "t5")
    assert done.returncode == 0, done.stderr
    assert "loaded: []" in done.stdout
    assert "a caption that lacks is left out with its image, and counted" in done.stdout


def test_the_model_is_not_loaded_where_all_is_stored(yaml, monkeypatch, program):
    """As above, in this process: with a store, and with a cache of images."""
    embed(yaml, "store")
    monkeypatch.setattr("ldm_lab.conditioners.t5.load_encoder", None)
    code, _, err = program("train", "--config", yaml, "conditioner.store=store", "trainer.max_steps=1")
    assert code == 0, err
    config = load(yaml, ["cache.folder=cache"])
    assert load_conditioner(config).encoder is None


def test_captions_that_a_closed_store_lacks_are_skipped_and_counted(yaml, program):
    embed(yaml, "store")
    closed_part = conditioner_of(yaml, "store", "conditioner.missing=skip")
    with pytest.raises(UserError, match=r"conditioner\.store: it has no states of 'no such text'"):
        closed_part.check_texts(["", "no such text"])
    closed_part.check_texts([""])
    conditioner_of(yaml, "store").check_texts(["no such text"])  # it may encode it
    of_data = sorted(Path("store").glob("texts-*.safetensors"), key=lambda path: -path.stat().st_size)[:2]
    closed = ["conditioner.store=store", "conditioner.missing=skip", "trainer.max_steps=3", "data.max_skipped=0.9"]
    of_data[0].unlink()
    code, out, err = program("train", "--config", yaml, *closed)
    assert code == 0 and "skipped (" in out and f"{LACKING} " in out, out
    of_data[1].unlink()
    code, _, err = program("train", "--config", yaml, *closed, "run=other")
    assert code == 2 and "no usable sample in a long time: " in err and LACKING in err.splitlines()[-1], err


def test_prompts_that_a_closed_store_lacks_are_told_before_training(yaml, tmp_path, program):
    embed(yaml, "store")
    (tmp_path / "more.txt").write_text("a photo of the star\n")
    code, _, err = program(
        "train", "--config", yaml, "conditioner.store=store", "conditioner.missing=skip", "demo.prompts=more.txt"
    )
    assert code == 2 and "store has no states of the prompt 'a photo of the star'; python -m ldm_lab embed-text" in err


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("conditioner.text_size=10", "another conditioner.text_size: 12, and this is 10"),
        ("conditioner.dtype=fp32", 'another conditioner.dtype: "bf16", and this is "fp32"'),
        ("conditioner.padding=read", 'another conditioner.padding: "masked", and this is "read"'),
        ("conditioner.model=OTHER", "another conditioner.sha256"),
        ("conditioner.model=minilm", "another conditioner."),
    ],
    ids=["length", "dtype", "padding", "weights", "minilm"],
)
def test_a_store_of_another_text_encoder_is_refused(yaml, tmp_path, program, override, told):
    embed(yaml, "store")
    if "OTHER" in override:
        override = override.replace("OTHER", str(write_language_model(tmp_path / "other", width=64)))
    for command in (("train",), ("ldm_lab.__main__", "embed-text")):
        code, _, err = program(*command, "--config", yaml, "conditioner.store=store", override)
        assert code == 2 and f"store: its states were made with {told}" in err.splitlines()[-1], err
        assert "Traceback" not in err and err.count("error:") == 1


def test_the_same_weights_under_another_name_are_the_same_encoder(yaml, made, tmp_path):
    embed(yaml, "store")
    shutil.copytree(made / "t5", tmp_path / "copied")
    conditioner = load_conditioner(load(yaml, ["conditioner.store=store", "conditioner.model=copied"]))
    assert len(conditioner.store) == 19
    store, report = embed(yaml, "store", "conditioner.model=copied")
    assert report.done == report.items and len(store) == 19


@pytest.mark.parametrize(
    ("file", "change", "same"),
    [
        ("tokenizer.json", lambda told: told["model"]["vocab"].update(red=4, circle=3), False),
        ("config.json", lambda told: told.update(layer_norm_epsilon=0.5), False),
        ("config.json", lambda told: told.update(transformers_version="0.0.1", dtype="bfloat16"), True),
    ],
    ids=["tokenizer", "config", "version_of_the_program"],
)
def test_what_makes_other_states_of_a_text_makes_another_encoder(made, tmp_path, file, change, same):
    """Its weights are the same in each case."""
    shutil.copytree(made / "t5", tmp_path / "copied")
    told = json.loads((tmp_path / "copied" / file).read_text())
    change(told)
    (tmp_path / "copied" / file).write_text(json.dumps(told))
    assert (identity(str(tmp_path / "copied")) == identity(str(made / "t5"))) is same


def test_what_it_refuses_to_be_a_store(yaml, tmp_path, program):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.png").write_bytes(b"")
    (tmp_path / "file").write_text("")
    for folder in ("full", "file"):
        with pytest.raises(UserError, match=rf"conditioner\.store: {folder}: neither empty nor a store"):
            load_conditioner(load(yaml, [f"conditioner.store={folder}"]))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / META).write_text(
        json.dumps(
            {
                "format": "ldm_lab cache 2",
                "complete": True,
                "samples": 0,
                "variants": 1,
                "description": {},
                "columns": {},
                "shards": [],
            }
        )
    )
    with pytest.raises(UserError, match="cache: a cache of images, no store of text states"):
        load_conditioner(load(yaml, ["conditioner.store=cache"]))
    with pytest.raises(UserError, match=r"skip is of what conditioner\.store lacks, and none is given"):
        load_conditioner(load(yaml, ["conditioner.missing=skip"]))
    none = RunConfig.from_dict({**load(yaml).to_dict(), "conditioner": {"name": "none", "store": "store"}})
    with pytest.raises(UserError, match="which none does not make; t5 does"):
        load_conditioner(none)
    code, _, err = program("ldm_lab.__main__", "embed-text", "--config", yaml)
    assert code == 2 and "--out: the folder of the store has to be given" in err


def test_an_interrupted_pass_goes_on_other_data_add_and_nothing_is_encoded_twice(yaml, made, monkeypatch):
    from ldm_lab.conditioners.t5 import T5

    encoded, encode_each = [], T5.encode_each

    def breaks_off(self, texts, once=False):
        if len(encoded) >= 3:
            raise KeyboardInterrupt
        encoded.extend(texts)
        return encode_each(self, texts, once)

    monkeypatch.setattr(T5, "encode_each", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        embed(yaml, "store", batch_size=8)
    monkeypatch.setattr(T5, "encode_each", lambda s, t, once=False: encoded.extend(t) or encode_each(s, t, once))
    store, report = embed(yaml, "store", batch_size=3)
    assert report.counts.read == 16 and report.done == 2 and len(store) == len(read_store("store"))
    assert len(set(read_store("store"))) == len(read_store("store")), "each text once"
    before, texts = len(encoded), len(store)
    store, _ = embed(yaml, "store")
    assert len(encoded) == before and len(store) == texts, "all was there"
    store, _ = embed(yaml, "store", "data.count=12", f"data.folder={made / 'others'}", "data.drawing_seed=5")
    assert len(store) > texts and len(set(read_store("store"))) == len(store)


def test_texts_that_were_left_to_an_item_whose_end_cannot_be_read_are_stored(yaml, monkeypatch):
    """Two shards with the same captions: while the first is at work, the second leaves its texts to it."""
    from ldm_lab.data import passes

    embed(yaml, "whole")
    own, waiting = passes._Pass.write, []

    def write(self, index, counts):
        if index == 0:  # its end comes last, and then it turns out that it cannot be reached
            counts.skip(SkippedSample(UNREACHABLE, "00000.tar"))
            waiting.append((index, counts))
            return
        own(self, index, counts)
        for late in waiting:
            own(self, *late)

    monkeypatch.setattr(passes._Pass, "write", write)
    _, report = embed(yaml, "store")
    assert report.done == 1 and len(report.unreached) == 1
    assert set(read_store("whole")) == set(read_store("store"))


def test_a_second_pass_at_the_same_time_takes_nothing_away(yaml, monkeypatch):
    """It finds all texts stored when it comes to an item, as another process was quicker."""
    from ldm_lab.training.embed_texts import TextJob

    embed(yaml, "store")
    before = sorted(read_store("store"))
    monkeypatch.setattr(TextJob, "finished", lambda self, item: None)
    embed(yaml, "store")
    assert sorted(read_store("store")) == before


@pytest.mark.slow
def test_two_processes_share_the_work_and_leave_whole_files(yaml, tmp_path):
    done = run_program(
        "-m", "ldm_lab", "embed-text", "--config", yaml, "--out", "two", "--devices", "2", "--accelerator", "cpu",
        "--workers", "0", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    embed(yaml, "one")
    assert sorted(set(read_store("two"))) == sorted(read_store("one"))
    assert not list((tmp_path / "two").glob("*.part"))


def test_a_damaged_shard_is_left_out_and_made_again(yaml, caplog):
    store, _ = embed(yaml, "store")
    path = max(Path("store").glob("texts-*.safetensors"), key=lambda path: path.stat().st_size)
    whole = path.read_bytes()
    for broken in (whole[:-8], whole.replace(b"token_states", b"taken_states", 1)):
        path.write_bytes(broken)
        with caplog.at_level(logging.WARNING):
            assert len(TextStore(Path("store"), store.description, dict(store.columns))) < len(store)
        assert f"{path}: left out" in caplog.text
        again, _ = embed(yaml, "store")
        assert len(again) == len(store) and path.read_bytes() == whole


def test_a_store_adds_reads_and_grows_as_the_tokens(tmp_path):
    """Of lengths 1 to 8: what the files take beside the states is bounded for each text."""
    torch.manual_seed(0)
    texts = [f"caption {i}" + ("\ud800" if i == 3 else "") for i in range(400)]
    states = [torch.randn(1 + i % 8, 48).half() for i in range(400)]
    store = TextStore(tmp_path / "store", MADE_BY, COLUMNS)
    assert not (tmp_path / "store").exists() and store.read(["caption 1"]) == [None]
    store.add(texts[:300], states[:300])
    assert store.read(texts[:1])[0].equal(states[0]), "before it is written"
    store.flush()
    other = TextStore(tmp_path / "store", MADE_BY, COLUMNS)
    other.add(texts[300:], states[300:])
    other.flush()
    store.refresh()
    for its in (store, other, TextStore(tmp_path / "store", MADE_BY, COLUMNS)):
        assert all(found.equal(state) for found, state in zip(its.read(texts), states, strict=True))
        assert len(its) == 400 and its.tokens == sum(map(len, states))
        assert texts[399] in its.known and "caption 400" not in its.known and its.read(["caption 400"]) == [None]
    size = sum(path.stat().st_size for path in (tmp_path / "store").glob("*.safetensors"))
    assert size < store.tokens * 48 * 2 + 400 * 80 + 4000


def test_stores_of_two_text_encoders_do_not_begin_in_one_folder(tmp_path):
    ours = TextStore(tmp_path / "store", MADE_BY, COLUMNS)
    other = TextStore(tmp_path / "store", {**MADE_BY, "conditioner.sha256": '"c"'}, COLUMNS)
    ours.add(["a star"], [torch.ones(2, 48, dtype=torch.float16)])
    ours.flush()
    other.add(["a circle"], [torch.zeros(2, 48, dtype=torch.float16)])
    with pytest.raises(UserError, match=r'another conditioner.sha256: "a", and this is "c"'):
        other.flush()
    ours.refresh()
    assert len(ours) == 1


def test_a_run_claims_its_store_before_it_trains(yaml, tmp_path):
    callback = text_callbacks(load(yaml, ["conditioner.store=store"]), conditioner_of(yaml, "store"))[0]
    callback.setup(None, None, "fit")
    with pytest.raises(UserError, match=r"another conditioner.padding"):
        conditioner_of(yaml, "store", "conditioner.padding=read")


def conditioner_of(yaml, folder: str, *overrides: str):
    return load_conditioner(load(yaml, [f"conditioner.store={folder}", *overrides]))


def test_a_shard_that_goes_away_meanwhile_is_one_line(tmp_path):
    store = TextStore(tmp_path / "store", MADE_BY, COLUMNS)
    store.add(["a star"], [torch.ones(2, 48, dtype=torch.float16)])
    store.flush()
    for path in store.folder.glob("texts-*"):
        path.unlink()
    with pytest.raises(UserError, match=r"texts-.*: unreachable shard, and it was there"):
        store.read(["a star"])


def test_texts_whose_hashes_begin_alike_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm_lab.data.text_store.text_key", lambda text: "0" * 16 + text_key(text)[16:])
    store = TextStore(tmp_path / "store", MADE_BY, COLUMNS)
    states = [torch.full((2, 48), i, dtype=torch.float16) for i in range(5)]
    store.add(list("abcde"), states)
    store.flush()
    assert all(found.equal(state) for found, state in zip(store.read(list("abcde")), states, strict=True))
    assert store.read(["f"]) == [None]


def test_states_that_overflow_leave_their_samples_out_and_counted(yaml, monkeypatch):
    from ldm_lab.conditioners.t5 import T5, Encoded

    def some_overflow(self, texts, once=False):
        made = encode_each(self, texts, once)
        return Encoded(made.states, {i: "states beyond" for i, text in enumerate(texts) if "star" in text})

    encode_each = T5.encode_each
    monkeypatch.setattr(T5, "encode_each", some_overflow)
    _, report = embed(yaml, "store", "demo=null", "data.max_skipped=0.9")
    skipped = report.counts.skipped["states beyond"]
    assert 0 < skipped < 16 and "" in read_store("store") and not any("star" in text for text in read_store("store"))


def test_what_a_run_needs_beside_its_captions(yaml):
    config = load(yaml, ["demo.sampling.negative=blurred"])
    assert prompts_of(config) == ["", "a red circle", "a star", "blurred"]


def test_work_is_named_alike_in_all_processes_whatever_a_server_answers(tmp_path, monkeypatch):
    def tag(answer: str, **options) -> str:
        monkeypatch.setattr(shard_source, "remote_contents", lambda addresses: dict.fromkeys(addresses, answer))
        data = PartConfig.from_dict("data", {"name": "webdataset", "image_size": 64, "batch_size": 2, **options})
        source = data.build()
        source.open()
        return tag_of(data, source)

    remote = "https://data.example/{0..3}.tar"
    assert tag("", shards=remote) == tag("1000 7", shards=remote) != tag("", shards="https://data.example/{0..4}.tar")
    write_shards(tmp_path / "local", count=4, shards=2, size=32, seed=0)
    first = tag("", shards=str(tmp_path / "local/*.tar"))
    shutil.rmtree(tmp_path / "local")
    write_shards(tmp_path / "local", count=6, shards=2, size=32, seed=0)
    assert tag("", shards=str(tmp_path / "local/*.tar")) != first


def test_captions_of_held_out_images_are_stored_too(yaml, made):
    drawn = {"name": "shapes", "folder": str(made / "held_out"), "count": 8, "shards": 1, "drawing_seed": 9}
    held_out = {"data": {**drawn, "image_size": 16, "batch_size": 4, "workers": 0}, "samples": 8}
    config = RunConfig.from_dict({**load(yaml).to_dict(), "held_out": held_out})
    embed(yaml, "those_of_the_data")
    section = config["conditioner"].with_use(store="store", missing="encode")
    options = PassOptions(4, 0, accelerator="cpu")
    store, report = embed_texts(config.with_part("conditioner", section), options)
    assert report.counts.read == 16 + 8 and report.done == report.items == 3
    assert set(read_store("store")) > set(read_store("those_of_the_data"))
    with tarfile.open(made / "held_out" / "00000.tar") as tar:
        captions = {tar.extractfile(name).read().decode().strip() for name in tar.getnames() if name.endswith(".txt")}
    assert len(store.read(list(captions))) > 2 and None not in store.read(list(captions))


def test_files_captions_are_read_without_their_images(tmp_path):
    from ldm_lab.config import build

    for name, caption in (("a", "a cat\na dog"), ("b", "")):
        (tmp_path / f"{name}.png").write_bytes(b"no image")
        (tmp_path / f"{name}.txt").write_text(caption)
    source = build("data", {"name": "folder", "path": str(tmp_path), "image_size": 16, "batch_size": 1})
    source.open()
    assert [source.captions_of(i).texts for i in range(2)] == [["a cat", "a dog"], [""]]
    source.require_text = True
    with pytest.raises(SkippedSample, match="no caption"):
        source.captions_of(1)


def test_a_cache_of_images_is_made_of_stored_states(yaml, program, monkeypatch):
    embed(yaml, "store")
    part = load_part("conditioner", Section(**load(yaml)["conditioner"].architecture()))
    part.rounds = True
    monkeypatch.setattr("ldm_lab.conditioners.t5.load_encoder", None)
    code, _, err = program("ldm_lab.__main__", "cache", "--config", yaml, "--out", "cache", "conditioner.store=store")
    assert code == 0, err
    from ldm_lab.config import build

    cache = build("data", {"name": "cache", "path": "cache", "batch_size": 4, "workers": 0})
    cache.open()
    from ldm_lab.data.order import Order

    batch = cache.to_device_format(cache.collate([cache.decode(i, Order(0, 0)) for i in range(4)]))
    told = part.from_batch(Batch(batch.key, batch.text))
    assert batch.conditions["token_states"].equal(told["token_states"])
    assert cache.captions_of(0).texts == [batch.text[0]]


def test_a_run_is_tried_out_and_counted_and_nothing_is_written(yaml, made, program):
    read = ["conditioner.padding=read", f"data.folder={made / 'shapes'}"]
    code, out, err = program("train", "--config", yaml, "--check", "conditioner.store=store", *read)
    assert code == 0, err
    assert not Path("store").exists() and "added by" not in out
    assert "check: counted, a step takes" in out and "one picture of demo drawn" in out


def test_what_a_step_costs_is_counted_without_the_model(yaml):
    from ldm_lab.training.cost import config_cost

    read = ["conditioner.padding=read", "conditioner.model=google/t5-v1_1-small", "conditioner.text_size=4"]
    assert config_cost(load(yaml, read)).flops > 0


def test_a_precision_that_says_nothing_is_said(yaml, capsys):
    load_conditioner(load(yaml, ["conditioner.precision=bf16"]))
    assert "conditioner.precision: without effect: conditioner.dtype is how t5 computes" in capsys.readouterr().out


def test_the_width_of_states_is_the_store_s_where_the_model_is_not_here(yaml):
    embed(yaml, "store")
    away = load(yaml, ["conditioner.store=store", "conditioner.model=someone/never-heard-of"])["conditioner"]
    assert with_known_width(away).options["width"] == 48
    assert with_known_width(PartConfig(away.role, away.name, {**away.options, "width": 48}, away.use)).options == {
        **away.options, "width": 48
    }  # fmt: skip
    with pytest.raises(UserError, match=r"conditioner\.width: 32, and the states in store are 48 wide"):
        with_known_width(PartConfig(away.role, away.name, {**away.options, "width": 32}, away.use))
