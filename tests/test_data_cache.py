"""Caches: what is written is what is read, in its own dtype; a server's are read like shards; damage is told."""

import functools
import http.server
import json
import threading
from pathlib import Path

import pytest
import torch
from data_sets import keys, module, take, write_cache

from ldm_lab.config import build
from ldm_lab.data.cache_files import CacheMeta, CacheShard, Column, ShardFacts, read_meta
from ldm_lab.data.samples import SkippedSample
from ldm_lab.errors import UserError
from ldm_lab.io.json_files import Fields

COUNT = 54


def columns() -> dict[str, torch.Tensor]:
    """Return columns of every kind; every row's differ, and the first number of each is the row's."""
    number = torch.arange(COUNT)  # [COUNT]
    return {
        "mean": (number[:, None, None, None].expand(-1, 4, 2, 3) / 64).half(),
        "logvar": (-number[:, None, None, None].expand(-1, 4, 2, 3) / 64).half(),
        "embed": torch.stack([number, -number], 1).float() + 1e-3,  # full precision, so that halves would show
        "token_ids": number[:, None] * 1000 + torch.tensor([0, 1, 49_407]),  # beyond what a half tells apart
        "token_ids_mask": torch.stack([number % 2 == 0, number % 3 == 0], 1),
        "token_states": [torch.full((int(n) % 4, 5), float(n)).half() for n in number],
        "level": number.float(),
    }


@pytest.fixture
def cache(tmp_path) -> Path:
    write_cache(tmp_path / "cache", columns(), per_shard=12, image_size=8)
    return tmp_path / "cache"


@pytest.mark.parametrize("workers", [0, 2])
def test_every_column_comes_back_as_it_was(cache, workers):
    data = module({"name": "cache", "path": str(cache), "workers": workers}, epochs=1)
    batches = take(data)
    assert sorted(keys(batches)) == [f"{n:05d}" for n in range(COUNT)]
    assert data.source.image_size == 8
    wanted = columns()
    for batch in batches:
        rows = [int(key) for key in batch.key]
        assert batch.text == [f"caption {n}" for n in rows] and batch.image is None
        read = {"mean": batch.mean, "logvar": batch.logvar, **batch.conditions}
        assert read.keys() == wanted.keys()
        for name, values in wanted.items():
            if name == "token_states":
                for row, states in zip(rows, read[name]):
                    assert torch.equal(states[: row % 4], values[row].float()) and not states[row % 4 :].any()
                assert read[name].shape == (len(rows), 3, 5)
                continue
            kind = torch.float32 if values.is_floating_point() else values.dtype
            assert read[name].dtype == kind, name
            assert torch.equal(read[name], values[rows].to(kind)), name


def test_pixels_stay_bytes_until_they_are_on_the_device(tmp_path):
    image = torch.arange(6 * 3 * 4 * 4).reshape(6, 3, 4, 4).to(torch.uint8)
    write_cache(tmp_path, {"image": image}, per_shard=4)
    source = module({"name": "cache", "path": str(tmp_path), "batch_size": 6}, epochs=1).source
    raw = source.collate([source.decode(n, None) for n in range(6)])
    assert raw.image.dtype == torch.uint8 and torch.equal(raw.image, image)
    assert torch.equal(source.to_device_format(raw).image, image.float() / 127.5 - 1)


def test_each_epoch_takes_the_next_variant(tmp_path):
    write_cache(tmp_path, {"embed": torch.arange(24.0)[:, None]}, per_shard=3, variants=3)
    data = module({"name": "cache", "path": str(tmp_path), "batch_size": 8})
    epochs = take(data, 6)
    rows = [dict(zip(batch.key, batch.conditions["embed"][:, 0].int().tolist())) for batch in epochs]
    for key in rows[0]:
        taken = [row[key] for row in rows]
        assert sorted(taken[:3]) == sorted(taken[3:]) == list(range(3 * int(key), 3 * int(key) + 3))
        assert taken[3:] == taken[:3]
    assert len({rows[0][key] % 3 for key in rows[0]}) == 3, "from a random one on"
    assert all(batch.text == [f"caption {row[key]}" for key in batch.key] for batch, row in zip(epochs, rows))
    again = module({"name": "cache", "path": str(tmp_path), "batch_size": 4, "workers": 2})
    assert {k: v for b in take(again, 2) for k, v in zip(b.key, b.conditions["embed"][:, 0].int().tolist())} == rows[0]


def test_captions_in_any_language(tmp_path):
    texts = ["", "eine Katze, größer", "猫が座っている", "🐈 a cat", ""]
    write_cache(tmp_path, {"embed": torch.arange(5.0)[:, None]}, per_shard=9, texts=texts)
    (batch,) = take(module({"name": "cache", "path": str(tmp_path), "batch_size": 5}, epochs=1))
    assert [texts[int(key)] for key in batch.key] == batch.text
    assert [texts[int(n)] for n in batch.conditions["embed"][:, 0]] == batch.text


# --------------------------------------------------------------------------------------------------- what is refused


def test_what_a_reader_refuses(cache):
    section = {"name": "cache", "path": str(cache)}
    shard = cache / "00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    told = f"{shard.name}: has {len(whole) - 1:,} bytes, not {len(whole):,}: it is damaged; .* makes it again"
    with pytest.raises(UserError, match=told):
        module(section)
    shard.unlink()
    (cache / "00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"00001.safetensors: is missing \(2 of 5 shards are missing or damaged\)"):
        module(section)
    meta = cache / "meta.json"
    content = json.loads(meta.read_text())
    for broken, told in [
        ("{", "meta.json: not readable"),
        (json.dumps({"format": "another"}), "not of the format 'ldm_lab cache 2'$"),
        (json.dumps({"format": "ldm_lab cache 1"}), "but 'ldm_lab cache 1': delete the cache and make it anew"),
        (json.dumps({**content, "samples": 3}), "samples is missing or damaged"),
        (json.dumps({**content, "variants": 0}), "variants is missing"),
        (json.dumps({**content, "columns": {"mean": {"dtype": "float16", "shape": [-1]}}}), "columns is missing"),
        *(
            (
                json.dumps({**content, "columns": {**content["columns"], name: content["columns"]["level"]}}),
                "columns is",
            )
            for name in ("text", "key", "key.ends")
        ),
        *(
            (json.dumps({**content, "columns": {**content["columns"], "huge": column}}), "columns is missing")
            for column in (
                {"dtype": "float16", "shape": [1 << 20], "ragged": False},
                {"dtype": "float16", "shape": [1 << 40], "ragged": True},
                {"dtype": "float16", "shape": [1 << 40, 0], "ragged": True},
                {"dtype": "float32", "shape": [1 << 31, 1 << 31, 1 << 31], "ragged": True},
            )
        ),
        (json.dumps({**content, "shards": [{**content["shards"][0], "name": "../x.safetensors"}]}), "shards is"),
        (json.dumps({**content, "complete": False}), "is not complete"),
    ]:
        meta.write_text(broken)
        with pytest.raises(UserError, match=told):
            module(section)
    meta.unlink()
    with pytest.raises(UserError, match=r"no cache here \(meta.json is missing\)"):
        module(section)


def test_a_shard_that_vanishes_is_skipped(cache):
    data = module({"name": "cache", "path": str(cache), "max_skipped": 0.9}, epochs=1)
    (cache / "00001.safetensors").unlink()
    assert len(keys(take(data))) == COUNT - 12
    assert dict(data.skipped) == {"unreachable shard": 12}


@pytest.mark.parametrize("change", ["shape", "dtype", "ends", "length", "variants", "missing", "more"])
def test_a_shard_of_other_columns_is_damaged(tmp_path, change):
    """Whatever a file says, no row is read outside its column."""
    states = [torch.ones(n, 2) for n in (1, 3, 2)]
    meta = write_cache(tmp_path, {"embed": torch.zeros(3, 4), "token_states": states}, per_shard=3)
    path, columns, variants = tmp_path / meta.shards[0].name, dict(meta.columns), 1
    CacheShard(path, columns, variants)
    if change in ("shape", "dtype"):
        columns["embed"] = Column("float32", (5,)) if change == "shape" else Column("int32", (4,))
    elif change == "length":
        columns["token_states"] = Column("float32", (2, 2), ragged=True)
    elif change == "variants":
        variants = 2
    elif change == "missing":
        columns["other"] = Column("float32", ())
    elif change == "more":
        del columns["embed"]
    else:
        from safetensors.torch import load_file, save_file

        tensors = load_file(path)
        tensors["token_states.ends"][0] = 400
        save_file(tensors, path, {"format": "ldm_lab cache 2"})
    with pytest.raises(SkippedSample, match="damaged shard"):
        CacheShard(path, columns, variants)


def test_facts_that_are_no_facts_are_none():
    good = {"name": "00000.safetensors", "samples": 1, "bytes": 2, "sha256": "a" * 64}
    assert ShardFacts.of(Fields(good)) is not None
    for key, value in [
        ("name", "a/b.safetensors"),
        ("name", ".safetensors"),
        ("samples", True),
        ("bytes", 2**60),
        ("sha256", "x"),
    ]:
        assert ShardFacts.of(Fields({**good, key: value})) is None, (key, value)
    assert Column.of(Fields({"dtype": "object", "shape": [], "ragged": False})) is None


# ------------------------------------------------------------------------------------------------------ from a server


class Handler(http.server.SimpleHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(cache):
    """The cache behind a web server; returns its address."""
    Handler.asked = []
    handler = functools.partial(Handler, directory=cache.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as its:
        threading.Thread(target=its.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{its.server_port}/cache"
        its.shutdown()


def remote(address: str, **options) -> dict:
    return {"name": "cache", "path": address, "shuffle_buffer": 7, **options}


def test_a_server_s_cache_is_read_like_shards_and_resumes_exactly(server, tmp_path):
    data = module(remote(server), epochs=1)
    assert (data.source.unit, data.source.count) == ("shards", 5)
    whole = take(data)
    assert sorted(keys(whole)) == [f"{n:05d}" for n in range(COUNT)]
    assert keys(whole) != sorted(keys(whole))
    local = take(module({"name": "cache", "path": str(tmp_path / "cache")}, epochs=1))
    by_key = {key: batch.mean[i] for batch in local for i, key in enumerate(batch.key)}
    assert all(torch.equal(batch.mean[i], by_key[key]) for batch in whole for i, key in enumerate(batch.key))
    for stop in (1, 7, 13):
        first = module(remote(server))
        taken = take(first, stop)
        Handler.asked.clear()
        second = module(remote(server))
        second.load_rank_states([first.rank_state()], 0)
        assert keys(taken) + keys(take(second, 13 - stop)) == keys(take(module(remote(server)), 13))
    assert keys(take(module(remote(f"{server}/meta.json", workers=2), epochs=1))), "loader processes fetch, too"


def test_what_is_kept_is_not_fetched_again(server, tmp_path):
    kept = tmp_path / "kept"
    take(module(remote(server, local=str(kept)), epochs=1))
    assert len(list(kept.iterdir())) == 5
    Handler.asked.clear()
    assert len(keys(take(module(remote(server, local=str(kept)), epochs=1)))) == COUNT
    assert Handler.asked == ["/cache/meta.json"]


def test_damaged_and_missing_shards_of_a_server_are_told(server, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    content = bytearray((cache / "00001.safetensors").read_bytes())
    content[-1] ^= 1
    (cache / "00001.safetensors").write_bytes(content)
    (cache / "00003.safetensors").unlink()
    data = module(remote(server, max_skipped=0.9), epochs=1)
    assert len(keys(take(data))) == COUNT - 24
    assert dict(data.skipped) == {"damaged shard": 12, "unreachable shard": 12}
    assert f"damaged shard 12 (e.g. {server}/00001.safetensors)" in data.summary()
    assert not list((tmp_path / "tmp").iterdir()), "nothing is left behind"
    with pytest.raises(UserError, match=r"no cache at http://.*/nothing: http://.*/nothing/meta.json: HTTP 404"):
        module(remote(server.replace("cache", "nothing")))


def test_a_missing_shard_of_a_server_counts_all_its_samples(server, cache, monkeypatch):
    """So `max_skipped` is about samples; a single one that comes first does not end a run of many shards."""
    (cache / "00003.safetensors").unlink()
    monkeypatch.setattr("ldm_lab.data.cache.CHECK_AFTER", 1)
    assert len(keys(take(module(remote(server, max_skipped=0.25), epochs=1)))) == COUNT - 12
    for workers in (0, 2):
        data = module(remote(server, max_skipped=0.1, workers=workers))
        with pytest.raises(UserError, match=r"too many unusable samples: .*unreachable shard \d\d") as told:
            take(data, 100)
        assert "data.max_skipped allows 10.0%" in str(told.value)


class Hub(Handler):
    """The Hub as far as files of a data set go: where one lies is asked by HEAD, and told in a header."""

    def do_HEAD(self) -> None:
        self.asked.append(f"HEAD {self.path}")
        name = self.path.removeprefix("/datasets/owner/latents/resolve/refs%2Fpr%2F1/sets/")
        here = f"http://127.0.0.1:{self.server.server_port}"
        self.send_response(404 if name == self.path or "gone" in name else 302)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", '"1"')
        self.send_header("X-Linked-Size", "1")
        self.send_header("Location", f"{here.replace('127.0.0.1', 'localhost')}/{name}")
        self.end_headers()


def test_a_cache_on_the_hub_is_found_by_its_address(cache, tmp_path, monkeypatch):
    """`hf://datasets/OWNER/REPOSITORY@REVISION/FOLDER`: list and shards are asked for, and read where they are."""
    from huggingface_hub import constants

    Handler.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, directory=cache.parent)) as its:
        threading.Thread(target=its.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{its.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", here)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", here + "/{repo_id}/resolve/{revision}/{filename}")
        address = "hf://datasets/owner/latents@refs/pr/1/sets/cache"
        data = module(remote(address, local=str(tmp_path / "kept")), epochs=1)
        assert sorted(keys(take(data))) == [f"{n:05d}" for n in range(COUNT)]
        asked = [path.rpartition("/")[2] for path in Handler.asked if path.startswith("HEAD ")]
        assert sorted(asked) == [*(f"{n:05d}.safetensors" for n in range(5)), "meta.json"]
        assert len(list((tmp_path / "kept").iterdir())) == 5
        assert keys(take(module(remote(f"{address}/", local=str(tmp_path / "kept")), epochs=1)))
        with pytest.raises(UserError, match=r"no cache at hf://datasets/owner/latents@refs/pr/1/sets/gone: hf://.*Hub"):
            module(remote("hf://datasets/owner/latents@refs/pr/1/sets/gone"))
        its.shutdown()


def test_a_meta_of_nothing_is_no_data(tmp_path):
    CacheMeta({}, complete=True).write(tmp_path)
    assert read_meta(tmp_path).samples == 0
    with pytest.raises(UserError, match="holds no sample"):
        build("data", {"name": "cache", "path": str(tmp_path), "batch_size": 1}).open()
