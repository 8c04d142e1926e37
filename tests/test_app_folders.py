"""What strangers are told does not say where files lie."""

import time

import pytest

from ldm_lab.app.folders import without_folders


@pytest.mark.parametrize(("text", "told"), [
    ("/home/john doe/My Models/run/ema.safetensors: damaged", "ema.safetensors: damaged"),
    ("C:\\Users\\john doe\\My Models\\ema.safetensors: damaged", "ema.safetensors: damaged"),
    ("[Errno 2] No such file or directory: 'C:\\\\Users\\\\john\\\\a.png'",
     "[Errno 2] No such file or directory: 'a.png'"),
    ("d:/My Models/a.ckpt, d:\\x\\b.ckpt", "a.ckpt, b.ckpt"), ("\\\\server\\my share\\a.pt is gone", "a.pt is gone"),
    ("~/my models/a.pt: damaged", "a.pt: damaged"),
    ("/home/o'neil/a b/c.pt", "c.pt"), ("'/a/b' or '/c/d'", "'b' or 'd'"),
    ("/srv/12:30/John, the 2nd (old)/a.pt: no", "a.pt: no"),
    ("file:///home/j d/a.pt", "a.pt"), ("/a/b.pt:0.8", "b.pt:0.8"),
    ("/home/j/a.png is 40/30 pixels", "a.png is 40/30 pixels"),
    ("/a b/c.pt and /d e/f.pt differ", "c.pt and f.pt differ"),
    ("neither /a b/run nor /c/other is there", "neither run nor other is there"), ("/a/.cache/x y/h.bin", "h.bin"),
    ("https://host.example/my models/a.pt", "https://host.example/my models/a.pt"), ("hf://owner/name", "hf://owner/name"),
    ("pictures / steps and/or 3/4", "pictures / steps and/or 3/4"), ("steps: 12x", "steps: 12x"),
    ("runs/first: not offered", "runs/first: not offered"),
], ids=range(20))  # fmt: skip
def test_folders_are_left_out(text, told):
    assert without_folders(text) == told


@pytest.mark.parametrize(
    "text", ["/" * 20_000, "/a " * 8000, "\\\\a" * 6000, "/a b.png " * 3000, "C:\\ x" * 5000], ids=range(5)
)
def test_odd_texts_take_no_time(text):
    begun = time.process_time()
    without_folders(text)
    assert time.process_time() - begun < 1
