"""Tables as people have them: files of other types and columns, unsigned hashes; the same rows from both engines."""

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from ldm_lab import __main__ as program_main
from ldm_lab.config import build, read
from ldm_lab.errors import UserError, run_program

pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
pytest.importorskip("ibis")
pytest.importorskip("duckdb")

ROOT = Path(__file__).resolve().parents[1]
CASES = ROOT / "tests" / "data" / "cases" / "metadata"
HAS_SPARK = shutil.which("java") is not None and find_spec("pyspark") is not None
SPARK = [pytest.mark.slow, pytest.mark.skipif(not HAS_SPARK, reason="Spark needs Java")]
ENGINES = [
    pytest.param({"name": "duckdb", "threads": 1}, id="duckdb"),
    pytest.param({"name": "spark", "master": "local[1]"}, id="spark", marks=SPARK),
]


@pytest.fixture(params=ENGINES)
def engine(request) -> dict:
    return request.param


@pytest.fixture
def program(monkeypatch, capsys):
    """Run a command in this process: `program("select", ...)` -> (exit code, out, err)."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ldm_lab", *words])
        with pytest.raises(SystemExit) as exit_:
            run_program(program_main.main)
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return call


def select(recipe: str, engine: dict, out: Path, *overrides: str):
    """Return the report of a recipe and the rows that it wrote."""
    config = read(str(ROOT / "configs" / "select" / f"{recipe}.yaml"), [f"out={out}", *overrides])
    return written(build("selection", config | {"engine": engine, "overwrite": True}))


def selected(table: Path, engine: dict, out: Path, rules: dict, **options):
    """Return the report of a selection and the rows that it wrote."""
    section = {"input": str(table), "out": str(out), "rules": rules, "engine": engine, "overwrite": True, **options}
    return written(build("selection", section))


def written(selection):
    report = selection.run()
    paths = sorted(selection.out.glob("part-*.parquet"))
    return report, [row for path in paths for row in pq.read_table(path).to_pylist()]


def write(folder: Path, *tables: dict) -> Path:
    """Write a folder of Parquet files."""
    folder.mkdir(exist_ok=True)
    for number, table in enumerate(tables):
        pq.write_table(pa.table(table), folder / f"part-{number}.parquet")
    return folder


# ------------------------------------------------------------------------------------------------ types and columns


def test_whole_numbers_in_the_first_file_round_no_other(tmp_path, engine):
    report, rows = select("laion_aesthetic", engine, tmp_path / "out", f"input={CASES / 'inttype'}")
    assert (report.rows, report.kept) == (8, 6)
    assert sorted(row["aesthetic"] for row in rows) == [7.4, 7.6, 8, 8.4, 8.6, 9]


def test_a_column_of_nothing_in_the_first_file(tmp_path, engine):
    report, rows = select("laion_aesthetic", engine, tmp_path / "out", f"input={CASES / 'nulltype'}")
    assert (report.rows, report.kept) == (8, 4)
    assert sorted(row["aesthetic"] for row in rows) == [7.4, 7.6, 8.4, 8.6]


def test_every_kind_of_difference_between_files(tmp_path, engine):
    """Types, order, case, a column too many or too few, pandas' index, texts that hold numbers."""
    nan = float("nan")
    table = write(
        tmp_path / "in",
        {"URL": ["a", "b"], "TEXT": ["x", "y"], "aesthetic": pa.array([5, 9], pa.int8())},
        {"aesthetic": pa.array([7.25, nan], pa.float32()), "TEXT": ["x", "y"], "URL": ["c", "d"], "extra": [1, None]},
        {"URL": ["e", "f"], "TEXT": ["x", "y"], "aesthetic": ["7.7", "none"], "__index_level_0__": [0, 1]},
        {"url": ["g", "h"], "Text": ["x", "y"], "AESTHETIC": [8.5, 6.5]},
        {"URL": ["i"], "TEXT": pa.array(["x"]).dictionary_encode()},
        {"URL": pa.array(["j"], pa.large_string()), "TEXT": [None], "aesthetic": pa.array([8], pa.uint64())},
    )
    report, rows = selected(table, engine, tmp_path / "out", {"aesthetic": {"above": 7}})
    assert [(row["URL"], row["aesthetic"]) for row in sorted(rows, key=lambda row: row["URL"])] == [
        ("b", 9), ("c", 7.25), ("e", 7.7), ("g", 8.5), ("j", 8),
    ]  # fmt: skip
    assert set(rows[0]) == {"URL", "TEXT", "aesthetic", "extra"}
    assert report.as_dict()["rules"]["aesthetic"]["reasons"] == {"aesthetic": 2, "missing_tag": 3}
    assert any("the column extra is not in 5 of 6 files" in note for note in report.notes)


def test_the_order_of_the_input_stays(tmp_path):
    tables = [{"URL": [f"{n}"], "aesthetic": [n if n % 3 else n + 0.5]} for n in range(20)]
    _, rows = selected(write(tmp_path / "in", *tables), {"name": "duckdb"}, tmp_path / "out", {})
    expected = sorted(f"part-{n}.parquet" for n in range(20))
    assert [f"part-{row['URL']}.parquet" for row in rows] == expected


def test_large_whole_numbers_beside_unsigned_ones_stay_exact(tmp_path, engine):
    table = write(
        tmp_path / "in",
        {"URL": ["a"], "id": pa.array([2**64 - 1], pa.uint64()), "n": pa.array([2**32 - 1], pa.uint32())},
        {"URL": ["b"], "id": pa.array([-(2**63)], pa.int64()), "n": pa.array([-1], pa.int32())},
    )
    _, rows = selected(table, engine, tmp_path / "out", {})
    assert {row["URL"]: (int(row["id"]), row["n"]) for row in rows} == {
        "a": (2**64 - 1, 2**32 - 1),
        "b": (-(2**63), -1),
    }


def test_types_without_anything_in_common_are_named(tmp_path):
    table = write(tmp_path / "in", {"URL": ["a"], "n": [1]}, {"URL": ["b"], "n": [[1, 2]]})
    with pytest.raises(
        UserError, match=r"the column 'n' has types that do not go together: int64 in .*part-0"
    ) as caught:
        selected(table, {"name": "duckdb"}, tmp_path / "out", {})
    assert "\n" not in str(caught.value)


def test_releases_of_swapped_and_other_sizes_are_not_mixed(tmp_path):
    sizes = {"URL": ["a"], "TEXT": ["x"], "WIDTH": [300], "HEIGHT": [400]}
    table = write(tmp_path / "in", sizes | {"hash": [1]}, sizes | {"SAMPLE_ID": [1]})
    rules = {"size": {"min_side": 256}}
    with pytest.raises(UserError, match=r"part-1\.parquet has other columns than .*part-0\.parquet: SAMPLE_ID, hash"):
        selected(table, {"name": "duckdb"}, tmp_path / "out", rules)
    assert selected(table, {"name": "duckdb"}, tmp_path / "out", rules, swapped_sizes=False)[0].kept == 2


@pytest.mark.parametrize("flags", [[], pytest.param(["--spark", "local[1]"], marks=SPARK)], ids=["duckdb", "spark"])
@pytest.mark.parametrize(("case", "counts"), [("inttype", [1, 3, 3, 1]), ("nulltype", [0, 2, 2, 0])])
def test_statistics_count_every_file_by_its_own_numbers(program, tmp_path, flags, case, counts):
    code, _, err = program("statistics", f"t={CASES / case}", "--out", str(tmp_path / "out"), "--samples", "0", *flags)
    assert code == 0, err
    histogram = json.loads((tmp_path / "out" / "histogram.json").read_text())["collections"]["t"]
    assert [histogram["buckets"][name] for name in ("6-7", "7-8", "8-9", "9-10")] == counts
    assert histogram["missing"] == 8 - sum(counts)


def test_a_store_of_scores_takes_such_files(program, tmp_path):
    for case, lines in (("inttype", {"1": "8.0", "10": "7.3984375"}), ("nulltype", {"10": "7.3984375"})):
        store = str(tmp_path / case)
        assert program("scores", "build", str(CASES / case), "--out", store, "--quiet")[0] == 0
        code, out, _ = program("scores", "get", store, "--hash", *lines)
        assert code == 0 and dict(line.split("\t") for line in out.splitlines()) == lines


@pytest.mark.parametrize("case", ["inttype", "nulltype"])
def test_tags_in_such_files(tmp_path, engine, case):
    table = write(tmp_path / "in", {"URL": ["a", "b", "c"], "TEXT": ["x"] * 3, "hash": [10, 13, 2]})
    _, rows = selected(
        table, engine, tmp_path / "out", {"aesthetic": {"above": 7}}, tags={"aesthetic": str(CASES / case)}
    )
    expected = [("a", 7.4), ("b", 8.6), ("c", 9)][: 3 if case == "inttype" else 2]
    assert sorted((row["URL"], row["aesthetic"]) for row in rows) == expected


# ------------------------------------------------------------------------------------------------ hashes


def test_unsigned_hashes_meet_signed_tags(tmp_path, engine):
    tags = f"tags.aesthetic={CASES / 'u64tags'}"
    report, rows = select("laion_aesthetic", engine, tmp_path / "out", f"input={CASES / 'u64join'}", tags)
    assert (report.rows, report.kept) == (4, 4)
    assert sorted(row["hash"] for row in rows) == [-(2**63) + 3, -5, 7, 9], "as LAION writes them"


def test_signed_hashes_meet_unsigned_tags_and_texts_of_either(tmp_path, engine):
    signed = [-5, 7, -(2**63) + 3, None]
    unsigned = [None if one is None else one % 2**64 for one in signed]
    rules = {"aesthetic": {"above": 7}, "duplicates": {"by": "hash"}}
    urls = {"URL": list("abcd"), "TEXT": ["x"] * 4}
    write(tmp_path / "signed", urls | {"hash": signed})
    write(tmp_path / "mixed", urls | {"hash": signed}, urls | {"hash": pa.array(unsigned, pa.uint64())})
    lines = ["URL\tTEXT\thash", *(f"{url}\tx\t{number}" for url, number in zip("abcd", unsigned))]
    (tmp_path / "texts.tsv").write_text("\n".join(lines) + "\n")
    write(tmp_path / "tags", {"hash": pa.array(unsigned, pa.uint64()), "aesthetic": [9, 8, 7.5, 9]})
    for table in ("signed", "mixed", "texts.tsv"):
        _, rows = selected(
            tmp_path / table, engine, tmp_path / "out", rules, tags={"aesthetic": str(tmp_path / "tags")}
        )
        assert sorted((row["URL"], row["hash"]) for row in rows) == list(zip("abc", signed)), table


# ------------------------------------------------------------------------------------------------ text files

PLAIN = {"caption_length": {"at_least": 1}}
DUCKDB = {"name": "duckdb", "threads": 1}


@pytest.mark.parametrize(("name", "reason"), [("cr", "a stray carriage return"), ("many", "3 fields instead of 2")])
def test_a_bad_line_is_counted_and_the_others_are_kept(program, tmp_path, name, reason):
    table = CASES / "tsv" / f"{name}.tsv"
    command = ["select", "--config", str(ROOT / "configs/select/cc12m.yaml"), f"input={table}", f"out={tmp_path}/out"]
    code, out, err = program(*command)
    assert code == 0, err
    assert f"1 bad line left out: {reason} ({table}, line 6)" in out and "5 of 10 rows kept" in out
    assert sorted(row["TEXT"] for row in pq.read_table(tmp_path / "out").to_pylist()) == [f"cap {n}" for n in range(5)]
    report = json.loads((tmp_path / "out" / "_report.json").read_text())
    assert report["bad_lines"] == {reason: 1} and report["rows"] == 10
    code, _, err = program(*command, "bad_lines=error", "overwrite=true")
    assert code == 2 and f"{table}, line 6: {reason}" in err and err.count("\n") == 1


def test_every_kind_of_bad_line(tmp_path, engine):
    good = [f"http://a/{number}\tcaption {number}" for number in range(3)]
    bad = ["http://b/1", "http://b/2\tx\ty", "http://b/3\tx\ry", "http://b/4\t" + "x" * (2 * 2**20)]
    lines = [good[0], bad[0], bad[1], "", good[1], bad[2], bad[3], good[2]]
    raw = b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\nhttp://b/5\tcaf\xe9\r\n"
    (tmp_path / "x.tsv").write_bytes(raw)
    report, rows = selected(tmp_path / "x.tsv", engine, tmp_path / "out", PLAIN)
    assert sorted(f"{row['URL']}\t{row['TEXT']}" for row in rows) == good
    assert report.bad_lines == {
        "1 field instead of 2": 1, "3 fields instead of 2": 1, "a stray carriage return": 1, "over 2 MB": 1,
        "not UTF-8": 1,
    }  # fmt: skip
    assert any(f"not UTF-8 ({tmp_path / 'x.tsv'}, line 9)" in note for note in report.notes)


def test_the_first_line_may_be_a_bad_one(tmp_path):
    (tmp_path / "x.tsv").write_text("http://a/0\tx\ty\n" + "".join(f"http://a/{n}\tz\n" for n in range(1, 4)))
    report, rows = selected(tmp_path / "x.tsv", DUCKDB, tmp_path / "out", PLAIN)
    assert len(rows) == 3 and report.bad_lines == {"3 fields instead of 2": 1}


def test_quoted_fields_of_a_csv(tmp_path, engine):
    text = (
        '"url","caption"\n'
        'http://a/1,"over\n\ntwo lines, ""quoted"""\n'
        'http://a/2,a 5" pipe\n'
        'http://b/1,"never ends\n'
        "http://a/3,after it\n"
        'http://b/2,"x"y\n'
        f'http://a/4,"{"long " * 40_000}"\n'
        "http://b/3,a,b\n"
    )
    (tmp_path / "x.csv").write_text(text)
    report, rows = selected(tmp_path / "x.csv", engine, tmp_path / "out", PLAIN)
    assert {row["URL"][-1]: row["TEXT"][:30] for row in rows} == {
        "1": 'over\n\ntwo lines, "quoted"', "2": 'a 5" pipe', "3": "after it", "4": ("long " * 6),
    }  # fmt: skip
    assert report.bad_lines == {"text beside a quoted field": 2, "3 fields instead of 2": 1}
    (tmp_path / "y.csv").write_text('url,caption\nhttp://b/1,"never ends\nhttp://a/1,x\nhttp://a/2,y\n')
    report, rows = selected(tmp_path / "y.csv", engine, tmp_path / "out", PLAIN)
    assert len(rows) == 2 and report.bad_lines == {"a quotation mark without its end": 1}


def test_lists_of_urls(tmp_path, engine):
    lines = ["http://a/1.jpg", " https://a/2.jpg ", "", "no address", '"http://a/3.jpg"', "http://a/1.jpg", ""]
    (tmp_path / "urls.txt").write_text("\n".join(lines))
    report, rows = selected(tmp_path / "urls.txt", engine, tmp_path / "out", {"duplicates": {"by": "url"}})
    assert sorted(row["URL"] for row in rows) == ["http://a/1.jpg", "https://a/2.jpg"] and set(rows[0]) == {"URL"}
    assert (report.rows, report.bad_lines) == (3, {"no url": 2})


def test_json_lines(tmp_path, engine):
    lines = [
        {"url": "http://a/1", "caption": "x", "aesthetic": 8, "hash": 2**64 - 5, "more": [1, {"a": "é"}]},
        {"url": "http://a/2", "caption": None, "aesthetic": 7.5, "hash": 7},
        {"aesthetic": 3, "caption": "z", "url": "http://a/3"},
    ]
    text = "\n".join([*(json.dumps(line) for line in lines), "{broken", "[1]", '{"url": "\\ud800"}', ""])
    (tmp_path / "x.jsonl").write_text(text)
    report, rows = selected(tmp_path / "x.jsonl", engine, tmp_path / "out", {"aesthetic": {"above": 7}})
    rows.sort(key=lambda row: row["URL"])
    assert [(row["URL"], row["TEXT"], row["aesthetic"], row["hash"]) for row in rows] == [
        ("http://a/1", "x", 8, -5), ("http://a/2", None, 7.5, 7),
    ]  # fmt: skip
    assert json.loads(rows[0]["more"]) == [1, {"a": "é"}]
    assert report.bad_lines == {"not JSON": 2, "not a JSON object with fields": 1}


def test_text_files_of_a_split_table(tmp_path):
    """`split` leaves the names to the first part; other parts may have columns of their own."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text("url,caption,WIDTH\nhttp://a/1,x,5\n")
    (tmp_path / "in" / "b.csv").write_text("http://a/2,y,6\n")
    (tmp_path / "in" / "c.csv").write_text("WIDTH,url\n7,http://a/3\n")
    (tmp_path / "in" / "README.txt").write_text("About these tables.\n")
    _, rows = selected(tmp_path / "in", DUCKDB, tmp_path / "out", {})
    assert [(row["URL"][-1], row["TEXT"], row["WIDTH"]) for row in rows] == [
        ("1", "x", 5),
        ("2", "y", 6),
        ("3", None, 7),
    ]


def test_statistics_of_text_files(program, tmp_path):
    (tmp_path / "x.tsv").write_text("url\taesthetic\nhttp://a/1\t5.5\nhttp://a/2\nhttp://a/3\t6.5\n")
    code, out, err = program("statistics", str(tmp_path / "x.tsv"), "--out", str(tmp_path / "out"))
    assert code == 0, err
    assert "1 bad line left out: 1 field instead of 2" in out and "rows 2" in out


def test_a_text_file_without_a_good_line(program, tmp_path):
    (tmp_path / "x.jsonl").write_text("<html>\n")
    config = str(ROOT / "configs" / "select" / "cc12m.yaml")
    code, _, err = program("select", "--config", config, f"input={tmp_path}/x.jsonl", f"out={tmp_path}/out")
    assert code == 2 and "x.jsonl: no row in it: 1 bad line left out: not JSON" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ Spark's settings


def test_dotted_settings_reach_spark():
    words = [
        "engine={name: spark}",
        "engine.config.spark.sql.shuffle.partitions=7",
        "engine.config.spark.speculation=true",
    ]
    config = read(str(ROOT / "configs" / "select" / "cc12m.yaml"), ["input=x", "out=y", *words])
    assert build("engine", config["engine"]).config == {
        "spark.sql.shuffle.partitions": "7",
        "spark.speculation": "true",
    }
    for wrong, message in (
        ({"foo": 1}, r"engine\.config\.foo: the settings of Spark begin with spark\."),
        ({"spark": {"sql": {"caseSensitive": False}}}, r"config\.spark\.sql\.caseSensitive: is true here"),
    ):
        with pytest.raises(UserError, match=message):
            build("engine", {"name": "spark", "config": wrong})


@pytest.mark.skipif(find_spec("pyspark") is None, reason="needs pyspark")
@pytest.mark.parametrize(
    ("master", "message"),
    [
        ("spark://127.0.0.1:1", r"engine\.master: spark://127\.0\.0\.1:1 cannot be reached \(.*refused"),
        ("spark://nowhere", r"spark://host:port is needed"),
        ("yarn", r"for yarn HADOOP_CONF_DIR or YARN_CONF_DIR has to say"),
    ],
)
def test_a_master_that_cannot_be_reached_is_not_a_missing_java(tmp_path, monkeypatch, master, message):
    for name in ("HADOOP_CONF_DIR", "YARN_CONF_DIR"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(UserError, match=message) as caught,
        build("engine", {"name": "spark", "master": master}).open(tmp_path),
    ):
        pass
    assert "Java" not in str(caught.value)


def test_rules_judge_the_caption_that_is_written(tmp_path, engine):
    slurs = {"slurs": {"file": str(CASES / "slurs.txt")}}
    _, rows = selected(CASES / "ct", engine, tmp_path / "out", slurs)
    assert sorted(row["TEXT"] for row in rows) == ["nice four", "nice one", "nice two"]
