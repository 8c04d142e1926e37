"""Streams of bytes: local files, HTTP, the Hugging Face Hub, the output of a command, and what else webdataset opens.

What is on another machine is given up after a while: a run must not wait for it for minutes, or for ever, unsaid.
"""

import bz2
import gzip
import lzma
import os
import re
import select
import shlex
import shutil
import subprocess
from typing import Protocol
from urllib.parse import unquote

from webdataset.gopen import gopen

from ldm_lab.data.shard_urls import scheme_of
from ldm_lab.errors import first_line
from ldm_lab.io.http import open_url

CHUNK = 2**16  # bytes
FIRST_TRIES = 2  # of a server that has not answered yet
SILENCE = 60.0  # seconds that a cloud's own tool may take for the next bytes
CURL = ["curl", "--connect-timeout", "15", "--retry", "2", "--fail", "--silent", "--location"]
TOOLS = {
    "gs": ["gsutil", "-o", "Boto:num_retries=2", "-o", "Boto:http_socket_timeout=15", "cat"],
    **dict.fromkeys(("sftp", "ftps", "scp"), CURL),
}
ANSWER = 15.0  # seconds that the Hub may take to say where a file is
ON_HUB = re.compile(
    r"hf://(?P<kind>datasets/|spaces/)?(?P<repository>[\w.-]+/[\w.-]+)"
    r"(@(?P<revision>refs/(?:pr|convert)/[\w.-]+|[^/]+))?/(?P<path>.+)"
)


NO_TAR = {  # the first bytes of files that are called shards, and are none -> what they are
    b"": "it is empty",
    b"\x28\xb5\x2f\xfd": "it is compressed by zstd, which data.shards='pipe:zstd -dc FILE' reads",
    b"\x04\x22\x4d\x18": "it is compressed by lz4, which data.shards='pipe:lz4 -dc FILE' reads",
    b"PK\3\4": "it is a ZIP archive",
    b"7z\xbc\xaf": "it is a 7z archive",
    b"Rar!": "it is a RAR archive",
    b"version https://git-lfs": "it is a Git LFS pointer; `git lfs pull` brings the file itself",
    b"<!": "it is a saved web page",
    b"<h": "it is a saved web page",
}
HEAD = 32  # bytes


class ByteStream(Protocol):
    """An open binary stream, read from front to back."""

    def read(self, size: int) -> bytes:
        """Return the next bytes, at most `size`; none at the end. Raises OSError."""
        ...

    def close(self) -> None:
        """Let go of it, at the end or before."""
        ...


def open_stream(address: str) -> ByteStream:
    """Return the stream of an address. Raises OSError or ValueError, with the reason, if it cannot be opened."""
    scheme = scheme_of(address)
    if not scheme:
        return open(address, "rb")
    if scheme == "pipe":
        return CommandOutput(address.removeprefix("pipe:"))
    if scheme in ("http", "https"):
        return open_url(address, first_tries=FIRST_TRIES)
    if scheme == "hf":
        return open_url(location_on_hub(address), first_tries=FIRST_TRIES)
    if scheme in TOOLS:
        return ToolOutput([*TOOLS[scheme], address])
    return gopen(address)


def reason_of(error: Exception) -> str:
    """Return why an address cannot be read, in a few words; the address itself is told beside it."""
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error, 160)


def location_on_hub(address: str) -> str:
    """Return where the Hub has a file; it is asked with the user's own token. Raises OSError."""
    match = ON_HUB.fullmatch(address)
    if match is None:
        raise OSError("is written hf://datasets/OWNER/REPOSITORY/FILE, or hf://datasets/OWNER/REPOSITORY@REVISION/FILE")
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        kind = {"datasets/": "dataset", "spaces/": "space", None: "model"}[match["kind"]]
        revision = unquote(match["revision"]) if match["revision"] else None
        url = hf_hub_url(match["repository"], match["path"], repo_type=kind, revision=revision)
        return get_hf_file_metadata(url, timeout=ANSWER).location
    except Exception as error:  # whatever the Hub, its client or the connection has to complain about
        raise OSError(f"the Hub does not give it: {first_line(error, 160)}") from None


class NoTar(OSError):
    """A file that is no tar file, nor a compressed one that can be read here; its text says what it is."""


class _Begun:
    """A stream whose first bytes have been looked at."""

    def __init__(self, head: bytes, stream: ByteStream) -> None:
        self.head, self.stream = head, stream

    def read(self, size: int = CHUNK) -> bytes:
        if not self.head:
            return self.stream.read(size)
        data, self.head = self.head[:size], self.head[size:]
        return data

    def close(self) -> None:
        self.stream.close()


def unpacked(stream: ByteStream) -> ByteStream:
    """Return the stream, decompressed where it is gzip, bzip2 or xz.

    All of their parts are read: bgzip, pbzip2 and pixz write many, and so does `cat a.tar.gz b.tar.gz`, of which
    tarfile would read the first alone.

    Raises:
        NoTar: something else that is known to be no tar file.
        OSError: the stream cannot be read.
    """
    head = b""
    while len(head) < HEAD and (more := stream.read(HEAD - len(head))):
        head += more
    for start, what in NO_TAR.items():
        if head.startswith(start) and (start or not head):
            raise NoTar(what)
    begun = _Begun(head, stream)
    if head.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=begun, mode="rb")
    if head.startswith(b"BZh"):
        return bz2.BZ2File(begun)
    if head.startswith((b"\xfd7zXZ", b"\x5d\0\0\x80")):
        return lzma.LZMAFile(begun)
    return begun


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
        data = self.process.stdout.read1(size)  # what there is, instead of waiting for as many
        if not data and self.process.wait() != 0:
            raise OSError(f"the command ended with status {self.process.returncode}")
        return data

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.kill()
        self.process.wait()


class ToolOutput(CommandOutput):
    """What a cloud's own tool prints, such as gsutil; OSError if it fails, or says nothing for too long."""

    def __init__(self, command: list[str]):
        self.name = command[0]
        if shutil.which(self.name) is None:
            raise OSError(f"{self.name} is not installed")
        super().__init__(shlex.join(command))

    def read(self, size: int) -> bytes:
        ready, _, _ = select.select([self.process.stdout.fileno()], [], [], SILENCE)
        if not ready:
            raise OSError(f"{self.name} gave nothing for {SILENCE:g} seconds")
        data = os.read(self.process.stdout.fileno(), size)
        if not data and self.process.wait() != 0:
            raise OSError(f"{self.name} ended with status {self.process.returncode}")
        return data
