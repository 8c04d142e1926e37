"""Files that lie where weights should: named for what they are, wherever weights are taken."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm_lab.checkpoints.files import read_pickled
from ldm_lab.checkpoints.importer import detect_format
from ldm_lab.checkpoints.lookalikes import lookalike
from ldm_lab.checkpoints.models import read_model
from ldm_lab.checkpoints.parts import load_part
from ldm_lab.errors import UserError

CASES = Path(__file__).parent / "data/cases/weights"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
PAGE = "<!DOCTYPE html>\n<html><head><title>stabilityai/vae at main</title></head><body>{}</body></html>"


@pytest.mark.parametrize(
    "read",
    [
        detect_format,
        read_model,  # `--checkpoint`, `init_from`
        read_pickled,  # `resume.checkpoint`
        lambda path: load_part("autoencoder", {"name": "kl_f8", "weights": str(path)}),
    ],
)
def test_a_pointer_of_git_lfs_is_named_wherever_weights_are_taken(read):
    with pytest.raises(
        UserError, match=r"no weights: it is a Git LFS pointer of a file of 12,345 bytes; `git lfs pull"
    ):
        read(CASES / "lfs.safetensors")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.ckpt", POINTER.format("0" * 64, 7).replace("\n", "\r\n"), "Git LFS pointer of a file of 7 bytes"),
        ("a.safetensors", "\ufeff" + POINTER.format("0" * 64, 7), "Git LFS pointer"),
        ("a.pt", "/annex/objects/SHA256E-s12--0.pt\n", "git-annex pointer"),
        ("a.safetensors", PAGE.format("x" * 100_000), r"a saved web page \(stabilityai/vae at main\); take the link"),
        ("a.pt", "\n\n  <HTML lang=en><body>Google Drive can't scan this file", "a saved web page;"),
        ("a.pt", '<?xml version="1.0"?><Error><Message>Access Denied</Message></Error>', r"web page \(Access Denied\)"),
        ("a.pt", "<!-- saved from url=(0013)about:internet --><html>", "a saved web page"),
        ("a.ckpt", "From: <Saved by Blink>\r\nSubject: weights\r\n", "a saved web page"),
        ("a.pth", "Entry not found", "a text that begins 'Entry not found'"),
        ("a.pth", '{"error": "Repository not found"}', "a text that begins"),
        ("a.safetensors", "", "the file is empty"),
    ],
)
def test_what_is_said_of_other_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content.encode())
    with pytest.raises(UserError, match=message) as raised:
        detect_format(path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_pages_in_other_encodings_and_compressed_files():
    assert "web page" in lookalike(PAGE.format("é").encode("utf-16"), 500)
    assert "web page" in lookalike(PAGE.format("é").encode("latin-1"), 500)
    assert "web page" in lookalike(("<html>" + "é" * 4000).encode()[:4096], 9000), "cut within a letter"
    assert "gunzip" in lookalike(b"\x1f\x8b\x08" + bytes(100), 103)
    assert "HDF5" in lookalike(b"\x89HDF\r\n\x1a\n" + bytes(100), 108)


def test_weights_are_let_through(tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
    torch.save({"a": torch.zeros(3)}, tmp_path / "new.pt")
    torch.save({"a": torch.zeros(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "new.pt", "old.pt"):
        assert detect_format(tmp_path / name).kind == "unknown"
