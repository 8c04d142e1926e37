"""What happens to a run around it: killed loader processes, full memory and disks, readers that give nothing."""

import csv
import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from data_sets import encoded, module, write_shards
from tiny import ROOT, make_run, run_program

from ldm_lab.checkpoints.files import read_pickled
from ldm_lab.data import waiting
from ldm_lab.data.loader import describe_failure
from ldm_lab.data.loader_processes import Piped, Whereabouts, how_it_ended, lack_of_shared_memory, ready_to_send
from ldm_lab.data.streams import CommandOutput, drain
from ldm_lab.data.webdataset import WebDataset
from ldm_lab.errors import out_of_memory
from ldm_lab.interfaces import Batch
from ldm_lab.training import checkpointing, disk, logs
from ldm_lab.training.logs import CSVLog, read_rows
from ldm_lab.training.resume import is_whole

linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Runs go under the test's own folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(here):
    """The folder of the tiny run."""
    return here / "runs" / "tiny"


def steps(run: Path) -> list[int]:
    with open(run / "metrics.csv") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def one_error(err: str) -> str:
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "Traceback" not in err
    return line


def after(samples: int, do):
    """Return `WebDataset.samples` that does something in a loader process once it has read some samples."""
    parent, own = os.getpid(), WebDataset.samples
    count = [0]

    def reading(self, address):
        for sample in own(self, address):
            count[0] += 1
            if count[0] > samples and os.getpid() != parent:
                do()
            yield sample

    return reading


# ------------------------------------------------------------------------------------------------- loader processes


def raise_index_error():
    raise IndexError("no such row")


@pytest.mark.parametrize(
    ("do", "code", "words"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), 75, "loader process 0 of 1 was killed (SIGKILL"),
        (raise_index_error, 2, "loader process 0 of 1 failed with IndexError: no such row"),
    ],
)
def test_what_was_trained_is_saved_when_a_loader_process_dies(here, run, program, monkeypatch, do, code, words):
    options = ["data.workers=1", "data.batch_size=2", "data.shuffle_buffer=0", "checkpoint.every=100"]
    options += ["trainer.accumulate_grad_batches=2", "trainer.max_steps=100"]
    yaml = make_run(here)
    monkeypatch.setattr(WebDataset, "samples", after(14, do))
    ended, out, err = program("train", "--config", yaml, *options)
    assert ended == code, err
    assert words in out + err and "Traceback" not in out + err
    assert code == 2 or "fewer data.workers" in out
    saved = read_pickled(run / "last.ckpt")
    assert 1 <= saved["global_step"] <= 3
    assert saved["ldm_lab"]["batches_seen"] == 2 * saved["global_step"], "no step is cut in two"
    assert steps(run) == list(range(saved["global_step"]))


def test_a_step_that_was_cut_off_is_trained_as_if_nothing_had_been(here, program, monkeypatch):
    options = ["data.workers=1", "data.batch_size=2", "data.shuffle_buffer=0", "trainer.accumulate_grad_batches=3"]
    yaml = make_run(here)
    assert program("train", "--config", yaml, *options, "run=whole", "trainer.max_steps=4")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(WebDataset, "samples", after(15, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        assert program("train", "--config", yaml, *options, "run=cut", "trainer.max_steps=4")[0] == 75
    assert read_pickled("runs/cut/last.ckpt")["global_step"] < 3
    again = [*options, "run=cut", "trainer.max_steps=4", "resume.checkpoint=last"]
    assert program("train", "--config", yaml, *again)[0] == 0
    whole, cut = (read_pickled(f"runs/{name}/last.ckpt") for name in ("whole", "cut"))
    assert whole["ldm_lab"]["batches_seen"] == cut["ldm_lab"]["batches_seen"] == 12
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, cut["state_dict"][name]), name
    logged = [read_rows(here / "runs" / name / "metrics.csv", None) for name in ("whole", "cut")]
    whole_rows, cut_rows = (
        [{key: value for key, value in row.items() if not key.startswith("speed/")} for row in rows] for rows in logged
    )
    assert whole_rows == cut_rows and len(whole_rows) == 4


def test_a_loader_that_dies_at_once_is_the_user_s_to_mend(here, program, monkeypatch):
    monkeypatch.setattr(WebDataset, "samples", after(0, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    code, _, err = program("train", "--config", make_run(here), "data.workers=1")
    assert code == 2 and "was killed (SIGKILL" in one_error(err)


def test_what_a_reader_did_not_expect_in_words():
    try:
        b"a".decode("no such codec")
    except LookupError as error:
        failure = describe_failure(error, "reading the data")
    assert failure.message.startswith("reading the data failed with LookupError: unknown encoding: no such codec (")
    assert "test_faults.py" in failure.message and not failure.may_pass
    try:
        raise MemoryError
    except MemoryError as error:
        failure = describe_failure(error, "loader process 1 of 4")
    assert failure.message.startswith("loader process 1 of 4 ran out of memory (") and failure.may_pass


def test_ends_of_processes_in_words():
    assert how_it_ended(3) == "ended with status 3"
    assert how_it_ended(-signal.SIGTERM) == "was ended by SIGTERM"
    assert how_it_ended(-signal.SIGBUS) == "crashed (SIGBUS)"
    assert how_it_ended(-63) == "was ended by signal 63" or "SIGRT" in how_it_ended(-63)


def test_what_is_being_read_is_told_whatever_its_name():
    whereabouts = Whereabouts(2)
    assert str(whereabouts) == ""
    whereabouts.note(1, "photos/\udcff.jpg" + 500 * "x")
    whereabouts.note(0, "b.tar")
    assert str(whereabouts).startswith("b.tar, photos/\\udcffx.jpg"[:19])


def test_a_batch_without_room_in_shared_memory_comes_all_the_same(monkeypatch):
    batch = Batch(["a"], ["b"], image=torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2))
    batch.conditions = {"embed": torch.ones(1, 4, dtype=torch.float16)}
    assert ready_to_send(batch) is batch and batch.image.is_shared()

    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    sent = ready_to_send(batch)
    assert isinstance(sent, Piped) and sent.batch.image is None and not sent.batch.conditions
    back = sent.unpack()
    assert torch.equal(back.image, batch.image) and torch.equal(back.conditions["embed"], batch.conditions["embed"])
    assert back.key == ["a"] and back.mean is None


def test_too_little_shared_memory_in_words():
    batch = Batch(["a"], [""], image=torch.zeros(1, 3, 1000, 1000, dtype=torch.uint8))
    assert lack_of_shared_memory(batch, 4, 27_000_000) is None and lack_of_shared_memory(batch, 4, None) is None
    line = lack_of_shared_memory(batch, 4, 26_999_999)
    assert "has 27 MB free, and 9 batches of 3.0 MB may lie there (4 loader processes)" in line
    assert "--shm-size" in line and "data.workers" in line


SHARED_MEMORY = """
import subprocess, sys
from data_sets import module, take
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", "/dev/shm"], check=True)
section = {"name": "webdataset", "shards": sys.argv[1], "image_size": 1300, "batch_size": 3, "workers": 2}
for size in ("64m", "4m"):
    subprocess.run(["mount", "-o", f"remount,size={size}", "/dev/shm"], check=True)
    few = take(module(section), 4)
    print(size, [len(batch.image) for batch in few], all(batch.image.any() for batch in few))
"""


@pytest.mark.slow
@linux
def test_shared_memory_that_is_too_small_is_said_and_done_without(tmp_path):
    """Three pictures of 1300 pixels are 15 MB: in 64 MB there is room for four batches, in 4 MB for none."""
    try:
        subprocess.run(["unshare", "-rm", "true"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = str(error.stderr if isinstance(error, subprocess.CalledProcessError) else error)
        if "not permitted" in said.lower() or "denied" in said.lower():
            pytest.skip(f"no right to unshare: {said}")
        raise
    write_shards(tmp_path, 2, 12)
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", SHARED_MEMORY, f"{tmp_path}/*.tar"], text=True, capture_output=True,
        timeout=120, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "64m [3, 3, 3, 3] True" in done.stdout and "4m [3, 3, 3, 3] True" in done.stdout
    told = [line for line in done.stdout.splitlines() if line.startswith("data: /dev/shm has")]
    assert len(told) == 2 and "5 batches of 15.2 MB" in told[0] and "--shm-size" in told[0]


def _read_a_fifo(shards: str, pipe) -> None:
    """A stand-in for a training process that waits for a shard which never comes."""
    batches = iter(module({"name": "webdataset", "shards": [shards], "workers": 1}).train_dataloader())
    threading.Timer(1, lambda: pipe.send([p.pid for p in multiprocessing.active_children()])).start()
    next(batches)


def descendants(pid: int) -> set[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@linux
@pytest.mark.parametrize("shards", ["FIFO", "pipe:cat FIFO | cat"])
def test_nothing_outlives_a_trainer_that_is_killed(tmp_path, shards):
    fifo = tmp_path / "a.tar"
    os.mkfifo(fifo)
    if shards == "FIFO":  # the list of shards takes files alone, as it should
        shards = f"pipe:exec cat {fifo}"
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    trainer = context.Process(target=_read_a_fifo, args=(shards.replace("FIFO", str(fifo)), theirs))
    trainer.start()
    theirs.close()
    assert len(ours.recv()) == 1
    left = descendants(trainer.pid)
    assert len(left) >= 2, "a loader process and its command"
    trainer.kill()
    trainer.join()
    deadline = time.monotonic() + 20
    while any(map(alive, left)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in left if alive(pid)]


def test_a_command_s_output_and_failure_are_its_own():
    stream = CommandOutput("printf abc; cat; exit 0")
    assert stream.read(2) == b"ab" and stream.read(2) == b"c"
    drain(stream)
    stream.close()
    with pytest.raises(OSError, match="status 3"):
        drain(CommandOutput("exit 3"))
    stuck = CommandOutput("sleep 100")
    stuck.close()
    assert stuck.process.returncode is not None


# ------------------------------------------------------------------------------------------------------------- stalls


@pytest.fixture
def stalled(here):
    """The YAML of a run whose second shard never comes."""
    yaml = make_run(here)
    os.mkfifo(here / "stalled.tar")
    shard = next((here / "shards").glob("*.tar"))
    (here / "shards.yaml").write_text(
        f"defaults: {yaml}\ndata:\n  shuffle_buffer: 0\n  shards: ['pipe:cat {shard} {here}/stalled.tar']\n"
    )
    return here / "shards.yaml"


@pytest.mark.parametrize(("workers", "number"), [(0, signal.SIGTERM), (1, signal.SIGUSR1)])
def test_a_signal_during_a_stall_saves_and_leaves(stalled, run, program, monkeypatch, workers, number):
    monkeypatch.setattr(waiting, "PATIENCE", 2.0)
    monkeypatch.setattr(waiting, "SAY_AFTER", 1.0)
    seconds = iter([5.0])

    def when_it_stalls():
        while not (run / "metrics.csv").exists():
            time.sleep(0.1)
        time.sleep(next(seconds) / 2)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=when_it_stalls, daemon=True)
    thread.start()
    code, out, err = program(
        "train", "--config", stalled, "trainer.max_steps=100", "checkpoint.every=100", f"data.workers={workers}"
    )
    assert code == 75, err
    assert "data: no batch for 1 s, still waiting (pipe:cat " in out
    assert f"stopped by signal {int(number)} (no batch for" in out and "and saved" in out
    assert read_pickled(run / "last.ckpt")["global_step"] == len(steps(run)) >= 1


def test_a_signal_before_the_first_batch_leaves_too(here, program, monkeypatch):
    monkeypatch.setattr(waiting, "PATIENCE", 1.0)
    os.mkfifo(here / "stalled.tar")

    def once_it_is_heard():
        while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=once_it_is_heard, daemon=True).start()
    shards = f"data.shards=pipe:cat {here}/stalled.tar"
    code, out, err = program("train", "--config", make_run(here), shards)
    assert code == 75, err
    assert "at step 0 before anything new was trained" in out


def test_a_stall_ends_by_itself(stalled, run, program, monkeypatch):
    code, out, err = program("train", "--config", stalled, "data.timeout=2", "checkpoint.every=100", "data.workers=0")
    assert code == 75, err
    assert "stopped by the data (no batch for" in out and "and saved" in out
    assert read_pickled(run / "last.ckpt")["global_step"] >= 1


@pytest.fixture
def heeded():
    """Ctrl-C means something, also where a shell has started the tests in the background and they ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_in_the_midst_of_a_save_leaves_what_was_saved(heeded, here, run, program, monkeypatch):
    real, calls = torch.save, []

    class Impatient:
        """A file during whose writing Ctrl-C is pressed twice."""

        def __init__(self, file):
            self.file = file

        def write(self, data):
            self.file.write(data)
            if len(calls) == 2:
                calls.append("pressed")
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            return len(data)

        def flush(self):
            self.file.flush()

    def save(content, file):
        calls.append("save")
        real(content, Impatient(file))

    monkeypatch.setattr(checkpointing.torch, "save", save)
    code, _, err = program("train", "--config", make_run(here), "checkpoint.every=2")
    assert code == 130 and "interrupted" in err
    assert read_pickled(run / "last.ckpt")["global_step"] == 2 and is_whole(run / "last.ckpt")
    assert not list(run.rglob("*.part"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ------------------------------------------------------------------------------------------------- disk, memory, logs


def test_too_little_room_is_told_before_the_run(here, run, program, monkeypatch):
    yaml = make_run(here)
    assert program("train", "--config", yaml, "run=other", "trainer.max_steps=1")[0] == 0
    size = (here / "runs/other/last.ckpt").stat().st_size
    free = [3 * size]
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, free[0]))
    code, _, err = program("train", "--config", yaml, "checkpoint={every: 1, keep: 3}")
    line = one_error(err)
    assert code == 2 and "3 checkpoints of" in line and "checkpoint.keep=" in line and not run.exists()
    (fits,) = {word for word in line.split() if word.startswith("checkpoint.keep=")}
    assert program("train", "--config", yaml, "checkpoint.every=1", fits)[0] == 0
    free[0] = size
    code, _, err = program("train", "--config", yaml, "run=third")
    assert code == 2 and "; free some space" in err


def test_the_estimate_of_a_checkpoint_is_near(here, run, program, monkeypatch):
    estimates = []
    own = disk.checkpoint_bytes
    monkeypatch.setattr(disk, "checkpoint_bytes", lambda task: estimates.append(own(task)) or estimates[-1])
    assert program("train", "--config", make_run(here), "trainer.max_steps=1")[0] == 0
    assert 0.7 < estimates[0] / (run / "last.ckpt").stat().st_size < 1.3


def test_memory_that_runs_out_is_one_line(here, program, monkeypatch):
    from ldm_lab.training.diffusion import DiffusionTask

    def step(task, batch, index):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\nmany\nlines")

    monkeypatch.setattr(DiffusionTask, "training_step", step)
    code, _, err = program("train", "--config", make_run(here))
    line = one_error(err)
    assert code == 2 and "out of the device's memory (2.00 GiB more were asked for) while training at step 1" in line
    assert "data.batch_size" in line and "trainer.precision" in line


def test_what_memory_that_runs_out_looks_like():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60)
    assert out_of_memory(raised.value).startswith("out of main memory")
    assert out_of_memory(MemoryError())
    assert out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    assert out_of_memory(RuntimeError("shapes do not match")) is None
    assert out_of_memory(KeyError("out of memory")) is None


def test_the_row_of_a_saved_step_is_in_the_file_before_the_checkpoint(here, run, program, monkeypatch):
    seen = []
    real = checkpointing.verify

    def verify(path, step):
        real(path, step)
        seen.append((step, steps(run)))

    monkeypatch.setattr(checkpointing, "verify", verify)
    assert program("train", "--config", make_run(here), "checkpoint.every=2", "trainer.max_steps=4")[0] == 0
    assert seen == [(2, [0, 1]), (4, [0, 1, 2, 3])]
    assert steps(run) == [0, 1, 2, 3]


@pytest.mark.parametrize("torn", ["3,0.", "3", "3,0.5,14,0.7\n", "\0\0\0", "3,0.5", "\udcff"])
def test_torn_rows_are_left_out_and_said(tmp_path, capsys, torn):
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"step,loss\n0,0.1\n1,0.2\n" + torn.encode(errors="surrogateescape"))
    log = CSVLog(path, 4)
    log.log_metrics({"loss": 0.9, "lr": 1.0}, 4)
    log.save()
    assert [row["step"] for row in read_rows(path, None)] == ["0", "1", "4"]
    assert "1 torn row" in capsys.readouterr().out


@pytest.mark.parametrize("before", [4999, 2500, 0, 6000])
def test_a_resumed_log_is_cut_at_its_end_without_being_read_whole(tmp_path, monkeypatch, before):
    path, read = tmp_path / "metrics.csv", []
    rows = [f"{step},0.{step},{'9' * 40}\r\n" for step in range(5000)]
    path.write_text("step,loss,lr\r\n" + "".join(rows) + "5000,0.", newline="")
    monkeypatch.setattr(logs, "read_rows", None)
    step_of = logs.step_of
    monkeypatch.setattr(logs, "step_of", lambda line, columns: read.append(line) or step_of(line, columns))
    log = CSVLog(path, before)
    log.log_metrics({"loss": 0.5}, before)
    log.save()
    assert path.read_text() == "".join(
        ["step,loss,lr\n", *(r.replace("\r", "") for r in rows[:before]), f"{before},0.5,\n"]
    )
    assert before < 4999 or len(read) < 4


def test_a_csv_of_nothing_is_begun_anew(tmp_path):
    for content in (b"", b"\0\0", b"st", b"a,b\n1,2\n"):
        (tmp_path / "metrics.csv").write_bytes(content)
        assert read_rows(tmp_path / "metrics.csv", None) == []


# ------------------------------------------------------------------------------------------------------------- resume


def overwritten(path: Path, content: bytes) -> None:
    path.unlink()  # else its other name, the numbered checkpoint, would change, too
    path.write_bytes(content)


def test_a_damaged_last_checkpoint_names_an_intact_one(here, run, program):
    yaml = make_run(here)
    assert program("train", "--config", yaml, "checkpoint.every=2", "trainer.max_steps=4")[0] == 0
    whole = (run / "last.ckpt").read_bytes()
    hole = whole[: len(whole) // 2] + bytes(4096) + whole[len(whole) // 2 + 4096 :]
    for content in (b"", bytes(len(whole)), whole[:-1000], whole[:100], hole):
        overwritten(run / "last.ckpt", content)
        code, _, err = program("train", "--config", yaml, "resume.checkpoint=last")
        line = one_error(err)
        assert code == 2 and "last.ckpt" in line, line
        assert "resume.checkpoint=runs/tiny/step=00000004.ckpt goes on with the newest intact one" in line
    overwritten(run / "step=00000004.ckpt", hole)
    _, _, err = program("train", "--config", yaml, "resume.checkpoint=last")
    (override,) = [word for word in err.split() if word.startswith("resume.checkpoint=")]
    assert override == "resume.checkpoint=runs/tiny/step=00000002.ckpt"
    assert program("train", "--config", yaml, override, "trainer.max_steps=3")[0] == 0
    assert steps(run) == [0, 1, 2]


def test_what_a_resume_changes_is_said(here, program):
    yaml = make_run(here)
    slope = ["optim.schedule=cosine", "optim.lr=1e-3"]
    assert program("train", "--config", yaml, *slope, "trainer.max_steps=4")[0] == 0
    resumed = ["resume.checkpoint=runs/tiny/last.ckpt", *slope]
    code, out, _ = program("train", "--config", yaml, *resumed, "trainer.max_steps=2", "run=less")
    assert code == 0 and "step 4: nothing was left to do, trainer.max_steps=2 is less" in out
    code, out, _ = program("train", "--config", yaml, *resumed, "trainer.max_steps=8", "data.workers=1", "run=more")
    assert code == 0
    expected = "learning rate: cosine over 4 steps to 0 -> cosine over 8 steps to 0: it had ended, and stays at 0"
    assert expected in out
    assert "that are left" not in out, "one reader was one reader before"
    code, out, _ = program("train", "--config", yaml, *resumed, "trainer.max_steps=8", "data.workers=2", "run=two")
    assert "data: workers 1 -> 2: the shards that are left, 4 of epoch 0, some of them begun, go to 2 readers" in out


def test_names_that_are_no_text_end_in_no_traceback(here):
    code = textwrap.dedent(
        """
        import os, sys
        from ldm_lab.errors import UserError, run_program
        def main():
            print(os.fsdecode(b"photos/\\xff.jpg"))
            raise UserError(os.fsdecode(b"runs/\\xfe: damaged"))
        run_program(main)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=here,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "photos/\\udcff.jpg" in done.stdout and "error: runs/\\udcfe: damaged" in done.stderr


@linux
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_run_over_names_that_are_no_text(here, program, monkeypatch, kind):
    """Names of images, folders, shards, members, and of the folder that the run is in: in reports and checkpoints."""
    odd = os.fsdecode(b"\xff\xe9")
    home = here / odd
    home.mkdir()
    yaml = make_run(here)
    monkeypatch.chdir(home)
    images = {f"a{odd}.png": encoded(1), f"broken{odd}.png": b"no picture", "b.png": encoded(2), "c.png": encoded(3)}
    if kind == "folder":
        data = ["data.name=folder", "data.path=photos"]
        (home / "photos" / odd).mkdir(parents=True)
        for name, content in images.items():
            (home / "photos" / odd / name).write_bytes(content)
    else:
        data = ["data.shards=./*.tar"]
        with tarfile.open(home / f"{odd}.tar", "w", encoding="utf-8", errors="surrogateescape") as archive:
            for name, content in images.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    common = [*data, "data.max_skipped=0.5", "data.batch_size=2", "data.min_size=4", "checkpoint.every=2"]
    for again, steps_ in (([], 4), (["resume.checkpoint=last"], 6)):
        code, out, err = program("train", "--config", yaml, *common, *again, f"trainer.max_steps={steps_}")
        assert code == 0, (out, err)
        assert "(e.g. " in out.rpartition("data: ")[2]
    last = home / "runs" / "tiny" / "last.ckpt"
    overwritten(last, b"")
    absolute = f"resume.checkpoint={last}" if kind == "folder" else "resume.checkpoint=last"
    code, _, err = program("train", "--config", yaml, *common, absolute)
    assert code == 2
    assert "special characters are not allowed" in err or "goes on with the newest intact one" in one_error(err)


ONE_OF_TWO = """
import os, signal, sys
from ldm_lab.config import load
from ldm_lab.data.webdataset import WebDataset
from ldm_lab.errors import run_program
from ldm_lab.training import runner

trainer, own, killed = os.getpid(), WebDataset.samples, f"killed.{os.environ.get('LOCAL_RANK', 0)}"
def samples(self, address):
    for number, sample in enumerate(own(self, address)):
        if os.getpid() != trainer and number > 5 and os.environ.get("LOCAL_RANK") == "1" and not os.path.exists(killed):
            open(killed, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        yield sample
WebDataset.samples = samples
run_program(lambda: runner.run(load(sys.argv[1], sys.argv[2:])))
"""


@pytest.mark.slow
def test_two_processes_save_when_a_loader_process_of_one_is_killed(here, run):
    yaml = make_run(here, images=96)
    (here / "one_of_two.py").write_text(ONE_OF_TWO)
    options = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.max_steps=100", "checkpoint.every=1000"]
    options += ["data.workers=1", "data.batch_size=2", "data.shuffle_buffer=0"]
    done = run_program("one_of_two.py", yaml, *options, cwd=here)
    assert done.returncode == 75, done.stderr[-3000:]
    assert "was killed (SIGKILL" in done.stdout and "reading begins anew once" in done.stdout
    assert "stopped by a loader process that died at step" in done.stdout and "and saved" in done.stdout
    assert read_pickled(run / "last.ckpt")["global_step"] == len(steps(run))
