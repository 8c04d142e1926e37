"""Streams of bytes: local files, HTTP, the output of a command, and what else webdataset opens."""

import os
import subprocess
from typing import Protocol

from webdataset.gopen import gopen

from ldm_lab.data.shard_urls import scheme_of
from ldm_lab.io.http import open_url

CHUNK = 2**16  # bytes


class ByteStream(Protocol):
    """An open binary stream, read from front to back."""

    def read(self, size: int) -> bytes:
        """Return the next bytes, at most `size`; none at the end. Raises OSError."""
        ...

    def close(self) -> None:
        """Let go of it, at the end or before."""
        ...


def open_stream(address: str) -> ByteStream:
    """Return the stream of an address. Raises OSError or ValueError if it cannot be opened."""
    scheme = scheme_of(address)
    if not scheme:
        return open(address, "rb")
    if scheme == "pipe":
        return CommandOutput(address.removeprefix("pipe:"))
    if scheme in ("http", "https"):
        return open_url(address)
    return gopen(address)


def drain(stream: ByteStream) -> None:
    """Read on to the end, behind the archive's own: only there a command or a download shows that it failed."""
    while stream.read(CHUNK):
        pass


class CommandOutput:
    """The standard output of a shell command; OSError at its end if the command failed.

    The command has a session of its own, so that Ctrl-C does not reach it, and does not outlive whoever reads from it,
    however that ends: what its guard waits for ends with the reader.
    """

    GUARDED = "exec 3<&0 0</dev/null; (read _ <&3; kill -9 -$$) >/dev/null 2>&1 & exec 3<&-; "

    def __init__(self, command: str):
        guard = self.GUARDED if os.name == "posix" else ""
        self.process = subprocess.Popen(
            guard + command, shell=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )

    def read(self, size: int) -> bytes:
        data = self.process.stdout.read(size)
        if not data and self.process.wait() != 0:
            raise OSError(f"the command ended with status {self.process.returncode}")
        return data

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.kill()
        self.process.wait()
