"""`data.rules`: samples left out while streaming, by their json or by scores beside the shard, counted by rule."""

import gzip
import json
import math

import pytest
from data_sets import encoded, keys, module, take

from ldm_lab.config import check_section
from ldm_lab.data import loader
from ldm_lab.data.source import Source
from ldm_lab.data.tar import write_shard
from ldm_lab.errors import UserError


def metadata(number: int) -> dict:
    """Scores go from 0 to 9.9; every tenth sample has none, some are NaN; sizes as img2dataset writes them."""
    score = None if number % 10 == 3 else math.nan if number == 17 else number / 10
    sizes = {"width": 256, "height": 256, "original_width": 100 + number * 4, "original_height": 300, "WIDTH": 1}
    return {"aesthetic": score, "punsafe": 0.6 if number % 7 == 0 else 0.1, "caption": f"number {number}", **sizes}


@pytest.fixture
def shards(tmp_path):
    """100 samples in 5 shards; sample 42 has no json, 43 a damaged one."""
    for shard in range(5):
        samples = []
        for n in range(shard * 20, shard * 20 + 20):
            parts = {"png": encoded(n), "txt": f"caption {n}".encode(), "json": json.dumps(metadata(n)).encode()}
            if n == 42:
                del parts["json"]
            if n == 43:
                parts["json"] = b'{"aesthetic": 9'
            samples.append((f"{n:05d}", parts))
        write_shard(tmp_path / f"{shard}.tar", samples)
    return tmp_path


def section(shards, **more) -> dict:
    return {"name": "webdataset", "shards": f"{shards}/*.tar", **more}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle_buffer", [0, 1000])
def test_samples_are_filtered_and_counted_by_rule(shards, workers, shuffle_buffer):
    rules = {"punsafe": {"below": 0.5}, "aesthetic": {"above": 5}}
    data = module(section(shards, rules=rules, workers=workers, shuffle_buffer=shuffle_buffer), epochs=1)
    kept = [n for n in range(100) if n % 7 and n % 10 != 3 and n > 50]
    assert sorted(keys(take(data))) == [f"{n:05d}" for n in kept]
    assert dict(data.filtered) == {
        "rule punsafe": 15 - 1,  # 42 has no json
        "rule punsafe: missing_tag": 2,
        "rule aesthetic: missing_tag": sum(n % 7 > 0 and (n % 10 == 3 or n == 17) for n in range(100) if n != 43),
        "rule aesthetic": sum(n % 7 > 0 and n % 10 != 3 and n != 17 and n <= 50 for n in range(100) if n != 42),
    }
    assert not data.skipped and sum(data.filtered.values()) == 100 - len(kept)
    assert "100 samples read" in data.summary() and f"{100 - len(kept)} left out as asked" in data.summary()
    assert "rule punsafe 14 (e.g. " in data.summary() and "; none skipped" in data.summary()


def test_sizes_are_the_original_ones_and_captions_those_trained_on(shards, tmp_path):
    data = module(section(shards, rules={"size": {"min_side": 256}, "aspect_ratio": {"at_most": 1.3}}), epochs=1)
    assert sorted(keys(take(data))) == [f"{n:05d}" for n in range(100) if 100 + 4 * n >= 256 and 100 + 4 * n <= 390
                                        if n not in (42, 43)]  # fmt: skip
    (tmp_path / "words.txt").write_text("CAPTION 7\n")
    data = module(section(shards, rules={"slurs": {"file": str(tmp_path / "words.txt")}}), epochs=1)
    assert len(keys(take(data))) == 89, "7 and 70 to 79"
    assert dict(data.filtered) == {"rule slurs: slur": 11}


def test_scores_beside_the_shards_go_before_the_json(shards):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for shard in range(5):
        numbers = [n for n in range(shard * 20, shard * 20 + 20) if n != 81]
        rows = {"key": [f"{n:05d}" for n in numbers], "aesthetic": [9.0 - n / 10 for n in numbers]}
        pq.write_table(pa.table(rows), shards / f"{shard}.scores.parquet")
    data = module(section(shards, rules={"aesthetic": {"at_least": 8}}, scores=".scores.parquet"), epochs=1)
    assert sorted(keys(take(data))) == [f"{n:05d}" for n in range(11)] + ["00081"], "the json counts where no score is"
    (shards / "1.scores.parquet").write_bytes(b"PAR1 not really")
    data = module(section(shards, rules={"aesthetic": {"at_least": 8}}, scores=".scores.parquet"), epochs=1)
    assert len(keys(take(data))) == 12
    assert dict(data.skipped) == {"unreadable scores": 1}
    (shards / "3.scores.parquet").unlink()
    with pytest.raises(UserError, match=r"data\.scores: no such file: .*3\.scores\.parquet; 1 of 5 are missing"):
        module(section(shards, rules={"aesthetic": {"at_least": 8}}, scores=".scores.parquet"))


def test_scores_of_another_name_and_of_compressed_shards(shards):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (shards / "0.tar.gz").write_bytes(gzip.compress((shards / "0.tar").read_bytes()))
    rows = {"key": [f"{n:05d}" for n in range(20)], "AESTHETIC_SCORE": [9.0 - n / 10 for n in range(20)]}
    pq.write_table(pa.table(rows), shards / "0.scores.parquet")
    rules = {"aesthetic": {"at_least": 8, "predictor": "v2"}}
    for name in ("0.tar", "0.tar.gz"):
        one = {"name": "webdataset", "shards": str(shards / name), "rules": rules, "scores": ".scores.parquet"}
        data = module(one, epochs=1)
        assert sorted(keys(take(data))) == [f"{n:05d}" for n in range(11)], "the json has an aesthetic, too"


def test_resuming_delivers_the_same_batches(shards):
    one = section(shards, rules={"punsafe": {"below": 0.5}, "aesthetic": {"above": 3}}, shuffle_buffer=7, workers=2)
    whole = module(one, epochs=3)
    batches = keys(take(whole))
    first = module(one, epochs=3)
    begun = keys(take(first, 9))
    second = module(one, epochs=3)
    second.load_rank_states([first.rank_state()], 0)
    assert begun + keys(take(second)) == batches
    assert second.rank_state() == whole.rank_state() and second.filtered == whole.filtered


def test_filtered_samples_take_no_room_in_the_shuffle_buffer(shards):
    """With one sample in ten kept, a buffer of 10 mixes the whole data set, not a shard."""
    data = module(section(shards, rules={"aesthetic": {"above": 8.95}}, shuffle_buffer=10), epochs=1)
    assert len(take(data)) and data.filtered["rule aesthetic"] > 70


def test_filtered_samples_are_no_reason_to_stop(shards, monkeypatch):
    """97 % are left out and none is bad, although only 10 % may be."""
    monkeypatch.setattr(Source, "judged_after", 50)
    monkeypatch.setattr(loader, "CONSECUTIVE_FAILURES", 20)
    data = module(section(shards, rules={"aesthetic": {"above": 9.65}}))
    assert len(take(data, 5)) == 5


def test_rules_that_leave_nothing_stop_the_run(shards):
    data = module(section(shards, rules={"pwatermark": {"below": 0.5}}))
    with pytest.raises(
        UserError, match=r"no usable sample in a long time: .*left out as asked \(100.0%\): .*missing_tag"
    ):
        take(data, 1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rules": {"punsave": {"below": 0.5}}}, "data.rules.punsave: no such rule: 'punsave'"),
        ({"rules": {"punsafe": {"below": "low"}}}, "data.rules.punsafe.below: number or null is needed"),
        ({"rules": {"duplicates": {}}}, "data.rules.duplicates: compares samples with each other"),
        ({"rules": [1]}, "data.rules: "),
        ({"scores": ".scores.parquet"}, "data.scores: only rules ask for them"),
    ],
)
def test_mistakes_are_found_before_anything_is_read(more, message):
    problems = check_section("data", {**section("x"), "image_size": 8, "batch_size": 1, **more}, "data")
    assert any(problem.startswith(message) for problem in problems), problems
