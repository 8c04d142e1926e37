"""`python -m ldm_lab cache`: what it writes trains like the images it was made from, and nothing else is mixed in."""

import json
import os
from pathlib import Path

import pytest
import tiny_glide
import torch
import yaml as yaml_reader
from data_sets import write_files, write_shards
from safetensors.torch import load_file
from tiny import ROOT, make_run, run_program

from ldm_lab.batch import Batch
from ldm_lab.checkpoints.files import read_pickled
from ldm_lab.conditions import Embedding, TokenStates
from ldm_lab.config import build, load, to_yaml
from ldm_lab.data.cache_files import CacheMeta, read_meta
from ldm_lab.data.datamodule import DataModule
from ldm_lab.data.file_facts import FileFacts, Files, differences, facts_of, read_facts, write_facts
from ldm_lab.data.jobs import PassOptions
from ldm_lab.data.order import Order
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Conditioner
from ldm_lab.training import caching, disk
from ldm_lab.training.caching import make_cache, training_data
from ldm_lab.training.encoders import Encoders
from ldm_lab.training.encoding import CacheJob, CacheTarget, VariantBatch, Variants
from ldm_lab.training.runner import build_task


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


def test_a_complete_cache_is_not_written_again_but_what_is_lost_is(cached, program):
    again = ("ldm_lab.__main__", "cache", "--config", cached.parent / "tiny.yaml", "--out", "cache")
    code, _, err = program(*again)
    assert code == 2
    assert "complete already (24 samples)" in err
    folder = cached.parent / "cache"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "00002.safetensors").write_bytes(before["00002.safetensors"][:-8])
    code, out, _ = program(*again)
    assert code == 0 and "cache: made again: " in out and "cache: 24 samples" in out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_interrupted_pass_goes_on_with_what_is_left_and_batches_mix_no_shards(tmp_path, monkeypatch):
    yaml = make_run(tmp_path, images=20, cache={"folder": str(tmp_path / "cache")}, data={"batch_size": 3})
    encoded, encode = [], CacheJob.encode

    def breaks_off(self, batch):
        if len(encoded) == 5:
            raise KeyboardInterrupt
        encoded.append(batch.key)
        return encode(self, batch)

    monkeypatch.setattr(CacheJob, "encode", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        make_cache(load(yaml), PassOptions(batch_size=3, workers=0, accelerator="cpu"))
    done = [path.name for path in sorted((tmp_path / "cache").glob("0*.safetensors"))]
    assert done == ["00000.safetensors", "00001.safetensors"] and not read_meta(tmp_path / "cache").complete
    monkeypatch.setattr(CacheJob, "encode", encode)
    report = make_cache(load(yaml), PassOptions(batch_size=3, workers=0, accelerator="cpu"))
    assert report.counts.used == 20
    other = load(yaml, [f"cache.folder={tmp_path / 'other'}"])
    make_cache(other, PassOptions(batch_size=3, workers=2, accelerator="cpu"))
    names = {path.name for path in (tmp_path / "cache").iterdir()}
    assert names == {path.name for path in (tmp_path / "other").iterdir()}
    for name in names:
        assert (tmp_path / "cache" / name).read_bytes() == (tmp_path / "other" / name).read_bytes(), name
    with pytest.raises(UserError, match=r"made with another cache\.crops"):
        training_data(load(yaml, ["cache.crops=3"]))


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


def test_a_seed_that_nothing_was_drawn_by_may_change(cached, program):
    """Middle crops, no mirror images, one caption each: any seed would have made this cache. Several captions count."""
    yaml = cached.parent / "tiny.yaml"
    plain = ["data.crop=center", "data.flip=false", "cache.folder=own", "trainer.max_steps=1"]
    assert program("train", "--config", yaml, "run=first", *plain)[0] == 0
    assert json.loads((cached.parent / "own" / "meta.json").read_text())["description"]["seed"] is None
    code, out, err = program("train", "--config", yaml, "run=second", *plain, "seed=5")
    assert code == 0 and "encoding" not in out, err
    shard = next((cached.parent / "own").glob("*.safetensors"))
    shard.unlink()
    code, out, err = program("ldm_lab.__main__", "cache", "--config", yaml, "--out", "own", *plain[:2], "seed=6")
    assert code == 0 and "made again" in out, err
    assert shard.exists()
    write_files(cached.parent / "images", 4)
    for path in (cached.parent / "images").rglob("00001.txt"):
        path.write_text("one\ntwo\n")
    folder = ["data={name: folder, path: images, image_size: 64, batch_size: 4}"]
    code, out, err = program("ldm_lab.__main__", "cache", "--config", yaml, "--out", "captions", *folder)
    assert code == 0, err
    assert json.loads((cached.parent / "captions" / "meta.json").read_text())["description"]["seed"] == 1


# ----------------------------------------------------------------------------------------------- as good as the images

BOUND = 2e-3  # of a sample's loss, relative: half precision; up to 3.5e-4 was measured, in networks with random weights
GLIDE = {key: tiny_glide.config()[key] for key in ("conditioner", "denoiser", "objective")}
PIXELS = {"autoencoder": {"name": "identity"}, "conditioner": {"name": "none"}}


def losses(config, section, shift: int = 0) -> dict[str, float]:
    """Return the loss of each sample of the first epoch, at noise and times that follow from its key.

    `shift` changes what each is told: embeddings grow, and ids are the next ones.
    """
    data = DataModule(section.build(), seed=config.seed, epochs=1)
    data.setup()
    task, found = build_task(config), {}
    torch.manual_seed(0)
    for parameter in task.model.parameters():  # a new network says nothing, whatever it is told
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    task.model.eval()
    for batch in data.train_dataloader():
        for i, key in enumerate(batch.key):
            one = lambda value: None if value is None else value[i : i + 1]  # noqa: B023, E731
            conditions = {name: one(value) for name, value in batch.conditions.items()}
            row = Batch([key], [batch.text[i]], one(batch.image), one(batch.mean), one(batch.logvar), conditions)
            torch.manual_seed(int(key))
            x0, conditions = task.encode(row)
            conditions = {name: its if its.dtype == torch.bool else its + shift for name, its in conditions.items()}
            conditions = {name: its % 600 if name == "token_ids" else its for name, its in conditions.items()}
            t, noise = torch.rand(1), torch.randn_like(x0)
            found[key] = float(task.objective.loss_terms(task.model, x0, conditions, t, noise)["loss"].detach())
    return found


@pytest.mark.parametrize("kind", ["ccld", "glide", "pixels"])
def test_cached_and_online_losses_are_equal(tmp_path, kind):
    sections = {"ccld": {}, "glide": GLIDE, "pixels": PIXELS}[kind]
    yaml = make_run(tmp_path, images=8, cache={"folder": str(tmp_path / "cache")}, data={"image_size": 32})
    yaml.write_text(to_yaml(yaml_reader.safe_load(yaml.read_text()) | sections))
    config = load(yaml)
    cached, online = losses(config, training_data(config)), losses(config, config["data"])
    assert cached.keys() == online.keys() and len(online) == 8
    bound = 0 if kind == "pixels" else BOUND
    assert all(abs(cached[key] - online[key]) <= bound * online[key] for key in online)
    told = losses(config, config["data"], shift=1)
    assert sum(abs(told[key] / online[key] - 1) for key in online) / 8 > 2 * BOUND, "the loss hears what is cached"
    shard = load_file(tmp_path / "cache" / "00000.safetensors")
    kinds = {name: str(values.dtype).removeprefix("torch.") for name, values in shard.items()}
    latents = {"mean": "float16", "logvar": "float16"}
    wanted = {
        "ccld": {**latents, "embed": "float16"},
        "glide": {**latents, "token_ids": "int64", "token_ids_mask": "bool"},
        "pixels": {"image": "uint8", "embed": "float16"},
    }[kind]
    assert {name: kinds[name] for name in kinds if name.partition(".")[0] not in ("key", "text")} == wanted


def test_encoders_in_chunks_and_in_half_precision(tmp_path, monkeypatch):
    """Chunks and the order in memory change no more than rounding does; bf16 is written down, and near."""
    yaml = make_run(tmp_path, images=8, data={"crop": "center"})
    made = {}
    for name, precision, pixels in (
        ("whole", "32-true", 2**30),
        ("chunks", "32-true", 64 * 64),
        ("bf16", "bf16-mixed", 1),
    ):
        monkeypatch.setattr("ldm_lab.training.encoders.CHUNK_PIXELS", pixels)
        folder = tmp_path / name
        config = load(yaml, [f"cache.folder={folder}", f"cache.precision={precision}"])
        make_cache(config, PassOptions(batch_size=5, workers=0, accelerator="cpu"))
        assert read_meta(folder).description["precision"] == f'"{precision}"'
        made[name] = load_file(folder / "00001.safetensors")
    task = build_task(load(yaml))
    source = load(yaml)["data"].build()
    source.open()
    raw = [source.decode(item, Order(1, 0)).image for item in source.samples(source.addresses[1])]
    with torch.no_grad():
        mean, _ = task.autoencoder.moments(torch.stack(raw).float() / 127.5 - 1)  # [2, C, h, w]
    for name, bound in (("whole", 1e-3), ("chunks", 1e-3), ("bf16", 0.05)):
        assert (made[name]["mean"].float() - mean).abs().max() < bound, name
    assert not torch.equal(made["bf16"]["mean"], made["whole"]["mean"])
    with pytest.raises(UserError, match=r"made with another cache\.precision"):
        training_data(load(yaml, [f"cache.folder={tmp_path / 'bf16'}", "cache.precision=32-true"]))
    read = training_data(load(yaml, [f"cache.folder={tmp_path / 'bf16'}", "data.max_skipped=0.3", "data.timeout=60"]))
    assert read.name == "cache" and (read["max_skipped"], read["timeout"]) == (0.3, 60), "as the run's data are read"


class WithStates(Conditioner):
    """States of texts of different lengths, with something behind their ends."""

    @property
    def spec(self):
        return {"token_states": TokenStates(4, 6), "plain": Embedding(2, stored="float32")}

    def from_batch(self, batch):
        lengths = torch.tensor([len(text) % 7 for text in batch.text])  # [B]
        mask = torch.arange(6)[None] < lengths[:, None]  # [B, 6]
        states = torch.rand(len(lengths), 6, 4, generator=torch.Generator().manual_seed(0))  # [B, 6, 4]
        return {"token_states": states, "token_states_mask": mask, "plain": states[:, 0, :2]}


def test_states_of_texts_are_kept_up_to_their_ends():
    source = build("data", {"name": "folder", "path": "nowhere", "image_size": 8, "batch_size": 1})
    encoders = Encoders(build("autoencoder", {"name": "identity"}), WithStates())
    job = CacheJob(encoders, source, Variants(), CacheTarget(Path("nowhere"), {}, 0))
    texts = ["", "abc", "abcdef"]
    made = job.process(VariantBatch(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), list("abc"), texts))
    assert made.rows.tensors["token_states"].shape == (9, 4) and made.rows.lengths["token_states"].tolist() == [0, 3, 6]
    assert made.columns["token_states"].ragged and not made.columns["plain"].ragged
    assert made.columns["plain"].dtype == "float32" and made.columns["token_states"].dtype == "float16"


# ---------------------------------------------------------------------------------------------------------- variants


def test_crops_and_flips_are_those_of_the_first_epochs(tmp_path):
    """Each variant is the latent of a crop that training on the images would have seen, as it is and mirrored."""
    crops = {"crops": 2, "flip": True, "folder": str(tmp_path / "cache")}
    yaml = make_run(tmp_path, images=8, cache=crops, data={"image_size": 32})
    yaml.write_text(to_yaml(yaml_reader.safe_load(yaml.read_text()) | PIXELS))
    source = load(yaml)["data"].build()
    source.open()
    training_data(load(yaml))
    meta = read_meta(tmp_path / "cache")
    assert meta.variants == 4 and meta.samples == 8
    assert (meta.description["crops"], meta.description["flip"]) == ("2", "true")
    source.flip = False
    raw = [item for item in source.samples(source.addresses[0]) if not isinstance(item, Exception)]
    images = load_file(tmp_path / "cache" / "00000.safetensors")["image"]  # [samples * 4, 3, S, S]
    for n, item in enumerate(raw):
        for crop in range(2):
            image = source.decode(item, Order(1, crop)).image
            assert torch.equal(images[4 * n + 2 * crop], image)
            assert torch.equal(images[4 * n + 2 * crop + 1], image.flip(-1))
    with pytest.raises(UserError, match=r"cache\.crops: 3 crops need data\.crop=random"):
        training_data(load(yaml, ["cache.crops=3", "data.crop=center", "cache.folder=other"]))


def test_what_is_limited_skipped_or_without_room(tmp_path, monkeypatch):
    write_shards(tmp_path / "odd", shards=3, per_shard=4)
    overrides = [f"data.shards={tmp_path}/odd/*.tar", "data.image_size=32", "data.min_size=16"]
    yaml = make_run(tmp_path, images=8, cache={"folder": str(tmp_path / "cache")})
    options = PassOptions(batch_size=4, workers=0, accelerator="cpu")
    report = make_cache(load(yaml, [*overrides, "cache.limit=5"]), options)
    assert report.counts.used == 5 == read_meta(tmp_path / "cache").samples
    monkeypatch.setattr("ldm_lab.data.passes.CHECK_AFTER", 2)
    small = [*overrides[:2], "data.max_pixels=9", f"cache.folder={tmp_path / 'small'}"]
    with pytest.raises(UserError, match=r"too many unusable samples: 4 samples read, 4 skipped .* allows 10\.0%"):
        make_cache(load(yaml, small), options)
    assert not read_meta(tmp_path / "small").complete
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: disk.shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(UserError, match=r"has .* of room, and this cache needs about .* more"):
        make_cache(load(yaml, [*overrides, f"cache.folder={tmp_path / 'full'}"]), options)


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


# ---------------------------------------------------------------------------------------------------- several processes


@pytest.mark.slow
def test_files_do_not_depend_on_the_number_of_processes_and_a_run_s_processes_make_them_together(tmp_path):
    yaml = make_run(tmp_path, images=20, cache={"folder": str(tmp_path / "together")})
    make_cache(load(yaml, [f"cache.folder={tmp_path / 'one'}"]), PassOptions(4, 0, accelerator="cpu"))
    command = ("-m", "ldm_lab", "cache", "--config", yaml, "--out", tmp_path / "two", "--accelerator", "cpu")
    done = run_program(*command, "--devices", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", ROOT / "train.py")
    done = run_program(*torchrun, "--config", yaml, "trainer.devices=2", "trainer.max_steps=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step 2: " in done.stdout
    for other in ("two", "together"):
        for path in (tmp_path / "one").iterdir():
            assert path.read_bytes() == (tmp_path / other / path.name).read_bytes(), (other, path.name)


GROUPS = """
import sys
import torch
from ldm_lab.commands.train import main

own, made = torch.distributed.init_process_group, []
torch.distributed.init_process_group = lambda *args, **options: made.append(1) or own(*args, **options)
main(sys.argv[1:])
print(f"{len(made)} process group")
"""


@pytest.mark.slow
def test_processes_that_made_a_cache_train_in_the_same_group(tmp_path):
    """Several times over: a second group on the same store met the closed connections of the first, now and then."""
    yaml = make_run(tmp_path, images=8)
    (tmp_path / "train.py").write_text(GROUPS)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py")
    for number in range(3):
        options = [f"cache.folder={tmp_path}/cache{number}", f"run=run{number}", "trainer.devices=2"]
        done = run_program(*torchrun, "--config", yaml, *options, "trainer.max_steps=2", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "step 2: " in done.stdout and done.stdout.count("1 process group") == 2


def test_a_cache_knows_what_its_shards_are_read_with(tmp_path):
    """The table of captions, and the scores that rules judge by, make other samples as shards do."""
    write_shards(tmp_path, 2, 2)
    table = tmp_path / "captions.csv"
    table.write_text("file_name,text\n00000.png,one\n")
    for number in range(2):
        (tmp_path / f"{number:05d}.scores.parquet").write_bytes(b"scores")
    section = {
        "name": "webdataset", "shards": str(tmp_path / "*.tar"), "image_size": 8, "batch_size": 1,
        "captions": {"metadata": "captions.csv"}, "rules": {"aesthetic": {"at_least": 8}}, "scores": ".scores.parquet",
    }  # fmt: skip

    def seen() -> Files:
        source = build("data", section)
        source.open()
        return facts_of(source.files())

    before = seen()
    table.write_text("file_name,text\n00000.png,another\n")
    (tmp_path / "00001.scores.parquet").write_bytes(b"others")
    os.utime(tmp_path / "00001.scores.parquet", (0, 0))
    told = differences(before, seen())
    assert "data.captions.metadata" in told and "data.scores/1/00001.scores.parquet" in told and "/0/" not in told


def test_a_cache_that_another_process_has_just_begun_is_taken(tmp_path, monkeypatch):
    """The first process writes `meta.json` while the others look for it."""
    folder = tmp_path / "cache"
    config = load(make_run(tmp_path, images=4), [f"cache.folder={folder}"])
    looked = caching.holds_something

    def looks_late(its: Path) -> bool:
        CacheMeta({}).write(its)
        return looked(its)

    monkeypatch.setattr(caching, "holds_something", looks_late)
    caching.begin(config, {}, {})
    assert not read_meta(folder).complete
