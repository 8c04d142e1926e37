"""Where a run reports beside its CSV: TensorBoard and wandb hold the same numbers, read back by their own readers."""

import csv
import io
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import ROOT, make_run, run_program

from ldm_lab.checkpoints.files import read_pickled
from ldm_lab.training import start
from ldm_lab.training.logs import CSVLog, read_rows
from ldm_lab.training.tensorboard import TensorBoard

DEMO = {"prompts": "prompts.txt", "every": 6, "sampling": {"sampler": {"name": "ddim", "steps": 2}}}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def csv_table(folder: Path) -> dict[str, dict[int, float]]:
    """Return column -> step -> number."""
    table: dict[str, dict[int, float]] = {}
    with open(folder / "metrics.csv") as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                if name != "step" and text:
                    table.setdefault(name, {})[int(row["step"])] = float(text)
    return table


def tensorboard_table(folder: Path) -> tuple[dict[str, dict[int, float]], EventAccumulator]:
    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    read.Reload()
    return {tag: {e.step: e.value for e in read.Scalars(tag)} for tag in read.Tags()["scalars"]}, read


def records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a .wandb file: LevelDB's log, https://github.com/google/leveldb/blob/main/doc/log_format.md.

    A head of 7 bytes, then blocks of 32 KiB of pieces: checksum (4 bytes), length (2), kind (1): whole, first, middle
    or last piece of a record.
    """
    assert data[:4] == b":W&B"
    place, record = 7, b""
    while place + 7 <= len(data):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def wandb_rows(folder: Path) -> tuple[list[dict], dict]:
    """Return the logged rows of a run's .wandb file, and its config, parsed by wandb's own messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.rglob("wandb/**/*.wandb")
    rows, config = [], {}
    for data in records(path.read_bytes()):
        record = Record.FromString(data)
        pairs = [("/".join(i.nested_key) or i.key, json.loads(i.value_json)) for i in record.history.item]
        rows += [dict(pairs)] if pairs else []
        for update in (*record.config.update, *record.run.config.update):
            config["/".join(update.nested_key) or update.key] = json.loads(update.value_json)
    return rows, config


def assert_same(ours: dict[str, dict[int, float]], theirs: dict[str, dict[int, float]], precision: float):
    assert theirs.keys() == ours.keys()
    for name, column in ours.items():
        assert theirs[name] == pytest.approx(column, rel=precision, nan_ok=True), name


def test_tensorboard_and_wandb_hold_the_tables_grids_and_config_of_the_csv(here):
    held_out = {"data": {"name": "webdataset", "shards": str(here / "shards" / "*.tar"), "image_size": 64,
                         "batch_size": 4}, "samples": 4, "every": 3}  # fmt: skip
    yaml = make_run(here, demo=DEMO, held_out=held_out, logging={"wandb": "offline", "tensorboard": True})
    result = run_program(ROOT / "train.py", "--config", yaml, cwd=here, WANDB_MODE="")
    assert result.returncode == 0, result.stderr
    run = here / "runs" / "tiny"
    table = csv_table(run)
    assert len(table["train/loss"]) == 6 and len(table["held_out/loss"]) == 3 and "speed/images_per_s" in table
    scalars, read = tensorboard_table(run)
    assert_same(table, scalars, 1e-6)
    grids = {e.step: Image.open(io.BytesIO(e.encoded_image_string)) for e in read.Images("demo/grid")}
    files = {step: Image.open(run / "demo" / f"step={step + 1:08d}.png") for step in (0, 5)}
    assert {step: grid.tobytes() for step, grid in grids.items()} == {
        step: file.convert("RGB").tobytes() for step, file in files.items()
    }
    text = read.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    base_channels: 16" in text

    rows, config = wandb_rows(run)
    history: dict[str, dict[int, float]] = {}
    for row in rows:
        for name in row.keys() & table.keys():
            history.setdefault(name, {})[row["trainer/global_step"]] = row[name]
    assert_same(table, history, 1e-12)
    assert config["denoiser"]["base_channels"] == 16
    assert any("demo/grid/captions" in key or "demo/grid" in key for row in rows for key in row)
    assert list(run.rglob("wandb/**/media/images/**/*.png")), "no picture in wandb's files"
    captions = b"".join(path.read_bytes() for path in run.rglob("wandb/**/*.wandb"))
    assert b"a blue square" in captions


def test_what_a_resumed_run_goes_over_again_counts_once(here, program):
    yaml = make_run(here, logging={"tensorboard": True}, checkpoint={"every": 2, "keep": 5})
    assert program("train", "--config", yaml, "trainer.max_steps=5")[0] == 0
    run = here / "runs" / "tiny"
    assert read_pickled(run / "step=00000004.ckpt")["global_step"] == 4
    code, _, err = program("train", "--config", yaml, f"resume.checkpoint={run}/step=00000004.ckpt", "optim.lr=1e-3")
    assert code == 0, err
    scalars, _ = tensorboard_table(run)
    assert list(scalars["train/loss"]) == list(range(6))
    assert_same(csv_table(run), scalars, 1e-6)


def test_what_is_measured_when_a_step_s_row_is_written_gets_a_row_of_its_own(tmp_path):
    log = CSVLog(tmp_path / "metrics.csv")
    log.log_metrics({"loss": 1.0, "epoch": 0}, 4)
    log.save()
    log.log_metrics({"loss": 2.0, "epoch": 0}, 4)  # as Lightning does once more, behind a checkpoint
    log.log_metrics({"evaluate/fd": 3.0, "epoch": 0}, 4)
    log.save()
    log.log_metrics({"loss": 4.0, "evaluate/fd": 5.0}, 4)
    log.log_metrics({"loss": 6.0}, 5)
    log.finalize("success")
    rows = [{"step": "4", "loss": "1.0", "evaluate/fd": ""}, {"step": "4", "loss": "", "evaluate/fd": "3.0"}]
    assert read_rows(tmp_path / "metrics.csv", None) == [*rows, {"step": "5", "loss": "6.0", "evaluate/fd": ""}]


def test_numbers_that_are_not_finite_are_kept(tmp_path):
    logger = TensorBoard(tmp_path)
    logger.log_metrics({"a": math.nan, "b": math.inf, "epoch": 0}, 3)
    logger.finalize("success")
    scalars, _ = tensorboard_table(tmp_path)
    assert math.isnan(scalars["a"][3]) and scalars["b"] == {3: math.inf} and scalars.keys() == {"a", "b"}


def test_a_full_disk_ends_the_files_and_not_the_run(tmp_path, capsys, monkeypatch):
    logger = TensorBoard(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(logger.experiment, "add_scalar", full)
    logger.log_metrics({"a": 1.0, "b": 2.0}, 0)
    logger.log_picture("grid", Image.new("RGB", (4, 4)), 0)
    logger.finalize("success")
    said = capsys.readouterr().out
    assert said.count("cannot be written: No space left on device; nothing more is written there") == 1


@pytest.mark.parametrize("words", [[], ["--check"]], ids=["train", "check"])
def test_without_the_package_one_line_names_the_extra(here, program, monkeypatch, words):
    yaml = make_run(here, images=8)
    monkeypatch.setattr(start, "has_tensorboard", lambda: False)
    code, _, err = program("train", "--config", yaml, "logging.tensorboard=true", *words)
    assert code == 2 and "logging.tensorboard: needs tensorboard, which is not installed" in err
    assert "make setup EXTRAS=tensorboard, or pip install -e" in err and not (here / "runs").exists()
