"""The recorded score store: its bytes, its keys, and what it answers."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ldm_lab.curation.store.build import build_store
from ldm_lab.curation.store.format import ScoreStore, StoreWriter, hashes_of


class Recorded:
    """The case's json, arrays and files."""

    def __init__(self, golden: Path):
        path = golden / "aesthetic_kv.json"
        if not path.is_file():
            pytest.skip(f"{golden} has no case aesthetic_kv")
        self.json = json.loads(path.read_text(encoding="utf-8"))
        self.folder = golden / self.json["folder"]
        self.tags, self.store = self.folder / "tags.parquet", self.folder / "aesthetic-tags-kv"
        with np.load(path.with_suffix(".npz")) as arrays:
            self.arrays = {name: arrays[name] for name in arrays.files}


@pytest.fixture
def recorded(golden: Path) -> Recorded:
    return Recorded(golden)


def test_the_keys(recorded):
    pairs = json.loads((recorded.folder / "pairs.json").read_text(encoding="utf-8"))
    assert pairs
    keys = hashes_of([pair["url"] for pair in pairs], [pair["text"] for pair in pairs])
    assert [str(key) for key in keys] == [str(pair["hash"]) for pair in pairs]


def test_a_build_reproduces_the_bytes(recorded, tmp_path):
    built = build_store([recorded.tags], tmp_path / "kv")
    assert (tmp_path / "kv").read_bytes() == recorded.store.read_bytes()
    tags = pq.read_table(recorded.tags)
    assert built.rows == len(tags)
    assert built.no_key == tags["hash"].null_count
    assert built.entries == built.rows - built.no_key - built.no_score == recorded.json["rows"]
    assert built.repeated == sum(len(repeated["file_order"]) - 1 for repeated in recorded.json["duplicates"])


def test_the_command_reproduces_the_bytes(recorded, program, tmp_path):
    code, out, err = program("ldm_lab.__main__", "scores", "build", recorded.tags, "--out", tmp_path / "kv", "--quiet")
    assert code == 0, err
    assert f"{recorded.json['rows']:,} entries" in out
    assert (tmp_path / "kv").read_bytes() == recorded.store.read_bytes()


def test_all_entries(recorded, tmp_path):
    store = ScoreStore(recorded.store)
    keys, scores = (np.concatenate(parts) for parts in zip(*store.blocks(64)))
    np.testing.assert_array_equal(keys, recorded.arrays["all_keys"])
    np.testing.assert_array_equal(scores[:, 0], recorded.arrays["all_scores"])  # NaN equals NaN here
    with StoreWriter(tmp_path / "kv") as writer:
        writer.add(keys, scores)
    assert (tmp_path / "kv").read_bytes() == recorded.store.read_bytes()


@pytest.mark.parametrize("asked_before", [0, 10_000], ids=["cold", "with fences"])
def test_look_ups(recorded, asked_before):
    store = ScoreStore(recorded.store)
    store.get(np.zeros(asked_before, dtype=np.int64))
    present, absent = recorded.arrays["present_keys"], recorded.arrays["absent_keys"]
    scores, found = store.get(present)
    assert found.all()
    np.testing.assert_array_equal(scores, recorded.arrays["present_scores"])
    scores, found = store.get(absent)
    assert not found.any()
    assert np.isnan(scores).all()
    for key, score in zip(present.tolist(), recorded.arrays["present_scores"]):
        assert key in store
        np.testing.assert_equal(store[key], float(score))
    for key in absent.tolist():
        assert key not in store
        with pytest.raises(KeyError):
            store[key]
    for repeated in recorded.json["duplicates"]:
        assert store[int(repeated["key"])] == repeated["answer"]


def test_the_rounding(recorded, tmp_path):
    values = recorded.arrays["rounding_in"]
    with StoreWriter(tmp_path / "kv") as writer:
        writer.add(np.arange(len(values)), values)
    scores, _ = ScoreStore(tmp_path / "kv").get(np.arange(len(values)))
    np.testing.assert_array_equal(scores, recorded.arrays["rounding_out"])
