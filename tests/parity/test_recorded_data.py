"""The rules on LAION's tables, and img2dataset's shards, against what was recorded: every row, every reason."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ldm_lab.config import build, read
from ldm_lab.data.order import Order
from ldm_lab.data.samples import SkippedSample
from ldm_lab.data.tar import read_shard
from ldm_lab.io.images import decode_image, to_rgb
from ldm_lab.rules.sample import SampleRow, violated_rules

pq = pytest.importorskip("pyarrow.parquet")
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "select"
RECIPES = {"spaceforge_v1_2": "laion_improved_aesthetics"}  # where ours has another name than the case's
# A recipe is for the tables that the two probability rules have been applied to; the case's own table is one.
REASONS = {  # the case's name of a reason -> ours
    "undecodable_image": {"undecodable image", "truncated image"},
    "truncated_tar": {"broken shard"},
    "unreadable_tar": {"broken shard"},
    "too_small": {"too small"},
    "too_large": {"too many pixels"},
    "missing_image": {"no image"},
    "missing_caption": {"no caption"},
    "duplicate_key": {"duplicate key"},
}


def read_case(golden: Path, name: str) -> tuple[dict, Path]:
    """Return a case that is not made of arrays, and its folder of files."""
    path = golden / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"{golden} has no case {name}")
    recorded = json.loads(path.read_text(encoding="utf-8"))
    return recorded, golden / recorded["folder"]


def selection_of(table: dict, file: Path, out: Path, whole_words: bool = False):
    """Return the selection that a recorded table asks for."""
    name = RECIPES.get(table["recipe"], table["recipe"])
    overrides = [f"input={file}", f"out={out}"]
    if name == "laionide_v2":
        overrides += [
            f"rules.slurs.file={file.parent / 'slurs.txt'}",
            f"rules.slurs.whole_words={str(whole_words).lower()}",
        ]
    if "with" in table:
        overrides.append(f"tags.aesthetic={file.parent / table['with']}")
    if name in ("laion_art", "laion_high_resolution"):
        overrides.append("shuffle=null")  # the rows are told by their order
    if name == "laion_art":
        overrides.append("language=en")
    return build("selection", read(CONFIGS / f"{name}.yaml", overrides))


def rows_of(file: Path) -> list[dict]:
    return pq.read_table(file).to_pylist()


def numbers_of(selected: list[dict], rows: list[dict]) -> list[int]:
    """Return the numbers of the selected rows, in their order; several rows may have one address."""
    urls = [row.get("URL", row.get("url")) for row in rows]
    numbers, place = [], -1
    for row in selected:
        place = urls.index(row["URL"], place + 1)
        numbers.append(place)
    return numbers


def test_every_row_of_every_table(golden, tmp_path):
    recorded, folder = read_case(golden, "laion_filters")
    for name, table in recorded["tables"].items():
        file = folder / table.get("file", name)
        rows = rows_of(file)
        assert len(rows) == table["rows"]
        out = tmp_path / name
        report = selection_of(table, file, out).run()
        written = rows_of(out / "part-00000.parquet")
        assert numbers_of(written, rows) == table["kept"], name
        assert report.swapped_sizes == table["columns_swapped"]
        assert (report.rows, report.kept) == (len(rows), len(table["kept"]))
        reasons = [reason for broken in table["dropped"].values() for reason in broken]
        counted = {}
        for rule in report.as_dict()["rules"].values():
            for reason in rule["reasons"]:
                counted[reason] = True
        assert set(counted) == set(reasons), name
        if "output_columns" in table:
            assert list(written[0]) == table["output_columns"]
            assert {row["LANGUAGE"] for row in written} == {"en"}
        for number, row in zip(table["kept"], written):
            if "kept_aesthetic" in table:
                assert row["aesthetic"] == table["kept_aesthetic"][str(number)]
                assert row["hash"] == int(table["kept_hash"][str(number)])
        if "kept_whole_word_slurs" in table:
            selection_of(table, file, tmp_path / f"{name} whole words", whole_words=True).run()
            written = rows_of(tmp_path / f"{name} whole words" / "part-00000.parquet")
            assert numbers_of(written, rows) == table["kept_whole_word_slurs"], name


def test_every_reason_of_every_row(golden, tmp_path):
    """Row by row, as training sees them."""
    recorded, folder = read_case(golden, "laion_filters")
    for name, table in recorded["tables"].items():
        file = folder / table.get("file", name)
        selection = selection_of(table, file, tmp_path)
        rules = list(selection.rules)
        rows = rows_of(file)
        scores = {}
        if "with" in table:
            limits = next(rule for rule in rules if rule.part_name == "aesthetic")
            for tag in rows_of(folder / table["with"]):  # the highest that passes, else the highest
                scores.setdefault(tag["hash"], []).append(tag)
            scores = {
                key: min(
                    tags, key=lambda tag: (bool(violated_rules([limits], SampleRow(tag))), -(tag["aesthetic"] or 0))
                )
                for key, tags in scores.items()
            }
        if {"status", "error_message"} <= set(rows[0]):
            rules = [build("rule", {"name": "downloaded"}), *rules]
        kept = []
        for number, row in enumerate(rows):
            row = SampleRow(row | scores.get(row.get("hash"), {}), swapped_sizes=table["columns_swapped"])
            broken = {reason for _, reason in violated_rules(rules, row)}
            assert broken == set(table["dropped"].get(str(number), [])), f"{name}, row {number}"
            kept += [] if broken else [number]
        assert kept == table["kept"]


def test_shards(golden):
    recorded, folder = read_case(golden, "img2dataset_shard")
    loader, tolerance = recorded["loader"], recorded["tolerance"]
    source = build(
        "data",
        {
            "name": "webdataset",
            "shards": f"{folder}/*.tar",
            "image_size": 16,
            "batch_size": 1,
            "min_size": loader["min_side"],
            "max_pixels": loader["max_pixels"],
            "require_text": "file" if loader["require_caption"] else False,
        },
    )
    source.open()
    assert [Path(address).name for address in source.addresses] == list(recorded["yields"])
    skipped, empty = [], {}
    for address in source.addresses:
        shard = Path(address).name
        wanted = iter(recorded["yields"][shard])
        for item in read_shard(address):
            try:
                if isinstance(item, SkippedSample):
                    raise item
                sample = source.decode(item, Order(0, 0))
            except SkippedSample as problem:
                skipped.append((shard, problem.key, problem.reason))
                continue
            theirs = next(wanted)
            assert sample.key == theirs["key"]
            assert sample.text == theirs["caption"].strip()
            if not sample.text:
                empty.setdefault(shard, []).append(sample.key)
            image = decode_image(item.image)
            assert (image.format or "JPEG", list(image.size)) == (theirs["format"], theirs["size"])
            pixels = np.asarray(to_rgb(image)).astype(float)  # [H, W, 3]
            exact = tolerance["png_exact"] and theirs["format"] == "PNG"
            mean, corner = (0.01, 0) if exact else (tolerance["mean_rgb"], tolerance["corners_rgb"])
            assert np.abs(pixels.mean((0, 1)) - theirs["mean_rgb"]).max() <= mean, theirs["key"]
            corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]  # [4, 3]
            assert np.abs(corners - theirs["corners_rgb"]).max() <= corner, theirs["key"]
            centre = pixels[pixels.shape[0] // 2, pixels.shape[1] // 2]  # [3]
            assert np.abs(centre - theirs["centre_rgb"]).max() <= corner, theirs["key"]
        assert next(wanted, None) is None, shard
    assert empty == recorded["empty_captions"]
    assert len(skipped) == len(recorded["skipped"])
    for (shard, key, reason), theirs in zip(skipped, recorded["skipped"]):
        assert shard == theirs["shard"] and reason in REASONS[theirs["reason"]], theirs
        assert key == (theirs["key"] if reason != "broken shard" else f"{folder / shard}")
    assert recorded["skipped_counts"] == {
        name: sum(reason in REASONS[name] for _, _, reason in skipped) for name in recorded["skipped_counts"]
    }


def test_success_report(golden, tmp_path):
    from ldm_lab.curation.metadata.downloads import read_stats

    recorded, folder = read_case(golden, "img2dataset_shard")
    shutil.copytree(folder, tmp_path / "shards")
    ours = read_stats(tmp_path / "shards").as_dict()
    theirs = recorded["stats_summary"]
    for key in ("count", "successes", "failed_to_download", "failed_to_resize", "success_rate", "status_dict"):
        assert ours["total"][key] == theirs[key], key
