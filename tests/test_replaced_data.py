"""Other data in the place of those that a run was trained on: noticed on resume, said in a line, a new epoch begun."""

import contextlib
import http.server
import json
import shutil
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from data_sets import encoded, keys, module, take, write_cache, write_files, write_shards

from ldm_lab.config import build
from ldm_lab.data import remote_contents
from ldm_lab.data.contents import contents_of, differing_contents, file_entries, names_within
from ldm_lab.data.tar import write_shard
from ldm_lab.errors import UserError

COUNT, SHARDS = 36, 6


def section(kind, root):
    return {
        "webdataset": {"name": "webdataset", "shards": f"{root}/shards/*.tar", "shuffle_buffer": 3},
        "folder": {"name": "folder", "path": f"{root}/images"},
        "class_folders": {"name": "class_folders", "path": f"{root}/images"},
        "image_list": {"name": "image_list", "path": f"{root}/list.txt"},
        "cache": {"name": "cache", "path": f"{root}/cache"},
    }[kind]


KINDS = ("webdataset", "folder", "class_folders", "image_list", "cache")


def write(root, first=0):
    """Write images `first` and on, of one size in bytes, as every kind of source."""
    write_shards(root / "shards", SHARDS, COUNT // SHARDS)
    write_files(root / "images", COUNT)
    for number, path in enumerate(sorted((root / "images").rglob("*.png"))):
        path.write_bytes(encoded(first + number))
    for shard in range(SHARDS if first else 0):
        names = range(shard * 6, shard * 6 + 6)
        write_shard(root / f"shards/{shard:05d}.tar", [(f"{n:05d}", {"png": encoded(first + n)}) for n in names])
    values = torch.arange(first, first + COUNT, dtype=torch.float16)[:, None]
    write_cache(root / "cache", {"embed": values}, per_shard=COUNT // SHARDS)


@pytest.fixture
def root(tmp_path):
    write(tmp_path)
    return tmp_path


def stopped(its):
    """Return where a run stands that was stopped in the midst of its first epoch, and what it has trained on."""
    data = module(its)
    trained = keys(take(data, 4))
    return [data.rank_state()], trained


def goes_on(its, states):
    data = module(its, epochs=2)
    data.load_rank_states(states, 0)
    return keys(take(data))


@pytest.mark.parametrize("kind", KINDS)
def test_others_of_the_same_names_and_number_begin_a_new_epoch(root, kind, capsys):
    """Also of the same sizes: how files begin tells them apart; a cache's list has its shards' checksums."""
    states, _ = stopped(section(kind, root))
    shutil.rmtree(root / "images")
    write(root, first=100)
    capsys.readouterr()
    assert len(goes_on(section(kind, root), states)) == COUNT, "the whole of the second epoch, nothing of the first"
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "other data than before" in line]
    what = {"webdataset": "6 of 6 shards", "cache": "6 of 6 shards"}.get(kind, "36 of 36 images")
    assert f"{what} have another content under the same name: another order, so this run goes on with epoch 1" in line


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_was_moved_or_copied_is_the_same(root, tmp_path_factory, kind, capsys):
    states, trained = stopped(section(kind, root))
    moved = tmp_path_factory.mktemp("elsewhere") / "deep" / "down"
    shutil.copytree(root, moved)
    for path in moved.rglob("*.png"):
        path.touch()
    capsys.readouterr()
    second = goes_on(section(kind, moved), states)
    assert len(trained) + len(second) == 2 * COUNT
    assert set(second[: COUNT - len(trained)]).isdisjoint(trained)
    assert "data: other" not in capsys.readouterr().out


def test_how_many_names_differ_is_said(root, capsys):
    its = section("webdataset", root)
    states, _ = stopped(its)
    (root / "shards/00002.tar").rename(root / "shards/00012.tar")
    goes_on(its, states)
    assert "other data than before, 1 of 6 shards have other names: another order" in capsys.readouterr().out
    images = sorted((root / "images").rglob("*.png"))
    states, _ = stopped(section("folder", root))
    for path in images[:3]:
        path.write_bytes(encoded(1, (40, 40)))
    goes_on(section("folder", root), states)
    assert "3 of 36 images have another content under the same name" in capsys.readouterr().out


def test_a_list_in_another_order_is_another_one(root, capsys):
    states, _ = stopped(section("image_list", root))
    lines = (root / "list.txt").read_text().split()
    (root / "list.txt").write_text("\n".join(reversed(lines)))
    goes_on(section("image_list", root), states)
    assert "other data than before, the images are the same ones in another order" in capsys.readouterr().out


def test_all_ranks_decide_by_what_the_first_one_found(root, monkeypatch):
    """A rank that sees an old list of a shared folder goes on as all others do."""
    its = section("folder", root)
    data = module(its, rank=1, world_size=2)
    seen_by_first = data.rank_state()["contents"]
    other = seen_by_first.replace("images 36", "images 37")

    class Strategy:
        def broadcast(self, value):
            assert value == "", "this rank does not look itself"
            return other

    class Trainer:
        strategy = Strategy()

    data._contents, data.trainer = "", Trainer()
    data.setup()
    assert data.rank_state()["contents"] == other


def test_other_scores_under_the_same_names_read_the_begun_shards_again(tmp_path, capsys):
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow import parquet

    write_shards(tmp_path, 4, 5)
    for shard in range(4):
        table = {"key": [f"{n:05d}" for n in range(shard * 5, shard * 5 + 5)], "aesthetic": [6.0] * 5}
        parquet.write_table(pyarrow.table(table), tmp_path / f"{shard:05d}_scores.parquet")
    its = {"name": "webdataset", "shards": f"{tmp_path}/*.tar", "scores": "_scores.parquet", "shuffle_buffer": 2,
           "rules": {"aesthetic": {"at_least": 5}}}  # fmt: skip
    states, _ = stopped({**its, "batch_size": 2})
    table = {"key": [f"{n:05d}" for n in range(5)], "aesthetic": [1.0] * 5}
    parquet.write_table(pyarrow.table(table), tmp_path / "00000_scores.parquet")
    capsys.readouterr()
    goes_on({**its, "batch_size": 2}, states)
    assert "other items in the shards, or another order of them: those that were begun begin anew" in (
        capsys.readouterr().out
    )


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, pieces of its files if asked for them, as kinds of servers do; notes what it was asked for."""

    kind = "pieces"
    asked: list[str] = []

    def do_GET(self):
        self.asked.append(self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if self.kind == "out of reach" or not path.is_file():
            self.send_error(404)
            return
        data, asked = path.read_bytes(), self.headers.get("Range")
        first, _, last = (asked or "=0-").partition("=")[2].partition("-")
        whole = asked is None or self.kind == "whole files"
        piece = data if whole else data[int(first) : int(last) + 1 if last else None]
        self.send_response(200 if whole else 206)
        if not whole:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(piece) - 1}/{len(data)}")
        self.send_header("ETag", f'"{len(self.asked)}"')  # another one each time, as of several machines
        self.send_header("Content-Length", str(len(piece)))
        self.end_headers()
        with contextlib.suppress(OSError):  # who asks may have enough
            self.wfile.write(piece)

    def log_message(self, *args):
        """Keep the test's output clean."""


@pytest.fixture
def served(root, monkeypatch):
    """The address of the shards on a server of their own."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Server, "asked", [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(root))) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}/shards/{{00000..0000{SHARDS - 1}}}.tar"
        running.shutdown()


@pytest.mark.parametrize("kind", ["pieces", "whole files"])
def test_other_shards_of_the_same_names_on_a_server_are_noticed(root, served, kind, monkeypatch, capsys):
    """Of the same sizes, too; the same ones are the same whatever else the server says, and when it says nothing."""
    monkeypatch.setattr(Server, "kind", kind)
    its = {**section("webdataset", root), "shards": served}
    states, trained = stopped(its)
    assert Server.asked.count("bytes=0-4095") == SHARDS
    assert len(trained) + len(goes_on(its, states)) == 2 * COUNT and "other data" not in capsys.readouterr().out
    monkeypatch.setattr(Server, "kind", "out of reach")
    data = module(its)
    data.load_rank_states(states, 0)
    assert data.rank_state()["left"] == states[0]["left"] and "other data" not in capsys.readouterr().out
    monkeypatch.setattr(Server, "kind", kind)
    write(root, first=100)
    assert len(goes_on(its, states)) == COUNT
    assert "6 of 6 shards have another content under the same name" in capsys.readouterr().out


def test_few_shards_on_servers_are_asked_for_and_a_silent_server_once(monkeypatch):
    asked = []

    class Silent:
        def __init__(self, url, **_):
            asked.append(url)
            raise remote_contents.NoAnswer("timed out")

    monkeypatch.setattr(remote_contents, "Response", Silent)
    monkeypatch.setattr(remote_contents, "location_on_hub", lambda address: address.replace("hf://", "https://hub/"))
    many = [f"https://a/{n}.tar" for n in range(10_000)] + ["pipe:cat x", "gs://b/1.tar", "/local/1.tar"]
    assert set(remote_contents.remote_contents(many).values()) == {""}
    assert 1 <= len(asked) <= remote_contents.AT_ONCE
    asked.clear()
    assert len(remote_contents.remote_contents([f"hf://datasets/o/r/{n}.tar" for n in range(1000)])) <= 64
    assert asked[0].startswith("https://hub/datasets/o/r/")


@pytest.mark.parametrize("damage", ["x", "shards 3 00", 7, None], ids=str)
def test_a_damaged_text_is_told(root, damage):
    states, _ = stopped(section("folder", root))
    with pytest.raises(UserError, match="the position in the data is damaged"):
        goes_on(section("folder", root), [{**states[0], "contents": damage}])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["/a/b/1.tar", "/a/b/2.tar"], ["/mnt/1.tar", "/mnt/2.tar"]),
        (["https://one/x/1.tar", "https://one/x/2.tar"], ["https://two/y/z/1.tar", "https://two/y/z/2.tar"]),
        (["https://one/1.tar?Expires=3", "https://one/2.tar?Expires=3"],
         ["https://one/1.tar?Expires=9", "https://one/2.tar?Expires=9"]),
        (["/a/1.tar", "hf://datasets/o/r/1.tar"], ["/b/1.tar", "hf://datasets/other/r/1.tar"]),
        (["/a/b/1.tar", "/a/c/1.tar"], ["/x/b/1.tar", "/x/c/1.tar"]),
    ],
    ids=["folder", "server", "signature", "two places", "two folders"],
)  # fmt: skip
def test_names_do_not_depend_on_the_place(one, other):
    assert names_within(one) == names_within(other)


def test_names_that_a_question_alone_tells_apart_stay_apart():
    assert len(set(names_within(["https://one/get?id=1", "https://one/get?id=2"]))) == 2
    assert names_within(["pipe:cat /a/1.tar", "pipe:cat /a/2.tar"]) == ["pipe:cat /a/1.tar", "pipe:cat /a/2.tar"]


@pytest.mark.parametrize("differing", [1, 5, 40, 200])
def test_the_number_of_differing_names_is_nearly_right(differing):
    def text(new):
        return contents_of("images", ((f"{'new' if n < new else ''}{n}.jpg", "") for n in range(1000)))

    words = differing_contents(text(0), text(differing))
    told = int(words.removeprefix("about ").partition(" of ")[0])
    assert abs(told - differing) <= max(0.25 * differing, differing > 4), words


def test_few_files_are_looked_at_however_many_there_are(tmp_path, monkeypatch):
    import ldm_lab.data.contents as its

    asked = []
    monkeypatch.setattr(its, "_told_apart_by", lambda path, begins: asked.append(begins) or "1")
    list(file_entries([(f"{n}", f"/nowhere/{n}") for n in range(100_000)]))
    assert sum(asked) <= its.OPENED and len(asked) <= its.SIZED + its.OPENED


def test_the_text_of_a_million_names_is_as_long_as_that_of_one():
    assert len(contents_of("images", [("1", "")])) > len(contents_of("images", ((f"{n}", "") for n in range(9999)))) - 8
    assert contents_of("images", []) == ""
    json.dumps(build("data", {"name": "folder", "path": ".", "image_size": 8, "batch_size": 1}).items_key)


def test_contents_that_only_one_side_knows_are_not_compared():
    """The same shards on a server and on a disk, and a file that is out of reach for the moment."""
    names = ["0.tar", "1.tar"]
    there, away = (contents_of("shards", zip(names, its)) for its in (["5 1", "6 2"], ["", ""]))
    one_away = contents_of("shards", zip(names, ["5 1", ""]))
    assert differing_contents(there, away) == differing_contents(away, there) == ""
    assert differing_contents(there, one_away) == ""
    other_away = contents_of("shards", zip(names, ["", "6 2"]))
    assert differing_contents(one_away, other_away) == "", "as many are known, and not the same ones"
    others = contents_of("shards", zip(names, ["5 1", "6 3"]))
    assert "another content" in differing_contents(there, others)
