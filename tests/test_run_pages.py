"""The pages of runs: long logs in few numbers, what is torn, hostile or missing, and a run that renews its own page."""

import json
import math
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from run_folders import write_log, write_run
from tiny import make_run

from ldm_lab.__main__ import main
from ldm_lab.commands.runs import find_runs
from ldm_lab.config import read
from ldm_lab.errors import UserError
from ldm_lab.metrics import METRICS, is_higher_better
from ldm_lab.pages import render, run_events
from ldm_lab.pages.charts import groups
from ldm_lab.pages.run_events import Event, EventReader, read_events
from ldm_lab.pages.run_folder import find_pictures, read_config
from ldm_lab.pages.run_log import RunLog
from ldm_lab.pages.run_page import RunReader
from ldm_lab.pages.thinned import Extreme, Thinned
from ldm_lab.training import watching
from ldm_lab.training.guard_log import Event as GuardEvent


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_log(path: Path) -> RunLog:
    log = RunLog(path)
    assert log.read()
    return log


def page_data(path: Path, name: str = "charts") -> dict:
    return json.loads(re.search(rf'id="data-{name}">(.*?)</script>', path.read_text(), re.DOTALL)[1])


def read_page(folder: Path) -> str:
    reader = RunReader(folder)
    assert reader.read()
    return reader.write_page().read_text()


# ------------------------------------------------------------------------------------------------------- few numbers


@pytest.mark.parametrize("pieces", [1, 7, 400], ids=lambda n: f"{n}_pieces")
def test_buckets_hold_mean_lowest_and_highest_however_the_log_came(pieces):
    generator = np.random.default_rng(0)
    steps, values = np.arange(1, 4001), generator.normal(size=4000)
    values[[100, 101]], values[2000], values[3000] = np.nan, np.inf, -np.inf
    values[1234] = 99.5
    thinned = Thinned(100)
    for own, its in zip(np.array_split(steps, pieces), np.array_split(values, pieces)):
        thinned.add(own, its)
    points = thinned.points()
    assert 50 < len(points.steps) <= 100 and points.width == 64
    for place, index in enumerate(thinned.index):
        inside = values[steps // 64 == index]
        finite = inside[np.isfinite(inside)]
        assert points.mean[place] == pytest.approx(finite.mean(), rel=1e-4, abs=1e-6)
        assert points.low[place] == pytest.approx(finite.min(), rel=1e-5)
        assert points.high[place] == pytest.approx(finite.max(), rel=1e-5)
        assert points.steps[place] == pytest.approx(steps[steps // 64 == index].mean(), abs=0.51)
    assert (thinned.highest, thinned.last) == (Extreme(99.5, 1235), Extreme(values[-1], 4000))
    assert thinned.odd_counts() == {"NaN": 2, "inf": 1, "-inf": 1} and points.first_odd == 101
    assert [odd[1:] for odd in points.odd] == [[2, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_a_column_without_a_number_and_sums_that_overflow():
    nothing, huge = Thinned(10), Thinned(1)
    nothing.add(np.arange(3), np.full(3, np.nan))
    assert nothing.points().mean == [None] * 3 and nothing.last is None
    huge.add(np.arange(4), np.full(4, 1.5e308))
    assert huge.points().mean == [1.5e308]


def test_a_million_rows_are_a_small_page_with_all_their_spikes(tmp_path):
    path = tmp_path / "metrics.csv"
    steps = np.arange(1_000_000)
    loss = (1 + 1 / (1 + steps / 1000)).round(4).astype(str)
    loss[654_321] = "1234.5"
    path.write_text("step,train/loss\n" + "\n".join(map(",".join, zip(steps.astype(str), loss))) + "\n")
    reader = RunReader(tmp_path)
    assert reader.read() and reader.log.rows == reader.log.last_step == 1_000_000
    column = reader.log.columns["train/loss"]
    assert column.highest == Extreme(1234.5, 654_322) and max(column.points().high) == 1234.5
    began = time.process_time()
    page = reader.write_page()
    with open(path, "a") as file:
        file.write("1000000,0.5\n")
    assert reader.read() and reader.log.rows == 1_000_001
    reader.write_page()
    assert time.process_time() - began < 1, "to renew a page costs as little as it did at first"
    assert page.stat().st_size < 120_000


def test_a_log_is_read_on_and_from_its_beginning_when_it_was_cut_or_written_anew(tmp_path):
    path = tmp_path / "metrics.csv"
    log = RunLog(path)
    assert log.read() and log.rows == 0
    path.write_text("step,a\n0,1\n1,2\n2")
    assert log.read() and (log.rows, log.is_cut_off) == (2, True)
    with open(path, "a") as file:
        file.write(",3\n3,4\n")
    assert log.read() and (log.rows, log.torn, log.is_cut_off) == (4, 0, False)
    assert log.columns["a"].points().mean == [1, 2, 3, 4]
    path.write_text("step,a\n0,1\n1,2\n2,9\n3,8\n4,7\n")  # a run that goes on cuts rows off and writes others
    assert log.read() and log.columns["a"].points().mean == [1, 2, 9, 8, 7]
    path.write_text("step,a,b\n0,1,\n1,2,5\n")  # a new column
    assert log.read() and {name: its.points().steps for name, its in log.columns.items()} == {"a": [1, 2], "b": [2]}


def test_a_long_log_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm_lab.pages.run_log.BLOCK", 4096)
    write_log(tmp_path / "metrics.csv", 300)
    pieces, whole = RunLog(tmp_path / "metrics.csv"), read_log(tmp_path / "metrics.csv")
    times = 1
    while not pieces.read(10_000):
        times += 1
    assert times > 5 and pieces.rows == whole.rows == 300 and pieces.torn == 0
    assert {n: c.points() for n, c in pieces.columns.items()} == {n: c.points() for n, c in whole.columns.items()}


@pytest.mark.parametrize(
    ("text", "rows", "torn"),
    [
        ("", 0, 0),
        ("step,a", 0, 0),
        ("a,b\n1,2\n", 0, 1),
        ("step,a\n0,1\n1,\n2,x\n3\n,4\n5,6,7\n1.5,1\n-1,1\nnan,1\n8,9\n", 3, 7),
        ("step,a\n0,nan\n1,-inf\n2,1e400\n", 3, 0),
        ("step,a\n0," + "9" * 10_000 + "\n1,2\n", 1, 1),
        ("step,a\n\x00\x00\x00\n1,2\n", 1, 1),
        ('"step","a,b"\r\n0,1\r\n', 1, 0),
    ],
    ids=["empty", "no end", "no steps", "torn", "odd numbers", "long number", "zeros of a power failure", "quoted"],
)
def test_logs_that_are_not_whole(tmp_path, text, rows, torn):
    (tmp_path / "metrics.csv").write_bytes(text.encode())
    log = read_log(tmp_path / "metrics.csv")
    assert (log.rows, log.torn) == (rows, torn)
    assert render(RunReader(tmp_path).page())


# ---------------------------------------------------------------------------------------------------------- one page


def test_columns_that_belong_together_share_a_chart():
    found = groups([
        "train/loss", "train/loss_t0.00", "train/loss_t0.50", "train/lr", "train/vb", "held_out/loss",
        "held_out/loss_t0.25", "evaluate/fd", "speed/images_per_s", "speed/fetch_s", "speed/rest_s", "mine/x", "bare",
    ])  # fmt: skip
    shown = {
        (group.title, plot.title.partition(",")[0]): [n for _, n in plot.columns]
        for group in found
        for plot in group.plots
    }
    assert list(shown.values()) == [
        ["train/loss"], ["train/loss_t0.00", "train/loss_t0.50"], ["train/vb"], ["held_out/loss"],
        ["held_out/loss_t0.25"], ["evaluate/fd"], ["train/lr"], ["speed/images_per_s"],
        ["speed/fetch_s", "speed/rest_s"], ["mine/x"], ["bare"],
    ]  # fmt: skip
    assert [group.title for group in found] == [
        "Training",
        "Held-out images",
        "Evaluation",
        "Optimizer",
        "Speed",
        "mine",
        "bare",
    ]


def test_a_page_has_the_curves_pictures_events_and_config_of_its_folder(tmp_path):
    folder = write_run(tmp_path / "a <b>")
    text = read_page(folder)
    charts = page_data(folder / "index.html")
    assert charts["steps"] == 20_000 and len(charts["curves"]) == 15
    loss = charts["curves"]["train/loss"]
    assert loss["steps"][0] == 50 and max(v for v in loss["mean"] if v is not None) == 35.25
    assert [odd[1:] for odd in loss["odd"]] == [[1, 0, 0]] and charts["curves"]["train/grad_norm"]["odd"][0][2] == 1
    assert [(m["step"], m["kind"]) for m in charts["marks"]] == [
        (10_000, "run"), (12_000, "guard"), (12_001, "guard"), (12_002, "guard"), (16_000, "guard"),
    ]  # fmt: skip
    series = page_data(folder / "index.html", "pictures")["series"]
    assert [(its["name"], len(its["steps"])) for its in series] == [("demo", 4), ("enlargements", 4)]
    assert series[0]["addresses"][0] == "demo/step%3D00000001.png"
    for said in ("1 started, 1 resumed, 1 ended, 3 left out, 1 rolled back", "optim.lr: 0.001 -&gt; 0.0001",
                 "loss leaps (loss 35.25, limit 3, norm inf): left out", "samples: 00012, &lt;b&gt;",
                 "ended 2026-01-03T10:00:00+00:00: done", "20,000 of 20,000"):  # fmt: skip
        assert said in text, said
    assert "not finite" not in text.partition("data-charts")[0] and "loss: 1 NaN, first at step" in text
    assert "<b>" not in text.replace("<b>demo</b>", "").replace("<b>enlargements</b>", "")


def test_a_page_of_a_folder_with_a_log_alone(tmp_path):
    write_log(tmp_path / "metrics.csv", 3)
    text = read_page(tmp_path)
    assert "none that was written down" in text and "there is no config.yaml" in text and "Pictures" not in text


@pytest.mark.parametrize(
    "content",
    [
        "a: &a [x]\nb: [*a, *a]\n",
        "a: !!python/object/apply:os.system [ls]\n",
        "a: [1, 2\n",
        "- 1\n- 2\n",
        "a: " + "[" * 1500,
    ],
    ids=["aliases", "code", "broken", "list", "deep"],
)
def test_a_config_that_is_none_is_shown_as_it_is(tmp_path, content):
    write_log(tmp_path / "metrics.csv", 3)
    (tmp_path / "config.yaml").write_text(content)
    config = read_config(tmp_path)
    assert (config.text, config.flat) == (content, {})
    assert "config.yaml is no readable YAML" in read_page(tmp_path)


def test_events_are_counted_in_the_whole_file_and_read_on(tmp_path, monkeypatch):
    """However long it is; a line that is being written, or is longer than any event, harms no other."""
    monkeypatch.setattr(run_events, "BLOCK", 4096)
    path, event = tmp_path / "guard.jsonl", {"kind": "spike", "done": "left out"}
    lines = [json.dumps({**event, "step": step, "keys": ["k"] * (step % 9)}) for step in range(900)]
    path.write_text("\n".join(lines[:500]) + "\n" + lines[500][:30])
    reader = EventReader(tmp_path)
    times = 1
    while not reader.read(4096):
        times += 1
    found = reader.events()
    assert times > 5 and found.counts == {"left out": 500} and found.torn == 1 and len(found.shown) == 200
    with path.open("a") as file:
        file.write(lines[500][30:] + "\n" + "x" * 9000 + "\n" + "\n".join(lines[501:]))
    assert reader.read()
    found = reader.events()
    assert (found.counts["left out"], found.torn) == (900, 1) and found.shown[-1].step == 899
    assert read_events(tmp_path) == found
    path.write_text("\n".join(lines[:3]))
    assert reader.read() and reader.events().counts == {"left out": 3}
    path.unlink()
    assert reader.read() and not reader.events().counts


def test_events_that_cannot_be_read_are_counted_and_many_are_cut(tmp_path):
    event = Event(3, "resumed", "from x", "2026-01-01T00:00:00+00:00", ("a: 1 -> 2",))
    (tmp_path / "events.jsonl").write_bytes(event.line() + b"torn{\n[]\n\xff\xfe\n" + b'{"event": 3, "text": "x"}\n')
    for step in range(300):
        GuardEvent(step + 1, "loss", keys=("k",)).log(tmp_path, "left out")
    found = read_events(tmp_path)
    assert found.shown[2] == event or event in found.shown
    assert found.torn == 4 and found.counts == {"resumed": 1, "left out": 300} and len(found.shown) == 201
    assert found.shown[-1].text == "loss not finite (loss nan, limit inf, norm nan): left out"


@pytest.mark.parametrize("resumed", [None, Path("last.ckpt")], ids=["fresh", "resumed"])
def test_events_of_what_is_trained_anew_do_not_count(tmp_path, capsys, resumed):
    """A fresh run in a used folder has none of them, one that goes on none of the guard's beyond its checkpoint."""
    write_run(tmp_path / "run", rows=4, pictures=2)  # the guard's are of the steps 120 to 122 and 160
    guard = (tmp_path / "run" / "guard.jsonl").read_bytes().splitlines(keepends=True)
    callback = watching.Watching(tmp_path / "run", None, resumed, ())
    callback.on_train_start(SimpleNamespace(is_global_zero=True, global_step=121, world_size=1, precision="32"), None)
    found = read_events(tmp_path / "run")
    if resumed is None:
        assert found.counts == {"started": 1} and not (tmp_path / "run" / "guard.jsonl").exists()
    else:
        assert found.counts == {"started": 1, "resumed": 2, "ended": 1, "left out": 2}
        assert (tmp_path / "run" / "guard.jsonl").read_bytes() == b"".join(guard[:2])
    assert found.newest is not None and found.newest.kind == ("resumed" if resumed else "started")
    callback.tidy(50)
    assert capsys.readouterr().out.count("grids of steps after 50 that an earlier run has left: 1") == 2


def test_all_events_of_a_run_that_goes_on_at_once_count(tmp_path):
    write_run(tmp_path / "run", rows=4, pictures=0)
    trainer = SimpleNamespace(is_global_zero=True, global_step=1, world_size=1, precision="32")
    watching.Watching(tmp_path / "run", None, Path("last.ckpt"), (), is_same_run=True).on_train_start(trainer, None)
    assert read_events(tmp_path / "run").counts["left out"] == 3


def test_the_state_of_a_run_is_what_it_wrote_last_whatever_the_clock_said(tmp_path):
    """As where summer time ends, or a run goes on in another zone, or from an earlier step."""
    write_run(tmp_path / "run", rows=3, pictures=0)
    started = Event(9, "started", "x", "2026-10-25T02:50:00+02:00")
    ended = Event(4, "ended", "done", "2026-10-25T02:10:00+01:00")
    (tmp_path / "run" / "events.jsonl").write_bytes(started.line() + ended.line())
    reader = RunReader(tmp_path / "run")
    assert reader.read() and reader.state == "ended 2026-10-25T02:10:00+01:00: done"


def test_only_grids_are_pictures(tmp_path):
    write_run(tmp_path / "run", rows=3, pictures=2)
    (tmp_path / "run" / "demo" / ".step=00000009.png.part").write_bytes(b"")
    (tmp_path / "run" / "demo" / "other.png").write_bytes(b"")
    (tmp_path / "run" / "empty").mkdir()
    assert [(its.name, its.steps) for its in find_pictures(tmp_path / "run")] == [
        ("demo", [1, 76]),
        ("enlargements", [1, 76]),
    ]


# -------------------------------------------------------------------------------------------------------- a run's own


def test_a_run_renews_its_page_and_writes_its_events(here, program):
    demo = {"prompts": "prompts.txt", "every": 3, "sampling": {"sampler": {"name": "ddim", "steps": 2}}}
    yaml = make_run(here, images=16, demo=demo, logging={"page": 0.01})
    assert program("train", "--config", yaml, "trainer.max_steps=4")[0] == 0
    code, out, _ = program("train", "--config", yaml, "resume.checkpoint=last", "optim.weight_decay=0.1")
    assert code == 0 and "runs/tiny/index.html" in out
    run = here / "runs" / "tiny"
    text, charts = (run / "index.html").read_text(), page_data(run / "index.html")
    assert charts["curves"]["train/loss"]["steps"] == [1, 2, 3, 4, 5, 6]
    assert page_data(run / "index.html", "pictures")["series"][0]["steps"] == [1, 3, 6]
    events = read_events(run).shown
    assert [(event.step, event.kind) for event in events] == [
        (0, "started"),
        (4, "ended"),
        (4, "resumed"),
        (6, "ended"),
    ]
    assert any("weight_decay" in line for line in events[2].details), "changes on resume"
    assert any("24 samples read" in line for line in events[3].details), "what was read and skipped"
    assert "weight_decay" in text and read_config(run).flat["trainer.max_steps"] == "6"
    assert read(run / "config.yaml")["logging"]["page"] == 0.01


def test_a_run_that_breaks_off_says_so_on_its_page(here, program):
    yaml = make_run(here, images=16, optim={"lr": 1e30})
    code, _, _ = program("train", "--config", yaml, "trainer.max_steps=50")
    assert code == 3
    events = read_events(here / "runs" / "tiny")
    assert "broke off" in events.counts and "stopped" in events.counts
    assert "broke off" in (here / "runs" / "tiny" / "index.html").read_text()


def test_no_page_where_none_is_wanted(here, program):
    assert program("train", "--config", make_run(here, images=16), "logging.page=null", "trainer.max_steps=1")[0] == 0
    assert not (here / "runs" / "tiny" / "index.html").exists()


@pytest.mark.parametrize(
    "error", [UserError("index.html: cannot be written: no space"), OSError(28, "full"), KeyError("x")]
)
def test_a_page_that_cannot_be_written_is_said_once_and_the_run_goes_on(here, program, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(watching.RunReader, "write_page", fail)
    code, out, err = program(
        "train", "--config", make_run(here, images=16, logging={"page": 0.0001}), "trainer.max_steps=3"
    )
    assert code == 0, err
    assert out.count("the run goes on without its page") + out.count("index.html: cannot be made (KeyError: 'x')") == 1


def test_renewals_take_a_hundredth_of_the_time_at_most(tmp_path, monkeypatch):
    write_log(tmp_path / "metrics.csv", 3)
    callback = watching.Watching(tmp_path, 1.0, None, ())
    monkeypatch.setattr(callback.reader, "write_page", lambda: time.sleep(0.05))
    began = time.monotonic()
    callback.renew()
    assert callback.due - began >= 5


# -------------------------------------------------------------------------------------------------------- several runs


def test_runs_writes_a_page_of_several_with_links_and_differences(tmp_path, capsys):
    write_run(tmp_path / "runs" / "a", rows=100)
    write_run(tmp_path / "runs" / "group" / "odd #%?", rows=200, lr=1e-3, seed=1)
    assert main(["runs", str(tmp_path / "runs")]) is None
    assert "with links to the pages of 2 runs" in capsys.readouterr().out
    page = tmp_path / "runs" / "index.html"
    text, charts = page.read_text(), page_data(page)
    links = re.findall(r'<a href="([^"]+)"', text)
    assert links == ["a/index.html", "group/odd%20%23%25%3F/index.html"]
    assert all((tmp_path / "runs" / name / "index.html").exists() for name in ("a", "group/odd #%?"))
    assert charts["curves"].keys() >= {"0 train/loss", "1 train/loss"} and charts["steps"] == 10_000
    loss = next(chart for section in charts["sections"] for chart in section["charts"] if chart["title"] == "Loss")
    assert [line["label"] for line in loss["lines"]] == ["a", "odd #%?"]
    table = text.partition('id="differences"')[2]
    assert "optim.lr" in table and "0.001" in table and "seed" not in table
    columns = read_log(tmp_path / "runs" / "a" / "metrics.csv").columns
    for best in (columns["evaluate/fd"].lowest, columns["evaluate/clip_score"].highest):
        assert f"{best.value:.5g} at {best.step:,}" in text


def test_pages_know_which_way_is_better_as_evaluate_does():
    ways = {name: metric.higher_is_better for name, metric in METRICS.items()} | {"image_to_text_at_1": True}
    assert {name: is_higher_better(f"evaluate/{name}") for name in ways} == ways
    assert not is_higher_better("held_out/loss")


def test_many_runs_make_a_page_that_is_not_large(tmp_path):
    first = write_run(tmp_path / "runs" / "r0", rows=3000, pictures=0)
    for number in range(1, 20):
        shutil.copytree(first, tmp_path / "runs" / f"r{number}")
    main(["runs", str(tmp_path / "runs"), "--out", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").stat().st_size < 5e6
    curve = page_data(tmp_path / "page.html")["curves"]["19 train/loss"]
    assert max(value for value in curve["high"] if value is not None) == 35.25, "the spike is still there"


def test_runs_of_one_run_renews_its_page(tmp_path, capsys):
    run = write_run(tmp_path / "a", rows=100)
    with open(run / "metrics.csv", "a") as file:
        file.write("torn,\n")
    main(["runs", str(run)])
    said = capsys.readouterr().out
    assert (
        f"written: {run / 'index.html'}" in said and "note: a: metrics.csv: 1 torn row, of a run that broke off" in said
    )
    main(["runs", str(run), "--out", str(tmp_path / "one.html")])
    assert 'href="a/index.html"' in (tmp_path / "one.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["empty"], "empty: holds no run: a run's folder has a metrics.csv"),
        (["runs/a", "runs/b"], "--out: a file is needed"),
        (["runs", "--out", "runs/a/index.html"], "is the page of the run a itself"),
        (["runs", "--out", "empty"], "--out: empty is a folder"),
    ],
    ids=["nowhere", "no run", "no file", "a run's own", "folder"],
)
def test_what_has_no_page(here, words, message):
    (here / "empty").mkdir()
    for name in ("a", "b"):
        write_run(here / "runs" / name, rows=3, pictures=0)
    with pytest.raises(UserError, match=message):
        main(["runs", *words])


def test_a_run_in_a_folder_that_cannot_be_written_is_still_shown(here, capsys, monkeypatch):
    for name in ("a", "b"):
        write_run(here / "runs" / name, rows=3, pictures=0)

    def locked(self):
        raise UserError(f"{self.folder}/index.html: cannot be written: Permission denied")

    monkeypatch.setattr(RunReader, "write_page", locked)
    main(["runs"])
    said = capsys.readouterr().out
    assert said.count("its own page is not renewed") == 2 and (here / "runs" / "index.html").exists()


def test_names_that_are_no_text_have_addresses(here):
    run = here / "runs" / os.fsdecode(b"n\xff")
    write_run(run, rows=3, pictures=0)
    grids = run / os.fsdecode(b"gr\xff")
    grids.mkdir()
    (grids / "step=00000001.png").write_bytes(b"")
    main(["runs"])
    assert "n%FF/index.html" in (here / "runs" / "index.html").read_text()
    assert "gr%FF/step%3D00000001.png" in (run / "index.html").read_text()


def test_files_that_cannot_be_read_are_noted_and_the_other_runs_shown(here, capsys, monkeypatch):
    for name in ("a", "b", "c"):
        write_run(here / "runs" / name, rows=3, pictures=0)
    for name, file in (("a", "events.jsonl"), ("b", "config.yaml")):
        (here / "runs" / name / file).unlink(missing_ok=True)
        (here / "runs" / name / file).mkdir()
    (here / "runs" / "a" / "guard.jsonl").unlink(missing_ok=True)
    os.mkfifo(here / "runs" / "a" / "guard.jsonl")  # nobody writes to it
    read = RunLog.read

    def locked(self, most=None):
        if self.path.parent.name == "c":
            raise PermissionError(13, "Permission denied", str(self.path))
        return read(self, most)

    monkeypatch.setattr(RunLog, "read", locked)
    main(["runs"])
    said = capsys.readouterr().out
    for line in (
        "note: a: events.jsonl cannot be read: it is not a file\n",
        "note: a: guard.jsonl cannot be read: it is not a file\n",
        "note: b: config.yaml cannot be read: it is not a file\n",
        "note: c: cannot be read and is left out: Permission denied",
        "pages of 2 runs",
    ):
        assert line in said


def test_links_to_runs_are_followed_and_each_run_is_shown_once(here):
    write_run(here / "elsewhere" / "b", rows=3, pictures=0)
    write_run(here / "runs" / "a", rows=3, pictures=0)
    for name, target in {"linked": "../elsewhere/b", "again": "a", "loop": ".", "gone": "../nowhere"}.items():
        (here / "runs" / name).symlink_to(target)
    assert {path.resolve().name for path in find_runs(here / "runs")} == {"a", "b"}
    assert len(find_runs(here / "runs")) == 2
    main(["runs"])
    assert (here / "elsewhere" / "b" / "index.html").exists()


def test_runs_of_one_name_are_told_apart(here):
    for name in ("x/run", "y/run"):
        write_run(here / name, rows=3, pictures=0)
    main(["runs", "x", "y", "x/run", "--out", "both.html"])
    assert re.findall(r'data-hides="([^"]+)"', (here / "both.html").read_text()) == ["x/run", "y/run"]
    assert math.isfinite(page_data(here / "both.html")["steps"])
