"""Tables that are odd but real: each is right, or refused in one line, and the same by both engines."""

import codecs
import gzip
import shutil
import struct
import sys
from datetime import UTC, datetime
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path

import pytest

from ldm_lab import __main__ as program_main
from ldm_lab.config import build
from ldm_lab.errors import UserError, run_program
from ldm_lab.rules.rule import build_rules
from ldm_lab.rules.sample import SampleRow, violated_rules

pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
pytest.importorskip("ibis")
pytest.importorskip("duckdb")

HAS_SPARK = shutil.which("java") is not None and find_spec("pyspark") is not None
SPARK = [pytest.mark.slow, pytest.mark.skipif(not HAS_SPARK, reason="Spark needs Java")]
DUCKDB = {"name": "duckdb", "threads": 1}
ENGINES = [
    pytest.param(DUCKDB, id="duckdb"),
    pytest.param({"name": "spark", "master": "local[1]"}, id="spark", marks=SPARK),
]
SCORE = {"aesthetic": {"above": 7}}
ANY = {"caption_length": {"at_least": 1}}
NOON = datetime(2020, 1, 2, 12)


def select(source, out: Path, rules: dict, engine: dict = DUCKDB, **options):
    """Return the report of a selection and the rows that it wrote, by their urls."""
    section = {"input": str(source), "out": str(out), "rules": rules, "engine": engine, "overwrite": True, **options}
    report = build("selection", section).run()
    rows = [row for path in sorted(out.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]
    return report, sorted(rows, key=lambda row: row["URL"])


def urls(*names: str, **more) -> dict:
    """Return columns with a url for each name, and a caption."""
    return {"URL": [*names], "TEXT": ["x" for _ in names], **more}


def folder(path: Path, *tables, **options) -> Path:
    path.mkdir()
    for number, table in enumerate(tables):
        table = table if isinstance(table, pa.Table) else pa.table(table)
        pq.write_table(table, path / f"{number}.parquet", **options)
    return path


# ------------------------------------------------------------------------------------------------ Parquet

TEXTS = ["7.5", " 8 ", "+1e1", "7,5", "", "nan", "8.0f", "9_000", "0x9", ".9e1", "inf", "true"]
NAMES = ["my score", "a.b", 'q"q', "it's", "select", "größe 日本", "a`b", "x,y", "b\\s", " lead", "n\nl", ";=(){}"]
MAP = pa.map_(pa.string(), pa.int64())
RIGHT = {
    "decimals beside doubles": (
        [urls("a", "b", aesthetic=[Decimal("7.25"), Decimal("6.50")]), urls("c", aesthetic=[7.125])],
        SCORE,
        {"a": {"aesthetic": 7.25}, "c": {"aesthetic": 7.125}},
    ),
    "texts of numbers": (
        [urls(*"abcdefghijkl", aesthetic=TEXTS)],
        SCORE,
        {name: {"aesthetic": score} for name, score in zip("abcjk", (7.5, 8, 10, 9, float("inf")))},
    ),
    "flags of two types": (
        [urls("a", "b", flag=[True, False]), urls("c", flag=[1])],
        ANY,
        {"a": {"flag": 1}, "b": {"flag": 0}, "c": {"flag": 1}},
    ),
    "times of two precisions": (
        [urls("a", t=pa.array([NOON], pa.timestamp("us"))), urls("b", t=pa.array([NOON], pa.timestamp("ms")))],
        ANY,
        {"a": {"t": NOON}, "b": {"t": NOON}},
    ),
    "large strings and dictionaries": (
        [
            urls("a", "b", LANGUAGE=pa.array(["en", "de"]).dictionary_encode()),
            urls("c", LANGUAGE=pa.array(["en"], pa.large_string())),
        ],
        {"language": {"keep": ["en"]}},
        {"a": {}, "c": {}},
    ),
    "nested columns": (
        [urls("a", "a", boxes=[[[1, 2]], None], m=pa.array([[("k", 1)], []], MAP), s=[{"q": 1}, None])],
        {"duplicates": {"by": "url"}},
        {"a": {"boxes": [[1, 2]], "m": [("k", 1)], "s": {"q": 1}}},
    ),
    "no rows in the first file": (
        [pa.table(urls("z", aesthetic=[1])).slice(0, 0), urls("a", "b", aesthetic=[7.5, 6])],
        SCORE,
        {"a": {"aesthetic": 7.5}},
    ),
    "unsigned sizes": (
        [urls("a", "b", WIDTH=pa.array([300, 100], pa.uint16()), HEIGHT=pa.array([300, 300], pa.uint64()))],
        {"size": {"min_side": 256}},
        {"a": {"WIDTH": 300, "HEIGHT": 300}},
    ),
    "names of all characters": (
        [urls("a", **{name: [1] for name in NAMES})],
        ANY,
        {"a": dict.fromkeys(NAMES, 1)},
    ),
    "a character of 0 and a field of 3 MB": (
        [{"URL": ["a", "b"], "TEXT": ["x\0y", "x" * 3_000_000]}],
        ANY,
        {"a": {"TEXT": "x\0y"}, "b": {"TEXT": "x" * 3_000_000}},
    ),
    "true and false are no score": (
        [urls("a", punsafe=[False]), urls("b", punsafe=[0.25])],
        {"punsafe": {"below": 0.5}},
        {"a": {"punsafe": 0}, "b": {"punsafe": 0.25}},
    ),
}  # fmt: skip
REFUSED = {
    "two columns of one name": (
        [pa.table([pa.array(["a"])] * 3, names=["URL", "TEXT", "TEXT"])],
        r"0\.parquet: the column 'TEXT' is there twice",
    ),
    "a time as a score": (
        [urls("a", aesthetic=[NOON])],
        r"0\.parquet: the column 'aesthetic' is timestamp.*; for 'aesthetic' a number is needed",
    ),
    "lists as captions": (
        [{"URL": ["a"], "TEXT": [["x", "y"]]}],
        r"the column 'TEXT' is array<string>; for 'caption' a text is needed",
    ),
    "bytes as addresses": ([{"URL": [b"a"], "TEXT": ["x"]}], r"the column 'URL' is binary; for 'url' a text is needed"),
    "times with and without a zone": (
        [urls("a", t=pa.array([NOON], pa.timestamp("us"))), urls("b", t=pa.array([NOON.replace(tzinfo=UTC)]))],
        r"the column 't' has types that do not go together: timestamp\[us\] in .*, timestamp\[us, tz=UTC\] in",
    ),
    "a name of our own": ([urls("a", ldm_lab_place=[1])], "'ldm_lab_place' has a name of the kind ldm_lab_"),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_parquet_that_is_read(tmp_path, engine_of, name):
    tables, rules, expected = RIGHT[name]
    rules = {**rules, **({"aesthetic": SCORE["aesthetic"]} if rules is SCORE else {})}
    _, rows = select(folder(tmp_path / "in", *tables), tmp_path / "out", rules, engine_of)
    assert [row["URL"] for row in rows] == [*expected]
    for row, wanted in zip(rows, expected.values(), strict=True):
        assert {key: row[key] for key in wanted} == wanted


@pytest.fixture(params=ENGINES)
def engine_of(request) -> dict:
    return request.param


@pytest.mark.parametrize("name", REFUSED)
def test_parquet_that_is_refused(tmp_path, name):
    tables, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as caught:
        select(folder(tmp_path / "in", *tables), tmp_path / "out", {**ANY, **SCORE} if "score" in name else ANY)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [pa.float16(), pa.timestamp("ns"), pa.list_(pa.float16())])
def test_types_that_spark_does_not_have(tmp_path, kind):
    value = {"halffloat": 7.5, "timestamp[ns]": NOON}.get(str(kind), [7.5])
    source = folder(tmp_path / "in", urls("a", odd=pa.array([value], kind)))
    _, rows = select(source, tmp_path / "out", ANY)
    assert rows[0]["odd"] == value
    spark = build("engine", {"name": "spark"})
    from ldm_lab.curation.metadata.inputs import find_files

    with pytest.raises(UserError, match=r"Spark cannot read the column 'odd', which is .*engine\.name=duckdb can"):
        spark.read(find_files(str(source), "input"))


def test_every_compression(tmp_path):
    source = folder(tmp_path / "in", urls("a"))
    for kind in ("zstd", "gzip", "brotli", "lz4", "none"):
        pq.write_table(pa.table(urls(kind)), source / f"{kind}.parquet", compression=kind)
    assert len(select(source, tmp_path / "out", ANY)[1]) == 6


@pytest.mark.parametrize("text", TEXTS)
def test_samples_take_the_same_texts_for_numbers(text):
    kept = not violated_rules(build_rules(SCORE), SampleRow({"aesthetic": text}))
    assert kept == (text in ("7.5", " 8 ", "+1e1", ".9e1", "inf"))


# ------------------------------------------------------------------------------------------------ text files

PLAIN = "url,caption\nhttp://a/1,é\nhttp://a/2,日本😀\n"
PARTS = b"".join(gzip.compress(line, mtime=0) for line in (b"http://a/1\tx\n", b"http://a/2\tx\n"))
BOTH = {"http://a/1": "é", "http://a/2": "日本😀"}
UTF32 = codecs.BOM_UTF32_LE + PLAIN.encode("utf-32-le")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("utf16.csv", PLAIN.encode("utf-16"), BOTH),
        ("utf16.tsv", codecs.BOM_UTF16_BE + PLAIN.replace(",", "\t").encode("utf-16-be"), BOTH),
        ("utf32.csv", UTF32, BOTH),
        ("utf16.csv.gz", gzip.compress(PLAIN.encode("utf-16"), mtime=0), BOTH),
        ("utf16.jsonl", '{"url": "http://a/1", "caption": "é"}\r\n'.encode("utf-16"), {"http://a/1": "é"}),
        ("two.tsv.gz", PARTS, dict.fromkeys(BOTH, "x")),
        ("not_compressed.csv.gz", PLAIN.encode(), BOTH),
        ("compressed.csv", gzip.compress(PLAIN.encode(), mtime=0), BOTH),
        ("blanks.csv", b"url, caption\r\nhttp://a/1,x\r\n", {"http://a/1": "x"}),
        ("index.csv", b",url,caption\n0,http://a/1,x\n", {"http://a/1": "x"}),
        ("index2.csv", b"Unnamed: 0,url,caption\n0,http://a/1,x\n", {"http://a/1": "x"}),
        ("zero.csv", b"url,caption\nhttp://a/1,x\0y\n", {"http://a/1": "x\0y"}),
        ("windows.csv", b'url,caption\r\nhttp://a/1,"a\r\nb"\r\n', {"http://a/1": "a\nb"}),
        ("lines.ndjson", b'{"url": "http://a/1", "caption": "x"}\n', {"http://a/1": "x"}),
        ("UPPER.CSV", PLAIN.encode(), BOTH),
    ],
)  # fmt: skip
def test_text_files_that_are_read(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    report, rows = select(tmp_path / name, tmp_path / "out", ANY)
    assert {row["URL"]: row["TEXT"] for row in rows} == expected and set(rows[0]) == {"URL", "TEXT"}
    assert not report.bad_lines
    if name.startswith("index"):
        assert any(note.startswith("left out, as an index of pandas'") for note in report.notes)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("twice.csv", b"url,caption,caption\nhttp://a/1,x,y\n", "the column 'caption' is there twice"),
        ("mac.csv", b"url,caption\rhttp://a/1,x\rhttp://a/2,y\r", "its lines end in carriage returns alone"),
        ("t.csv", b"PAR1\x15\x04\x15", r"is a Parquet file; its name has to end in \.parquet"),
        ("cut.csv.gz", gzip.compress(bytes(range(256)) * 900, mtime=0)[:500], "not a readable text file"),
        (
            "half.csv",
            codecs.BOM_UTF16_LE + "url,caption\nhttp://a/1,x\n".encode("utf-16-le")[:-1],
            "not a readable text",
        ),
        ("semicolons.csv", b"url;caption\nhttp://a/1;x\n", "no column caption or text .*there are: url;caption"),
        ("names.csv", b"url,caption\n", "no row in it"),
        ("array.jsonl", b'[{"url": "http://a/1"}]\n', r"no row in it: 1 bad line left out: not a JSON object"),
    ],
)
def test_text_files_that_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        select(tmp_path / name, tmp_path / "out", ANY)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_bad_lines_in_utf16_are_counted_too(tmp_path):
    lines = [
        "url,caption",
        "http://a/1,x",
        "http://a/2,\ud800",
        "http://a/3",
        "http://a/4," + "é" * (2 * 2**20),
        "http://a/5,y",
    ]
    (tmp_path / "t.csv").write_bytes(codecs.BOM_UTF16_LE + "\n".join(lines).encode("utf-16-le", "surrogatepass"))
    report, rows = select(tmp_path / "t.csv", tmp_path / "out", ANY)
    assert [row["URL"][-1] for row in rows] == ["1", "5"]
    assert report.bad_lines == {"not UTF-8": 1, "1 field instead of 2": 1, "over 2 MB": 1}


def test_a_column_that_a_text_file_lacks_is_said_of_that_file(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text("url,caption,WIDTH\nhttp://a/1,x,5\n")
    (tmp_path / "in" / "b.csv").write_text("url,caption\nhttp://a/2,y\n")
    report, _ = select(tmp_path / "in", tmp_path / "out", ANY)
    assert f"the column WIDTH is not in 1 of 2 files, such as {tmp_path}/in/b.csv: unknown" in report.notes


# ------------------------------------------------------------------------------------------------ stores of scores


@pytest.fixture
def program(monkeypatch, capsys):
    """Run a command in this process: `program("scores", ...)` -> (exit code, out, err)."""

    def call(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ldm_lab", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            run_program(program_main.main)
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return call


NUMBERS = {-5: 9.0, 7: 8.0, -(2**63) + 3: 7.5}  # signed hash -> score
UNSIGNED = [key % 2**64 for key in NUMBERS]
STORE = b"".join(struct.pack("<qe", key, NUMBERS[key]) for key in sorted(NUMBERS))
LINES = [f"{key},{score}" for key, score in zip(UNSIGNED, NUMBERS.values())]


def quoted(line: str) -> str:
    return ",".join(f'"{value}"' for value in [*line.split(","), "a\nb"])


@pytest.mark.parametrize(
    "name", ["u64", "mixed", "texts", "decimal", "t.csv", "bom.csv", "quoted.csv", "t.tsv", "t.jsonl", "utf16.csv.gz"]
)
def test_a_store_is_the_same_of_whatever_table(program, tmp_path, name):
    scores = list(NUMBERS.values())
    tables = {
        "u64": [{"hash": pa.array(UNSIGNED, pa.uint64()), "aesthetic": scores}],
        "mixed": [
            {"hash": pa.array(UNSIGNED[:1], pa.uint64()), "aesthetic": pa.array([9], pa.int8())},
            {"aesthetic": scores[1:], "hash": [*NUMBERS][1:]},
        ],
        "texts": [{"hash": [*map(str, UNSIGNED)], "aesthetic": [*map(str, scores)]}],
        "decimal": [{"hash": pa.array([*map(Decimal, UNSIGNED)], pa.decimal128(20, 0)), "aesthetic": scores}],
    }
    texts = {
        "t.csv": "\r\n".join(["hash,aesthetic", *LINES]).encode(),
        "bom.csv": "\ufeff".encode() + "\n".join(["hash,aesthetic", *LINES, ""]).encode(),
        "quoted.csv": "\n".join(['"hash","aesthetic","text"', *map(quoted, LINES)]).encode(),
        "t.tsv": "\n".join(["hash\taesthetic", *(line.replace(",", "\t") for line in LINES)]).encode(),
        "t.jsonl": "\n".join('{"hash": ' + line.replace(",", ', "aesthetic": ') + "}" for line in LINES).encode(),
        "utf16.csv.gz": gzip.compress("\n".join(["hash,aesthetic", *LINES]).encode("utf-16")),
    }  # fmt: skip
    source = tmp_path / name
    if name in tables:
        folder(source, *tables[name])
    else:
        source.write_bytes(texts[name])
    code, out, err = program("scores", "build", source, "--out", tmp_path / "kv", "--quiet")
    assert code == 0, err
    assert (tmp_path / "kv").read_bytes() == STORE and "3 entries of 3 rows" in out


def test_what_a_text_table_lacks_is_counted(program, tmp_path):
    lines = ["hash,aesthetic", "1,nan", "2,", ",5", "none,5", "3,much", "4,5,6", "5,6.5", "5,7.5", f"{2**64},5"]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    code, out, err = program("scores", "build", tmp_path / "t.csv", "--out", tmp_path / "kv", "--quiet")
    assert code == 0, err
    for said in (
        "3 entries of 8 rows", "3 rows without a hash left out", "2 rows without a score left out",
        "1 repeated hashes kept; look-ups answer the first", "1 scores are NaN",
        "1 bad line left out: 3 fields instead of 2 (" + str(tmp_path / "t.csv") + ", line 7)",
    ):  # fmt: skip
        assert said in out, out
    code, out, _ = program("scores", "get", tmp_path / "kv", "--hash", 5, 1)
    assert code == 0 and out == "5\t6.5\n1\tnan\n"


@pytest.mark.parametrize("kind", ["u64", "texts", "dictionary", "decimal", "t.csv", "utf16.tsv"])
def test_look_ups_take_unsigned_hashes_and_odd_files(program, tmp_path, kind):
    (tmp_path / "kv").write_bytes(STORE)
    asked = [*UNSIGNED, 8]
    columns = {
        "u64": pa.array(asked, pa.uint64()),
        "texts": pa.array([*map(str, asked)]),
        "dictionary": pa.array([*map(str, asked)]).dictionary_encode(),
        "decimal": pa.array([*map(Decimal, asked)], pa.decimal128(20, 0)),
    }
    source = tmp_path / (kind if "." in kind else f"{kind}.parquet")
    if kind in columns:
        pq.write_table(pa.table({"hash": columns[kind]}), source)
    else:
        separator = "," if kind == "t.csv" else "\t"
        lines = [f"id{separator}hash", *(f"x{separator}{key}" for key in asked), "one"]
        source.write_bytes("\n".join(lines).encode("utf-16" if "16" in kind else "utf-8-sig"))
    out = tmp_path / "o.parquet"
    code, said, err = program("scores", "get", tmp_path / "kv", "--table", source, "--out", out, "--quiet")
    assert code == 0, err
    assert "4 rows, 3 with a score, 1 absent" in said
    assert ("1 bad line left out: 1 field instead of 2" in said) == ("." in kind)
    assert pq.read_table(out)["aesthetic"].to_pylist() == [*NUMBERS.values(), None]
    code, said, _ = program("scores", "get", tmp_path / "kv", "--hash", UNSIGNED[0])
    assert (code, said) == (0, f"{UNSIGNED[0]}\t9.0\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["kv", "o.parquet", source.name])


# ------------------------------------------------------------------------------------------------ texts for numbers


def test_texts_that_are_no_numbers_are_not_lost(tmp_path, engine_of):
    labels = {"hash": ["d41d8cd9", "7"], "prediction": ["cat", "dog"], "similarity": ["0.3", "n/a"]}
    report, rows = select(folder(tmp_path / "in", urls("a", "b", **labels)), tmp_path / "out", ANY, engine_of)
    assert [(row["hash"], row["prediction"], row["similarity"]) for row in rows] == [
        ("d41d8cd9", "cat", 0.3),
        ("7", "dog", None),
    ]
    assert report.notes == [
        "1 values of the column hash are texts that are no numbers; it is written as it is",
        "2 values of the column prediction are texts that are no numbers; it is written as it is",
    ]


def test_the_highest_of_scores_in_a_text_file(tmp_path, engine_of):
    (tmp_path / "tags.tsv").write_text("hash\taesthetic\n1\t9.5\n1\t10.25\n2\tnan\n2\t7.5\n")
    source = folder(tmp_path / "in", urls("a", "b", hash=[1, 2]))
    _, rows = select(source, tmp_path / "out", SCORE, engine_of, tags={"aesthetic": str(tmp_path / "tags.tsv")})
    assert [row["aesthetic"] for row in rows] == [10.25, 7.5]


# ------------------------------------------------------------------------------------------------ folders and lists


def test_what_is_left_aside_in_a_folder_is_said(tmp_path):
    source = folder(tmp_path / "in", urls("a"))
    (source / "._0.parquet").write_bytes(b"\0\5\x16\7")
    (source / "more.csv").write_text("url,caption\nhttp://a/1,x\n")
    (source / "README.txt").write_text("about it\n")
    folder(source / "LANGUAGE=en", urls("b"))
    report, rows = select(source, tmp_path / "out", ANY)
    assert [row["URL"] for row in rows] == ["a"]
    assert report.notes == [f"3 files of {source} are left aside, such as {source}/._0.parquet"]
    report, rows = select(f"{source}/**/*.parquet", tmp_path / "out", ANY)
    assert [row["URL"] for row in rows] == ["a", "b"]
    assert report.notes == ["what folders are called is no column of the table: LANGUAGE=en"]
    (tmp_path / "above").mkdir()
    folder(tmp_path / "above" / "x", urls("b"))
    with pytest.raises(
        UserError, match=r"no \.parquet, .* in this folder; below it .* write .*/above/\*\*/\*\.parquet"
    ):
        select(tmp_path / "above", tmp_path / "out", ANY)


def test_a_file_that_is_given_twice_is_read_once(tmp_path):
    source = folder(tmp_path / "in", urls("a"), urls("b"))
    section = {"input": [str(source), f"{source}/0.parquet", f"{source}/../in/*.parquet"], "out": str(tmp_path / "out")}
    report = build("selection", {**section, "rules": ANY, "engine": DUCKDB}).run()
    assert report.rows == 2 and report.notes == ["3 files are given more than once, and read once"]
