"""Programs begun in a copy of a process that has imported torch and Lightning, and nothing of ours.

What a test starts is a process of its own, with its own environment, folder and files, and need not wait for these
libraries each time.

`tiny.run_program` asks; run as a program, this file is the process that is copied.
"""

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

LONGEST = 1 << 20  # bytes of a request
LIBRARIES = "import torch, pytorch_lightning, omegaconf, torch.distributed.tensor"


class Program:
    """A program that has been started: `python WORDS...`, WORDS beginning with a script or -m, in a session of its own.

    Attributes:
        pid: its process.
        returncode: once it has ended; below 0 for a signal.
    """

    def __init__(
        self, words: Sequence[str], folder: Path, environment: Mapping[str, str], files: tuple[IO, IO] | None = None
    ) -> None:
        """Start it; what it prints, and prints as errors, goes to files of its own or to these."""
        request = json.dumps({"words": list(words), "folder": str(folder), "environment": dict(environment)}).encode()
        self.words, self.returncode = list(words), None
        self.files = files or (tempfile.TemporaryFile(), tempfile.TemporaryFile())  # noqa: SIM115
        reading, writing = os.pipe()
        self.answers = open(reading, buffering=1)  # noqa: SIM115
        try:
            socket.send_fds(server(), [request], [*(file.fileno() for file in self.files), writing])
        finally:
            os.close(writing)
        self.pid = int(self.answers.readline())

    def poll(self) -> int | None:
        """Return its exit code, None as long as it runs."""
        if self.returncode is None and select.select([self.answers], [], [], 0)[0]:
            self.returncode = int(self.answers.readline())
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for its end; return its exit code. Raises TimeoutExpired, and kills it."""
        if self.returncode is None and not select.select([self.answers], [], [], timeout)[0]:
            self.send_signal(signal.SIGKILL)
            raise subprocess.TimeoutExpired(self.words, timeout)
        return self.poll()

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def printed(self) -> tuple[str, str]:
        """Return what it has printed so far, and printed as errors, into files of its own."""
        texts = []
        for file in self.files:
            file.seek(0)
            texts.append(file.read().decode(errors="backslashreplace").replace("\r\n", "\n").replace("\r", "\n"))
        return tuple(texts)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)
            self.wait(60)
        for file in (self.answers, *self.files):
            file.close()


@functools.cache
def server() -> socket.socket:
    """Start the process that is copied; it ends with this one."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, __file__, str(its.fileno())], pass_fds=[its.fileno()], env=environment)
    its.close()
    atexit.register(process.wait)
    atexit.register(ours.close)
    return ours


def serve(connection: socket.socket) -> list[str]:
    """Copy this process for each request, until nobody asks any more. Returns, in a copy alone, what it is to run."""
    path = [entry for entry in sys.path[1:] if entry not in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    exec(LIBRARIES, {})
    gc.collect()
    gc.freeze()
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                continue
        data, files, _, _ = socket.recv_fds(connection, LONGEST, 3)
        if not data:
            os._exit(0)
        if os.fork() == 0:
            connection.close()
            program = os.fork()
            if program == 0:
                return become(json.loads(data), files, path)
            os.write(files[2], f"{program}\n".encode())
            os.write(files[2], f"{os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])}\n".encode())
            os._exit(0)
        for file in files:
            os.close(file)


def become(request: dict, files: Sequence[int], path: Sequence[str]) -> list[str]:
    """Have this copy begin as an interpreter of its own does. Returns its words."""
    gc.unfreeze()  # what is left at the end libraries would complain of
    os.dup2(files[0], 1)
    os.dup2(files[1], 2)
    for file in files:
        os.close(file)
    os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    words = request["words"]
    beside = os.getcwd() if words[0] == "-m" else str(Path(words[0]).resolve().parent)
    sys.path[:] = [beside, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *path]
    sys.argv[:] = words[1:] if words[0] == "-m" else words
    return words


if __name__ == "__main__":
    words = serve(socket.socket(fileno=int(sys.argv[1])))
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")
