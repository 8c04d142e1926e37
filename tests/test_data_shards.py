"""Shards: where they may come from, what a broken one gives, what a wrong address says."""

import gzip
import http.server
import io
import multiprocessing
import os
import re
import signal
import tarfile
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from data_sets import keys, module, samples, take, write_shards

from ldm_lab.data import streams
from ldm_lab.data.samples import RawSample, SkippedSample
from ldm_lab.data.shard_urls import expand
from ldm_lab.data.tar import FIRST, read_shard, write_shard
from ldm_lab.errors import UserError

ALL = [f"{n:05d}" for n in range(16)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    write_shards(root, shards=4, per_shard=4)
    return root


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; `faults` is how many of the next responses are cut or refused."""

    faults: list[str] = []
    ranges = True
    asked: list[str] = []

    def do_GET(self):
        if re.fullmatch(r"bytes=0-\d+", self.headers.get("Range", "")):  # how it begins, not the shard itself
            self.send_error(404)
            return
        fault = self.faults.pop(0) if self.faults else None
        self.asked.append(self.headers.get("Range", ""))
        if fault == "503":
            self.send_error(503)
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        start = 0
        if self.ranges and "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : start + 3000] if fault == "cut" else data[start:])

    def log_message(self, *args):
        """Keep the test's output clean."""


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setattr("ldm_lab.io.http.PAUSE", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Handler.faults, Handler.asked, Handler.ranges = [], [], True
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def read_all(addresses: str | list[str], **options) -> tuple[list[str], dict[str, int]]:
    data = module({"name": "webdataset", "shards": addresses, "max_skipped": 0.9, **options}, epochs=1)
    read = keys(take(data))
    return sorted(read), dict(data.skipped)


# ------------------------------------------------------------------------------------------------------- addresses


def test_local_addresses(folder, monkeypatch):
    names = [str(folder / f"{n:05d}.tar") for n in range(4)]
    assert expand([f"{folder}/{{00000..00003}}.tar"]) == names
    assert expand([f"{folder}/*.tar"]) == names
    assert expand([f"{folder}/{{00000,0000[1-2]}}.tar", names[3]]) == names
    assert expand([f"file://{folder}/*.tar"]) == names
    monkeypatch.setenv("HOME", str(folder.parent))
    assert expand([f"~/{folder.name}/*.tar"]) == names
    assert read_all(f"{folder}/{{00000..00003}}.tar", workers=2) == (ALL, {})
    assert read_all([f"{folder}/00000.tar", f"{folder}/0000[1-3].tar"]) == (ALL, {})


def test_a_name_with_brackets_is_no_pattern_where_the_file_exists(tmp_path):
    write_shard(tmp_path / "a[1].tar", samples(range(1)))
    assert expand([f"{tmp_path}/a[1].tar"]) == [f"{tmp_path}/a[1].tar"]


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("{}/none*.tar", r"'.*/none\*.tar' matches no file"),
        ("{}/{{00002..00007}}.tar", r"no such file: .*00004.tar and 3 more; a pattern with \*"),
        ("{}", r"is a folder; its shards are .*/\*.tar"),
        ("{}/{{00000..00003.tar", "unbalanced braces"),
        ("s4://bucket/0.tar", r"no such kind of address: 's4'.*Known: .*https.*pipe"),
    ],
)
def test_wrong_addresses(folder, pattern, told):
    with pytest.raises(UserError, match=told):
        expand([pattern.format(folder)])


def test_an_empty_list_of_shards():
    with pytest.raises(UserError, match="list of shards is empty"):
        module({"name": "webdataset", "shards": []})


@pytest.mark.parametrize("workers", [0, 2])
def test_pipe(folder, workers):
    assert read_all(f"pipe:cat {folder}/{{00000..00003}}.tar | cat", workers=workers) == (ALL, {})


def test_a_failing_command_is_a_broken_shard(folder):
    addresses = [f"{folder}/00000.tar", f"pipe:cat {folder}/00001.tar; exit 3", "pipe:exit 4"]
    read, skipped = read_all(addresses)
    assert read == ALL[:8] and skipped == {"broken shard": 2}


def test_commands_end_with_their_reader(tmp_path):
    """A reader that stops in mid-shard leaves no command behind."""
    marker, began = tmp_path / "pid", time.monotonic()
    write_shards(tmp_path, shards=1, per_shard=2 * FIRST)
    items = read_shard(f"pipe:echo $$ > {marker}; cat {tmp_path}/00000.tar; exec sleep 60")
    assert next(items).key == "00000"
    items.close()
    assert time.monotonic() - began < 50, "what has come is read at once, however little it is"
    with pytest.raises(ProcessLookupError):
        os.kill(int(marker.read_text()), 0)


# ------------------------------------------------------------------------------------------------------------ HTTP


def test_http(server):
    assert read_all(f"{server}/{{00000..00003}}.tar") == (ALL, {})


@pytest.mark.parametrize("ranges", [True, False])
def test_http_goes_on_where_the_connection_was_lost(server, ranges):
    Handler.faults, Handler.ranges = ["503", "cut", "cut", "503"], ranges
    got = list(read_shard(f"{server}/00001.tar"))
    assert [item.key for item in got] == ALL[4:8]
    assert Handler.asked == ["", "", "bytes=3000-", "bytes=6000-", "bytes=6000-"] if ranges else len(Handler.asked) > 4


def test_http_failures_are_counted_and_reading_goes_on(server):
    read, skipped = read_all([f"{server}/gone.tar", f"{server}/00002.tar", "http://127.0.0.1:9/0.tar"])
    assert read == ALL[8:12] and skipped == {"unreachable shard": 2}
    assert len([a for a in Handler.asked if not a]) == 2  # a 404 is not asked for again


@pytest.fixture
def no_tools(tmp_path, monkeypatch):
    """A folder for commands, the only one that is searched."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


def reason(address: str) -> tuple[str, str]:
    """Return the reason of a shard of which nothing comes, and what stands beside its address."""
    (item,) = read_shard(address)
    return item.reason, item.key.removeprefix(f"{address}: ")


def test_what_is_on_another_machine_is_one_skipped_shard_with_its_reason(server, no_tools):
    assert reason(f"{server}/gone.tar") == ("unreachable shard", "HTTP 404 Not Found")
    kind, why = reason("http://127.0.0.1:9/0.tar")
    assert kind == "unreachable shard" and "refused" in why
    assert reason("gs://bucket/0.tar") == ("unreachable shard", "gsutil is not installed")
    kind, why = reason("hf://datasets/0.tar")
    assert kind == "unreachable shard" and "is written hf://datasets/OWNER/REPOSITORY/FILE" in why
    with pytest.raises(
        UserError, match=r"no such kind of address: 's3'.* A command can read it: 'pipe:aws s3 cp s3://b/0"
    ):
        expand(["s3://b/0.tar"])


def test_a_cloud_s_tool_that_fails_or_is_silent(folder, no_tools, monkeypatch):
    files = f'*1.tar) exit 1;; *2.tar) /bin/sh -c "/bin/sleep 60; true";; *) /bin/cat {folder}/00000.tar;;'
    (no_tools / "gsutil").write_text(f'#!/bin/sh\nfor last; do :; done\ncase "$last" in {files} esac\n')
    (no_tools / "gsutil").chmod(0o755)
    monkeypatch.setattr(streams, "SILENCE", 0.5)
    assert [item.key for item in read_shard("gs://bucket/0.tar")] == ALL[:4]
    assert reason("gs://bucket/1.tar") == ("broken shard", "gsutil ended with status 1")
    began = time.monotonic()
    assert reason("gs://bucket/2.tar") == ("broken shard", "gsutil gave nothing for 0.5 seconds")
    assert time.monotonic() - began < 20, "it was not waited for"


def test_a_file_of_the_hub_is_asked_for_once_and_read_from_where_it_lies(server, monkeypatch):
    import huggingface_hub

    asked = []

    def metadata(url, timeout):
        asked.append((url, timeout))
        if "gated" in url:
            raise RuntimeError("403: accept the terms first")
        return SimpleNamespace(location=f"{server}/00001.tar")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    assert [item.key for item in read_shard("hf://datasets/owner/photos@v1/train/0.tar")] == ALL[4:8]
    assert asked == [("https://huggingface.co/datasets/owner/photos/resolve/v1/train/0.tar", streams.ANSWER)]
    assert reason("hf://datasets/owner/gated/0.tar")[1] == "the Hub does not give it: 403: accept the terms first"


def test_no_server_makes_us_wait_as_long_as_it_likes():
    from ldm_lab.io.http import LONGEST_PAUSE, _session

    retries = _session().get_adapter("http://a").max_retries
    wait = [
        retries.get_retry_after(SimpleNamespace(headers=h)) for h in ({"Retry-After": "86400"}, {"Retry-After": "2"})
    ]
    assert wait == [LONGEST_PAUSE, 2]


def test_data_of_which_no_shard_can_be_reached(server, no_tools):
    """The run stops with the reasons, and does not go round for ever."""
    with pytest.raises(UserError, match=r"no usable sample .*unreachable shard \d \(e.g. .*(not installed|HTTP 404)"):
        take(module({"name": "webdataset", "shards": [f"{server}/gone.tar", "gs://bucket/0.tar"]}), 1)


# ---------------------------------------------------------------------------------------------------- broken shards


def broken_at(folder: Path, tmp_path: Path, cut) -> list[RawSample | SkippedSample]:
    path = tmp_path / "cut.tar"
    path.write_bytes(cut((folder / "00000.tar").read_bytes()))
    return list(read_shard(str(path)))


def member_offset(path: Path, name: str) -> int:
    with tarfile.open(path) as archive:
        return archive.getmember(name).offset


@pytest.mark.parametrize(
    ("name", "behind", "delivered"),
    [
        ("00002.png", 100, 2),  # in a header, between two samples
        ("00002.png", 600, 2),  # in the image's data
        ("00002.txt", 514, 2),  # in the caption: the sample lacks what the others have
        ("00002.json", 513, 2),
        ("00003.png", 100, 3),
        ("00000.txt", 100, 0),
    ],
)
def test_a_truncated_shard_gives_what_is_before_the_break(folder, tmp_path, name, behind, delivered):
    at = member_offset(folder / "00000.tar", name) + behind
    *whole, last = broken_at(folder, tmp_path, lambda data: data[:at])
    assert [item.key for item in whole] == ALL[:delivered]
    assert all(item.image and item.text and item.json for item in whole)
    assert isinstance(last, SkippedSample) and last.reason == "broken shard"


def test_a_damaged_header_is_no_silent_end(folder, tmp_path):
    at = member_offset(folder / "00000.tar", "00002.png")
    *whole, last = broken_at(folder, tmp_path, lambda data: data[:at] + b"x" * 512 + data[at + 512 :])
    assert [item.key for item in whole] == ALL[:2] and last.reason == "broken shard"


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 100, b"x" * 5000])
def test_a_file_that_is_no_archive(folder, tmp_path, content):
    (item,) = broken_at(folder, tmp_path, lambda data: content)
    assert item.reason == "broken shard"


def test_compressed_shards(folder, tmp_path):
    path = tmp_path / "0.tar.gz"
    path.write_bytes(gzip.compress((folder / "00000.tar").read_bytes()))
    assert [item.key for item in read_shard(str(path))] == ALL[:4]
    path.write_bytes(path.read_bytes()[:-400])
    assert isinstance(list(read_shard(str(path)))[-1], SkippedSample)


def test_reading_goes_on_with_the_next_shard(folder, tmp_path):
    path = tmp_path / "cut.tar"
    path.write_bytes((folder / "00000.tar").read_bytes()[:2000])
    read, skipped = read_all([str(path), f"{folder}/00001.tar"])
    assert set(ALL[4:8]) <= set(read) and skipped == {"broken shard": 1}


def test_samples_are_grouped_by_name(tmp_path):
    """Subfolders, capitals, parts that nobody asked for, macOS droppings, links: only images, captions, metadata."""
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("a/1.JPG", "a/1.txt", "a/1.seg.png", "a/1.pyd", "a/._1.jpg", "b/1.webp", "README", "c/2.txt"):
            member = tarfile.TarInfo(name)
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))
        link = tarfile.TarInfo("d/3.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    *found, link = read_shard(str(path))
    assert link.key == "d/3" and link.reason == "link in place of a file (tar -h stores the files)"
    assert found == [
        RawSample("a/1", b"a/1.JPG", b"a/1.txt"),
        RawSample("b/1", b"b/1.webp"),
        RawSample("c/2", None, b"c/2.txt"),
    ]


def test_written_shards_are_reproducible_and_whole(tmp_path):
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / name, samples(range(3)))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()

    def interrupted():
        yield from samples(range(2))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "c.tar", interrupted())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "b.tar"]


# --------------------------------------------------------------------------------------------------------- processes


def _train(shards: str, pipe) -> None:
    """A stand-in for a training process: minds signals itself, asks for batches, leaves."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    # As OpenBLAS does: a thread in the new process before anything of ours runs there, which takes signals, too.
    os.register_at_fork(after_in_child=lambda: threading.Thread(target=time.sleep, args=(60,), daemon=True).start())
    batches = iter(module({"name": "webdataset", "shards": shards, "workers": 2}).train_dataloader())
    next(batches), next(batches)
    pipe.send("reading")
    pipe.recv()
    for _ in range(12):
        next(batches)
    pipe.send("went on")


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the loader processes mind SIGTERM on Linux only")
def test_loader_processes_outlive_signals_to_the_group_but_not_their_parent(folder):
    """Ctrl-C and SIGTERM reach the whole process group; the parent still gets batches, and can then leave at once."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    parent = context.Process(target=_train, args=(f"{folder}/*.tar", theirs))
    parent.start()
    theirs.close()
    assert ours.recv() == "reading"
    os.killpg(parent.pid, signal.SIGINT)
    os.killpg(parent.pid, signal.SIGTERM)
    ours.send("go on")
    assert ours.recv() == "went on"
    parent.join(60)
    assert parent.exitcode == 0
