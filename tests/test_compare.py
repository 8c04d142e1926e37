"""`python -m ldm_lab compare`: the same prompts and seeds through several models, votes, a table at wandb."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_glide
from PIL import Image
from test_sample_program import make_checkpoint

from ldm_lab.errors import UserError
from ldm_lab.evaluation.compare_page import Cell, Comparison, Heading, Row, write_comparison
from ldm_lab.evaluation.votes import add_up, interval

FAST = ("--steps", 2, "--device", "cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for name in ("a", "b"):
        (folder / name).mkdir()
        made[name] = make_checkpoint(folder / name, dropout=0.2)
        (folder / name / "config.yaml").write_text("run: x\n")  # as a run's folder has it
    made["glide"] = tiny_glide.write(folder / "glide.safetensors")
    made["upsampler"] = tiny_glide.write(folder / "glide_up.safetensors", upsampler=True)
    return made


@pytest.fixture
def compare(program, models, monkeypatch, tmp_path):
    """Run the command in an empty folder with two prompts: (exit code, out, err)."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red fox\na cat:2 </script>\n")

    def call(*words):
        named = [models.get(word, word) if isinstance(word, str) else word for word in words]
        return program("ldm_lab.__main__", "compare", *named)

    return call


def asked(*words, out="out"):
    return (*words, "--prompts", "prompts.txt", "--out", out, *FAST)


def labels(folder="out") -> list[str]:
    return [column["label"] for column in json.loads(Path(folder, "comparison.json").read_text())["columns"]]


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def test_models_and_a_sweep_with_the_pictures_of_sample(compare, program, models):
    code, out, err = compare(*asked("--checkpoint", "a", "--checkpoint", "b", "--guidance", 1, "--guidance", 3))
    assert code == 0, err
    assert "8 pictures (8 new) of 4 columns: out/index.html" in out
    it = json.loads(Path("out/comparison.json").read_text())
    assert labels() == ["a guidance 1", "a guidance 3", "b guidance 1", "b guidance 3"]
    assert [(row["prompt"], row["seed"]) for row in it["rows"]] == [("a red fox", 0), ("a cat:2 </script>", 1)]
    assert "prompt by cloob with weights of sha256" in it["scorer"] and all(
        -1 <= cell["score"] <= 1 for row in it["rows"] for cell in row["cells"]
    )
    page = Path("out/index.html").read_text()
    assert page.count("<img ") == 8 and "</script>:2" not in page and "a cat:2 &lt;/script&gt;" in page
    files = [[cell["image"] for cell in row["cells"]] for row in it["rows"]]
    assert len({name for row in files for name in row}) == 8
    words = ("--checkpoint", models["b"], "--prompts", "prompts.txt", "--guidance", 3, *FAST)
    assert program("sample", *words, "--out", "samples")[0] == 0
    for i, row in enumerate(files):
        assert (pixels(Path("out", row[3])) == pixels(f"samples/{i:05d}.png")).all()
    code, _, err = program("sample", "--from", Path("out", files[1][3]), "--checkpoint", models["b"], "--device", "cpu")
    assert code == 0, err


def test_it_goes_on_where_it_was_stopped(compare, monkeypatch):
    from ldm_lab.sampling import output

    write = output.write_picture
    written = []

    def stopped(path, *rest):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *rest)

    words = asked("--checkpoint", "a", "--steps", 3)
    monkeypatch.setattr(output, "write_picture", stopped)
    assert compare(*words)[0] == 130
    monkeypatch.setattr(output, "write_picture", write)
    assert "4 pictures (3 new)" in compare(*words)[1] and labels() == ["steps 3", "steps 2"]
    before = {path: path.stat().st_mtime_ns for path in Path("out/images").iterdir()}
    code, out, err = compare(*words)
    assert "4 pictures (0 new)" in out and "scores" not in err
    assert before == {path: path.stat().st_mtime_ns for path in Path("out/images").iterdir()}
    with open("prompts.txt", "a") as file:
        file.write("one more\n")
    next(iter(before)).write_bytes(b"damaged")
    assert "6 pictures (3 new)" in compare(*words)[1]
    code, out, _ = compare(*asked("--checkpoint", "a", "--seed", 5))
    assert code == 0 and "note: 6 pictures in out/images are of other settings" in out


def test_samplers_with_options_of_their_own(compare):
    words = asked("--checkpoint", "a", "--sampler", "ddim", "--sampler", "plms", "--eta", 0, "--eta", 1)
    code, _, err = compare(*words, "--no-scores")
    assert code == 0 and "note: --eta is of ddim" in err
    assert labels() == ["ddim eta 0", "ddim eta 1", "plms"]


def test_families_mix_and_upsamplers_belong_to_the_model_before_them(compare):
    words = ("--checkpoint", "glide", "--upsampler", "upsampler", "--checkpoint", "glide", "--label", "<small>")
    code, _, err = compare(*asked(*words, "--checkpoint", "a", "--upsampler-steps", 2, "-n", 2))
    assert code == 0, err
    it = json.loads(Path("out/comparison.json").read_text())
    assert labels() == ["glide + glide_up.safetensors", "<small>", "a"]
    sides = [cell["width"] for cell in it["rows"][0]["cells"]]
    assert sides == [tiny_glide.SIDE * tiny_glide.FACTOR, tiny_glide.SIDE, 16] and len(it["rows"]) == 4
    assert "&lt;small&gt;" in Path("out/index.html").read_text()


def test_a_clip_that_is_named_scores(compare):
    from tiny import ROOT

    clip = ("--clip", "name=cloob", f"weights={ROOT}/assets/quickstart/cloob.safetensors")
    assert compare(*asked("--checkpoint", "a"))[0] == 0
    before = json.loads(Path("out/comparison.json").read_text())
    code, out, err = compare(*asked("--checkpoint", "a", *clip, "--title", "<t>"))
    assert code == 0 and "2 pictures (0 new)" in out, err
    it = json.loads(Path("out/comparison.json").read_text())
    assert it["scorer"] != before["scorer"] and it["title"] == "<t>" and it["id"] == before["id"]
    scores = [[row["cells"][0]["score"] for row in one["rows"]] for one in (before, it)]
    assert all(abs(a - b) > 1e-4 for a, b in zip(*scores))
    assert compare(*asked("--checkpoint", "a", "--no-scores"))[0] == 0
    without = json.loads(Path("out/comparison.json").read_text())
    assert without["scorer"] == "" and without["rows"][0]["cells"][0]["score"] is None
    assert [one["scorer"] for one in without["known"]] == [before["scorer"], it["scorer"]]
    code, _, err = compare(*asked("--checkpoint", "a"))
    assert code == 0 and "scores" not in err  # they were kept
    assert json.loads(Path("out/comparison.json").read_text())["rows"] == before["rows"]


def test_nobody_votes_on_a_page_that_still_grows(tmp_path):
    """Its id becomes another with the settings of columns that are made later, and the votes would be refused."""
    cell = Cell("a.png", "a.png", 8, 8, 8, 8)
    columns = [Heading("A", {"steps": "2"}), Heading("B", {})]
    growing = Comparison("x", columns, [Row("a cat", 0, [cell, None])])
    whole = Comparison("x", columns, [Row("a cat", 0, [cell, cell])])
    pages = []
    for it in (growing, whole):
        write_comparison(tmp_path, it)
        pages.append((tmp_path / "index.html").read_text())
    assert ['id="blind"' in page for page in pages] == [False, True]
    assert ["as soon as all pictures are made" in page for page in pages] == [True, False]


def test_another_autoencoder_under_the_same_name_makes_new_pictures(compare, tmp_path):
    from safetensors.torch import load_file, save_file

    (folder := tmp_path / "swapped").mkdir()
    checkpoint = make_checkpoint(folder, dropout=0.2)
    words = asked("--checkpoint", checkpoint, "--no-scores")
    assert "2 pictures (2 new)" in compare(*words)[1]
    before = json.loads(Path("out/comparison.json").read_text())
    assert "2 pictures (0 new)" in compare(*words)[1]
    parts = sorted(path for path in folder.glob("*.safetensors") if path != checkpoint)
    for path in parts:
        save_file({key: value * 1.01 for key, value in load_file(path).items()}, path, _metadata(path))
        assert "2 pictures (2 new)" in compare(*words)[1], path
    assert len(parts) == 2
    after = json.loads(Path("out/comparison.json").read_text())
    assert after["id"] != before["id"]  # votes on the old pictures are not mixed with those on the new ones


def _metadata(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def test_large_pictures_have_thumbnails(compare, monkeypatch):
    from ldm_lab.commands import compare as module

    monkeypatch.setattr(module, "LARGEST_SHOWN", 8)
    assert compare(*asked("--checkpoint", "a"))[0] == 0
    (thumbnail, _) = sorted(Path("out/thumbnails").iterdir())
    assert pixels(thumbnail).shape == (8, 8, 3)
    page = Path("out/index.html").read_text()
    assert re.search(rf'src="thumbnails/{thumbnail.name}"[^>]*\swidth="8"', page)
    written = thumbnail.stat().st_mtime_ns
    picture = Path("out/images") / f"{thumbnail.stem}.png"
    picture.write_bytes(picture.read_bytes()[:-20])  # cut off: it is made anew
    assert "(1 new)" in compare(*asked("--checkpoint", "a"))[1] and Path("out/index.html").read_text() == page
    assert "(0 new)" in compare(*asked("--checkpoint", "a"))[1] and thumbnail.stat().st_mtime_ns == written
    for damaged in (b"damaged", thumbnail.read_bytes()[:-40]):
        thumbnail.write_bytes(damaged)
        cell = module.cell_of(Path("out"), thumbnail.stem)
        assert cell is not None and pixels(thumbnail).shape == (8, 8, 3), "of the picture, which is whole"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "the following arguments are required: --checkpoint, --prompts, --out"),
        (("--upsampler", "b", "--checkpoint", "a"), "--upsampler: belongs behind the --checkpoint"),
        (("--checkpoint", "a", "--label", "x", "--label", "y"), "--label: is given twice"),
        (asked("--checkpoint", "a", "--seed", -1), "--seed -1: all models begin from the same noise"),
        (asked("--checkpoint", "a", "--seed", 1, "--seed", 2), "--seed: is given twice"),
        (asked("--checkpoint", "a", "--checkpoint", "a"), "two columns are called"),
        (asked("--checkpoint", "a", "--checkpoint", "none.ckpt"), "none.ckpt"),
        (asked("--checkpoint", "a", "--sampler", "ddim", "--sampler", "euler_x"), "no such sampler: 'euler_x'"),
        (asked("--checkpoint", "a", "--eta", 0.5, "--sampler", "plms"), "eta"),
        (asked("--checkpoint", "upsampler", "--label", "up"), "up: this model is an upsampler"),
        (asked("--checkpoint", "a", "--upsampler-steps", 2), "--upsampler-steps belongs to an --upsampler"),
        (asked("--checkpoint", "a", "--guidance", "x"), "--guidance"),
        (asked("--checkpoint", "a", out="prompts.txt"), "--out prompts.txt: this is a file, not a folder"),
        (("--votes", "none.json"), "none.json: no such file of votes"),
        (asked("--checkpoint", "a", out="prompts.txt/x"), "--out prompts.txt/x: no folder that can be written to"),
        (asked("--checkpoint", "a", out="/proc/x"), "--out /proc/x: no folder that can be written to"),
        (asked("--checkpoint", "a", "--clip", "foo"), "--clip: "),
        (asked("--checkpoint", "a", "--clip", "weights=none.pt", "model=ViT-B-32"), "none.pt"),
        (asked("--checkpoint", "a", "--clip", "foo", "--no-scores"), "--no-scores leaves scores out"),
        (asked("--checkpoint", "a", "--blind-seed", -5), "--blind-seed: at least 0 is needed, not -5"),
        (asked("--checkpoint", "a", "--blind-seed", 2**32), "--blind-seed: at most 4294967295 is needed"),
        (("--votes", "v.json", "--checkpoint", "a", "-n", 2), "--checkpoint, -n cannot stand beside it"),
    ],
    ids=["nothing", "upsampler first", "two labels", "random seed", "two seeds", "same model twice", "no file",
         "no sampler", "other sampler's option", "upsampler alone", "no upsampler", "no number", "no folder",
         "no votes", "below a file", "not a real folder", "no clip", "no file of clip", "clip without scores",
         "negative order", "order too large", "votes and a model"],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(compare, words, message):
    code, _, err = compare(*words)
    assert code == 2 and message in err and err.strip().count("\n") == 0, err
    assert not Path("out/index.html").exists() and not Path("out/images").exists()


# ------------------------------------------------------------------------------------------------------------- votes


def votes(path: Path, choices: list[int | None], **changes) -> str:
    content = {"format": "ldm_lab votes", "comparison": "abc", "title": "A or B", "columns": ["A", "B"], "seed": 0}
    content |= {"rows": 6, "voter": path.name, "saved": "2026-05-01T10:00:00.000Z"}
    content["votes"] = [{"row": i, "choice": choice, "order": [0, 1]} for i, choice in enumerate(choices)]
    path.write_text(json.dumps({**content, **changes}))
    return str(path)


def test_votes_of_several_people_are_added_up(program, tmp_path):
    files = [votes(tmp_path / "1.json", [0, 1, 1, None]), votes(tmp_path / "2.json", [1] * 6)]
    copy = tmp_path / "copy.json"
    copy.write_bytes(Path(files[0]).read_bytes())
    code, out, err = program("ldm_lab.__main__", "compare", "--votes", *files, copy)
    assert code == 0 and f"{copy}: is the same as {files[0]}, and counted once" in err
    lines = out.splitlines()
    assert lines[0] == "A or B: 10 votes of 2 voters, 1 of them without a preference"
    assert " ".join(lines[1].split()) == "B 8 88.9% (95 %: 56.5% to 98.0%)"
    assert " ".join(lines[2].split()) == "A 1 11.1% (95 %: 2.0% to 43.5%)"


def test_names_in_a_file_of_votes_are_no_orders_for_the_terminal(tmp_path):
    names = ["A\x1b[31m\n", "猫 <b>"]
    lines = add_up([votes(tmp_path / "1.json", [1], columns=names, title="\x07 t")]).lines()
    assert lines[0].startswith("\\x07 t: 1 votes of 1 voter") and lines[1].startswith("  猫 <b>")
    assert lines[2].startswith("  A\\x1b[31m\\n ")


@pytest.mark.parametrize(("wins", "count"), [(0, 0), (0, 5), (5, 5), (8, 9), (50, 100)])
def test_the_interval_is_wilson_s(wins, count):
    from scipy.stats import binomtest

    if count == 0:
        assert interval(0, 0) == (0.0, 1.0)
    else:
        theirs = binomtest(wins, count).proportion_ci(0.95, "wilson")
        assert interval(wins, count) == pytest.approx((theirs.low, theirs.high), abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "no file of votes"),
        ({"columns": ["A", 2]}, "no file of votes"),
        ({"columns": []}, "no file of votes"),
        ({"votes": [{"row": 0, "choice": 2}]}, "a vote that is none"),
        ({"votes": [{"row": 0, "choice": -1}]}, "a vote that is none"),
        ({"votes": [{"row": "0", "choice": 1}]}, "a vote that is none"),
        ({"votes": [{"row": 0}]}, "a vote that is none"),
        ({"votes": [{"row": 0, "choice": "1"}]}, "a vote that is none"),
        ({"votes": [{"row": 6, "choice": 1}]}, "row 6 of a comparison whose 6 rows are counted from 0"),
        ({"votes": [3]}, "a vote that is none"),
        ({"votes": None}, "no list of votes"),
        ({"votes": {"row": 0}}, "no list of votes"),
        ({"rows": 0}, "no file of votes"),
        ({"voter": ""}, "voter .an id. and saved"),
        ({"saved": "yesterday"}, "voter .an id. and saved"),
        ({"saved": "2026-05-01T10:00:00"}, "a time with its zone"),
        ({"columns": ["A", "A"]}, "two columns are called 'A'"),
        ({"rows": 7}, "votes on another comparison"),
        ({"comparison": "other"}, "votes on another comparison"),
        ({"columns": ["B", "A"]}, "votes on another comparison"),
    ],
    ids=[
        "format",
        "columns",
        "no column",
        "choice",
        "negative",
        "row",
        "no choice",
        "choice is a text",
        "row too large",
        "no object",
        "no votes",
        "votes are no list",
        "no rows",
        "no voter",
        "no time",
        "no zone",
        "same columns",
        "rows",
        "comparison",
        "order",
    ],
)
def test_strange_votes_are_refused(tmp_path, changes, message):
    good = votes(tmp_path / "good.json", [0])
    with pytest.raises(UserError, match=message):
        add_up([good, votes(tmp_path / "bad.json", [1], **changes)])


def test_the_newest_file_of_a_voter_counts(tmp_path, capsys):
    def saved(name, minute, choices, voter):
        return votes(tmp_path / name, choices, voter=voter, saved=f"2026-05-01T10:{minute:02}:00.000Z")

    old, new = saved("1.json", 1, [0], "x"), saved("2.json", 3, [1, 1, None], "x")
    between, other = saved("3.json", 2, [0, 0], "x"), saved("4.json", 0, [0, 0], "y")
    tally = add_up([old, new, between, other, saved("5.json", 0, [], "z")])
    assert (tally.wins, tally.ties, tally.voters) == ([2, 2], 1, 2)
    notes = capsys.readouterr().err.splitlines()
    assert notes[0] == f"note: {old}, {between}: the voter of {new} has saved them earlier; not counted"
    assert notes[1].endswith("5.json: has no votes, and is not counted") and len(notes) == 2


def test_a_folder_is_no_file_of_votes(tmp_path):
    with pytest.raises(UserError, match="a folder, not a file of votes"):
        add_up([str(tmp_path)])


# ------------------------------------------------------------------------------------------------------------- wandb


@pytest.mark.slow
def test_wandb_offline_holds_the_same_table(compare, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    code, _, err = compare(*asked("--checkpoint", "a", "--checkpoint", "b"), "--wandb", "offline")
    assert code == 0, err
    (file,) = Path("out/wandb").glob("offline-run-*/files/media/table/comparison_*.table.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["prompt", "seed", "a", "b", "a: similarity", "b: similarity"]
    it = json.loads(Path("out/comparison.json").read_text())
    for line, row in zip(table["data"], it["rows"], strict=True):
        assert line[:2] == [row["prompt"], row["seed"]]
        assert line[4:] == pytest.approx([cell["score"] for cell in row["cells"]])
    pictures = {path.read_bytes() for path in Path("out/images").iterdir()}
    assert {path.read_bytes() for path in file.parents[1].glob("images/**/*.png")} == pictures
