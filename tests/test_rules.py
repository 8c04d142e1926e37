"""The rules: one definition, the same answer for tables and for single samples; options, null, unknown names."""

import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldm_lab.config import check_mapping, check_section, parts
from ldm_lab.errors import UserError
from ldm_lab.rules.cell import Cell
from ldm_lab.rules.names import QUANTITIES, Names
from ldm_lab.rules.quantities import RELEASES
from ldm_lab.rules.rule import build_rules
from ldm_lab.rules.sample import SampleRow, violated_rules
from ldm_lab.rules.slurs import pattern_of

WORDS = ["zorblat", "Grok Nik", "quux'ite", "ΦΟΡΟΣ", "İstanbul", "a+b", "naïve", "東京", "x_1", "$5 (five)"]
SIDES = [None, 0, 1, 255, 256, 333, 400, 500, 512, 650, 651, 1023, 1024, -1]
NUMBERS = [None, math.nan, math.inf, -math.inf, 0.0, 0.5, 0.3, 0.8, 5.0, 6.999999, 7.0, 7.000001, -1.0, 11.3]
COLUMNS = {
    "TEXT": st.one_of(
        st.none(),
        st.text(max_size=12),
        st.builds(
            lambda before, word, change, after: before + change(word) + after,
            *(st.text("ab _-.1éß", max_size=3), st.sampled_from(WORDS)),
            *(st.sampled_from([str, str.upper, str.lower, str.title]), st.text("ab _-.1éß", max_size=3)),
        ),
    ),
    "WIDTH": st.sampled_from(SIDES),
    "HEIGHT": st.sampled_from(SIDES),
    **{name: st.sampled_from(NUMBERS) for name in ("similarity", "punsafe", "pwatermark", "AESTHETIC_SCORE")},
    "NSFW": st.sampled_from([None, "", "NSFW", " nsfw\t", "LIKELY", "UNLIKELY", "unsure", "0.3"]),
    "LANGUAGE": st.sampled_from([None, "", "en", "EN ", "zh", "zh-Latn"]),
    "status": st.sampled_from([None, "success", "failed_to_download"]),
}
ROWS = st.lists(st.fixed_dictionaries(COLUMNS), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_bytes("\ufeff".encode() + "\r\n \n".join(WORDS).encode() + b"\n\n")
    return path


def all_rules(words: Path, whole_words: bool) -> dict:
    """Return a section with every rule that judges rows by themselves."""
    return {
        "aesthetic": {"above": 5, "at_most": 7},
        "punsafe": {"below": 0.5},
        "pwatermark": {"at_least": 0.3, "below": 0.8},
        "similarity": {"at_least": 0.3},
        "caption_length": {"at_least": 2, "at_most": 9},
        "size": {"min_side": 256, "max_side": 1023},
        "aspect_ratio": {"at_least": 0.8, "at_most": 1.3},
        "nsfw": {"drop": ["NSFW", "LIKELY"]},
        "language": {"keep": ["en", "zh"]},
        "slurs": {"file": str(words), "whole_words": whole_words},
        "downloaded": {},
    }


def test_all_rules_are_meant(words):
    assert set(all_rules(words, False)) | {"duplicates"} == set(parts("rule"))


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
def test_tables_and_samples_agree(words, tmp_path, whole_words, swapped):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    ibis = pytest.importorskip("ibis")
    from ldm_lab.curation.metadata.duckdb_engine import DuckDB
    from ldm_lab.curation.metadata.inputs import find_files
    from ldm_lab.curation.metadata.tables import TableRow, bit_mask, kept_by

    rules = build_rules(all_rules(words, whole_words))
    kinds = {"TEXT": pa.string(), "NSFW": pa.string(), "LANGUAGE": pa.string(), "status": pa.string()}
    kinds |= {"WIDTH": pa.int32(), "HEIGHT": pa.int32()}
    schema = pa.schema([(name, kinds.get(name, pa.float64())) for name in COLUMNS])

    with DuckDB(threads=1).open(tmp_path) as engine:

        @given(ROWS)
        @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        def agree(rows):
            path = tmp_path / "rows.parquet"
            pq.write_table(pa.Table.from_pylist(rows, schema), path)
            files = find_files(str(path), "input")
            row = TableRow(engine.read(files), files.columns, swapped_sizes=swapped)
            mask, bits = bit_mask(row, rules)
            kept = ibis.literal(True)
            for condition in kept_by(row, rules):
                kept = kept & condition
            answers = engine.rows(row.table.select(mask=mask, kept=kept))
            for values, answer in zip(rows, answers):
                broken = violated_rules(rules, SampleRow(values, swapped))
                theirs = [(rule.part_name, why) for i, (rule, why) in enumerate(bits) if answer["mask"] >> i & 1]
                assert sorted(broken) == sorted(theirs), values
                assert answer["kept"] == (not broken), values

        agree()


def test_the_letters_that_are_lowered_in_several_ways():
    import re

    for word, texts in (("ΦΟΡΟΣ", ["φορος", "φοροσ"]), ("İzmir", ["izmir", "i̇zmir"]), ("izmir", ["i̇zmi̇r"])):
        for text in texts:
            assert re.search(pattern_of(word.lower()), text), (word, text)
    assert not re.search(pattern_of("a.b"), "axb")


def test_null_logic():
    null, true, false = Cell(None), Cell(True), Cell(False)
    assert (null & false).value is False and (null | true).value is True
    assert (null & true).value is None and (null | false).value is None and (~null).value is None
    assert (Cell(1) < null).value is None and not (Cell(1) < null).truth
    assert Cell(None).isnull().truth and not Cell(0).isnull().truth
    assert (Cell(1.0) / Cell(0.0).nullif(0)).value is None


def test_numbers_of_all_kinds():
    row = SampleRow({"punsafe": "0.25", "pwatermark": True, "aesthetic": 10**400, "similarity": [1]})
    assert row.number("punsafe").value == 0.25
    assert all(row.number(name).value is None for name in ("pwatermark", "aesthetic", "similarity", "width"))


def test_columns_of_all_releases():
    names = Names()
    assert names.find("aesthetic", ["hash", "AESTHETIC_SCORE"]) == "AESTHETIC_SCORE"
    assert names.find("aesthetic", ["hash", "prediction"]) == "prediction"
    assert names.find("width", ["WIDTH", "width", "original_width"]) == "original_width"
    with pytest.raises(
        UserError, match=r"'WIDTH' and 'width'; say which one: names\.width=WIDTH or names\.width=width"
    ):
        names.find("width", ["WIDTH", "width"])
    with pytest.raises(UserError) as error:
        names.require("punsafe", ["URL", "TEXT", "NSFW"], "part-0.parquet: rule punsafe")
    message = str(error.value)
    assert "part-0.parquet: rule punsafe" in message and "there are: URL, TEXT, NSFW" in message
    assert "-joined" in message and "base collections have NSFW" in message
    assert set(QUANTITIES) - {"url", "caption"} == set(RELEASES)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"punsave": {"below": 0.5}}, "no such rule: 'punsave'. Did you mean 'punsafe'?"),
        ({"punsafe": {"beneath": 0.5}}, "rules.punsafe.beneath: no such key: 'beneath' of rule.name=punsafe"),
        ({"punsafe": {"below": "half"}}, "rules.punsafe.below: number or null is needed, not 'half'"),
        ({"punsafe": {}}, "rules.punsafe.above: this, at_least, below or at_most is needed"),
        ({"punsafe": 0.5}, "rules.punsafe: options are needed, such as rules.punsafe={}, not 0.5"),
        ({"aspect_ratio": {"at_least": 2, "at_most": 1}}, "rules.aspect_ratio.at_least: 2 is above at_most, 1"),
        ({"nsfw": {"drop": ["NSFW"], "keep": ["UNLIKELY"]}}, "rules.nsfw.drop: either this or keep is needed"),
        ({"size": {"min_side": -1}}, "rules.size.min_side: at least 0 is needed, not -1"),
        ({"slurs": {}}, "rules.slurs.file: has to be given"),
        ({"duplicates": {"by": "looks"}}, "rules.duplicates.by: one of 'hash'"),
        (["punsafe"], "rules: a mapping of rule names to their options is needed"),
    ],
)
def test_mistakes(section, message):
    assert any(message in problem for problem in check_mapping("rule", section, "rules", True))


def test_a_rule_is_switched_off_by_null(words):
    assert build_rules({"punsafe": None}) == [] and check_mapping("rule", {"punsafe": None}, "rules", True) == []
    assert check_section("rule", {"name": "slurs", "file": str(words)}, "rule") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"\n  \r\n\n", "no word in it"), (b"\xff\xfe\xff", "not UTF-8 text")],
)
def test_a_list_of_slurs_that_is_none(tmp_path, content, message):
    path = tmp_path / "slurs.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        build_rules({"slurs": {"file": str(path)}})


def test_keep_lists_and_unknown_values():
    def broken(section, **values):
        return {reason for _, reason in violated_rules(build_rules(section), SampleRow(values))}

    keep = {"nsfw": {"keep": ["UNLIKELY"]}}
    assert broken(keep, nsfw="unlikely ") == set() and broken(keep, NSFW="UNSURE") == {"nsfw"}
    assert broken(keep) == {"missing_tag"}
    short = {"caption_length": {"at_least": 1}}
    assert broken(short, TEXT="") == {"caption_length"} == broken(short, TEXT=None) and broken(short, TEXT="a") == set()
    assert broken({"caption_length": {"at_most": 3}}, TEXT=None) == set()
    assert broken({"size": {"min_width": 10}}, WIDTH=9, HEIGHT=1) == {"too_small"}
    assert broken({"size": {"min_width": 10}}, WIDTH=10, HEIGHT=1) == set()
    first = {"punsafe": {"below": 0.5}, "downloaded": {}}
    assert broken(first, status="failed_to_download") == {"not_downloaded"}
