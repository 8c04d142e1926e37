"""Files that appear whole or not at all: every writer goes by the umask, and says a full disk in one line."""

import ast
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm_lab.checkpoints.files import write_safetensors
from ldm_lab.data.tar import write_shard
from ldm_lab.errors import UserError
from ldm_lab.io.atomic import atomic_write, new_folder, replaced_folder
from ldm_lab.io.images import save_png
from ldm_lab.io.json_files import write_json

ROOT = Path(__file__).resolve().parents[1]


def plain(path: Path) -> None:
    with atomic_write(path) as file:
        file.write(b"content")


def folder(path: Path) -> None:
    with replaced_folder(path) as new:
        (new / "file").write_text("content")


def new(path: Path) -> None:
    with new_folder(path) as folder:
        (folder / "file").write_text("content")


WRITERS: dict[str, Callable[[Path], None]] = {
    "file": plain,
    "folder": folder,
    "new folder": new,
    "png": lambda path: save_png(path, Image.new("RGB", (2, 2))),
    "json": lambda path: write_json(path, {"a": 1}),
    "shard": lambda path: write_shard(path, iter([("a", {"txt": b"b"})])),
    "safetensors": lambda path: write_safetensors(path, {"a": torch.zeros(1)}, {}),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_all_writers_go_by_the_umask(tmp_path, write, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "out")
    finally:
        os.umask(before)
    full = 0o777 if (tmp_path / "out").is_dir() else 0o666
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == full & ~umask
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("write", [w for name, w in WRITERS.items() if "folder" not in name])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path, monkeypatch, write):
    (tmp_path / "out").write_text("before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"out: cannot be written: No space left on device; free some space") as caught:
        write(tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "out").read_text() == "before" and os.listdir(tmp_path) == ["out"]


def test_a_full_disk_is_one_line_for_a_folder_too(tmp_path, monkeypatch):
    folder(tmp_path / "out")
    replace = os.replace

    def full(source, target):
        if Path(target) == tmp_path / "out":
            monkeypatch.setattr(os, "replace", replace)
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"out: cannot be written: No space left on device"):
        folder(tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "content" and os.listdir(tmp_path) == ["out"]


def test_of_two_that_write_a_new_folder_the_first_wins(tmp_path):
    with new_folder(tmp_path / "out") as slow:
        (slow / "file").write_text("of the slow one")
        new(tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "content" and os.listdir(tmp_path) == ["out"]


def test_nothing_else_renames_or_hashes_files():
    """One atomic write and one checksum of a file in the whole package."""
    forbidden = {"os.replace", "hashlib.file_digest", "tempfile.mkstemp", "tempfile.NamedTemporaryFile"}
    for path in (ROOT / "ldm_lab").rglob("*.py"):
        text = path.read_text()
        if path.name == "atomic.py" or not any(name.rpartition(".")[2] in text for name in forbidden):
            continue
        called = {ast.unparse(node.func) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)}
        assert not called & forbidden, path
