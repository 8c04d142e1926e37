"""Histograms of scores, their plot and page, and the report of img2dataset's downloads."""

import io
import json
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from data_sets import encoded
from PIL import Image

from ldm_lab import __main__ as program_main
from ldm_lab.data.tar import write_shard
from ldm_lab.errors import UserError, run_program

pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
pytest.importorskip("ibis")
pytest.importorskip("matplotlib")
from ldm_lab.curation.buckets import Buckets  # noqa: E402
from ldm_lab.curation.metadata.downloads import read_stats  # noqa: E402
from ldm_lab.curation.metadata.histogram import short  # noqa: E402

GOLDEN = Path(__file__).resolve().parent / "data" / "golden"
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command in this process: `command("statistics", ...)` -> (exit code, out, err)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ldm_lab", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            run_program(program_main.main)
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return call


class Page(HTMLParser):
    """Checks that every element is closed, and keeps images and headings."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.images, self.tags, self.text = [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attributes)["src"])
        elif tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def write_table(path: Path, scores: list, name: str = "aesthetic", caption: str = "a caption") -> Path:
    urls = [f"https://example.org/{i}.jpg" for i in range(len(scores))]
    pq.write_table(pa.table({"URL": urls, "TEXT": [caption] * len(scores), name: pa.array(scores, pa.float32())}), path)
    return path


def test_buckets_are_half_open_and_nothing_is_lost(command, tmp_path):
    scores = [0.0, 0.999, 1.0, 5.0, 5.5, 6.0, 9.9999, 10.0, 11.3, -0.001, -2.5, NAN, None, INF, -INF, 7.0]
    table = write_table(tmp_path / "a.parquet", scores)
    code, out, err = command("statistics", f"2B-en={table}", "--out", tmp_path / "out", "--samples", 3)
    assert (code, err) == (0, "")
    counted = json.loads((tmp_path / "out" / "histogram.json").read_text())["collections"]["2B-en"]
    expected = {"0-1": 2, "1-2": 1, "2-3": 0, "3-4": 0, "4-5": 0, "5-6": 2, "6-7": 1, "7-8": 1, "8-9": 0, "9-10": 1}
    assert counted["buckets"] == expected and list(counted["buckets"]) == list(expected)
    assert (counted["below"], counted["above"], counted["missing"], counted["rows"]) == (3, 3, 2, 16)
    assert "2B-en: {'0-1': '2', '1-2': '1'" in out
    image = Image.open(tmp_path / "out" / "histogram.png")
    assert image.format == "PNG" and min(image.size) > 300 and len(image.convert("RGB").getcolors(10**6)) > 5
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "histogram.json", "histogram.png", "samples.html",
    ]  # fmt: skip


def test_other_scores_have_other_buckets(command, tmp_path):
    """0.3 / 0.1 is less than 3 in floating point, 0.3 in float32 is more than 0.3 and 0.7 is less."""
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"punsafe": [0.3, 0.7, 0.0, 0.99, 1.0, 0.6]}), table)
    unsafe = ("--quantity", "punsafe", "--high", 1, "--width", 0.1)
    assert command("statistics", table, *unsafe, "--out", tmp_path / "out")[0] == 0
    counted = json.loads((tmp_path / "out" / "histogram.json").read_text())["collections"]["a"]
    filled = {name: count for name, count in counted["buckets"].items() if count}
    assert filled == {"0-0.1": 1, "0.3-0.4": 1, "0.6-0.7": 1, "0.7-0.8": 1, "0.9-1": 1} and counted["above"] == 1
    assert Buckets(0, 1, 0.1).places([0.3, 0.7, -0.1, 1.0]).tolist() == [4, 8, 0, 11]


def test_the_page_shows_each_bucket_and_trusts_nothing(command, tmp_path):
    hostile = '"><script>alert(1)</script> & <b>'
    a = write_table(tmp_path / "a.parquet", [n / 100 for n in range(1000)], caption=hostile)
    rows = {
        "url": ["javascript:alert(1)", None, "https://x/'\"><script>"],
        "caption": [None, "b", "c"],
        "prediction": [5.0] * 3,
    }
    pq.write_table(pa.table(rows), tmp_path / "b.parquet")
    first = tmp_path / "first"
    assert command("statistics", f"<i>one</i>={a}", tmp_path / "b.parquet", "--out", first, "--samples", 4)[0] == 0
    text = (first / "samples.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and "b" not in page.tags and "i" not in page.tags
    assert len(page.images) == 10 * 4 + 1 and all(source.startswith("https://") for source in page.images)
    assert page.text.count(hostile) == 40 and "5-6: 100 rows (10.00%)" in page.text and "5-6: 3 rows" in page.text
    second = tmp_path / "second"
    again = ("statistics", f"<i>one</i>={a}", tmp_path / "b.parquet", "--samples", 4)
    assert command(*again, "--out", second)[0] == 0 and (second / "samples.html").read_text() == text
    assert command(*again, "--out", second, "--seed", 1)[0] == 0 and (second / "samples.html").read_text() != text


def test_shards_are_counted_by_their_json_or_the_scores_beside_them(command, tmp_path):
    samples = [
        (f"{n:03d}", {"png": encoded(n, (300, 200)), "txt": b"c", "json": json.dumps({"aesthetic": n / 10}).encode()})
        for n in range(100)
    ]
    samples[55][1]["png"] = b"no image"
    del samples[77][1]["json"]
    write_shard(tmp_path / "0.tar", samples[:50])
    write_shard(tmp_path / "1.tar", samples[50:])
    run = ("statistics", "--shards", f"{tmp_path}/*.tar", "--samples", 10, "--out", tmp_path / "out")
    code, out, _ = command(*run)
    assert code == 0 and "not usable: undecodable image 1" in out
    counted = json.loads((tmp_path / "out" / "histogram.json").read_text())["collections"]["shards"]
    assert list(counted["buckets"].values()) == [10] * 7 + [9, 10, 10] and counted["missing"] == 1
    page = Page((tmp_path / "out" / "samples.html").read_text())
    assert len(page.images) == 98
    import base64

    thumbnail = Image.open(io.BytesIO(base64.b64decode(page.images[0].partition(",")[2])))
    assert thumbnail.size == (160, 107)
    for shard in range(2):
        keys = [key for key, _ in samples[shard * 50 : shard * 50 + 50]]
        pq.write_table(pa.table({"key": keys, "aesthetic": [9.5] * 50}), tmp_path / f"{shard}.s.parquet")
    assert command(*run, "--scores", ".s.parquet")[0] == 0
    counted = json.loads((tmp_path / "out" / "histogram.json").read_text())["collections"]["shards"]
    assert counted["buckets"]["9-10"] == 100


def test_mistakes(command, tmp_path):
    table = write_table(tmp_path / "a.parquet", [None, NAN])
    for arguments, message in (
        ([], "tables or --shards are needed"),
        ([table], "none of 2 rows has a score 'aesthetic'; nothing was written"),
        ([table, table], "two collections are called 'a'"),
        ([table, "--quantity", "beauty"], "--quantity: invalid choice: 'beauty' (choose from"),
        ([table, "--quantity", "punsafe"], "no column punsafe"),
        ([table, "--width", 3], "0 to 10 is not 1 to 1000 times a width of 3"),
        ([table, "--low", "nan"], "nan to 10 is not 1 to 1000 times a width of 1"),
        ([table, "--high", "inf"], "0 to inf is not 1 to 1000 times a width of 1"),
        ([tmp_path / "b.parquet"], "no such file"),
        (["--shards", f"{tmp_path}/*.tar"], "matches no file"),
    ):
        code, _, err = command("statistics", *arguments, "--out", tmp_path / "out")
        assert code == 2 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()


def test_counts_in_short():
    counts = {0: "0", 999: "999", 9_999: "9999", 20_123: "0.02M", 1_380_000: "1.38M", 364_680_000: "364.68M"}
    assert {n: short(n) for n in counts} == counts and short(2_170_140_000) == "2.17B"


# ------------------------------------------------------------------------------------------------ downloads


def write_stats(folder: Path, name: str, successes: int, **errors: int) -> None:
    folder.mkdir(exist_ok=True)
    failed = sum(errors.values())
    stats = {"count": successes + failed, "successes": successes, "failed_to_download": failed, "failed_to_resize": 0}
    status = {"success": successes, **errors}
    (folder / f"{name}_stats.json").write_text(json.dumps({**stats, "duration": 1.5, "status_dict": status}))
    (folder / f"{name}.tar").write_bytes(b"")


def test_downloads_are_summed_over_shards(command, tmp_path):
    folder = tmp_path / "images"
    write_stats(folder, "00000", 90, timed_out=6, not_found=4)
    write_stats(folder, "00001", 50, timed_out=40, evil=10)
    (folder / "00002.tar").write_bytes(b"")
    (folder / "00003_stats.json").write_text('{"count": 1')
    (folder / "00004_stats.json").write_text('{"count": null}')
    (folder / "00000.parquet").write_bytes(b"")
    total = read_stats(folder).total()
    assert total.success_rate == 0.7 and total.count == 200
    assert total.status_dict == {"success": 140, "timed_out": 46, "evil": 10, "not_found": 4}
    code, out, _ = command("downloads", folder, "--batch-size", 64)
    assert code == 0 and "2 shards, 200 urls, 140 images (70.00%)" in out and "whole batches of 64: 2" in out
    assert "timed_out" in out and "23.00%" in out and "76.67%" in out
    assert out.index("00001 ") < out.index("00000 "), "the worst one first"
    assert "1 shards without stats: not finished: 00002" in out
    assert "2 shards with unreadable stats: 00003, 00004" in out
    code, out, _ = command("downloads", folder, "--json")
    assert json.loads(out)["shards"]["00001"]["success_rate"] == 0.5


def test_the_recorded_shard_and_folders_without(command, tmp_path):
    shutil.copytree(GOLDEN / "img2dataset_shard", tmp_path / "clean")
    code, out, _ = command("downloads", tmp_path / "clean")
    assert code == 0 and "1 shards, 8 urls, 6 images (75.00%)" in out and "HTTP Error 404" in out
    for folder in (tmp_path / "nowhere", tmp_path):
        code, _, err = command("downloads", folder)
        assert code == 2 and "img2dataset" in err and err.count("\n") == 1
    with pytest.raises(UserError, match="no readable"):
        read_stats(tmp_path)
