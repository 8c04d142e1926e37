"""How a file finds its importer: opened once, by one registry, which other modules may add to."""

import sys
import zipfile
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from tiny import DENOISER, KL_F8, embedding

from ldm_lab.checkpoints import files, importer, opened, released_zip
from ldm_lab.checkpoints.importer import detect_format, importers
from ldm_lab.checkpoints.models import read_model
from ldm_lab.checkpoints.native import save_model, save_part
from ldm_lab.checkpoints.parts import load_part
from ldm_lab.config import build
from ldm_lab.errors import UserError

# A format of nobody's: the tensors of `kl_f8` under names with another prefix, in a module outside the package.
MODULE = """
from ldm_lab.checkpoints.importer import Importer, LoadedPart, Section, register_importer
from ldm_lab.checkpoints.third_party import strip_prefix

@register_importer
class Mine(Importer):
    kind = "mine"
    title = "an autoencoder of mine"
    parts = {"autoencoder": "kl_f8"}

    def matches(self, file):
        return any(name.startswith("mine.") for name in file.tensors)

    def infer_config(self, tensors):
        return Section(ch=tensors["mine.encoder.conv_in.weight"].shape[0])

    def read(self, file, role):
        return LoadedPart(strip_prefix(file.read(), "mine."), Section(%r))
"""


@pytest.fixture
def counted(monkeypatch):
    """Count what opens files: unpacking a zip, torch.load, safetensors, and reading a pickle."""
    counts = dict.fromkeys(("unpack", "torch.load", "safe_open", "pickle"), 0)

    def count(module: object, name: str, key: str) -> None:
        before = getattr(module, name)

        def counting(*args, **kwargs):
            counts[key] += 1
            return before(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)

    count(released_zip, "_unpack", "unpack")
    count(torch, "load", "torch.load")
    for module in (opened, files):
        count(module, "safe_open", "safe_open")
    count(opened, "load_arrays", "pickle")
    return counts


@pytest.fixture
def released(tmp_path):
    """A released zip with an autoencoder in it, the same as a checkpoint, and as a part of ours."""
    torch.manual_seed(0)
    net = build("autoencoder", KL_F8)
    own = {name for name, _ in net.named_parameters()}
    state = {name: value for name, value in net.state_dict().items() if name in own}
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    with zipfile.ZipFile(tmp_path / "kl.zip", "w") as archive:
        archive.write(tmp_path / "model.ckpt", "model.ckpt")
    save_part(tmp_path / "part.safetensors", net, KL_F8)
    save_file(state, tmp_path / "plain.safetensors")
    return net


def changed(counts: dict[str, int]) -> dict[str, int]:
    return {key: count for key, count in counts.items() if count}


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("kl.zip", {"unpack": 1, "torch.load": 1}),
        ("model.ckpt", {"torch.load": 1}),
        ("part.safetensors", {"safe_open": 1}),
        ("plain.safetensors", {"safe_open": 1}),
    ],
)
def test_weights_are_opened_once(tmp_path, released, counted, file, expected):
    part = load_part("autoencoder", {"name": "kl_f8", "weights": str(tmp_path / file), "norm_groups": 4})
    assert changed(counted) == expected
    assert all(torch.equal(value, dict(part.named_parameters())[name]) for name, value in released.named_parameters())


@pytest.mark.parametrize("file", ["kl.zip", "model.ckpt", "part.safetensors"])
@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_commands_open_a_file_once(tmp_path, released, counted, program, file, command):
    out = [tmp_path / "out.safetensors"] if command == "convert" else []
    code, _, err = program("ldm_lab.__main__", command, tmp_path / file, *out)
    assert code == 0, err
    assert max(counted.values()) == 1


def test_a_model_is_opened_once(tmp_path, counted):
    state = build("denoiser", DENOISER, 3, embedding(8)).state_dict()
    save_model(tmp_path / "ema.safetensors", state, {"denoiser": DENOISER}, {"step": "3"})
    torch.save(state, tmp_path / "unet.pth")
    for file, expected in (("ema.safetensors", "safe_open"), ("unet.pth", "torch.load")):
        model = read_model(tmp_path / file)
        assert model.state.keys() == state.keys()
        assert counted[expected] == 1
    assert sum(counted.values()) == 2


def test_the_folder_of_a_run_stands_for_its_model(tmp_path):
    save_model(tmp_path / "ema.safetensors", {"a": torch.zeros(1)}, {"denoiser": DENOISER}, {"step": "3"})
    assert read_model(tmp_path).extra == {"step": "3"}


def test_what_a_zip_held_stays_readable_after_it_is_gone(tmp_path, released):
    tensors = detect_format(tmp_path / "kl.zip").file.read()
    (tmp_path / "kl.zip").unlink()
    expected = dict(released.named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in tensors.items())


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A module outside the package that registers an importer; forgotten afterwards."""
    (tmp_path / "my_formats.py").write_text(MODULE % KL_F8)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(importer, "_registry", dict(importer._registry))
    yield __import__("my_formats")
    del sys.modules["my_formats"]


def test_an_importer_outside_the_package_is_found_and_used(tmp_path, released, outside, program):
    save_file({f"mine.{name}": value for name, value in released.state_dict().items()}, tmp_path / "mine.safetensors")
    found = detect_format(tmp_path / "mine.safetensors")
    assert (found.kind, found.title) == ("mine", "an autoencoder of mine")
    part = load_part("autoencoder", {"name": "kl_f8", "weights": str(tmp_path / "mine.safetensors")})
    assert all(torch.equal(value, part.state_dict()[name]) for name, value in released.state_dict().items())
    code, out, err = program("ldm_lab.__main__", "inspect", tmp_path / "mine.safetensors")
    assert code == 0 and "an autoencoder of mine" in out and f"ch: {KL_F8['ch']}" in out, err
    converted = tmp_path / "ours.safetensors"
    code, out, err = program("ldm_lab.__main__", "convert", tmp_path / "mine.safetensors", converted)
    assert code == 0 and "from an autoencoder of mine" in out, err
    assert detect_format(converted).kind == "part"
    with pytest.raises(UserError, match=r"not a CLOOB|or .*: it holds an autoencoder of mine"):
        load_part("conditioner", {"name": "cloob", "weights": str(tmp_path / "mine.safetensors")})


def test_every_importer_says_what_it_is():
    kinds = [known.kind for known in importers()]
    assert len(kinds) == len(set(kinds)) == 26
    for known in importers():
        assert known.title and type(known).__doc__
        assert known.holds_model or known.parts or known.used_by or known.kind == "part"


def test_safetensors_is_counted_where_it_is_used():
    """The counting above would be in vain if the files were opened through another name."""
    assert opened.safe_open is safetensors.safe_open
    text = "".join(path.read_text() for path in Path(opened.__file__).parent.rglob("*.py"))
    assert text.count("safe_open(") == 4
