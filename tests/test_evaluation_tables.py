"""The table of an evaluation says the same in all of its files, and what its numbers and margins are of."""

import csv
import hashlib
import io
import json
import math
import re

import pytest
import torch
from test_evaluate import PLOT, SHORT, evaluate, models, table  # noqa: F401  # fixtures
from tiny import DENOISER, embedding

from ldm_lab.checkpoints.native import save_model
from ldm_lab.config import build
from ldm_lab.evaluation.metrics import Value
from ldm_lab.evaluation.origin import Origin
from ldm_lab.evaluation.tables import Row, Table
from ldm_lab.io.json_files import Fields, parse_json

SEEDS, DRAWS = Value(0.5, 0.1, "seeds", 3), Value(0.25, 0.2, "bootstrap", 20)
NAN = Value(math.nan)


def cells(made: Table) -> list[list[str]]:
    """Return the cells of a table in Markdown, without its heads."""
    lines = [line for line in made.to_markdown().splitlines() if line.startswith("|")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


@pytest.mark.parametrize(
    ("rows", "margins"),
    [
        ([{"fd": SEEDS}], "95 % interval of Student's t over 3 seeds"),
        ([{"fd": DRAWS}, {"fd": DRAWS}], "1.96 standard deviations of 20 bootstrap draws of the images"),
        (
            [{"fd": SEEDS, "psnr": DRAWS, "loss": Value(1.0)}],
            "95 % interval of Student's t over 3 seeds; ± ...\\*: 1.96 standard deviations of 20 bootstrap draws of "
            "the images; no margin of loss",
        ),
        ([{"fd": Value(1.0)}, {"fd": Value(2.0), "kid": Value(3.0)}], "no margin of fd, kid"),
        ([{"fd": DRAWS}, {"fd": NAN}], "1.96 standard deviations of 20 bootstrap draws of the images"),
    ],
    ids=["seeds", "draws", "both", "none", "some"],
)  # fmt: skip
def test_margins_are_said_as_they_are(rows, margins):
    made = Table([Row(f"m{number}", values=values) for number, values in enumerate(rows)], {})
    assert made.margins() == made.told()["margins"] == margins and f"- margins: {margins}" in made.to_markdown()


def test_draws_are_marked_where_other_margins_are_of_seeds():
    made = Table([Row("a", values={"fd": SEEDS}), Row("folder", values={"fd": DRAWS})], {})
    assert [row[-1] for row in cells(made)] == ["0.5 ± 0.1", "**0.25 ± 0.2**\\*"]


def test_rows_of_different_numbers_of_pictures_are_said():
    rows = [Row("a", pictures=200, values={"fd": SEEDS, "kid": SEEDS}), Row("b", pictures=50, values={"fd": DRAWS})]
    line = "fd: rows are of 50 to 200 pictures, which tells on them; compare rows of equal numbers alone"
    made = Table(rows, {})
    assert json.loads(made.to_json())["remarks"] == [line] and f"- {line}" in made.to_markdown()
    others = [Row("a", pictures=200, values={"kid": SEEDS}), Row("b", pictures=50, values={"kid": SEEDS})]
    assert not Table(others, {}).uneven() and not Table(rows[:1], {}).uneven()
    assert not Table([*rows[:1], Row("c", values={"loss": DRAWS})], {}).uneven()


def test_a_table_without_values_says_nothing_of_margins():
    assert "margins" not in Table([Row("a")], {}).told()


def test_what_is_no_number_is_marked_in_all_files_and_is_never_the_best():
    rows = [Row("a", values={"fd": NAN, "kid": Value(1.0)}), Row("b", values={"fd": Value(3.0)})]
    rows += [Row("c", values={"fd": Value(2.0), "kid": Value(math.inf)})]
    made = Table(rows, {})
    assert made.best("fd") == 2.0 and made.best("kid") is None and not made.is_finite
    assert [row[-2:] for row in cells(made)] == [["not finite", "1"], ["3", "–"], ["**2**", "not finite"]]
    read = Fields(parse_json(made.to_json().encode())).listed("rows")
    values = [row.named("values") for row in read]
    assert math.isnan(values[0]["fd"].number("value")) and values[2]["kid"].number("value") == math.inf
    told = list(csv.DictReader(io.StringIO(made.to_csv())))
    assert [(row["fd"], row["kid"]) for row in told] == [("nan", "1.0"), ("3.0", ""), ("2.0", "inf")]


def test_a_whole_number_beyond_all_floating_point_ones_is_none():
    read = Fields(parse_json(b'{"many": ' + b"9" * 401 + b', "few": 2}'))
    assert read.number("many") is None and read.number("few") == 2.0


def test_a_plot_of_what_is_no_number(tmp_path):
    rows = [Row("a", values={"fd": NAN}), Row("b", values={"fd": SEEDS}), Row("c", values={"fd": DRAWS, "loss": NAN})]
    PLOT(Table(rows, {}), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_whole_checksums_are_for_programs_and_short_ones_for_people():
    origin = Origin({"a": "1" * 64}, {"a": "2" * 64})
    made = Table([Row("a", values={"fd": SEEDS})], {"embedding": "x"}, origin=origin)
    facts = json.loads(made.to_json())["facts"]
    assert facts["weights_sha256"] == {"a": "1" * 64} and facts["identity_sha256"] == {"a": "2" * 64}
    assert facts["weights"] == origin.weights() and f"a {'2' * 12} (whole" in made.to_markdown()
    assert "2" * 13 not in made.to_markdown()


def test_what_was_measured_can_be_told_again(evaluate, models, tmp_path):  # noqa: F811
    words = ("--guidance", 2, "--sampler", "ddim", "--metric", "fd", "--metric", "rfd", "--seeds", 0, 1)
    assert evaluate(*SHORT, *words)[0] == 0
    content, model = table(tmp_path / "out"), models / "a.safetensors"
    assert content["facts"]["weights_sha256"] == {"a": hashlib.sha256(model.read_bytes()).hexdigest()}
    (row,) = content["rows"]
    settings = row["settings"]
    assert (settings["sampler"], settings["steps"], settings["guidance"]) == ("ddim", 2, 2.0)
    assert (settings["width"], settings["height"], settings["precision"]) == (32, 32, "32-true")
    assert settings["checkpoint"] == "a.safetensors" and "eta" in settings and "device" not in settings
    assert (row["seeds"], row["pictures"]) == ([0, 1], 6)
    data = content["data"]
    assert data["section"]["shards"] == f"{models}/shards/*.tar" and (data["used"], data["shards"]) == (24, 3)
    assert re.fullmatch("[0-9a-f]{64}", data["sha256"]) and data["limit"] == 10_000
    assert content["prompts"]["from"] == "captions of the real images" and content["prompts"]["count"] == 6
    assert "over 2 seeds; no margin of rfd" in content["facts"]["margins"]
    singular = [line for line in content["remarks"] if "covariances are singular" in line]
    assert [line.partition(":")[0] for line in singular] == ["fd"]  # 24 images for 16 features are enough for rfd


def test_reconstructions_of_few_images_are_said_to_be_few(evaluate, tmp_path):  # noqa: F811
    assert evaluate("--metric", "rfd", "--limit", 12)[0] == 0
    assert any(line.startswith("rfd: 12 real images for 16 features") for line in table(tmp_path / "out")["remarks"])


def test_a_model_whose_pictures_are_not_finite_does_not_lose_the_others(evaluate, models, tmp_path):  # noqa: F811
    torch.manual_seed(3)
    state = build("denoiser", DENOISER, 4, embedding(16)).state_dict()
    broken = {name: value * 1e30 if value.is_floating_point() else value for name, value in state.items()}
    config = json.loads(_metadata(models / "a.safetensors")["config"])
    save_model(models / "broken.safetensors", broken, config, {"image_size": "32"})
    checkpoints = ("--checkpoint", models / "a.safetensors", "--checkpoint", models / "broken.safetensors")
    for _ in range(2):  # the second time what was seen is taken up again
        code, _, err = evaluate(*checkpoints, *SHORT)
        assert code == 3 and "some values are not finite" in err and "Traceback" not in err, err
        one, other = table(tmp_path / "out")["rows"]
        assert all(isinstance(its["value"], float) for its in one["values"].values())
        assert {its["value"] for its in other["values"].values()} == {"nan"}
        remarks = table(tmp_path / "out")["remarks"]
        assert any("broken, guidance" in line and "6 of 6 images are not finite" in line for line in remarks)


def _metadata(path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()
