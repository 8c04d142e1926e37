"""Faults, by real processes: what a tiny run leaves behind when it is killed, told to stop, starved or starts twice.

    python benchmarks/faults.py --folder /scratch/faults --kills 200

Every run is a process of its own that does what `train.py` does (forked from this one, which has imported everything,
so that a start takes a second). After each fault all checkpoints are read to their last byte, the exported model is
read, and the rows of metrics.csv are compared with the saved step. Prints the table of docs/measured.md. The small
disks and the small /dev/shm are mounted in a name space of the process's own (Linux, as `unshare -rm` does).
"""

import argparse
import csv
import ctypes
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # to run from a checkout that is not installed

from tiny import make_run  # noqa: E402

from ldm_lab.checkpoints.files import read_pickled, read_safetensors  # noqa: E402
from ldm_lab.commands import train  # noqa: E402
from ldm_lab.errors import UserError, run_program  # noqa: E402
from ldm_lab.training import runner  # noqa: E402, F401  # imported before the fork
from ldm_lab.training.resume import is_whole  # noqa: E402

FOREVER = ["trainer.max_steps=1000000", "logging.every=1", "data.batch_size=2"]
OFTEN = [*FOREVER, "data.workers=1", "checkpoint.every=1", "checkpoint.keep=3"]
# The guard's copies of the state in main memory, as often as they can be taken.
SNAPSHOTS = ["guard.on_nonfinite=rollback", "guard.on_spike=skip", "guard.snapshot_every=1"]
SELDOM = [*FOREVER, "checkpoint.every=1000000"]
SLURM = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "run", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
         "SLURM_NODEID": "0", "SLURM_NTASKS_PER_NODE": "1"}  # fmt: skip
NEWUSER_NEWNS = 0x10000000 | 0x00020000  # flags of unshare(2)


class Run:
    """A training process that was started in a folder, with its output in `log.txt`."""

    def __init__(self, folder: Path, *overrides: str, **environment: str) -> None:
        self.folder, self.run, self.log = folder, folder / "runs" / "tiny", folder / "log.txt"
        self.began_at = self.log.stat().st_size if self.log.exists() else 0
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            os.chdir(folder)
            os.dup2(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
            os.dup2(1, 2)
            os.environ.update(environment)
            code = 1
            try:
                run_program(lambda: train.main(["--config", "tiny.yaml", *overrides]))
            except SystemExit as left:
                code = int(left.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)

    def wait(self) -> int:
        """Return the exit code, or the negative number of the signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def has_left(self) -> bool:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    def wait_for(self, happened: Callable[[], bool], seconds: float = 120) -> None:
        """Wait until something has happened, or the process has left."""
        deadline = time.monotonic() + seconds
        while not happened() and not self.has_left() and time.monotonic() < deadline:
            time.sleep(0.02)

    def wait_for_steps(self, more: int) -> None:
        """Wait until some more steps are in the log."""
        before = len(rows(self.run))
        self.wait_for(lambda: len(rows(self.run)) >= before + more)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def said(self, words: str) -> str:
        """Return the line of this process's output with some words; "" if there is none."""
        text = self.log.read_bytes()[self.began_at :].decode(errors="replace")
        return next((line for line in text.replace(f"{self.folder}/", "").splitlines() if words in line), "")


@dataclass
class Result:
    """What came of a fault.

    Attributes:
        times: it was caused.
        codes: exit codes, -9 for a process that was killed.
        checkpoints: read to their end.
        invalid: checkpoints or exports that could not be.
        unexported: times that the very first checkpoint was there and its export was not yet.
        missing: rows of steps before the saved one that are missing or double.
        left: processes that outlived the run.
        note: what it said, or how long it took.
    """

    name: str
    times: int = 0
    codes: Counter = field(default_factory=Counter)
    checkpoints: int = 0
    invalid: int = 0
    unexported: int = 0
    missing: int = 0
    left: int = 0
    note: str = ""

    def look(self, run: Path, code: int) -> None:
        """Count what a run has left behind."""
        self.times += 1
        self.codes[code] += 1
        for path in run.glob("*.ckpt"):
            self.checkpoints += 1
            self.count_invalid(path, is_whole(path))
        last = run / "last.ckpt"
        if not last.exists():
            return
        saved = read_pickled(last, mmap=True)["global_step"]
        there = Counter(step for step in rows(run) if step < saved)
        self.missing += sum(there[step] != 1 for step in range(saved))
        export = run / "ema.safetensors"
        if not export.exists():  # killed between the first checkpoint and its export
            self.unexported += 1
            return
        try:
            read_safetensors(export)
        except UserError:
            self.count_invalid(export, False)

    def count_invalid(self, path: Path, is_valid: bool) -> None:
        """Count a file that cannot be read, and name it."""
        if not is_valid:
            self.invalid += 1
            print(f"  {path} is not valid", file=sys.stderr)

    def __str__(self) -> str:
        codes = ", ".join(f"{code} ({n})" if len(self.codes) > 1 else f"{code}" for code, n in self.codes.items())
        return (
            f"| {self.name} | {self.times} | {codes} | {self.invalid} of {self.checkpoints} | {self.missing} "
            f"| {self.left} | {self.note} |"
        )


def rows(run: Path) -> list[int]:
    """Return the steps in metrics.csv; what is torn at its end is none."""
    try:
        with open(run / "metrics.csv", errors="replace") as file:
            whole = [row for row in csv.DictReader(file) if None not in row.values()]
            return [int(row["step"]) for row in whole if row["step"].isdecimal()]
    except (FileNotFoundError, KeyError):
        return []


def in_session(session: int) -> list[int]:
    """Return the processes that belong to a session and have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def outlived(session: int, seconds: float = 5) -> int:
    """Return how many processes of a session are left after some seconds."""
    deadline = time.monotonic() + seconds
    while in_session(session) and time.monotonic() < deadline:
        time.sleep(0.1)
    return len(in_session(session))


def fresh(folder: Path) -> Path:
    """Return a folder with all that a tiny run needs."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make_run(folder)
    return folder


# ------------------------------------------------------------------------------------------------------------- faults


def kills(folder: Path, times: int, seed: int) -> list[Result]:
    """Kill a run again and again, at a random moment of its start or of its training, which goes on each time.

    The guard takes snapshots for rollbacks meanwhile.
    """
    result, chance = Result("kill -9 at a random moment"), random.Random(seed)
    killed: list[int] = []
    for i in range(times):
        run = Run(folder, *OFTEN, *SNAPSHOTS, "resume.checkpoint=last")
        if i % 10:  # in training; else perhaps in the start
            run.wait_for_steps(1)
        time.sleep(chance.uniform(0, 1))
        run.send(signal.SIGKILL)
        result.look(run.run, run.wait())
        killed.append(run.pid)
        if i % 10 == 9:
            print(result, file=sys.stderr)
    result.left = sum(map(outlived, killed))
    result.note = f"nine of ten while training and saving after every step; {result.unexported} before the first export"
    return [result]


def signals(folder: Path) -> list[Result]:
    """Tell a run to stop, and go on with it, with and without SLURM's variables."""
    results = []
    for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        for environment in ({}, SLURM):
            result = Result(f"{number.name}{' under SLURM' if environment else ''}, then resumed")
            for _ in range(2):
                run = Run(folder, *SELDOM, "data.workers=1", "resume.checkpoint=last", **environment)
                run.wait_for_steps(3)
                run.send(number)
                result.look(run.run, run.wait())
                result.left += outlived(run.pid)
            names = sorted(path.name for path in run.run.glob("*.ckpt"))
            result.note = f"`{run.said('stopped by')}`" if names == ["last.ckpt"] else f"left {names}"
            results.append(result)
    return results


def dead_loader(folder: Path) -> list[Result]:
    """Kill a loader process, as the system does when memory runs out."""
    result = Result("loader process killed")
    for i in range(10):
        run = Run(folder, *SELDOM, "resume.checkpoint=last", "data.workers=2" if i % 2 else "data.workers=1")
        run.wait_for_steps(3)
        children = [pid for pid in in_session(run.pid) if pid != run.pid]
        os.kill(children[0], signal.SIGKILL)
        result.look(run.run, run.wait())
        result.left += outlived(run.pid)
    result.note = f"`{run.said('stopped by')}`"
    return [result]


def stall(folder: Path) -> list[Result]:
    """Read from a pipe that gives nothing after its first shard, and be told to stop, and be killed."""
    os.mkfifo(folder / "nothing.tar")
    shard = next((folder / "shards").glob("*.tar"))
    data = [
        "data.workers=1",
        f"data.shards=['pipe:cat {shard} {folder}/nothing.tar']",
        "data.shuffle_buffer=0",
        "resume.checkpoint=last",
    ]
    results = []
    for number in (signal.SIGTERM, signal.SIGKILL):
        result = Result(f"stalled pipe, {number.name} after 5 s")
        run = Run(folder, *SELDOM, *data)
        run.wait_for_steps(1)
        time.sleep(5)
        at = time.monotonic()
        run.send(number)
        code = run.wait()
        took = time.monotonic() - at
        result.left = outlived(run.pid) + len(readers_of(folder / "nothing.tar"))
        result.look(run.run, code)
        result.note = f"left after {took:.0f} s"
        results.append(result)
    return results


def readers_of(path: Path) -> list[int]:
    """Return the processes that have a path among their words: commands that wait for it."""
    time.sleep(2)
    found = []
    for words in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(path).encode() in words.read_bytes() and int(words.parent.name) != os.getpid():
                found.append(int(words.parent.name))
        except OSError:
            continue
    return found


def two_at_once(folder: Path) -> list[Result]:
    """Start a run that is running."""
    result = Result("the same run started twice")
    first = Run(folder, *OFTEN)
    first.wait_for_steps(3)
    second = Run(folder, *OFTEN, "resume.checkpoint=last")
    code = second.wait()
    result.note = f"`{second.said('error:')}`, exit code {code}; the first goes on"
    first.wait_for_steps(3)
    first.send(signal.SIGTERM)
    result.look(first.run, first.wait())
    return [result]


# ------------------------------------------------------------------------------------------------------- small mounts


def alone(work: Callable[[], Result]) -> Result:
    """Return the result of work in a process with mounts of its own."""
    ours, theirs = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        try:
            user, group = os.getuid(), os.getgid()
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.unshare(NEWUSER_NEWNS):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
            os.write(theirs, repr(vars(work())).encode())
        except OSError as error:
            os.write(theirs, f"not done: {error}".encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as answers:
        answer = answers.read().decode()
    os.waitpid(pid, 0)
    if not answer.startswith("{"):
        return Result("a small mount", note=answer)
    return Result(**eval(answer, {"Counter": Counter}))  # written by this program


def mount(path: Path | str, size: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], check=True)


def small_shared_memory(folder: Path, size: str) -> Result:
    """Train on large batches with little /dev/shm."""
    mount("/dev/shm", size)
    result = Result(f"/dev/shm of {size}B, 4 loader processes, batches of 8.6 MB")
    big = ["data.batch_size=700", "data.workers=4", "data.shuffle_buffer=10", "trainer.max_steps=2", "logging.every=1"]
    run = Run(folder, "checkpoint.every=1", *big)
    result.look(run.run, run.wait())
    result.note = f"`{run.said('data: /dev/shm has').partition(';')[0]}`: all 2 steps done"
    return result


def full_disk(folder: Path) -> Result:
    """Fill the disk of a run while it saves after every step."""
    runs = folder / "runs"
    runs.mkdir()
    mount(runs, "24m")
    result = Result("disk that fills up")
    run = Run(folder, *OFTEN)
    run.wait_for_steps(5)
    try:
        with open(runs / "other", "wb", buffering=0) as file:
            while file.write(bytes(2**12)):
                continue
    except OSError:
        pass
    result.look(run.run, run.wait())
    result.note = f"`{run.said('error:')}`"
    return result


def small_disk(folder: Path) -> Result:
    """Start a run on a disk that is too small for its checkpoints."""
    (folder / "runs").mkdir()
    mount(folder / "runs", "2m")
    result = Result("disk too small from the start")
    run = Run(folder, *OFTEN)
    result.look(run.run, run.wait())
    result.note = f"`{run.said('error:')}`"
    return result


FAULTS: dict[str, Callable[[Path], list[Result]]] = {
    "signals": signals,
    "loader": dead_loader,
    "shm64": lambda folder: [alone(lambda: small_shared_memory(folder, "64M"))],
    "shm4": lambda folder: [alone(lambda: small_shared_memory(folder, "4M"))],
    "full": lambda folder: [alone(lambda: full_disk(folder))],
    "small": lambda folder: [alone(lambda: small_disk(folder))],
    "stall": stall,
    "two": two_at_once,
}


def main() -> int:
    """Cause the faults; returns 1 if anything was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--folder", type=Path, required=True, help="made anew")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--only", nargs="*", choices=["kills", *FAULTS], default=["kills", *FAULTS])
    args = parser.parse_args()
    results = []
    for name in args.only:
        print(name, file=sys.stderr)
        folder = fresh(args.folder.absolute() / name)
        results += kills(folder, args.kills, args.seed) if name == "kills" else FAULTS[name](folder)
    print("| fault | times | exit code | invalid checkpoints | missing rows | processes left | |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print(*results, sep="\n")
    return int(any(r.invalid or r.missing or r.left or not r.times for r in results))


if __name__ == "__main__":
    sys.exit(main())
