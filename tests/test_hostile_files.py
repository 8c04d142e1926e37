"""Files that want to run code, to write elsewhere, to fill memory, or that are damaged.

Each goes through the commands that a user types: refused in one line, nothing run, nothing written.
"""

import io
import json
import os
import pickle
import re
import stat
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as safetensors_bytes
from tiny import KL_F8, make_run

from ldm_lab.checkpoints.files import FORMAT
from ldm_lab.config import build

CONV = {
    "encoder.conv_in.weight": torch.zeros(8, 3, 3, 3),
    "encoder.down.0.block.0.conv1.weight": torch.zeros(8, 8, 3, 3),
}
CONFIG = {
    "autoencoder": {"name": "identity"},
    "conditioner": {"name": "none"},
    "denoiser": {"name": "ccld_unet", "base_channels": 16, "multipliers": [4, 4]},
    "objective": {"name": "v_cosine"},
}


class Evil:
    """Pickles as a shell command that makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def run_torch(path: Path) -> None:
    torch.load(path, weights_only=False)


def run_pickle(path: Path) -> None:
    with open(path, "rb") as file:
        pickle.load(file)


def run_zipped(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith((".ckpt", "data.pkl"))]
        content = archive.read(name)
    if name.endswith(".pkl"):
        pickle.loads(content)
    else:
        torch.load(io.BytesIO(content), weights_only=False)


# -------------------------------------------------------------------------------------- files that want to run code


def cloob_pickle(folder: Path, marker: Path) -> Path:
    tree = {"vi_t_image_encoder": {"class_embed": Evil(marker)}}
    (folder / "cloob.pkl").write_bytes(pickle.dumps({"params": (tree, {}), "epoch": 16}, protocol=4))
    return folder / "cloob.pkl"


def compvis_ckpt(folder: Path, marker: Path) -> Path:
    torch.save({"state_dict": CONV, "callbacks": [Evil(marker)]}, folder / "model.ckpt")
    return folder / "model.ckpt"


def zipped_compvis_ckpt(folder: Path, marker: Path) -> Path:
    buffer = io.BytesIO()
    torch.save({"state_dict": {**CONV, "x": Evil(marker)}}, buffer)
    with zipfile.ZipFile(folder / "kl-f8.zip", "w") as archive:
        archive.writestr("model.ckpt", buffer.getvalue())
    return folder / "kl-f8.zip"


def ccld_checkpoint(folder: Path, marker: Path) -> Path:
    torch.save({"net.0.main.0.weight": torch.zeros(8, 20, 3, 3), "x": Evil(marker)}, folder / "yfcc.pth")
    return folder / "yfcc.pth"


def old_checkpoint(folder: Path, marker: Path) -> Path:
    content = {"state_dict": {"model_ema.net.0.main.0.weight": torch.zeros(8, 20, 3, 3), "x": Evil(marker)}}
    torch.save(content, folder / "old.ckpt", _use_new_zipfile_serialization=False)
    return folder / "old.ckpt"


def diffusers_bin(folder: Path, marker: Path) -> Path:
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    content = {"encoder.down_blocks.0.resnets.0.conv1.weight": torch.zeros(8, 8, 3, 3), "x": Evil(marker)}
    torch.save(content, folder / "vae" / "diffusion_pytorch_model.bin")
    return folder / "vae"


def last_ckpt(folder: Path, marker: Path) -> Path:
    run = {"config": {"task": "diffusion", "x": Evil(marker)}, "frozen": {}}
    torch.save({"state_dict": {"model.x": torch.zeros(1)}, FORMAT: run, "global_step": 3}, folder / "last.ckpt")
    return folder / "last.ckpt"


def torchscript(folder: Path, marker: Path) -> Path:
    with zipfile.ZipFile(folder / "ViT-B-32.pt", "w") as archive:
        archive.writestr("clip/code/__torch__.py", "import os\n")
        archive.writestr("clip/data.pkl", pickle.dumps(Evil(marker), protocol=2))
    return folder / "ViT-B-32.pt"


RUNNING: dict[Callable[[Path, Path], Path], Callable[[Path], None]] = {
    cloob_pickle: run_pickle,
    compvis_ckpt: run_torch,
    zipped_compvis_ckpt: run_zipped,
    ccld_checkpoint: run_torch,
    old_checkpoint: run_torch,
    diffusers_bin: lambda folder: run_torch(folder / "diffusion_pytorch_model.bin"),
    last_ckpt: run_torch,
    torchscript: run_zipped,
}


@pytest.mark.parametrize("write", RUNNING, ids=lambda write: write.__name__)
def test_the_dangerous_files_are_dangerous(tmp_path, write):
    """Loaded as Python loads a pickle they do what they are made for, so that the tests below can fail."""
    marker = tmp_path / "marker"
    path = write(tmp_path, marker)
    assert not marker.exists()
    try:
        RUNNING[write](path)
    finally:
        assert marker.exists()


# ------------------------------------------------------------------------------------- files that lie or are damaged


def _checkpoint() -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": CONV}, buffer)
    return buffer.getvalue()


def _zip(path: Path, name: str | zipfile.ZipInfo, content: bytes, **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr(name, content)
    return path


def zip_that_climbs(folder: Path, marker: Path) -> Path:
    return _zip(folder / "climbs.zip", "../../marker.ckpt", _checkpoint())


def zip_of_an_absolute_path(folder: Path, marker: Path) -> Path:
    return _zip(folder / "absolute.zip", str(marker.with_suffix(".ckpt")), _checkpoint())


def zip_of_a_link(folder: Path, marker: Path) -> Path:
    info = zipfile.ZipInfo("model.ckpt")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return _zip(folder / "link.zip", info, b"/etc/passwd")


def zip_of_a_program(folder: Path, marker: Path) -> Path:
    path = _zip(folder / "program.zip", "model.ckpt", _checkpoint())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("setup.py", "import os")
    return path


def zip_bomb(folder: Path, marker: Path) -> Path:
    return _zip(folder / "bomb.zip", "model.ckpt", bytes(64 << 20), compression=zipfile.ZIP_DEFLATED)


def tampered_zip(folder: Path, marker: Path) -> Path:
    path = _zip(folder / "tampered.zip", "model.ckpt", _checkpoint())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def compressed_checkpoint(folder: Path, marker: Path) -> Path:
    path = folder / "compressed.ckpt"
    with (
        zipfile.ZipFile(io.BytesIO(_checkpoint())) as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    return path


def truncated_safetensors(folder: Path, marker: Path) -> Path:
    (folder / "truncated.safetensors").write_bytes(safetensors_bytes(CONV)[:-10])
    return folder / "truncated.safetensors"


def _with_header(path: Path, header: dict, data: bytes = bytes(64), length: int | None = None) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def safetensors_with_lying_offsets(folder: Path, marker: Path) -> Path:
    entry = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}
    return _with_header(folder / "lying.safetensors", dict.fromkeys(CONV, entry))


def safetensors_with_overlaps(folder: Path, marker: Path) -> Path:
    entry = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
    return _with_header(folder / "overlaps.safetensors", dict.fromkeys(CONV, entry))


def safetensors_with_a_huge_header(folder: Path, marker: Path) -> Path:
    return _with_header(folder / "huge.safetensors", {}, length=1 << 62)


def _model(path: Path, config: object) -> Path:
    metadata = {"format": FORMAT, "role": "model", "config": json.dumps(config)}
    path.write_bytes(safetensors_bytes({"net.0.main.0.weight": torch.zeros(8, 19, 3, 3)}, metadata))
    return path


def model_of_an_unknown_part(folder: Path, marker: Path) -> Path:
    return _model(folder / "part.safetensors", {**CONFIG, "denoiser": {"name": "os.system", "command": "true"}})


def model_with_an_unknown_key(folder: Path, marker: Path) -> Path:
    return _model(folder / "key.safetensors", {**CONFIG, "autoencoder": {"name": "identity", "_target_": "os.system"}})


def model_without_a_config(folder: Path, marker: Path) -> Path:
    return _model(folder / "list.safetensors", [1, 2])


def part_of_an_unknown_kind(folder: Path, marker: Path) -> Path:
    metadata = {"format": FORMAT, "role": "autoencoder", "config": json.dumps({"name": "os.system"})}
    (folder / "kind.safetensors").write_bytes(safetensors_bytes(CONV, metadata))
    return folder / "kind.safetensors"


# writer -> what `inspect` says of the file
LYING: dict[Callable[[Path, Path], Path], str] = {
    zip_that_climbs: "leads out of the folder",
    zip_of_an_absolute_path: "leads out of the folder",
    zip_of_a_link: "is a link or a device",
    zip_of_a_program: "refused: 'setup.py' in it",
    zip_bomb: "would unpack",
    tampered_zip: "truncated or damaged (Bad CRC-32",
    compressed_checkpoint: "is compressed, which no checkpoint is",
    truncated_safetensors: "not a readable safetensors file, truncated or damaged",
    safetensors_with_lying_offsets: "not a readable safetensors file, truncated or damaged",
    safetensors_with_overlaps: "not a readable safetensors file, truncated or damaged",
    safetensors_with_a_huge_header: "not a readable safetensors file, truncated or damaged",
    model_of_an_unknown_part: "config.denoiser.name: no such denoiser: 'os.system'",
    model_with_an_unknown_key: "config.autoencoder._target_: no such key",
    model_without_a_config: "a mapping of sections is needed",
    part_of_an_unknown_kind: "no such autoencoder: 'os.system'",
}


# ------------------------------------------------------------------------------------------------- what a user types


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """The YAML of a tiny run, whose frozen parts are good."""
    return make_run(tmp_path_factory.mktemp("recipe"), images=8)


def everything(folder: Path) -> set[Path]:
    """Return all that is there, but for what libraries put into the folder for temporary files on being imported."""
    return {path for path in folder.rglob("*") if not re.search(r"/temporary/(?!ldm_lab)", str(path))}


@pytest.mark.parametrize("write", [*RUNNING, *LYING], ids=lambda write: write.__name__)
def test_hostile_files_are_refused(tmp_path, monkeypatch, program, recipe, write):
    for name in ("files", "work", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    path = write(tmp_path / "files", tmp_path / "marker")
    before = everything(tmp_path)
    role = "conditioner" if write in (cloob_pickle, torchscript) else "autoencoder"
    name = {"name": "clip", "model": "ViT-B-32"} if write is torchscript else {}
    overrides = [f"{role}.{key}={value}" for key, value in name.items()]
    for command in (
        ("ldm_lab.__main__", "inspect", path),
        ("ldm_lab.__main__", "inspect", "--json", path),
        ("ldm_lab.__main__", "convert", path, "out.safetensors", *(["model=ViT-B-32"] if name else [])),
        ("ldm_lab.__main__", "convert", path, "vae", "--format", "diffusers"),
        ("sample", "--checkpoint", path, "a red star", "--out", "samples"),
        ("train", "--config", recipe, "run=hostile", f"{role}.weights={path}", *overrides),
        ("train", "--config", recipe, "run=hostile", f"init_from={path}"),
    ):
        code, _, err = program(*command)
        lines = [line for line in err.splitlines() if "Warning" not in line and not line.startswith("  ")]
        assert code == 2, (command, err)
        assert len(lines) == 1, (command, err)
        assert lines[0].startswith("error: "), (command, err)
        assert "Traceback" not in err
        assert len(lines[0]) < 1000
        if "inspect" in command:
            assert LYING.get(write, "system") in err, err
        assert everything(tmp_path) == before, (command, everything(tmp_path) - before)
    assert not list(tmp_path.rglob("marker*")), "something in the file was run, or written where it asked"


def test_good_files_pass(tmp_path, monkeypatch, program):
    """The same commands work on files without a fault."""
    monkeypatch.chdir(tmp_path)
    state = {name: value for name, value in build("autoencoder", KL_F8).state_dict().items() if name != "scale"}
    torch.save({"state_dict": state}, "model.ckpt")
    with zipfile.ZipFile("kl.zip", "w") as archive:
        archive.write("model.ckpt")
    assert program("ldm_lab.__main__", "inspect", "kl.zip")[0] == 0
    assert program("ldm_lab.__main__", "convert", "kl.zip", "kl.safetensors")[0] == 0
