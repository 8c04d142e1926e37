"""Which column holds which quantity: one mapping for rules, output, printed commands, training; a doubt is asked."""

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from data_sets import encoded, keys, module, take

from ldm_lab import __main__ as program_main
from ldm_lab.config import build, check_section
from ldm_lab.data.tar import write_shard
from ldm_lab.errors import UserError, run_program
from ldm_lab.rules.known_tables import known_as
from ldm_lab.rules.names import Names
from ldm_lab.rules.rule import build_rules
from ldm_lab.rules.sample import SampleRow, violated_rules

pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
pytest.importorskip("ibis")
pytest.importorskip("duckdb")

CASES = Path(__file__).resolve().parent / "data" / "cases" / "metadata"
HAS_SPARK = shutil.which("java") is not None and find_spec("pyspark") is not None
SPARK = [pytest.mark.slow, pytest.mark.skipif(not HAS_SPARK, reason="Spark needs Java")]
DUCKDB = {"name": "duckdb", "threads": 1}
ENGINES = [
    pytest.param(DUCKDB, id="duckdb"),
    pytest.param({"name": "spark", "master": "local[1]"}, id="spark", marks=SPARK),
]
COYO = {
    **{"id": [1, 2], "url": ["a", "b"], "text": ["x", "y"], "width": [600, 600], "height": [600, 600]},
    **{"image_phash": ["0", "1"], "clip_similarity_vitb32": [0.3, 0.3], "clip_similarity_vitl14": [0.2, 0.2]},
    **{"nsfw_score_opennsfw2": [0.1, 0.1], "nsfw_score_gantman": [0.1, 0.9]},
    **{"watermark_score": [0.1, 0.9], "aesthetic_score_laion_v2": [5.5, 6.0]},
}
ALL, JOINED = ["URL", "TEXT", "WIDTH", "HEIGHT", "similarity"], ["hash", "punsafe", "pwatermark"]


@pytest.fixture(params=ENGINES)
def engine(request) -> dict:
    return request.param


def select(source, out: Path, rules: dict, engine: dict = DUCKDB, **options):
    """Return the report of a selection and the rows that it wrote."""
    section = {"input": str(source), "out": str(out), "rules": rules, "engine": engine, "overwrite": True, **options}
    report = build("selection", section).run()
    return report, [row for path in sorted(out.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


def write(path: Path, columns: dict) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


# ------------------------------------------------------------------------------------------------ two predictors


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"rules": {"aesthetic": {"above": 5, "predictor": "v2"}}}, ["00", "01", "03"]),
        ({"rules": {"aesthetic": {"above": 5, "predictor": "v1"}}}, ["00", "02", "03"]),
        ({"rules": {"aesthetic": {"above": 5}}, "names": {"aesthetic": "AESTHETIC_SCORE"}}, ["00", "01", "03"]),
    ],
    ids=["v2", "v1", "named"],
)
def test_each_predictor_is_judged_by_its_own_scores(tmp_path, engine, options, kept):
    report, rows = select(CASES / "both", tmp_path / "out", engine=engine, **options)
    assert sorted(row["URL"][-6:-4] for row in rows) == kept
    assert {"aesthetic", "AESTHETIC_SCORE"} <= set(rows[0])
    assert report.as_dict()["columns"]["aesthetic"] == ("aesthetic" if "02" in kept else "AESTHETIC_SCORE")


def test_a_doubt_is_asked(tmp_path):
    with pytest.raises(UserError) as caught:
        select(CASES / "both", tmp_path / "out", {"aesthetic": {"above": 5}})
    assert "say which one: names.aesthetic=aesthetic or names.aesthetic=AESTHETIC_SCORE" in str(caught.value)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("column", ["my score", "yes", "1st", "a.b", 'q"q', "it's", "größe"])
def test_the_override_of_a_question_can_be_typed(column):
    import shlex

    from ldm_lab.config.overrides import parse

    (word,) = shlex.split(Names().answer("aesthetic_v2", column))
    assert parse(word)[1] == {"names": {"aesthetic": column}}


def test_joined_scores_go_before_the_tables_own(tmp_path):
    write(tmp_path / "tags.parquet", {"hash": [0, 1], "prediction": [9.0, 1.0]})
    tags = {"tags": {"aesthetic": str(tmp_path / "tags.parquet")}}
    report, rows = select(CASES / "both", tmp_path / "out", {"aesthetic": {"above": 5, "predictor": "v2"}}, **tags)
    assert [(row["aesthetic"], row["AESTHETIC_SCORE"]) for row in rows] == [(7.5, 9.0)]
    assert "tags.aesthetic take the place of those in the column AESTHETIC_SCORE" in str(report)
    report, rows = select(CASES / "both", tmp_path / "out", {"aesthetic": {"above": 5, "predictor": "v1"}}, **tags)
    assert [(row["aesthetic"], row["AESTHETIC_SCORE"]) for row in rows] == [(9.0, 5.5)]
    v1 = write(tmp_path / "v1.parquet", {"URL": ["a"], "TEXT": ["x"], "hash": [0], "aesthetic": [3.0]})
    _, rows = select(v1, tmp_path / "out", {"aesthetic": {"above": 5, "predictor": "v2"}}, **tags)
    assert [(row["aesthetic"], row["AESTHETIC_SCORE"]) for row in rows] == [(3.0, 9.0)], "v1's stay v1's"


# ------------------------------------------------------------------------------------------------ names of columns


def test_other_names_than_those_of_public_tables(tmp_path, engine):
    columns = {"link": ["a", "b"], "alt": ["x", "bad"], "w": [600, 600], "h": [600, 100], "URL": ["q", "r"]}
    table = write(tmp_path / "t.parquet", columns | {"wm": [0.1, 0.2], "ID": pa.array([2**64 - 5, 2], pa.uint64())})
    names = {"url": "link", "caption": "alt", "width": "W", "height": "h", "pwatermark": "wm", "hash": "ID"}
    rules = {"size": {"min_side": 256}, "pwatermark": {"below": 0.5}, "duplicates": {"by": "hash"}}
    report, rows = select(table, tmp_path / "out", rules, engine, names=names)
    assert rows == [{"URL": "a", "TEXT": "x", "WIDTH": 600, "HEIGHT": 600, "wm": 0.1, "ID": -5}]
    assert "the column URL is not written: URL holds link" in str(report)
    assert report.as_dict()["columns"]["pwatermark"] == "wm"


def test_what_is_said_of_the_columns_that_are_not_written(tmp_path):
    columns = {"URL": ["a"], "caption": ["x"], "TEXT": ["y"], "original_width": [6], "WIDTH": [7], "HEIGHT": [8]}
    report, rows = select(write(tmp_path / "t.parquet", columns), tmp_path / "out", {"size": {"min_side": 1}})
    assert rows == [{"URL": "a", "TEXT": "x", "WIDTH": 6, "HEIGHT": 8}]
    assert report.notes == [
        "the column TEXT is not written: TEXT holds caption, which rules judge, too; names.caption=TEXT takes TEXT "
        "instead",
        "the column WIDTH is not written: WIDTH holds original_width, which rules judge, too; names.width=WIDTH takes "
        "WIDTH instead",
    ]
    both = {"columns": ["URL", "TEXT", "width"], "names": {"caption": "TEXT", "width": "WIDTH"}}
    report, rows = select(tmp_path / "t.parquet", tmp_path / "out", {"size": {"min_side": 1}}, **both)
    assert rows == [{"URL": "a", "TEXT": "y", "width": 7}] and not report.notes
    report, rows = select(
        CASES / "both", tmp_path / "out", {"aesthetic": {"above": 5, "predictor": "v2"}}, columns=["URL", "aesthetic"]
    )
    assert "rules judge AESTHETIC_SCORE; the columns that are written have aesthetic for 'aesthetic' instead" in str(
        report
    )


def test_columns_that_differ_in_case_only(tmp_path, engine):
    columns = {"URL": ["a"], "TEXT": ["x"], "Similarity": [0.1], "similarity": [0.3], "x": [1], "X": [2]}
    table = write(tmp_path / "t.parquet", columns)
    rules = {"similarity": {"above": 0.2}}
    with pytest.raises(UserError, match=r"names\.similarity=Similarity or names\.similarity=similarity"):
        select(table, tmp_path / "out", rules, engine)
    report, rows = select(table, tmp_path / "out", rules, engine, names={"similarity": "similarity"})
    assert rows == [{"URL": "a", "TEXT": "x", "Similarity_1": 0.1, "similarity": 0.3, "x": 1, "X_1": 2}]
    assert "the column Similarity is written as Similarity_1" in str(report) and "written as X_1" in str(report)


def test_img2datasets_own_columns_go_before_those_it_was_given(tmp_path, engine):
    made = {"url": ["a"], "caption": ["x"], "key": ["0"], "status": ["success"], "error_message": [None]}
    sizes = {"width": [256], "height": [256], "original_width": [600], "original_height": [500], "WIDTH": [1]}
    table = write(tmp_path / "t.parquet", {"URL": ["given"], "TEXT": ["given"], **made, **sizes})
    report, rows = select(table, tmp_path / "out", {"size": {"min_side": 256}}, engine)
    assert rows == [{"URL": "a", "TEXT": "x", "WIDTH": 600, "HEIGHT": 500}]
    assert "table: img2dataset's output, by its columns" in str(report)
    assert "not written: key, status, error_message, width, height" in str(report)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"aestetic": "a"}, "names.aestetic: no such quantity: 'aestetic'. Did you mean 'aesthetic'?"),
        ({"aesthetic": "AESTHETIC"}, None),
        ({"aesthetic": "beauty"}, "names.aesthetic=beauty: no such column: 'beauty'."),
        ({"aesthetic": 5}, "names"),
    ],
)
def test_names_that_are_none(tmp_path, names, message):
    rules = {"aesthetic": {"above": 0}}
    if message is None:
        assert select(CASES / "both", tmp_path / "out", rules, names=names)[0].kept == 4
        return
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        select(CASES / "both", tmp_path / "out", rules, names=names)


def test_one_column_is_not_two_standard_ones(tmp_path):
    table = write(tmp_path / "t.parquet", {"URL": ["a"], "TEXT": ["x"]})
    with pytest.raises(UserError, match="the column URL cannot be both URL and TEXT; see names"):
        select(table, tmp_path / "out", {"caption_length": {"at_least": 1}}, names={"caption": "URL"})


def test_named_sizes_are_taken_as_they_are(tmp_path):
    columns = {"SAMPLE_ID": [1], "URL": ["a"], "TEXT": ["x"], "HEIGHT": [100], "WIDTH": [500], "LICENSE": ["?"]}
    table = write(tmp_path / "t.parquet", {**columns, "NSFW": ["UNLIKELY"], "similarity": [0.3]})
    names = {"width": "WIDTH", "height": "HEIGHT"}
    report, rows = select(table, tmp_path / "out", {"size": {"min_width": 400}}, names=names)
    assert (rows[0]["WIDTH"], rows[0]["HEIGHT"]) == (500, 100) and not report.notes and not report.swapped_sizes
    _, rows = select(table, tmp_path / "out", {"size": {"min_height": 400}})
    assert (rows[0]["WIDTH"], rows[0]["HEIGHT"]) == (100, 500), "a base collection's are swapped"


# ------------------------------------------------------------------------------------------------ known tables


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (COYO, "COYO-700M"),
        (["uid", "url", "text", "clip_b32_similarity_score", "clip_l14_similarity_score", "sha256"], "DataComp"),
        (
            ["SAMPLE_ID", "URL", "TEXT", "HEIGHT", "WIDTH", "LICENSE", "NSFW", "similarity"],
            "a base collection of LAION",
        ),
        (["SAMPLE_ID", "URL", "TEXT", "HEIGHT", "WIDTH", "LICENSE", "LANGUAGE", "NSFW", "similarity"], "laion2B-multi"),
        (["URL", "TEXT", "WIDTH", "HEIGHT", "similarity", "hash", "punsafe", "pwatermark"], "a -joined table of LAION"),
        (
            ["URL", "TEXT", "WIDTH", "HEIGHT", "similarity", "hash", "punsafe", "pwatermark", "aesthetic"],
            "LAION-Aesthetics V1",
        ),
        (
            ["URL", "TEXT", "WIDTH", "HEIGHT", "similarity", "hash", "punsafe", "pwatermark", "AESTHETIC_SCORE"],
            "LAION-Aesthetics V2",
        ),
        (["url", "caption"], "url and caption alone, as CC12M and CC3M"),
        ([*COYO, "key", "status", "error_message"], "img2dataset's output, of COYO-700M"),
        (["URL", "TEXT", "score"], None),
    ],
)
def test_known_tables(columns, name):
    found = known_as(columns)
    assert found is None if name is None else found.startswith(name)


def test_coyo_and_its_doubts(tmp_path, engine):
    table = write(tmp_path / "t.parquet", COYO)
    rules = {"aesthetic": {"above": 5, "predictor": "v2"}, "pwatermark": {"below": 0.5}, "size": {"min_side": 512}}
    report, rows = select(table, tmp_path / "out", rules, engine)
    assert [row["URL"] for row in rows] == ["a"]
    assert str(report).startswith(
        "table: COYO-700M, by its columns; aesthetic is aesthetic_score_laion_v2, pwatermark is watermark_score, "
    )
    with pytest.raises(UserError, match=r"names\.punsafe=nsfw_score_opennsfw2 or names.punsafe=nsfw_score_gantman"):
        select(table, tmp_path / "out", {"punsafe": {"below": 0.5}}, engine)
    with pytest.raises(UserError, match=r"names\.similarity=clip_similarity_vitb32 or names.similarity=clip_simil"):
        select(table, tmp_path / "out", {"similarity": {"above": 0.1}}, engine)


def test_cc3m_has_the_caption_before_the_url(tmp_path):
    (tmp_path / "cc3m.tsv").write_text("a caption\thttp://a/1\nof http://x\thttp://a/2\nanother\thttp://a/3\n")
    report, rows = select(tmp_path / "cc3m.tsv", tmp_path / "out", {"caption_length": {"at_least": 3}})
    assert [(row["URL"][-1], row["TEXT"]) for row in rows] == [
        ("1", "a caption"),
        ("2", "of http://x"),
        ("3", "another"),
    ]
    assert "cc3m.tsv has no line with the columns' names; taken for caption, url" in str(report)


# ------------------------------------------------------------------------------------------------ commands


@pytest.fixture
def program(monkeypatch, capsys):
    """Run a command in this process: `program("select", ...)` -> (exit code, out, err)."""

    def call(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ldm_lab", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            run_program(program_main.main)
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return call


def test_the_printed_commands_know_the_columns(program, tmp_path):
    write(tmp_path / "t.parquet", {"link": ["a"], "alt": ["x"], "key": ["k"], "my score": [7.0]})
    config = tmp_path / "c.yaml"
    config.write_text("input: ???\nout: ???\nrules: {aesthetic: {above: 5}}\nengine: {name: duckdb}\n")
    command = ["select", "--config", config, f"input={tmp_path / 't.parquet'}", f"out={tmp_path / 'out'}"]
    names = ["names.url=link", "names.caption=alt", 'names.aesthetic="my score"']
    code, out, err = program(*command, *names)
    assert (code, err) == (0, "")
    assert "--url_col URL --caption_col TEXT" in out and """--save_additional_columns '["my score"]'""" in out
    assert """for the same rules in training, by the same columns:\n  'data.names.aesthetic="my score"'""" in out
    code, out, _ = program(*command, *names, "columns=[url,text]", "overwrite=true")
    assert code == 0 and "--url_col url --caption_col text" in out
    code, out, _ = program(*command, *names, 'columns=["my score"]', "overwrite=true")
    assert code == 0 and "it has no column URL, so there is nothing to download" in out and "img2dataset" not in out


def test_training_takes_the_caption_that_was_written(program, tmp_path):
    """The text that img2dataset writes beside an image is the chosen column's; `data.names` has no caption."""
    config = CASES / "cap.yaml"
    slurs = f"rules.slurs.file={CASES / 'slurs.txt'}"
    code, out, err = program(
        "select", "--config", config, slurs, f"input={CASES / 'ct'}", f"out={tmp_path / 'out'}", "names.caption=TEXT"
    )
    assert (code, err) == (0, "")
    assert "table: caption is TEXT" in out and "--caption_col TEXT" in out and "data.names" not in out


def test_statistics_ask_and_are_told(program, tmp_path):
    command = ["statistics", f"both={CASES / 'both'}", "--out", tmp_path / "out", "--samples", 0]
    code, _, err = program(*command)
    assert code == 2 and "--names aesthetic=aesthetic or --names aesthetic=AESTHETIC_SCORE" in err
    code, out, err = program(*command, "--names", "aesthetic=AESTHETIC_SCORE")
    assert (code, err) == (0, "") and "scores of two predictors, by its columns; aesthetic is AESTHETIC_SCORE" in out
    buckets = json.loads((tmp_path / "out" / "histogram.json").read_text())["collections"]["both"]["buckets"]
    assert {name: count for name, count in buckets.items() if count} == {"4-5": 1, "5-6": 1, "6-7": 1, "7-8": 1}
    code, _, err = program(*command, "--names", "beauty=x")
    assert code == 2 and "--names beauty: no such quantity" in err


# ------------------------------------------------------------------------------------------------ training


def test_training_judges_by_the_same_columns(tmp_path):
    def sample(number: int, **more) -> tuple[str, dict[str, bytes]]:
        return f"{number}", {"png": encoded(number), "txt": b"x", "json": json.dumps(more).encode()}

    scores = [(7.5, 5.5, 0.1), (5.0, 7.5, 0.1), (8.0, 4.0, 0.1), (6.0, 6.5, 0.9)]
    write_shard(
        tmp_path / "0.tar",
        [sample(n, aesthetic=v1, AESTHETIC_SCORE=v2, wm=wm) for n, (v1, v2, wm) in enumerate(scores)],
    )
    section = {"name": "webdataset", "shards": f"{tmp_path}/0.tar", "shuffle_buffer": 0}

    def kept(rules: dict, **more) -> list[str]:
        return sorted(keys(take(module({**section, "rules": rules, **more}, epochs=1))))

    assert kept({"aesthetic": {"above": 5, "predictor": "v2"}}) == ["0", "1", "3"]
    assert kept({"aesthetic": {"above": 5, "predictor": "v1"}}) == ["0", "2", "3"]
    rules = {"aesthetic": {"above": 5}, "pwatermark": {"below": 0.5}}
    with pytest.raises(UserError, match=r"data\.names\.aesthetic=aesthetic or data\.names\.aesthetic=AESTHETIC_SCORE"):
        kept(rules)
    assert kept(rules, names={"aesthetic": "AESTHETIC_SCORE", "pwatermark": "wm"}) == ["0", "1"]
    problems = check_section("data", {**section, "image_size": 8, "batch_size": 1, "names": {"caption": "T"}}, "data")
    assert any(one.startswith("data.names.caption: rules judge the caption that is trained on") for one in problems)


def test_scores_beside_a_shard_of_another_predictor():
    rules = build_rules({"aesthetic": {"above": 5, "predictor": "v2"}})
    json_ = {"aesthetic": 9, "AESTHETIC_SCORE": 4}
    assert violated_rules(rules, SampleRow(json_, before={"aesthetic": 9}))
    assert not violated_rules(rules, SampleRow(json_, before={"AESTHETIC_SCORE": 6}))
    assert not violated_rules(rules, SampleRow({"aesthetic": 4}, before={"aesthetic": 9}))
