"""The score store: properties of look-ups and builds, damaged files, the command."""

import json
import pickle
import struct
from dataclasses import asdict

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ldm_lab.curation.store import format as store_module
from ldm_lab.curation.store.build import build_store
from ldm_lab.curation.store.format import ScoreStore, StoreWriter, hash_of, hashes_of
from ldm_lab.curation.store.lookup import add_scores
from ldm_lab.curation.store.statistics import store_statistics
from ldm_lab.errors import UserError

KEYS = st.integers(-(2**63), 2**63 - 1)
# A few keys close together, the ends of the range, and any other: repeats and near misses are common then.
NEAR = st.one_of(st.integers(-3, 3), st.sampled_from([-(2**63), 2**63 - 1]), KEYS)


def write(path, entries, scores=1):
    """Write entries as they stand, by struct as the published writer does."""
    path.write_bytes(b"".join(struct.pack(f"<q{scores}e", key, *values) for key, *values in entries))
    return path


def table(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


@settings(max_examples=150, deadline=None)
@given(
    entries=st.lists(st.tuples(NEAR, st.floats(width=16)), max_size=60),
    asked=st.lists(NEAR, max_size=40),
    fences=st.sampled_from([1, 2, 3, 7, 64]),
    block=st.sampled_from([1, 5, 1000]),
)
def test_look_ups_are_those_of_a_dict(tmp_path_factory, entries, asked, fences, block):
    path = tmp_path_factory.mktemp("kv") / "kv"
    entries = sorted(entries, key=lambda entry: entry[0])
    first = dict(reversed(entries))
    write(path, entries)
    asked = np.array([*asked, *first], dtype=np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "FENCES", fences)
        patch.setattr(store_module, "BLOCK", block)
        store = ScoreStore(path)
        for _ in range(2):  # without fences, then perhaps with them
            scores, found = store.get(asked)
            assert scores.dtype == np.float32
            assert found.tolist() == [key in first for key in asked.tolist()]
            np.testing.assert_array_equal(scores, [first.get(key, np.nan) for key in asked.tolist()])
        for key in asked.tolist():
            assert (key in store) == (key in first)
            if key in first:
                np.testing.assert_equal(store[key], first[key])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.none() | NEAR, st.none() | st.floats(-60_000, 60_000) | st.just(float("nan"))), max_size=50
    ),
    cuts=st.lists(st.integers(0, 50), max_size=2),
    double=st.booleans(),
    unique=st.booleans(),
)
def test_a_build_is_a_stable_sort(tmp_path_factory, rows, cuts, double, unique):
    folder = tmp_path_factory.mktemp("build")
    number = pa.float64() if double else pa.float32()
    files = []
    for n, (begin, end) in enumerate(zip([0, *sorted(cuts)], [*sorted(cuts), len(rows)])):
        keys, scores = ([row[column] for row in rows[begin:end]] for column in (0, 1))
        path = folder / f"{9 - n}.parquet"  # the order given counts, not that of the names
        files.append(table(path, hash=pa.array(keys, pa.int64()), aesthetic=pa.array(scores, number)))
    kept = [(key, score) for key, score in rows if key is not None and score is not None]
    kept = [(key, score if double else float(np.float32(score))) for key, score in kept]
    if not kept:
        with pytest.raises(UserError, match="no row to build from"):
            build_store(files, folder / "kv", memory="64MB", threads=1)
        assert not (folder / "kv").exists()
        return
    kept.sort(key=lambda row: row[0])
    repeated = [row for row, before in zip(kept[1:], kept) if row[0] == before[0]]
    if unique:
        kept = list({key: (key, score) for key, score in reversed(kept)}.values())[::-1]
    built = build_store(files, folder / "kv", unique=unique, memory="64MB", threads=1)
    expected = write(folder / "expected", kept).read_bytes()
    assert (folder / "kv").read_bytes() == expected
    assert (built.rows, built.no_key) == (len(rows), sum(key is None for key, _ in rows))
    assert (built.entries, built.repeated) == (len(kept), len(repeated))
    assert built.rows == built.no_key + built.no_score + built.entries + (built.repeated if unique else 0)
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


@given(url=st.none() | st.text(), text=st.none() | st.text())
def test_the_hash_knows_no_border(url, text):
    joined = (url or "") + (text or "")
    assert hash_of(url, text) == hash_of(joined, None) == hash_of("", joined) == hashes_of([url], [text])[0]
    assert -(2**63) <= hash_of(url, text) < 2**63


def test_known_hashes():
    assert hash_of(None, None) == 0
    assert hash_of("ab", "c") == hash_of("a", "bc")
    # MurmurHash3 x64-128 of "hello" with seed 0, as in smhasher's test programs
    assert hash_of("hello", "") == struct.unpack("<q", bytes.fromhex("029bbd41b3a7d8cb"))[0]
    with pytest.raises(UserError, match="surrogate"):
        hash_of("a\ud800", "b")


@given(values=arrays(np.float64, 20, elements=st.floats(-65_000, 65_000)))
def test_scores_are_rounded_as_struct_does(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("kv") / "kv"
    with StoreWriter(path) as writer:
        writer.add(np.arange(20), values)
    assert path.read_bytes() == write(path.with_name("x"), zip(range(20), values)).read_bytes()


def test_two_scores_per_entry(tmp_path):
    source = table(tmp_path / "t.parquet", hash=[5, -7, 6], pwatermark=[0.5, 0.25, None], punsafe=[1.0, 0.125, 0.5])
    built = build_store([source], tmp_path / "kv", scores=["pwatermark", "punsafe"])
    assert (built.entries, built.no_score) == (2, 1)
    assert (tmp_path / "kv").read_bytes() == struct.pack("<qeeqee", -7, 0.25, 0.125, 5, 0.5, 1.0)
    store = ScoreStore(tmp_path / "kv", scores=2)
    assert store[5] == (0.5, 1.0)
    scores, found = store.get([5, 6])
    np.testing.assert_array_equal(scores, [[0.5, 1.0], [np.nan, np.nan]])
    assert found.tolist() == [True, False]


def test_url_and_text_in_place_of_hashes(tmp_path):
    texts = {"URL": ["http://a/1", None, "http://a/3"], "TEXT": ["star", "cat", None]}
    source = table(tmp_path / "t.parquet", **texts, AESTHETIC_SCORE=[1.0, 2.0, 3.0])
    build_store([source], tmp_path / "kv")
    store = ScoreStore(tmp_path / "kv")
    assert [store[hash_of(*pair)] for pair in (("http://a/1", "star"), (None, "cat"), ("http://a/3", ""))] == [1, 2, 3]


def test_pickles_by_its_path(tmp_path):
    store = ScoreStore(write(tmp_path / "kv", [(1, 2.0), (3, 4.0)]))
    again = pickle.loads(pickle.dumps(store))
    assert (len(again), again[3]) == (2, 4.0)


def test_a_large_store_is_not_read_to_be_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "CHECK_WHOLE", 100)
    keys = list(range(0, 20_000, 2))
    keys[1234], keys[1235] = keys[1235], keys[1234]  # between two probes
    store = ScoreStore(write(tmp_path / "kv", [(key, 1.0) for key in keys]))
    with pytest.raises(UserError, match=r"do not ascend \(entry 1,234 has 2470, entry 1,235 has 2468\)"):
        store_statistics(store)
    write(tmp_path / "kv", [(key, 1.0) for key in reversed(keys)])
    with pytest.raises(UserError, match="do not ascend"):
        ScoreStore(tmp_path / "kv")


# ------------------------------------------------------------------------------------------- damaged and wrong stores


def test_an_empty_store_has_no_keys(tmp_path, program):
    (tmp_path / "kv").touch()
    store = ScoreStore(tmp_path / "kv")
    assert len(store) == 0
    assert 0 not in store
    assert not store.get([0, 1])[1].any()
    assert store.get([])[0].shape == (0,)
    assert store_statistics(store).scores[0].mean is None
    code, out, _ = program("ldm_lab.__main__", "scores", "stats", tmp_path / "kv", "--quiet")
    assert code == 0
    assert "0 entries" in out


@pytest.mark.parametrize("lost", range(1, 10))
def test_a_store_that_is_cut(tmp_path, lost):
    path = write(tmp_path / "kv", [(key, 5.0) for key in range(9)])
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(UserError, match=f"{90 - lost} bytes are not a whole number of entries of 10 bytes"):
        ScoreStore(path)


def test_stores_that_are_none(tmp_path):
    path = write(tmp_path / "kv", [(3, 1.0), (2, 1.0)])
    with pytest.raises(UserError, match=r"do not ascend \(entry 0 has 3, entry 1 has 2\): not a score store"):
        ScoreStore(path)
    keys = np.sort(np.random.default_rng(0).integers(-(2**63), 2**63, 50))
    two = write(tmp_path / "two", [(key, 0.5, 0.25) for key in keys.tolist()], 2)
    with pytest.raises(UserError, match="or one with 2 scores per entry"):
        ScoreStore(two)
    with pytest.raises(UserError, match="no such file"):
        ScoreStore(tmp_path / "none")
    with pytest.raises(UserError, match="not a file"):
        ScoreStore(tmp_path)


@pytest.mark.parametrize("keys", [[1.0], [[1]], [2**63], [float("nan")], ["1"]])
def test_keys_that_are_none(tmp_path, keys):
    store = ScoreStore(write(tmp_path / "kv", [(1, 2.0)]))
    with pytest.raises(ValueError, match="keys are"):
        store.get(keys)


def test_a_failed_write_leaves_the_old_store(tmp_path):
    path = write(tmp_path / "kv", [(1, 2.0)])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="ascending"), StoreWriter(path) as writer:
        writer.add([1, 2], [1.0, 1.0])
        writer.add([1], [1.0])
    with pytest.raises(UserError, match="half float holds up to 65,504, not the score 65520"), StoreWriter(path) as w:
        w.add([1], [65520.0])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["kv"]


def test_tables_that_cannot_be_built_from(tmp_path):
    good = table(tmp_path / "good.parquet", hash=[1], aesthetic=[5.0])
    out = tmp_path / "kv"
    for columns, message in (
        ({"hash": [1.0], "aesthetic": [5.0]}, r"column 'hash': .*DOUBLE, which cannot hold one exactly"),
        ({"hash": ["a"], "aesthetic": [5.0]}, r"no row to build from: of 1 rows 1 have no hash"),
        ({"hash": [[1]], "aesthetic": [5.0]}, r"column 'hash': .*BIGINT\[\]; --url"),
        ({"hash": [1], "aesthetic": [True]}, r"column 'aesthetic': a score is a number"),
        ({"hash": [1], "aesthetic": [5.0], "AESTHETIC_SCORE": [4.0]}, r"--score aesthetic or --score AESTHETIC_SCORE"),
        ({"hash": [1], "HASH": [2], "aesthetic": [5.0]}, r"which one: --key hash or --key HASH"),
        ({"hash": [1], "score": [5.0]}, r"no column aesthetic or .* for 'aesthetic'; there are: hash, score"),
        ({"url": ["a"], "aesthetic": [5.0]}, r"no column caption or text"),
        ({"hash": [1], "aesthetic": [1e6]}, r"half float"),
    ):
        with pytest.raises(UserError, match=message):
            build_store([table(tmp_path / "bad.parquet", **columns)], out)
    built = build_store([good, table(tmp_path / "bad.parquet", hash=[2])], tmp_path / "counted")
    assert (built.rows, built.entries, built.no_score) == (2, 1, 1), "a file without the score is counted"
    with pytest.raises(UserError, match="which cannot hold one exactly"):  # one file of many that pandas rewrote
        build_store([good, table(tmp_path / "bad.parquet", hash=[2.0], aesthetic=[1.0])], out)
    for content in (b"", b"PAR1 no", good.read_bytes()[:-20]):
        (tmp_path / "bad.parquet").write_bytes(content)
        with pytest.raises(UserError, match=r"bad.parquet"):
            build_store([tmp_path / "bad.parquet"], out)
    for source, message in (
        (tmp_path / "*.none", "matches no file"),
        (tmp_path / "none.parquet", "no such file or folder"),
        (tmp_path / "t.csv", "t.csv: no row to build from: of 1 rows 0 have no hash, 1 have one and no score"),
    ):
        (tmp_path / "t.csv").write_text("hash,aesthetic\n1,much\n")
        with pytest.raises(UserError, match=message):
            build_store([source], out)
    with pytest.raises(UserError, match=r"good.parquet: no such column: 'score'. Known: aesthetic, hash"):
        build_store([good], out, scores=["score"])
    with pytest.raises(UserError, match="give one of these"):
        build_store([good], out, key="hash", url="hash")
    for options, message in (({"memory": "much"}, "--memory much, "), ({"threads": 0}, "--threads 0: ")):
        with pytest.raises(UserError, match=message):
            build_store([good], out, **options)
    assert not out.exists()
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_a_broken_row_group_leaves_nothing(tmp_path):
    rng = np.random.default_rng(0)
    path = table(tmp_path / "t.parquet", hash=rng.integers(-(2**63), 2**63, 50_000), aesthetic=rng.normal(5, 1, 50_000))
    content = bytearray(path.read_bytes())
    content[len(content) // 4 : len(content) // 4 * 3] = bytes(len(content) // 4 * 3 - len(content) // 4)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"t\.parquet"):
        build_store([path], tmp_path / "kv")
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.parquet"]


def test_columns_in_another_order_and_types_that_differ(tmp_path):
    a = table(tmp_path / "a.parquet", hash=pa.array([1], pa.int32()), aesthetic=pa.array([2.5], pa.float32()))
    b = table(tmp_path / "b.parquet", aesthetic=[6.00293], hash=[2**62])  # a float32 on the way would round twice
    build_store([a, b], tmp_path / "kv")
    assert (tmp_path / "kv").read_bytes() == struct.pack("<qeqe", 1, 2.5, 2**62, 6.00293)


def test_more_rows_than_the_memory_holds(tmp_path):
    duckdb.sql(
        "SELECT hash(i)::BIGINT AS hash, (i % 1000 / 100)::FLOAT AS aesthetic FROM range(1_500_000) rows(i) "
        "WHERE hash(i) < 9_000_000_000_000_000_000"
    ).write_parquet(str(tmp_path / "t.parquet"))
    with pytest.raises(UserError, match="--memory 2MB: too little to sort in"):
        build_store([tmp_path / "t.parquet"], tmp_path / "kv", memory="2MB", threads=1)
    built = build_store([tmp_path / "t.parquet"], tmp_path / "kv", memory="24MB", threads=1)
    tags = pq.read_table(tmp_path / "t.parquet")
    assert built.entries == len(tags) > 700_000
    keys, scores = (np.concatenate(part) for part in zip(*ScoreStore(tmp_path / "kv").blocks()))
    order = np.argsort(tags["hash"].to_numpy(), kind="stable")
    np.testing.assert_array_equal(keys, tags["hash"].to_numpy()[order])
    np.testing.assert_array_equal(scores[:, 0], tags["aesthetic"].to_numpy()[order].astype(np.float16))


# ------------------------------------------------------------------------------------------------- tables and command


@pytest.fixture
def small(tmp_path):
    """A store of three entries; one score is NaN."""
    entries = [(hash_of("http://a/1", "star"), 7.25), (2**62 + 1, 5.0), (-3, float("nan"))]
    return write(tmp_path / "kv", sorted(entries))


def test_a_column_of_scores(small, tmp_path, program):
    width = pa.array([1, 2, 3, 4], pa.int32())
    source = table(tmp_path / "t.parquet", hash=pa.array([2**62 + 1, None, 8, -3], pa.int64()), WIDTH=width)
    code, out, err = program(
        "ldm_lab.__main__", "scores", "get", small, "--table", source, "--out", tmp_path / "o.parquet", "--quiet"
    )
    assert code == 0, err
    assert "4 rows, 2 with a score, 2 absent" in out
    result = pq.read_table(tmp_path / "o.parquet")
    assert result.schema.names == ["hash", "WIDTH", "aesthetic"]
    assert result.schema.field("WIDTH").type == pa.int32()
    assert result["hash"].to_pylist() == [2**62 + 1, None, 8, -3]
    score, *absent, nan = result["aesthetic"].to_pylist()
    assert (score, absent) == (5.0, [None, None])
    assert np.isnan(nan)


@pytest.mark.parametrize(("name", "line"), [("t.csv", '"http://a/1","star",007'), ("t.tsv", 'http://a/1\tstar\t"07')])
def test_text_tables(small, tmp_path, name, line):
    separator = line[-4] if name == "t.tsv" else ","
    (tmp_path / name).write_text(separator.join(["url", "caption", "id"]) + f"\n{line}\n")
    assert add_scores(ScoreStore(small), tmp_path / name, tmp_path / "o.parquet") == (1, 1)
    row = pq.read_table(tmp_path / "o.parquet").to_pylist()[0]
    assert row == {"url": "http://a/1", "caption": "star", "id": line[-3:], "aesthetic": 7.25}


def test_hashes_in_a_text_table(small, tmp_path):
    (tmp_path / "t.csv").write_text(f"id,hash\na,{2**62 + 1}\nb,\nc,{2**62}\n")
    add_scores(ScoreStore(small), tmp_path / "t.csv", tmp_path / "o.parquet", names=["s"])
    assert pq.read_table(tmp_path / "o.parquet")["s"].to_pylist() == [5.0, None, None]
    (tmp_path / "t.csv").write_text("id,hash\na,4.6e18\n")
    with pytest.raises(UserError, match="column 'hash': a hash is an integer of 64 bits"):
        add_scores(ScoreStore(small), tmp_path / "t.csv", tmp_path / "o2.parquet")
    assert not (tmp_path / "o2.parquet").exists()


def test_tables_that_cannot_be_looked_up(small, tmp_path):
    store, out = ScoreStore(small), tmp_path / "o.parquet"
    good = table(tmp_path / "good.parquet", hash=list(range(50_000)))
    for source, message in (
        (table(tmp_path / "a.parquet", hash=[1.5]), "cannot hold one exactly"),
        (table(tmp_path / "b.parquet", id=[1]), "no column url"),
        (table(tmp_path / "c.parquet", url=[1], text=["a"]), "column 'url': texts are hashed"),
        (table(tmp_path / "d.parquet", hash=[1], Aesthetic=[1.0]), "has a column 'Aesthetic' already"),
        (tmp_path / "none.parquet", "no such file"),
        (small, "kv"),
    ):
        with pytest.raises(UserError, match=message):
            add_scores(store, source, out)
    content = good.read_bytes()
    for damaged in (b"", content[:-9], content[:100] + bytes(20_000) + content[20_100:]):
        good.write_bytes(damaged)
        with pytest.raises(UserError, match=r"good.parquet: (not a readable|cannot be read)"):
            add_scores(store, good, out)
    with pytest.raises(UserError, match="2 names for entries of 1"):
        add_scores(store, good, out, names=["a", "b"])
    assert not out.exists()


def test_single_look_ups(small, program):
    code, out, _ = program("ldm_lab.__main__", "scores", "get", small, "--hash", 2**62 + 1, -3)
    assert (code, out) == (0, f"{2**62 + 1}\t5.0\n-3\tnan\n")
    code, out, _ = program("ldm_lab.__main__", "scores", "get", small, "--url", "http://a/1", "--text", "star")
    assert (code, out) == (0, f"{hash_of('http://a/1', 'star')}\t7.25\n")
    code, out, _ = program("ldm_lab.__main__", "scores", "get", small, "--hash", 1, 2**70)
    assert (code, out) == (1, f"1\tabsent\n{2**70}\tabsent\n")


@pytest.mark.parametrize(
    "given",
    [
        ["get"],
        ["get", "--hash", "1", "--table", "t.csv", "--out", "o.parquet"],
        ["get", "--hash", "1", "--url", "a"],
        ["get", "--text", "a"],
        ["get", "--hash", "1", "--out", "o.parquet"],
        ["get", "--table", "t.csv"],
        ["get", "--hash", "1", "--scores", "0"],
        ["stats", "--scores", "-1"],
    ],
)
def test_options_that_do_not_go_together(small, program, given):
    code, _, err = program("ldm_lab.__main__", "scores", given[0], small, *given[1:])
    assert code == 2
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


def test_stats(tmp_path, program):
    scores = [-1.5, 0.0, 0.999, 1.0, 5.5, 5.75, 9.9, 10.0, 11.0, float("nan"), 5.0]
    path = write(tmp_path / "kv", [(max(n - 1, 0), score) for n, score in enumerate(scores)])
    stats = asdict(store_statistics(ScoreStore(path)))
    score = stats["scores"][0]
    assert score["histogram"] == {f"{k}-{k + 1}": {0: 2, 1: 1, 5: 3, 9: 1}.get(k, 0) for k in range(10)}
    assert (score["below"], score["above"], score["nan"]) == (1, 2, 1)
    assert (score["min"], score["max"]) == (-1.5, 11.0)
    assert score["mean"] == pytest.approx(np.nanmean(np.float16(scores).astype(float)))
    assert (stats["count"], stats["repeated"], stats["first_key"], stats["last_key"]) == (11, 1, 0, 9)
    code, out, _ = program("ldm_lab.__main__", "scores", "stats", path, "--json", "--quiet")
    assert code == 0
    assert json.loads(out) == stats
    code, out, _ = program("ldm_lab.__main__", "scores", "stats", path)
    assert "5-6" in out
    assert "27.27 %" in out


def test_repeats_across_blocks_are_counted(tmp_path, monkeypatch):
    path = write(tmp_path / "kv", [(key // 3, 1.0) for key in range(12)])
    monkeypatch.setattr("ldm_lab.curation.store.statistics.BATCH", 2)
    assert store_statistics(ScoreStore(path)).repeated == 8
