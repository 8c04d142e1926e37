"""Caches of latents and embeddings: what is written is what is read; an interrupted writer goes on."""

import json

import pytest
import torch
from data_sets import keys, module, take, write_shards

from ldm_lab.batch import Batch
from ldm_lab.data.cache import CacheWriter, complete
from ldm_lab.errors import UserError

MADE_WITH = {"autoencoder": "a" * 64, "conditioner": "b" * 64, "image_size": 8, "data": {"name": "webdataset"}}


def moments(batch: Batch) -> dict[str, torch.Tensor]:
    """Return stand-ins for what the models would make of a batch; every sample's differ."""
    number = torch.tensor([float(key) for key in batch.key])  # [B]
    mean = number[:, None, None, None].expand(-1, 4, 2, 3) / 64  # [B, 4, 2, 3]
    embed = torch.stack([number, -number], 1)  # [B, 2]
    return {"mean": mean.half(), "logvar": (-mean).half(), "embed": embed}


def fill(folder, source: dict, stop_after: int | None = None) -> CacheWriter:
    """Run a caching pass, from where the folder's cache stands, up to some batches."""
    data = module(source, epochs=1)
    writer = CacheWriter(folder, MADE_WITH, shard_size=12)
    if writer.state:
        data.load_rank_states([writer.state], 0)
    for number, batch in enumerate(data.train_dataloader()):
        if number == stop_after:
            return writer
        data.consumed(batch)
        writer.add(moments(batch), batch.text, batch.key, data.rank_state())
    writer.close()
    return writer


@pytest.fixture
def source(tmp_path) -> dict:
    write_shards(tmp_path / "shards", shards=6, per_shard=9)
    return {"name": "webdataset", "shards": f"{tmp_path}/shards/*.tar", "batch_size": 5}


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_pass_goes_on_without_gap_or_repetition(tmp_path, source, workers):
    source = {**source, "workers": workers}
    folder = tmp_path / "cache"
    first = fill(folder, source, stop_after=5)  # 25 samples: a shard of 15 and 10 that are lost
    assert first.written == 15
    with pytest.raises(UserError, match="not complete"):
        module({"name": "cache", "path": str(folder)})
    assert fill(folder, source).written == 54
    assert complete(folder) == 54

    data = module({"name": "cache", "path": str(folder), "workers": workers}, epochs=1)
    batches = take(data)
    assert sorted(keys(batches)) == [f"{n:05d}" for n in range(54)]
    assert data.source.description == MADE_WITH
    for batch in batches:
        wanted = moments(batch)
        assert batch.text == [f"caption {int(key)}" for key in batch.key]
        read = {"mean": batch.mean, "logvar": batch.logvar, **batch.conditions}
        assert read.keys() == wanted.keys()
        for name, values in wanted.items():
            assert read[name].dtype == torch.float32
            assert torch.equal(read[name], values.float())


def test_ranks_write_their_own_shards(tmp_path, source):
    for rank in (0, 1):
        data = module(source, rank, 2, epochs=1)
        writer = CacheWriter(tmp_path / "cache", MADE_WITH, rank=rank)
        for batch in data.train_dataloader():
            data.consumed(batch)
            writer.add(moments(batch), batch.text, batch.key, data.rank_state())
        writer.close()
    assert complete(tmp_path / "cache") == 54
    assert len(set(keys(take(module({"name": "cache", "path": str(tmp_path / "cache")}, epochs=1))))) == 54


def test_what_a_writer_refuses(tmp_path, source):
    folder = tmp_path / "cache"
    fill(folder, source)
    with pytest.raises(UserError, match="made with another autoencoder, image_size; take another folder"):
        CacheWriter(folder, {**MADE_WITH, "autoencoder": "c" * 64, "image_size": 16})
    complete(folder)
    with pytest.raises(UserError, match=r"complete already \(54 samples\)"):
        CacheWriter(folder, MADE_WITH)
    with pytest.raises(UserError, match="neither empty nor a cache"):
        CacheWriter(tmp_path / "shards", MADE_WITH)


def test_what_a_reader_refuses(tmp_path, source):
    folder = tmp_path / "cache"
    section = {"name": "cache", "path": str(folder)}
    with pytest.raises(UserError, match=r"no cache here \(meta.json is missing\)"):
        module(section)
    fill(folder, source)
    complete(folder)
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{shard.name}: a damaged shard"):
        module(section)
    shard.unlink()
    with pytest.raises(UserError, match="are missing: 39 samples are there, 54 were written"):
        module(section)
    meta = folder / "meta.json"
    meta.write_text("{")
    with pytest.raises(UserError, match=r"meta.json: not readable"):
        module(section)
    meta.write_text(json.dumps({"format": "another"}))
    with pytest.raises(UserError, match="not of the format 'ldm_lab cache 1'"):
        module(section)


def test_a_shard_that_vanishes_is_skipped(tmp_path, source):
    folder = tmp_path / "cache"
    fill(folder, source)
    complete(folder)
    data = module({"name": "cache", "path": str(folder), "max_skipped": 0.9}, epochs=1)
    sorted(folder.glob("*.safetensors"))[1].unlink()
    assert len(keys(take(data))) == 39
    assert dict(data.skipped) == {"unreachable shard": 15}


def test_captions_in_any_language(tmp_path):
    texts = ["", "eine Katze, größer", "猫が座っている", "🐈 a cat", ""]
    writer = CacheWriter(tmp_path / "cache", {})
    writer.add({"embed": torch.arange(5.0)[:, None]}, texts, list("abcde"), {})
    writer.close()
    complete(tmp_path / "cache")
    (batch,) = take(module({"name": "cache", "path": str(tmp_path / "cache"), "batch_size": 5}, epochs=1))
    assert dict(zip(batch.key, batch.text)) == dict(zip("abcde", texts))
    assert [texts[int(n)] for n in batch.conditions["embed"][:, 0]] == batch.text
