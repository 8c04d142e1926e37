"""Programs begun in a copy of a process that has imported torch and Lightning, and nothing of ours: what a test starts is
a process of its own, with its own environment, folder and files, and need not wait for these libraries each time.

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

LONGEST = 1 << 20  # bytes of a request
LIBRARIES = "import torch, pytorch_lightning, omegaconf, torch.distributed.tensor"


def run(words: Sequence[str], folder: Path, environment: Mapping[str, str], timeout: float) -> tuple[int, str, str]:
    """Run `python WORDS...`, WORDS beginning with a script or -m.

    Returns:
        The exit code, below 0 for a signal; what was printed, and printed as errors.

    Raises:
        TimeoutExpired: it has been killed.
    """
    request = json.dumps({"words": words, "folder": str(folder), "environment": dict(environment)}).encode()
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(reading, buffering=1) as answers:
        try:
            socket.send_fds(server(), [request], [out.fileno(), err.fileno(), writing])
        finally:
            os.close(writing)
        pid = int(answers.readline())
        if not select.select([answers], [], [], timeout)[0]:
            os.kill(pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(list(words), timeout)
        code = int(answers.readline())
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="backslashreplace").replace("\r\n", "\n").replace("\r", "\n"))
    return code, *texts


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
    os.dup2(files[0], 1)
    os.dup2(files[1], 2)
    for file in files:
        os.close(file)
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
