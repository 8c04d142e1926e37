"""`python -m ldm_lab select`: the program, its output for img2dataset, its report, and everything that goes wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ldm_lab import __main__ as program_main
from ldm_lab.config import build, read
from ldm_lab.errors import UserError, run_program

pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
pytest.importorskip("ibis")
duckdb = pytest.importorskip("duckdb")
from laion_rows import write_rows  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs" / "select").glob("*.yaml"))
TABLES = ROOT / "tests" / "data" / "golden" / "laion_filters"
JAVA = shutil.which("java")


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """20,000 synthetic rows in two files."""
    folder = tmp_path_factory.mktemp("table")
    write_rows(folder / "part-0.parquet", 12_000)
    write_rows(folder / "part-1.parquet", 8_000, first=12_000)
    return folder


@pytest.fixture
def select(monkeypatch, capsys):
    """Run the command in this process: `select("laion_art", "input=...")` -> (exit code, out, err)."""

    def call(recipe: str, *overrides: str) -> tuple[int, str, str]:
        config = str(ROOT / "configs" / "select" / f"{recipe}.yaml")
        monkeypatch.setattr(sys, "argv", ["ldm_lab", "select", "--config", config, *overrides])
        with pytest.raises(SystemExit) as exit_:
            run_program(program_main.main)
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return call


def selection(tmp_path: Path, table: Path, rules: dict, **options):
    """Return a selection of few words."""
    return build("selection", {"input": str(table), "out": str(tmp_path / "out"), "rules": rules, **options})


def rows_of(folder: Path) -> list[dict]:
    paths = sorted(folder.glob("part-*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def one_line(err: str) -> str:
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    return err


# ------------------------------------------------------------------------------------------------ what comes out


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_recipe_explains_itself_and_can_be_built(path, tmp_path):
    (tmp_path / "slurs.txt").write_text("word\n")
    more = [f"rules.slurs.file={tmp_path / 'slurs.txt'}"] if path.stem == "laionide_v2" else []
    assert build("selection", read(path, ["input=x", "out=y", *more])).rules
    head = path.read_text().splitlines()[:6]
    assert any(f"ldm_lab select --config configs/select/{path.name}" in line for line in head)


def test_the_program_says_what_each_rule_removed(select, tmp_path):
    source = f"input={TABLES / 'laion2B-en.parquet'}"
    slurs = f"rules.slurs.file={TABLES / 'slurs.txt'}"
    code, out, err = select("laionide_v2", source, slurs, f"out={tmp_path / 'out'}")
    assert (code, err) == (0, "")
    assert "WIDTH and HEIGHT are swapped in this release" in out
    assert "18 of 42 rows kept (42.86%)" in out
    assert f"img2dataset --url_list {tmp_path / 'out'} --input_format parquet --url_col URL --caption_col TEXT" in out
    report = json.loads((tmp_path / "out" / "_report.json").read_text())
    assert report["swapped_sizes"] is True and report["columns"]["width"] == "HEIGHT"
    assert list(report["rules"]) == ["nsfw", "aspect_ratio", "size", "slurs"]
    assert report["rules"]["slurs"]["reasons"] == {"slur": 7}
    assert report["rules"]["slurs"]["alone"] == 6 and report["rules"]["slurs"]["left"] == 18 == report["kept"]
    assert report["rules"]["size"]["reasons"] == {"unknown_size": 3, "too_small": 6}
    first = rows_of(tmp_path / "out")[1]
    assert (first["WIDTH"], first["HEIGHT"]) == (512, 500), "the right way round"
    assert pq.read_table(tmp_path / "out").num_rows == 18, "the report does not disturb who reads the folder"


def test_what_img2dataset_wrote_can_go_in_and_what_comes_out_fits_it(tmp_path):
    """Its bookkeeping would collide with what it writes the second time."""
    shard = selection(tmp_path, TABLES / "img2dataset_00000.parquet", {"size": {"min_side": 256}})
    report = shard.run()
    assert list(report.rules) == ["downloaded", "size"]
    row = rows_of(tmp_path / "out")[0]
    assert set(row) == {"URL", "TEXT", "NSFW", "similarity", "LICENSE", "WIDTH", "HEIGHT", "sha256"}
    assert (row["WIDTH"], row["HEIGHT"]) == (500, 512) or row["WIDTH"] >= 256
    kept = selection(tmp_path, TABLES / "img2dataset_00000.parquet", {"size": {"min_side": 1}, "downloaded": None})
    kept.overwrite = True
    assert list(kept.run().rules) == ["size"]


def test_text_files_have_no_quotes(tmp_path):
    """CC12M's has no names either; a " in a caption once swallowed the rows behind it."""
    rows = [
        'http://a/1\t"a quoted" start',
        "http://a/2\tplain",
        'http://a/3\t"open',
        "http://a/4\tit's",
        "http://a/5\t\\n",
    ]
    (tmp_path / "cc12m.tsv").write_text("\n".join(rows) + "\n")
    selection(tmp_path, tmp_path / "cc12m.tsv", {"caption_length": {"at_least": 1}}).run()
    assert [(row["URL"], row["TEXT"]) for row in rows_of(tmp_path / "out")] == [tuple(r.split("\t")) for r in rows]
    head = "url\tcaption\tWIDTH\tHEIGHT\thash\tpunsafe"
    wide = ["u1\tc1\t300\t400\t-6917529027641081857\t0.25", "u2\tc2\t\t400\t1\t0.1", "u3\tc3\t300\t400\t2\tnan"]
    (tmp_path / "named.tsv").write_text("\n".join([head, *wide]) + "\n")
    rules = {"size": {"min_side": 256}, "punsafe": {"below": 0.5}}
    named = selection(tmp_path, tmp_path / "named.tsv", rules, overwrite=True)
    assert named.run().as_dict()["rules"]["punsafe"]["reasons"] == {"missing_tag": 1}
    expected = {"URL": "u1", "TEXT": "c1", "WIDTH": 300, "HEIGHT": 400, "hash": -6917529027641081857, "punsafe": 0.25}
    assert rows_of(tmp_path / "out") == [expected]


def test_a_shuffle_is_one_order_of_the_same_rows(tmp_path, table):
    rules = {"aesthetic": {"above": 6}}
    plain = selection(tmp_path / "plain", table, rules)
    plain.run()
    ids = [row["SAMPLE_ID"] for row in rows_of(plain.out)]
    assert ids == sorted(ids), "without a shuffle the order stays"
    orders = {}
    for seed, threads in ((1, 1), (1, 2), (2, 2)):
        engine = {"name": "duckdb", "threads": threads}
        shuffled = selection(tmp_path / f"{seed}{threads}", table, rules, shuffle=seed, parts=3, engine=engine)
        shuffled.run()
        counts = [pq.read_metadata(path).num_rows for path in sorted(shuffled.out.glob("part-*.parquet"))]
        assert len(counts) == 3 and max(counts) - min(counts) <= 1
        orders[seed, threads] = [row["SAMPLE_ID"] for row in rows_of(shuffled.out)]
        assert sorted(orders[seed, threads]) == ids
    assert orders[1, 1] == orders[1, 2] != orders[2, 2], "the seed alone decides"
    halves = [sum(i < 10_000 for i in orders[1, 1][half::2]) for half in (0, 1)]
    assert abs(halves[0] - halves[1]) < 0.1 * len(ids)
    assert "ldm_lab_order" not in rows_of(plain.out)[0]


def test_parts_may_be_more_than_rows(tmp_path, table):
    few = selection(tmp_path, TABLES / "laion-art.parquet", {"aesthetic": {"above": 8}}, parts=20)
    kept = few.run().kept
    files = sorted(few.out.glob("*.parquet"))
    assert len(rows_of(few.out)) == kept and len(files) == kept < 20


def test_duplicates(tmp_path, table):
    """4 % of the rows share their hash with up to 49 others; null is no duplicate."""
    unique = selection(tmp_path, table, {"duplicates": {"by": "hash"}, "aesthetic": {"above": 5}})
    report = unique.run()
    rows = rows_of(unique.out)
    hashes = [row["hash"] for row in rows if row["hash"] is not None]
    assert len(hashes) == len(set(hashes)) and any(row["hash"] is None for row in rows)
    source = duckdb.sql(f"select hash from '{table}/*.parquet' where aesthetic > 5 and not isnan(aesthetic + 0.0)")
    all_hashes = [value for (value,) in source.fetchall()]
    missing = sum(value is None for value in all_hashes)
    assert len(rows) == len(set(all_hashes) - {None}) + missing == report.kept
    assert report.as_dict()["rules"]["duplicates"]["reasons"] == {"duplicate": len(all_hashes) - len(rows)}


def test_tags_are_joined_by_hash(tmp_path):
    rows = {"URL": list("abcde"), "TEXT": ["x"] * 5, "hash": [2**62 + 1, 2**62 + 2, 3, None, 5], "punsafe": [0.9] * 5}
    pq.write_table(pa.table(rows), tmp_path / "joined.parquet")
    tags = {
        "hash": [2**62 + 1, 2**62 + 1, 2**62 + 2, 3, 3, None],
        "prediction": [6.5, 7.5, 6.0, float("nan"), 7.25, 9.0],
    }
    pq.write_table(pa.table(tags), tmp_path / "tags.parquet")
    safe = {"hash": [2**62 + 1, 3], "punsafe": [0.1, 0.2]}
    pq.write_table(pa.table(safe), tmp_path / "safe.parquet")
    joined = selection(
        tmp_path,
        tmp_path / "joined.parquet",
        {"aesthetic": {"above": 7}, "punsafe": {"below": 0.5}},
        tags={"aesthetic": str(tmp_path / "tags.parquet"), "punsafe": [str(tmp_path / "safe.parquet")]},
    )
    report = joined.run().as_dict()
    written = [(row["URL"], row["aesthetic"], row["punsafe"], row["hash"]) for row in rows_of(joined.out)]
    assert written == [("a", 7.5, 0.1, 2**62 + 1), ("c", 7.25, 0.2, 3)]
    assert report["rules"]["aesthetic"]["reasons"] == {"aesthetic": 1, "missing_tag": 2}
    assert report["rules"]["punsafe"]["reasons"] == {"missing_tag": 3}, "the tags take the place of the column"


def test_sizes_that_may_be_swapped_are_pointed_out(tmp_path):
    sizes = {"URL": ["a"], "TEXT": ["x"], "WIDTH": [300], "HEIGHT": [300]}
    tables = [
        ({"NSFW": ["UNLIKELY"]}, True),
        ({"LICENSE": ["?"], "hash": [1]}, True),
        ({"hash": [1], "punsafe": [0.1]}, False),
        ({"LICENSE": ["?"]}, False),
    ]
    for number, (more, noted) in enumerate(tables):
        pq.write_table(pa.table(sizes | more), tmp_path / f"{number}.parquet")
        rules = {"size": {"min_side": 256}}
        report = selection(tmp_path, tmp_path / f"{number}.parquet", rules, overwrite=True).run()
        assert ("swapped_sizes=true or false" in str(report)) == noted
        report = selection(tmp_path, tmp_path / f"{number}.parquet", rules, overwrite=True, swapped_sizes=False).run()
        assert not report.notes


def test_hashes_of_other_types_than_integers(tmp_path):
    hashes = [2**62 + 1, 2**62 + 2, 7]
    lines = [f"http://a/{number}\tx\t{number}\n" for number in hashes]
    (tmp_path / "joined.tsv").write_text("URL\tTEXT\thash\n" + "".join(lines) + "http://a/none\tx\tnone\n")
    pq.write_table(pa.table({"hash": hashes, "aesthetic": [7.5, 6.0, 8.0]}), tmp_path / "tags.parquet")
    tags, rules = {"aesthetic": str(tmp_path / "tags.parquet")}, {"aesthetic": {"above": 7}}
    report = selection(tmp_path, tmp_path / "joined.tsv", rules, tags=tags).run()
    assert pq.read_table(tmp_path / "out")["URL"].to_pylist() == [f"http://a/{hashes[0]}", f"http://a/{hashes[2]}"]
    assert report.counts.reasons["aesthetic"] == {"aesthetic": 1, "missing_tag": 1}

    rows = {"URL": ["a"], "TEXT": ["x"], "hash": [float(hashes[0])]}
    pq.write_table(pa.table(rows), tmp_path / "pandas.parquet")
    with pytest.raises(UserError, match="the column 'hash' is float64; a hash is a signed integer of 64 bits"):
        selection(tmp_path, tmp_path / "pandas.parquet", rules, tags=tags, overwrite=True).run()
    tags = {"aesthetic": str(tmp_path / "float_tags.parquet")}
    pq.write_table(pa.table({"hash": [1.0], "aesthetic": [9.0]}), tmp_path / "float_tags.parquet")
    with pytest.raises(UserError, match=r"tags\.aesthetic: .*float_tags\.parquet: the column 'hash' is float64"):
        selection(tmp_path, tmp_path / "joined.tsv", rules, tags=tags, overwrite=True).run()


@pytest.mark.parametrize("above", [0, 30_000])
def test_a_line_of_another_number_of_columns_is_named(select, tmp_path, above):
    lines = [f"http://a/{number}\tcaption\n" for number in range(above + 2)]
    lines[above + 1] = "http://b\ty\tz\n"
    (tmp_path / "list.tsv").write_text("".join(lines))
    command = ("cc12m", f"input={tmp_path / 'list.tsv'}", f"out={tmp_path / 'out'}")
    code, _, err = select(*command, "bad_lines=error")
    assert code == 2 and f"list.tsv, line {above + 2}: 3 fields instead of 2" in one_line(err)
    (tmp_path / "list.tsv").write_text("")
    code, _, err = select(*command)
    assert code == 2 and "list.tsv: is empty, or begins with empty lines" in one_line(err)
    assert not (tmp_path / "out").exists()


def test_a_predictor_of_another_scale_is_pointed_out(tmp_path):
    rules = {"aesthetic": {"above": 5, "predictor": "v1"}}
    report = selection(tmp_path, TABLES / "improved_aesthetics.parquet", rules).run()
    assert "AESTHETIC_SCORE usually holds scores of the predictor v2" in str(report)


def test_a_shuffle_and_a_join_larger_than_memory(tmp_path):
    """It goes by way of the disk: with nowhere to spill to it does not."""
    write_rows(tmp_path / "rows.parquet", 400_000)
    duckdb.sql(f"copy (select hash, aesthetic from '{tmp_path}/rows.parquet') to '{tmp_path}/tags.parquet'")
    engine = {"name": "duckdb", "memory_limit": "90MB", "threads": 1}
    tags = {"aesthetic": str(tmp_path / "tags.parquet")}
    rules = {"aesthetic": {"at_least": -100}}
    both = selection(tmp_path, tmp_path / "rows.parquet", rules, shuffle=3, tags=tags, engine=engine)
    (report, (part,)) = both.run(), both.out.glob("*.parquet")
    assert report.kept == pq.read_metadata(part).num_rows > 350_000
    assert not list(both.out.glob(".*")), "what was spilled is gone"
    (tmp_path / "file").write_text("")
    nowhere = engine | {"temp_directory": str(tmp_path / "file" / "spill")}
    both = selection(tmp_path, tmp_path / "rows.parquet", rules, shuffle=3, tags=tags, engine=nowhere, overwrite=True)
    with pytest.raises(UserError, match="spill"):
        both.run()
    assert pq.read_metadata(part).num_rows == report.kept, "the earlier selection is still there"


# ------------------------------------------------------------------------------------------------ two engines

MANY_RULES = {
    "nsfw": {"drop": ["NSFW", "LIKELY"]},
    "punsafe": {"below": 0.5},
    "pwatermark": {"below": 0.8},
    "aesthetic": {"at_least": 4},
    "similarity": {"at_least": 0.29},
    "aspect_ratio": {"at_least": 0.5, "at_most": 2},
    "size": {"min_side": 256},
    "language": {"keep": ["en", "de", "nolang"]},
    "caption_length": {"at_least": 5, "at_most": 70},
}


def both_engines(tmp_path: Path, table: Path, words: list[str]) -> None:
    (tmp_path / "slurs.txt").write_text("\n".join(words))
    several = {
        "rules": MANY_RULES | {"slurs": {"file": str(tmp_path / "slurs.txt")}, "duplicates": {"by": "hash"}},
        "whole words": {"slurs": {"file": str(tmp_path / "slurs.txt"), "whole_words": True}},
    }
    for name, rules in several.items():
        ids, reports = {}, {}
        for engine in ({"name": "duckdb", "memory_limit": "1GB"}, {"name": "spark", "master": "local[2]"}):
            one = selection(
                tmp_path / name / engine["name"], table, rules, engine=engine, shuffle=1, parts=2,
                tags={"aesthetic": str(table)},
            )  # fmt: skip
            reports[engine["name"]] = one.run().as_dict()
            rows = pq.read_table(one.out, columns=["SAMPLE_ID", "aesthetic", "hash"])
            ids[engine["name"]] = sorted(map(str, rows.to_pylist()))
            assert len(list(one.out.glob("part-*.parquet"))) == 2
        assert ids["duckdb"] == ids["spark"] and len(ids["spark"]) > 100
        assert reports["duckdb"]["rules"] == reports["spark"]["rules"]


@pytest.mark.slow
@pytest.mark.skipif(JAVA is None, reason="Spark needs Java")
def test_both_engines_keep_the_same_rows(tmp_path, table):
    pytest.importorskip("pyspark")
    both_engines(tmp_path, table, ["zorblat", "grok nik", "quux'ite", "φορος", "İstanbul"])


@pytest.mark.slow
@pytest.mark.skipif(JAVA is None, reason="Spark needs Java")
def test_both_engines_keep_the_same_rows_of_a_million(tmp_path):
    pytest.importorskip("pyspark")
    (tmp_path / "table").mkdir()
    for part in range(4):
        write_rows(tmp_path / "table" / f"part-{part}.parquet", 250_000, first=part * 250_000)
    both_engines(tmp_path, tmp_path / "table", ["zorblat", "grok nik", "φορος", "İstanbul"])


@pytest.mark.slow
@pytest.mark.skipif(JAVA is None, reason="Spark needs Java")
def test_spark_reads_what_duckdb_reads(tmp_path):
    """Columns that differ in case, a TSV without names; its errors are one line, too."""
    pytest.importorskip("pyspark")
    spark = {"name": "spark", "master": "local[1]"}
    rules = {"size": {"min_side": 256}}
    for name, engine in (("a", None), ("b", spark)):
        selection(tmp_path / name, TABLES / "img2dataset_00000.parquet", rules, engine=engine).run()
    assert rows_of(tmp_path / "a" / "out") == rows_of(tmp_path / "b" / "out")
    lines = ['http://a/1\t"a quoted" start', 'http://a/2\t"open', "http://a/3\tit's", "http://a/4\tback\\slash"]
    (tmp_path / "x.tsv").write_text("\n".join(lines) + "\n")
    one = selection(tmp_path / "c", tmp_path / "x.tsv", {"caption_length": {"at_least": 1}}, engine=spark)
    one.run()
    assert [f"{row['URL']}\t{row['TEXT']}" for row in rows_of(one.out)] == lines
    broken = damaged_copy(TABLES / "laion-art.parquet", tmp_path / "broken.parquet")
    with pytest.raises(UserError, match=r"broken\.parquet: row group 1 of 1 is damaged"):
        selection(tmp_path / "d", broken, {"aesthetic": {"above": 1}}, engine=spark).run()
    assert not (tmp_path / "d" / "out").exists()


# ------------------------------------------------------------------------------------------------ what goes wrong


def damaged_copy(source: Path, target: Path) -> Path:
    """Overwrite the data of the last row group; the file's own description stays whole."""
    metadata = pq.read_metadata(source)
    group = metadata.row_group(metadata.num_row_groups - 1)
    data = bytearray(source.read_bytes())
    for number in range(group.num_columns):
        column = group.column(number)
        begin = column.dictionary_page_offset or column.data_page_offset
        data[begin : begin + column.total_compressed_size] = os.urandom(column.total_compressed_size)
    target.write_bytes(data)
    return target


def test_a_missing_column_says_which_release_has_it(select, tmp_path):
    base = f"input={TABLES / 'laion2B-en.parquet'}"
    code, _, err = select("laion_aesthetic", base, f"out={tmp_path / 'out'}")
    message = one_line(err)
    assert code == 2 and "rule punsafe: no column punsafe (in any case)" in message and "-joined" in message
    assert "there are: SAMPLE_ID, URL, TEXT, HEIGHT, WIDTH, LICENSE, NSFW, similarity" in message
    joined = f"input={TABLES / 'laion2B-en-joined.parquet'}"
    code, _, err = select("laion_aesthetic", joined, f"out={tmp_path / 'out'}")
    assert code == 2 and "rule aesthetic: no column" in one_line(err) and "tags:" in err
    code, _, err = select("laionide_v2", joined, f"out={tmp_path / 'out'}", "rules.slurs=null")
    assert code == 2 and "rule nsfw: no column nsfw" in one_line(err) and "base collections" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["input=nowhere.parquet"], "input: nowhere.parquet: no such file or folder"),
        (["input=nowhere/*.parquet"], "input: 'nowhere/*.parquet' matches no file"),
        (["rules.punsave={below: 0.5}"], "rules.punsave"),
        (["engine.name=dukdb"], "Did you mean 'duckdb'?"),
        (["engine.memory_limit=lots"], "engine: "),
        (["parts=0"], "parts: at least 1 is needed, not 0"),
        (["colums=[URL]"], "Did you mean 'columns'?"),
        (["columns=[URL, TXT]"], "no such column: 'TXT'. Did you mean 'TEXT'?"),
        (["tags.beauty=x"], "tags.beauty: no such tag: 'beauty'"),
        (["columns=[]"], "columns: 1 or more entries are needed, not []"),
        (["engine.threads=0"], "engine.threads: at least 1 is needed, not 0"),
        (["rules.aesthetic.predictor=v3"], "rules.aesthetic.predictor"),
        (["out=s3://bucket/x"], "a folder is needed that all machines of the engine see"),
    ],
)
def test_mistakes(select, tmp_path, overrides, message):
    table = TABLES / "laion2B-en-aesthetic.parquet"
    usual = [f"input={table}", f"out={tmp_path / 'out'}"]
    usual = [word for word in usual if not overrides[0].startswith(word.partition("=")[0] + "=")]
    code, _, err = select("laion_aesthetic", *usual, *overrides)
    assert code == 2 and message in one_line(err) and not err.startswith("error: selection.")
    assert not list(tmp_path.iterdir()), "nothing was left behind"


def test_an_empty_selection_writes_nothing_and_says_why(select, tmp_path):
    table = TABLES / "laion2B-en-aesthetic.parquet"
    code, _, err = select(
        "laion_art", f"input={table}", f"out={tmp_path / 'o'}", "rules.aesthetic.above=99", "language=en"
    )
    assert code == 2 and "the selection is empty, nothing was written" in err and "Traceback" not in err
    assert "aesthetic" in err and "0 of 16 rows kept" in err
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_tables(select, tmp_path):
    (tmp_path / "page.parquet").write_text("<html>404</html>")
    code, _, err = select("laion_art", f"input={tmp_path / 'page.parquet'}", f"out={tmp_path / 'out'}")
    assert code == 2 and "page.parquet: not a readable Parquet file" in one_line(err)
    whole = (TABLES / "laion-art.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:2000])
    code, _, err = select("laion_art", f"input={tmp_path / 'cut.parquet'}", f"out={tmp_path / 'out'}")
    assert code == 2 and "cut.parquet: not a readable Parquet file" in one_line(err)
    shutil.copy(TABLES / "laion-art.parquet", tmp_path / "a.parquet")
    shutil.copy(TABLES / "laion2B-en.parquet", tmp_path / "b.parquet")
    code, _, err = select("laion_art", f"input=[{tmp_path}/a.parquet,{tmp_path}/b.parquet]", f"out={tmp_path / 'out'}")
    assert code == 2 and "b.parquet has other columns than" in one_line(err) and "NSFW" in err


def test_a_damaged_row_group(select, tmp_path, table):
    (tmp_path / "in").mkdir()
    shutil.copy(table / "part-1.parquet", tmp_path / "in" / "part-1.parquet")
    damaged_copy(table / "part-0.parquet", tmp_path / "in" / "part-0.parquet")
    command = ("laion_aesthetic", f"input={tmp_path / 'in'}", f"out={tmp_path / 'out'}")
    code, _, err = select(*command)
    assert code == 2 and "part-0.parquet: row group 1 of 1 is damaged" in one_line(err)
    assert "1 of 2 files are whole, skip_broken=true leaves out the damaged ones. Nothing was written." in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    code, out, _ = select(*command, "skip_broken=true")
    assert code == 0 and "left out with them: 12,000 rows" in out and "of 8,000 rows kept" in out
    report = json.loads((tmp_path / "out" / "_report.json").read_text())
    assert report["broken_rows"] == 12_000 and "part-0.parquet" in report["broken_files"][0]


def test_an_earlier_selection_is_not_replaced_unasked(select, tmp_path):
    command = (
        "laion_art",
        f"input={TABLES / 'laion2B-en-aesthetic.parquet'}",
        f"out={tmp_path / 'out'}",
        "language=en",
    )
    assert select(*command)[0] == 0
    code, _, err = select(*command)
    assert code == 2 and "is not empty; take another folder, or overwrite=true" in one_line(err)
    assert select(*command, "overwrite=true")[0] == 0
    (tmp_path / "out" / "photo.jpg").write_bytes(b"mine")
    code, _, err = select(*command, "overwrite=true")
    assert code == 2 and "holds 'photo.jpg', which no selection wrote" in one_line(err)
    assert (tmp_path / "out" / "photo.jpg").read_bytes() == b"mine"
    (tmp_path / "file").write_text("x")
    code, _, err = select(*command[:2], f"out={tmp_path / 'file'}", "language=en")
    assert code == 2 and "is a file; a folder is needed" in one_line(err)


def test_a_full_disk(tmp_path, table):
    """A real one, by the limit that the system sets a process's files; what was there before stays."""
    code = (
        "import resource, signal, sys; from ldm_lab.__main__ import main; from ldm_lab.errors import run_program\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "run_program(main)"
    )
    config = ROOT / "configs" / "select" / "laion_high_resolution.yaml"
    command = ["select", "--config", config, f"input={table}", f"out={tmp_path / 'out'}", "rules.size.min_side=1"]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert "File too large" in one_line(done.stderr)
    assert not list(tmp_path.iterdir())


def test_selecting_does_not_load_torch():
    """It takes 500 MB, which a selection in bounded memory cannot spare."""
    code = (
        "import sys; sys.argv = ['ldm_lab', 'select', '--help']\n"
        "from ldm_lab.__main__ import main\n"
        "from ldm_lab.config import parts\n"
        "try: main()\nexcept SystemExit: pass\n"
        "parts('selection'), parts('engine'), parts('rule')\n"
        "assert 'torch' not in sys.modules and 'pyspark' not in sys.modules, 'loaded'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
