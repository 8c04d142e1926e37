"""Released weights by name: what arrives is right, goes on after a break, and is not fetched where it must not be."""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny import ROOT, make_run, run_program

from ldm_lab.__main__ import main
from ldm_lab.config import load
from ldm_lab.errors import UserError
from ldm_lab.io import download, http
from ldm_lab.io.atomic import sha256 as file_sha256
from ldm_lab.pretrained import answers
from ldm_lab.pretrained import resolve as pretrained
from ldm_lab.pretrained.catalogue import Released, catalogue, parse
from ldm_lab.pretrained.resolve import check_untrusted, fetch, resolve_weights

CONTENT = bytes(range(256)) * 2000 + b"the end"
NAME = "test/weights"


def checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


RIGHT = checksum(CONTENT)


class Server(ThreadingHTTPServer):
    """A mirror with faults. `files`: path -> content; `requests`: (path, Range, If-Range) of every GET."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}
        self.headers: dict[str, str] = {}  # of every answer
        self.requests: list[tuple[str, str | None, str | None]] = []
        self.authorized: list[str | None] = []
        self.breaks: list[int] = []  # bytes after which the next answers break off
        self.statuses: list[int] = []  # of the next answers, if not what they should be
        self.ranges, self.etag, self.sized, self.pause, self.silence, self.lie = True, True, True, 0.0, 0.0, None
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        if self.command == "GET":
            server.requests.append((self.path, asked, self.headers.get("If-Range")))
            server.authorized.append(self.headers.get("Authorization"))
        if self.path in server.redirects:
            self.send_response(302)
            self.send_header("Location", server.redirects[self.path])
            self.send_header("Content-Length", "0")
            return self.end_headers()
        time.sleep(server.silence)
        status = server.statuses.pop(0) if server.statuses else 200 if self.path in server.files else 404
        if status != 200:
            return self.send_error(status)
        content = server.files[self.path]
        etag, start, stop = f'"{checksum(content)[:8]}"', 0, len(content)
        if server.ranges and asked and self.headers.get("If-Range") in (None, etag):
            start, stop = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()
            start, stop = int(start), min(int(stop or len(content)) + 1, len(content))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206)
            told = start if server.lie is None else server.lie
            self.send_header("Content-Range", f"bytes {told}-{stop - 1}/{len(content)}")
        else:
            self.send_response(200)
        if server.etag:
            self.send_header("ETag", etag)
        for key, value in server.headers.items():
            self.send_header(key, value)
        if server.sized:
            self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command == "HEAD":
            return None
        end = start + server.breaks.pop(0) if server.breaks else stop
        try:
            for i in range(start, min(end, stop), 10_000):
                self.wfile.write(content[i : min(i + 10_000, end)])
                self.wfile.flush()
                time.sleep(server.pause)
        except OSError:  # the client is gone
            pass
        self.close_connection = True
        return None


@pytest.fixture
def mirror():
    server = Server()
    server.files["/w.bin"] = CONTENT
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_LAB_CACHE", str(tmp_path / "Cache"))
    monkeypatch.delenv("LDM_LAB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setattr(http, "PAUSE", 0.01)
    monkeypatch.setattr(http, "CHUNK", 10_000)
    return tmp_path / "Cache"


@pytest.fixture
def release(cache, mirror, monkeypatch):
    """Make a released file: `release(*addresses, **fields)` -> its path in the cache."""

    def add(*mirrors, name=NAME, sha256=RIGHT, **fields) -> Path:
        mirrors = mirrors or (f"{mirror.url}/w.bin",)
        fields = {"role": "autoencoder", "what": "a test", "file": "w.bin", "page": "http://page.test", **fields}
        monkeypatch.setitem(catalogue(), name, Released(mirrors=mirrors, sha256=sha256, **fields))
        return cache / name / fields["file"]

    return add


def left(path: Path) -> list[str]:
    """Return what lies in a file's folder, but for the lock."""
    return sorted(p.name for p in path.parent.iterdir() if p.name != ".lock") if path.parent.exists() else []


def test_a_download_is_checked_recorded_and_made_once(release, mirror):
    path = release()
    assert resolve_weights(NAME, "weights") == path and path.read_bytes() == CONTENT
    assert left(path) == ["w.bin", "w.bin.json"]
    record = json.loads((path.parent / "w.bin.json").read_text())
    assert record["sha256"] == checksum(CONTENT) and record["source"] == f"{mirror.url}/w.bin"
    resolve_weights(NAME, "weights")
    assert len(mirror.requests) == 1


def test_broken_off_it_goes_on_where_it_was(release, mirror):
    mirror.breaks = [200_000, 100_000]
    path = fetch_path(release())
    assert path.read_bytes() == CONTENT
    (_, first, _), (_, second, mark), (_, third, _) = mirror.requests
    assert first is None and second == "bytes=200000-" and third == "bytes=300000-"
    assert mark == f'"{checksum(CONTENT)[:8]}"'


def fetch_path(path: Path) -> Path:
    assert fetch(NAME) == path
    return path


def test_what_came_is_kept_for_the_next_run(release, mirror):
    path = release()
    mirror.breaks = [50_000] * http.TRIES
    with pytest.raises(UserError, match=r"the connection broke off \(4 tries; what came is kept\)"):
        fetch(NAME)
    assert not path.exists() and (path.parent / ".w.bin.part").read_bytes() == CONTENT[:200_000]
    fetch_path(path)
    assert mirror.requests[-1][1] == "bytes=200000-" and path.read_bytes() == CONTENT


# `python -m ldm_lab ...` with one more entry in the table: its address and checksum come first.
SCRIPT = """
import sys
from ldm_lab.io import download, http
from ldm_lab.io.atomic import sha256 as file_sha256
from ldm_lab.pretrained.catalogue import Released, catalogue
from ldm_lab.__main__ import main
from ldm_lab.config import load
from ldm_lab.errors import run_program
http.CHUNK = 10_000
catalogue()["test/weights"] = Released("autoencoder", "a test", "w.bin", (sys.argv[1],), sys.argv[2])
sys.argv[1:3] = []
run_program(main)
"""


def start(script: str, *args: str, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", script, *args], env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_killed_process_leaves_what_the_next_one_goes_on_with(release, mirror):
    path = release()
    mirror.pause = 0.05
    process = start(SCRIPT, f"{mirror.url}/w.bin", RIGHT, "pretrained", "get", NAME)
    part, deadline = path.parent / ".w.bin.part", time.monotonic() + 30
    while not (part.exists() and part.stat().st_size >= 100_000) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    have, mirror.pause = part.stat().st_size, 0.0
    assert 100_000 <= have < len(CONTENT) and not path.exists()
    fetch_path(path)
    assert mirror.requests[-1][1] == f"bytes={have}-" and path.read_bytes() == CONTENT


def test_two_processes_at_once_download_once(release, mirror):
    path = release()
    mirror.pause = 0.02
    processes = [start(SCRIPT, f"{mirror.url}/w.bin", RIGHT, "pretrained", "get", NAME) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and out.strip() == str(path), err
    assert len(mirror.requests) == 1 and path.read_bytes() == CONTENT


def test_a_wrong_checksum_is_said_and_the_next_mirror_tried(release, mirror, capsys):
    mirror.files["/bad.bin"] = b"x" * len(CONTENT)
    path = fetch_path(release(f"{mirror.url}/bad.bin", f"{mirror.url}/w.bin"))
    assert path.read_bytes() == CONTENT and left(path) == ["w.bin", "w.bin.json"]
    assert checksum(b"x" * len(CONTENT)) in capsys.readouterr().err


def test_of_a_wrong_checksum_nothing_is_left(release, mirror):
    path = release(sha256="0" * 64)
    with pytest.raises(UserError, match=f"wrong checksum {checksum(CONTENT)}, not 0{{64}}"):
        fetch(NAME)
    assert left(path) == []


def test_a_dead_mirror_is_passed_over_and_a_part_taken_along(release, mirror):
    other = Server()
    other.files["/w.bin"] = CONTENT
    other.breaks = [30_000] * http.TRIES
    path = fetch_path(release("http://127.0.0.1:9/w.bin", f"{other.url}/w.bin", f"{mirror.url}/w.bin"))
    other.shutdown()
    other.server_close()
    assert path.read_bytes() == CONTENT and mirror.requests == [("/w.bin", "bytes=120000-", None)]


def test_all_dead_is_one_line_with_each_reason(release, mirror):
    mirror.redirects = {"/away": "ftp://127.0.0.1/w.bin", "/loop": "/loop"}
    names = ("none.bin", "away", "loop")
    path = release("http://127.0.0.1:9/w.bin", "gopher://x/w.bin", *(f"{mirror.url}/{name}" for name in names))
    with pytest.raises(UserError) as caught:
        fetch(NAME)
    message = str(caught.value)
    for reason in ("9/w.bin: Failed to establish a new connection: [Errno 111] Connection refused; ",
                   "only http and https", "HTTP 404", "ftp://127.0.0.1", "30 redirects"):  # fmt: skip
        assert reason in message
    assert "\n" not in message and f"at {path}" in message and left(path) == []


def test_a_server_error_and_silence_are_reasons(release, mirror, monkeypatch):
    release()
    mirror.statuses = [500] * http.TRIES
    with pytest.raises(UserError, match="HTTP 500"):
        fetch(NAME)
    monkeypatch.setattr(http, "TIMEOUT", (2, 0.2))
    mirror.silence = 0.4
    with pytest.raises(UserError, match="Read timed out"):
        fetch(NAME)
    monkeypatch.setattr(http, "TIMEOUT", (2, 1.0))
    monkeypatch.setattr(http, "TRIES", 1)
    mirror.silence, mirror.pause = 0.0, 3.0
    with pytest.raises(UserError, match="the connection broke off"):
        fetch(NAME)


def test_a_busy_server_is_asked_again(release, mirror):
    mirror.statuses = [503, 429]
    assert fetch_path(release()).read_bytes() == CONTENT
    assert len(mirror.requests) == 3


def test_without_ranges_it_begins_again(release, mirror):
    mirror.ranges, mirror.breaks = False, [200_000]
    assert fetch_path(release()).read_bytes() == CONTENT


@pytest.mark.parametrize("sha256", [None, "new"])
@pytest.mark.parametrize("etag", [True, False])
def test_pieces_of_two_versions_are_not_glued(release, mirror, etag, sha256):
    new = CONTENT[::-1]
    path = release(sha256=sha256 and checksum(new))
    mirror.etag, mirror.breaks = etag, [50_000] * http.TRIES
    with pytest.raises(UserError):
        fetch(NAME)
    mirror.files["/w.bin"] = new
    assert fetch_path(path).read_bytes() == new


def test_a_server_that_sends_another_piece_is_not_believed(release, mirror):
    mirror.breaks, mirror.lie = [200_000], 7
    assert fetch_path(release()).read_bytes() == CONTENT


def test_a_redirect_is_followed_and_no_credentials_are_sent(release, mirror, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    mirror.redirects = {"/old": f"{mirror.url}/w.bin"}
    assert fetch_path(release(f"{mirror.url}/old")).read_bytes() == CONTENT
    assert mirror.authorized == [None, None]


@pytest.mark.parametrize("switch", ["LDM_LAB_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_it_says_which_file_to_put_where(release, mirror, monkeypatch, switch):
    path = release()
    monkeypatch.setenv(switch, "1")
    with pytest.raises(UserError, match="switched off") as caught:
        fetch(NAME)
    assert f"put w.bin (from {mirror.url}/w.bin or http://page.test) at {path}" in str(caught.value)
    assert mirror.requests == []
    path.write_bytes(CONTENT)
    assert fetch(NAME) == path
    path.write_bytes(b"changed")
    with pytest.raises(UserError, match=r"not test/weights: its sha256 is"):
        fetch(NAME)


def test_without_a_published_checksum_the_first_one_holds(release, mirror, capsys):
    path = fetch_path(release(sha256=None))
    assert checksum(CONTENT) in capsys.readouterr().err
    path.write_bytes(b"tampered")
    with pytest.raises(UserError, match="the one seen first"):
        fetch(NAME)
    path.unlink()
    mirror.files["/w.bin"] = b"another file"
    with pytest.raises(UserError, match=r"wrong checksum .*if the change is right, remove .*w\.bin\.json"):
        fetch(NAME)


def test_no_room_is_said_before_anything_is_fetched(release, mirror, monkeypatch):
    path = release()
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"to come and only 0.0 GiB are free \(LDM_LAB_CACHE=FOLDER moves it\)"):
        fetch(NAME)
    assert not path.exists()


def test_a_full_disk_is_said_and_what_came_is_kept(release, mirror, monkeypatch):
    path = release()
    mirror.breaks = [100_000]

    def full(seconds):
        if seconds:  # the client's pause before its second try; the server's own pauses are of no length
            monkeypatch.setattr(download.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))

    monkeypatch.setattr(download.time, "sleep", full)
    with pytest.raises(UserError, match=r"w\.bin: cannot be written: No space left"):
        fetch(NAME)
    assert not path.exists() and (path.parent / ".w.bin.part").stat().st_size >= 100_000


def test_an_announced_size_that_is_not_the_known_one_is_refused(release):
    path = release(size=5)
    with pytest.raises(UserError, match=r"a file of 512,007 bytes, not 5"):
        fetch(NAME)
    assert not path.exists()


def test_a_server_that_does_not_announce_the_size(release, mirror, monkeypatch):
    mirror.sized = False
    path = release()
    assert fetch_path(path).read_bytes() == CONTENT  # the checksum says that it is whole
    path = release(size=len(CONTENT), name=f"{NAME}3")
    mirror.breaks = [300_000]
    assert fetch(f"{NAME}3") == path and path.read_bytes() == CONTENT
    assert mirror.requests[-1][1] == "bytes=300000-"
    path = release(sha256=None, name=f"{NAME}2")
    with pytest.raises(UserError, match="it does not say how large the file is"):
        fetch(f"{NAME}2")
    monkeypatch.setattr(download, "LIMIT", 200_000)
    path = release(name=f"{NAME}4")
    with pytest.raises(UserError, match="it sends more than it announced"):
        fetch(f"{NAME}4")
    assert left(path) == []


def test_a_truncated_file_is_not_taken(release, mirror):
    mirror.files["/w.bin"] = CONTENT[:-1]
    path = release()
    with pytest.raises(UserError, match="wrong checksum"):
        fetch(NAME)
    assert left(path) == []


@pytest.mark.parametrize("name", ["../../etc/x", "/etc/nothing-here", "kl-f9", "cloob/../kl-f8"])
def test_what_is_no_name_is_a_path_and_never_fetched(cache, name):
    with pytest.raises(UserError, match="no such file"):
        resolve_weights(name, "weights")
    with pytest.raises(UserError, match="no such released weights"):
        fetch(name)
    assert not cache.exists()


@pytest.mark.parametrize("text", ["http://127.0.0.1/x", "ftp://x/y", "hf://", "hf://a", "hf://a/", "hf://a/../../x",
                                  "hf://../b/c", "hf://a/b/../c", "hf://a/b//c"])  # fmt: skip
def test_other_addresses_are_refused(text):
    with pytest.raises(UserError, match="weights: "):
        resolve_weights(text, "weights")


@pytest.mark.parametrize("text", ["hf://a/b/c", "http://x/y", "file:///etc/passwd", ["kl-f8"], 3])
def test_a_checkpoints_config_names_no_addresses(text, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", "/nowhere")
    with pytest.raises(UserError, match="refused"):
        check_untrusted(text, "autoencoder.weights")
    for allowed in ("kl-f8", "folder/file.ckpt", None):
        check_untrusted(allowed, "autoencoder.weights")


def test_a_checkpoint_that_names_an_address_is_refused_before_anything_is_fetched(parts, tmp_path, monkeypatch):
    from ldm_lab.checkpoints.native import save_model
    from ldm_lab.sampling import Pipeline

    config = {
        "autoencoder": {"name": "kl_f8", "weights": "hf://evil/repository/file.safetensors"},
        "conditioner": {"name": "none"}, "denoiser": {"name": "ccld_unet"}, "objective": {"name": "v_cosine"},
    }  # fmt: skip
    save_model(tmp_path / "m.safetensors", parts["denoiser"].state_dict(), config, {})
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it was going to be fetched"))
    with pytest.raises(UserError, match=r"autoencoder of the checkpoint: autoencoder\.weights: refused"):
        Pipeline.from_checkpoint(tmp_path / "m.safetensors")


def test_wherever_weights_are_taken_a_name_will_do(release, mirror, tmp_path, monkeypatch, program):
    """Training, fine-tuning, sampling, measuring, looking at and converting weights that are named, by the commands."""
    monkeypatch.chdir(tmp_path)
    yaml = make_run(tmp_path, images=8, trainer={"max_steps": 1}, checkpoint={"every": 1})

    def publish(name: str, file: Path) -> None:
        mirror.files[f"/{file.name}"] = file.read_bytes()
        release(f"{mirror.url}/{file.name}", name=f"test/{name}", sha256=file_sha256(file), file=file.name)
        file.unlink()

    for role in ("autoencoder", "conditioner"):
        publish(role, tmp_path / f"{role}.safetensors")
    parts = [f"{role}.weights=test/{role}" for role in ("autoencoder", "conditioner")]

    def done(*command) -> str:
        code, out, err = program(*command)
        assert code == 0, err
        return out

    done("train", "--config", yaml, *parts)
    publish("model", tmp_path / "runs/tiny/ema.safetensors")
    assert "init_from: weights of test/model (step 1)" in done(
        "train", "--config", yaml, *parts, "run=finetuned", "init_from=test/model"
    )
    sampled = ("sample", "a red star", "--steps", 2, "-n", 1, "--checkpoint", "test/model")
    done(*sampled, "--guide-model", "test/model", "--out", "plain")
    done(*sampled, "--autoencoder", "test/autoencoder", "--conditioner", "test/conditioner", "--out", "named")
    (entry,) = json.loads(Path("named/samples.json").read_text())
    assert entry["checkpoint"] == "test/model"
    assert entry["checkpoint_sha256"] == checksum(mirror.files["/ema.safetensors"])
    done("ldm_lab.__main__", "cache", "--config", yaml, "--out", "encoded", *parts)
    small = ("--batches", 1, "--batch-size", 4)
    done("ldm_lab.__main__", "scale", "--config", yaml, "--out", "scaled.safetensors", *small, *parts)
    assert "a part of ldm_lab's" in done("ldm_lab.__main__", "inspect", "test/autoencoder")
    done("ldm_lab.__main__", "convert", "test/model", "converted.safetensors", "--half")
    assert sorted(path for path, *_ in mirror.requests) == [
        "/autoencoder.safetensors", "/conditioner.safetensors", "/ema.safetensors",
    ]  # fmt: skip
    for command in (("inspect", "test/model-"), ("convert", "test/model-", "out.safetensors")):
        code, _, err = program("ldm_lab.__main__", *command)
        assert code == 2 and "test/model-: no such file (weights). Did you mean test/model?" in err
    code, _, err = program(*sampled[:-1], "test/model-")
    assert code == 2 and "Did you mean test/model?" in err


def test_a_path_is_a_path(release, mirror, tmp_path, monkeypatch):
    """However it is written, a file that has the name of released weights is not taken for them, nor they for it."""
    monkeypatch.chdir(tmp_path)
    path = release(name="w.bin")
    Path("w.bin").write_bytes(b"mine")
    assert resolve_weights(Path("w.bin"), "weights") == resolve_weights("./w.bin", "weights") == Path("w.bin")
    assert mirror.requests == []
    assert resolve_weights("w.bin", "weights") == path
    os.mkfifo("pipe")
    with pytest.raises(UserError, match=r"pipe: not a file \(weights\)"):
        resolve_weights("pipe", "weights")


HUB_SCRIPT = """
import sys
from ldm_lab.errors import UserError
from ldm_lab.pretrained.resolve import check_untrusted, resolve_weights
try:
    check_untrusted(sys.argv[1], "autoencoder.weights")
except UserError as error:
    print(error)
print(resolve_weights(sys.argv[1], "weights"))
check_untrusted(sys.argv[1], "autoencoder.weights")
"""


def test_a_file_on_the_hub_comes_through_its_own_library(mirror, cache, tmp_path):
    """And only then may a checkpoint name it."""
    mirror.headers = {"X-Repo-Commit": "1" * 40}
    mirror.files = {"/owner/repo/resolve/v1/sub/w.bin": CONTENT}
    env = {"HF_ENDPOINT": mirror.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    address = "hf://owner/repo/sub/w.bin@v1"
    process = start(HUB_SCRIPT, address, **env)
    out, err = process.communicate(timeout=60)
    refused, path = out.splitlines()
    assert process.returncode == 0, err
    assert refused.startswith(f"autoencoder.weights: refused, a checkpoint must not have '{address}' downloaded")
    assert Path(path).read_bytes() == CONTENT and str(tmp_path / "hf") in path


def test_a_folder_on_the_hub_takes_only_what_a_model_needs(monkeypatch, tmp_path):
    import huggingface_hub

    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/config.json").write_text("{}")
    calls = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: calls.append((a, k)) or str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    for whole in ("hf://owner/repo", "hf://owner/repo/", "hf://owner/repo@abc", "hf://owner/repo/@abc"):
        assert resolve_weights(whole, "weights") == tmp_path
        assert calls.pop()[1]["allow_patterns"] == ["*.json", "*.safetensors"]
    assert resolve_weights("hf://owner/repo/vae/@abc", "weights") == tmp_path / "vae"
    (repository,), options = calls[0]
    assert repository == "owner/repo" and options["revision"] == "abc"
    assert options["allow_patterns"] == ["vae/*.json", "vae/*.safetensors"]


def test_the_command_lists_gets_and_says_where(release, mirror, capsys):
    from ldm_lab.commands import pretrained as command_module

    path = release()

    def command(*args: str) -> str:
        parser = argparse.ArgumentParser()
        command_module.add_arguments(parser)
        command_module.run(parser.parse_args(args))
        return capsys.readouterr().out

    assert re.search(rf"^{NAME} +autoencoder +unknown +not stated +no ", command("list"), re.M)
    assert command("where", NAME).strip() == str(path) and not path.exists()
    assert command("get", NAME).strip() == str(path) and path.read_bytes() == CONTENT
    assert re.search(rf"^{NAME} +autoencoder +0\.5 MiB +not stated +yes ", command("list"), re.M)
    with pytest.raises(UserError, match="which weights"):
        command("get")


def test_the_command_as_a_program(release, mirror):
    """Standard output is the path alone; a mistake is one line."""
    path = release()
    process = start(SCRIPT, f"{mirror.url}/w.bin", RIGHT, "pretrained", "get", NAME)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, f"{path}\n"), err
    assert "100%" in err  # the progress bar
    done = run_program("-m", "ldm_lab", "pretrained", "get", "kl-f8", cwd=path.parent, LDM_LAB_OFFLINE="1")
    assert (done.returncode, done.stdout) == (2, "")
    missing = "error: kl-f8: not in the cache, and downloads are switched off: put kl-f8.zip (from "
    assert done.stderr.startswith(missing) and done.stderr.count("\n") == 1
    assert done.stderr.endswith(f" at {path.parents[2] / 'kl-f8/kl-f8.zip'}\n")


def test_every_released_entry_is_sound():
    for name, entry in catalogue().items():
        assert pretrained.cached_path(name).name == entry.file
        assert entry.sha256 is None or re.fullmatch("[0-9a-f]{64}", entry.sha256)
        assert all(url.startswith("https://") for url in entry.mirrors) and (entry.mirrors or entry.page)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"licence": "MIT"}, "a/b: licence: unknown"),
        ({"sha256": "abc"}, "a/b: sha256: "),
        ({"file": "../x"}, "a/b: file: "),
        ({"mirrors": ["file:///x"]}, "a/b: mirrors: "),
        ({"role": "autoencoders"}, "a/b: role: "),
        ({"size": "5"}, "a/b: size: "),
        ({"what": 3}, "a/b: what: "),
    ],
)
def test_a_wrong_entry_of_a_catalogue_is_named(change, message):
    entry = {"role": "head", "what": "a test", "file": "w.bin"}
    assert parse(json.dumps({"a/b": entry})) == {"a/b": Released(**entry)}
    with pytest.raises(ValueError, match=message):
        parse(json.dumps({"a/b": {**entry, **change}}))
    with pytest.raises(ValueError, match="file: "):
        parse(json.dumps({"a/b": {"role": "head", "what": "a test"}}))


def test_the_catalogue_is_installed_with_the_package():
    with open(ROOT / "pyproject.toml", "rb") as file:
        data = tomllib.load(file)["tool"]["setuptools"]["package-data"]
    assert "**/*.yaml" in data["ldm_lab"] and len(catalogue()) == 58


def checked(capsys, *names: str) -> tuple[int, list[str]]:
    try:
        code = main(["pretrained", "check", *names]) or 0
    except UserError as error:
        return 2, [*capsys.readouterr().out.splitlines(), str(error)]
    return code, capsys.readouterr().out.splitlines()


def test_which_addresses_answer(release, mirror, capsys):
    mirror.files |= {"/page.html": b"<!DOCTYPE html><title>Quota exceeded</title>", "/empty": b""}
    gone, page, empty = (f"{mirror.url}/{path}" for path in ("gone.bin", "page.html", "empty"))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        silent = f"http://127.0.0.1:{closed.getsockname()[1]}/w.bin"
        release(gone, f"{mirror.url}/w.bin", size=len(CONTENT))
        release(silent, page, empty, name="test/lost", sha256=None)
        release(name="test/other", size=7)
        mirror.requests.clear()
        code, lines = checked(capsys, NAME, "test/lost", "test/other", "miniglide")
    assert code == 2
    assert lines[0] == f"{NAME}: {gone}: not there: HTTP 404 Not Found"
    assert lines[1] == f"{NAME}: {mirror.url}/w.bin: answers, {len(CONTENT):,} bytes"
    assert lines[2].startswith(f"test/lost: {silent}: refuses: ")
    assert lines[3].endswith("a web page is there instead of the file")
    assert lines[4].endswith("the file there is empty")
    assert lines[5].endswith(f"another file is there: {len(CONTENT):,} bytes, not 7")
    assert lines[6].startswith("miniglide: no address is known; `pretrained where miniglide` says where to put")
    assert lines[7] == "1 of 6 addresses answer"
    assert lines[8].startswith("no checksum is published of test/lost: the file that comes first is trusted")
    assert lines[9] == "check: none of its addresses has the file of test/lost, test/other"
    assert not list(Path(os.environ["LDM_LAB_CACHE"]).rglob("*.bin")), "nothing is downloaded"
    assert {asked for _, asked, _ in mirror.requests} == {f"bytes=0-{answers.BEGINNING - 1}"}
    assert checked(capsys, NAME)[0] == 0, "one that answers is enough"


@contextlib.contextmanager
def tcp_server(drip: bytes = b"", pause: float = 0.05) -> Iterator[str]:
    """Take connections and say nothing, or a little at a time and never the whole; yield the address."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            taken = []
            while not done.is_set():
                with contextlib.suppress(OSError):
                    taken.append(server.accept()[0])
                    taken[-1].settimeout(1)
                    while drip and not done.wait(pause):
                        taken[-1].sendall(drip)
            for connection in taken:
                connection.close()

        server.settimeout(0.1)
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/w.bin"
        done.set()
        thread.join()


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        ("redirect", "answers", r"answers, 512,007 bytes; redirected to http://127\.0\.0\.1:\d+/w\.bin"),
        ("to a page", "another file", r"a web page is there instead of the file; redirected to .*/login"),
        ("loop", "fails", "fails: .*30 redirects"),
        ("elsewhere", "fails", "fails: .*ftp:"),
        ("nowhere", "fails", "fails: "),
        ("403", "refuses", "refuses: HTTP 403 Forbidden"),
        ("401", "refuses", "refuses: HTTP 401 Unauthorized"),
        ("410", "not there", "not there: HTTP 410 Gone"),
        ("500", "fails", "fails: HTTP 500 .*, perhaps for now"),
        ("503", "fails", "fails: HTTP 503 .*, perhaps for now"),
        ("no ranges", "answers", "answers, 512,007 bytes"),
        ("no size", "answers", "answers, it does not say how many bytes"),
        ("silent", "hangs", "hangs: Read timed out"),
        ("silent after the connection", "hangs", "hangs: Read timed out"),
        ("drips", "hangs", r"hangs: no whole answer within 1 s"),
        ("closes", "fails", "fails: "),
        ("scheme", "fails", "fails: only http and https"),
    ],
)
def test_what_an_address_says_is_told_apart(case, kind, words, release, mirror, monkeypatch):
    """Within bounded time, and with one question: a busy server is not asked again."""
    monkeypatch.setattr(http, "ANSWER", (0.3, 0.3))
    monkeypatch.setattr(answers, "PATIENCE", 1.0)
    mirror.files |= {"/login": b"<html>sign in</html>"}
    mirror.redirects = {"/moved": "/w.bin?token=secret", "/to": "/login", "/loop": "/loop", "/away": "ftp://x/w.bin"}
    mirror.redirects |= {"/bad": "http://[/w.bin"}
    mirror.files["/w.bin?token=secret"] = CONTENT
    paths = {"redirect": "/moved", "to a page": "/to", "loop": "/loop", "elsewhere": "/away", "nowhere": "/bad"}
    mirror.statuses = [int(case)] if case.isdecimal() else []
    mirror.ranges, mirror.sized = case not in ("no ranges", "no size"), case != "no size"
    mirror.silence = 0.6 * (case == "silent")
    drips = {"silent after the connection": b"", "drips": b"H", "closes": b"nonsense\r\n\r\n"}
    with tcp_server(drips[case]) if case in drips else contextlib.nullcontext(mirror.url) as url:
        url = "gopher://x/w.bin" if case == "scheme" else url + paths.get(case, "/w.bin" * (case not in drips))
        release(url)
        began = time.monotonic()
        answer = answers.ask(NAME, catalogue()[NAME], url)
    assert time.monotonic() - began < 2
    assert (answer.kind, answer.name, answer.url) == (kind, NAME, url) and re.match(words, answer.words), answer.words
    assert "secret" not in answer.words
    assert not mirror.statuses and len(mirror.requests) <= 31


def test_the_address_that_was_used_is_said_and_why_not_another(release, mirror, capsys):
    path = release(f"{mirror.url}/gone.bin", f"{mirror.url}/w.bin")
    assert fetch(NAME) == path
    said = capsys.readouterr().err
    assert f"{NAME}: {mirror.url}/gone.bin: HTTP 404 Not Found; the next address is asked\n" in said
    assert f"{NAME}: from {mirror.url}/w.bin\n" in said


def test_of_several_addresses_the_first_that_knows_tells_the_size(release, mirror, capsys):
    from ldm_lab.pretrained.resolve import announce, to_download

    release(f"{mirror.url}/gone.bin", f"{mirror.url}/w.bin")
    announce([to_download(NAME, "autoencoder.weights")])
    assert f"{len(CONTENT) / 2**20:.1f} MiB" in capsys.readouterr().err


def test_the_license_of_if_s_weights_is_named(cache, capsys):
    from ldm_lab.commands.pretrained import table

    lines = [line for line in table().splitlines() if line.startswith("if/")]
    assert len(lines) == 6 and all("DeepFloyd IF License (research only, to be accepted)" in line for line in lines)
    with pytest.raises(UserError, match=r"no address is known .*put pytorch_model\.bin .from https://huggingface"):
        fetch("if/i-m")


def test_all_that_lies_on_cloob_s_and_compvis_s_servers_has_another_route():
    named = {name for name, entry in catalogue().items() if entry.instead}
    assert named == {name for name in catalogue() if name.startswith(("cloob/", "kl-f"))}
    assert len({catalogue()[name].instead for name in named}) == 1


@pytest.mark.parametrize("name", ["cloob/vit_b_16_laion400m_16e", "kl-f8"])
def test_where_a_server_is_gone_the_error_has_overrides_to_paste(name, mirror, cache, monkeypatch, capsys):
    """They are read as a shell reads them, and give a config with which nothing is asked of that server."""
    gone = replace(catalogue()[name], mirrors=(f"{mirror.url}/gone.bin",))
    monkeypatch.setitem(catalogue(), name, gone)
    with pytest.raises(UserError, match="a new training can do without it, with conditioner=") as caught:
        fetch(name)
    pasted = shlex.split(str(caught.value).partition("can do without it, with ")[2])
    config = load(ROOT / "configs" / "yfcc_cfg.yaml", ["data.shards=x.tar", *pasted])
    clip = {
        "name": "clip",
        "model": "ViT-B-16",
        "pretrained": "laion2b_s34b_b88k",
        "dropout": 0.2,
        "gap": {"noise": None},
    }
    assert config["conditioner"] == clip, "and what the config says of its use stays"
    assert config["autoencoder"]["weights"] == "hf://stabilityai/sd-vae-ft-mse"
    assert config["autoencoder"]["latent_std"] == 5.49
    code, lines = checked(capsys, name)
    assert code == 2 and lines[-2] == f"a new training can do without {name}: {gone.instead}"


def test_the_table_says_of_what_no_checksum_is_published(release):
    from ldm_lab.commands.pretrained import table

    release(sha256=None)
    *_, last = lines = table().splitlines()
    assert re.search(rf"(?m)^{NAME} .* unpublished  a test$", "\n".join(lines))
    assert last.startswith("sha256 unpublished: the file that comes first is trusted")


def test_addresses_are_not_asked_where_downloads_are_switched_off(release, mirror, monkeypatch):
    release()
    with pytest.raises(UserError, match="no such released weights: 'test/weigths'"):
        main(["pretrained", "check", "test/weigths"])
    monkeypatch.setenv("LDM_LAB_OFFLINE", "1")
    with pytest.raises(UserError, match="check: downloads are switched off"):
        main(["pretrained", "check"])
    assert not mirror.requests
