"""The importers of CCLD and CompVis checkpoints: containers, architectures from shapes, damaged and hostile files."""

import argparse
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from tiny import embedding

from ldm_lab.autoencoders.kl_f8 import KLAutoencoder
from ldm_lab.checkpoints.formats import ccld, compvis
from ldm_lab.checkpoints.models import read_model
from ldm_lab.checkpoints.opened import open_weights
from ldm_lab.checkpoints.parts import load_part
from ldm_lab.denoisers.ccld_unet import CCLDUNet
from ldm_lab.errors import UserError


def read_ccld(path: Path, ema: bool = True):
    return ccld.unet(open_weights(path).read(), path, ema)


def read_compvis(path: Path):
    return compvis.autoencoder(open_weights(path))


READERS = (read_ccld, read_compvis)
TINY = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 3, "embed_dim": 5}


def unet(**options) -> CCLDUNet:
    torch.manual_seed(0)
    defaults = {"base_channels": 16, "multipliers": [4, 8], "blocks_per_level": 1, "mapping_width": 8}
    return CCLDUNet(3, embedding(10), **{**defaults, **options})


def autoencoder(**options) -> KLAutoencoder:
    torch.manual_seed(0)
    return KLAutoencoder(**{**TINY, **options})


def released(net: KLAutoencoder) -> dict[str, torch.Tensor]:
    """Return a state dict as CompVis has it: without our buffer, with the training loss."""
    own = {name: value for name, value in net.state_dict().items() if not name.startswith("latent_")}
    return {**own, "loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(2, 2)}


def assert_same(state: dict, expected: dict) -> None:
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def saved(content: object, folder: Path) -> Path:
    torch.save(content, folder / "model.ckpt")
    return folder / "model.ckpt"


# -------------------------------------------------------------------------------------------------------------- CCLD


def test_a_flat_ccld_checkpoint(tmp_path):
    expected = unet().state_dict()
    for content in (expected, {**expected, "autoencoder_scale": torch.tensor(2.55)}):
        path = saved(content, tmp_path)
        state, config, shape = read_ccld(path)
        assert_same(state, expected)
        assert config == {"base_channels": 16, "multipliers": [4, 8], "blocks_per_level": 1, "mapping_width": 8}
        assert shape == (3, embedding(10))
        std = pytest.approx(2.55) if "autoencoder_scale" in content else None
        assert ccld.latent_std(open_weights(path).read(), path) == std
    save_file(expected, tmp_path / "unet.safetensors")
    assert_same(read_ccld(tmp_path / "unet.safetensors")[0], expected)


def test_a_ccld_training_checkpoint(tmp_path):
    averaged, raw = unet().state_dict(), unet().state_dict()
    raw = {name: value + 1 for name, value in raw.items()}
    state = {f"model_ema.{name}": value for name, value in averaged.items()}
    state |= {f"model.{name}": value for name, value in raw.items()}
    state |= {"scale_factor": torch.tensor(8.0), "ae_model.loss.logvar": torch.zeros(()), "cloob.x": torch.zeros(1)}
    path = saved({"state_dict": state, "epoch": 3, "global_step": 9, "optimizer_states": [{"state": {}}]}, tmp_path)
    for ema, expected in ((True, averaged), (False, raw)):
        read, *_ = read_ccld(path, ema=ema)
        assert_same(read, expected)
        assert read_model(path, ema).config["autoencoder"]["latent_std"] == 8.0
    only_raw = {name: value for name, value in state.items() if name.startswith("model.")}
    with pytest.raises(UserError, match=r"neither 'net.0.main.0.weight' nor 'model_ema.net.0.main.0.weight'"):
        read_ccld(saved({"state_dict": only_raw}, tmp_path))


@pytest.mark.parametrize(
    "options",
    [
        {"base_channels": 192, "multipliers": [4, 4, 8, 8], "blocks_per_level": 4, "mapping_width": 1024},
        {"base_channels": 128, "multipliers": [4, 4, 8, 8], "blocks_per_level": 4, "mapping_width": 1024},
        {"base_channels": 32, "multipliers": [4, 6, 8], "blocks_per_level": 2, "mapping_width": 64},
        {"base_channels": 65, "multipliers": [1, 2, 3, 1, 2], "blocks_per_level": 3, "mapping_width": 10},
    ],
)
def test_architectures_of_ccld_from_shapes(options):
    with torch.device("meta"):
        expected = CCLDUNet(4, embedding(512), **options).state_dict()
        config = ccld.infer_config(expected)
        rebuilt = CCLDUNet(4, embedding(512), **config).state_dict()
    widths = [options["base_channels"] * multiplier for multiplier in options["multipliers"]]
    assert [config["base_channels"] * multiplier for multiplier in config["multipliers"]] == widths
    if options["mapping_width"] == 1024:  # the released ones come out as they were written
        assert config == options
    assert {name: value.shape for name, value in rebuilt.items()} == {n: v.shape for n, v in expected.items()}


def test_incomplete_ccld_checkpoints(tmp_path):
    state = unet().state_dict()
    for name in ("mapping.0.main.0.weight", "net.0.main.4.weight"):
        damaged = {key: value for key, value in state.items() if key != name}
        with pytest.raises(UserError, match=rf"not a complete CCLD U-Net \('{name}' is missing"):
            read_ccld(saved(damaged, tmp_path))
    with pytest.raises(UserError, match="not a CCLD U-Net"):
        read_ccld(saved(released(autoencoder()), tmp_path))
    with pytest.raises(UserError, match=r"autoencoder_scale is no number but a tensor of \[2\]"):
        read_model(saved({**state, "autoencoder_scale": torch.zeros(2)}, tmp_path))


# ------------------------------------------------------------------------------------------------------- autoencoders


@pytest.mark.parametrize(
    "options",
    [{}, {"ch_mult": [1, 1, 2], "num_res_blocks": 2}, {"attn_resolutions": [128]}, {"ch": 64, "ch_mult": [2, 1]}],
)
def test_architectures_of_autoencoders_from_shapes(tmp_path, options):
    net = autoencoder(**options)
    state, config = read_compvis(saved({"state_dict": released(net)}, tmp_path))
    assert_same(state, net.state_dict())
    assert config == {"name": "kl_f8", "attn_resolutions": [], "resolution": 256, **TINY, **options}


@pytest.mark.parametrize(("prefix", "factor", "scale"), [("first_stage_model.", 0.2, 5.0), ("ae_model.", 8.0, 8.0)])
def test_an_autoencoder_inside_a_diffusion_model(tmp_path, prefix, factor, scale):
    net = autoencoder()
    state = {prefix + name: value for name, value in released(net).items()}
    path = saved({"state_dict": {**state, "model.x": torch.zeros(1), "scale_factor": torch.tensor(factor)}}, tmp_path)
    read, _ = read_compvis(path)
    assert_same({**read, "latent_std": torch.tensor(1.0)}, net.state_dict())
    assert read["latent_std"].item() == pytest.approx(scale)


def test_an_autoencoder_by_its_config_section(tmp_path):
    net = autoencoder()
    path = str(saved({"state_dict": released(net)}, tmp_path))
    part = load_part("autoencoder", {"name": "kl_f8", "weights": path, "latent_std": 3.5})
    assert part.latent_std == 3.5
    assert_same({**part.state_dict(), "latent_std": torch.tensor(1.0)}, net.state_dict())
    with pytest.raises(UserError, match=r"autoencoder.ch: 64 is asked for"):
        load_part("autoencoder", {"name": "kl_f8", "weights": path, "ch": 64})


def test_released_configs_of_autoencoders():
    ddconfig = {
        "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
        "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    config = compvis.config_of(ddconfig, embed_dim=4)
    with torch.device("meta"):
        assert sum(p.numel() for p in KLAutoencoder(**config).parameters()) == 83_653_863
    with pytest.raises(UserError, match=r"ddconfig\.double_z: only True is supported, not False"):
        compvis.config_of({**ddconfig, "double_z": False}, embed_dim=4)
    del ddconfig["ch"]
    with pytest.raises(UserError, match="ddconfig: ch missing"):
        compvis.config_of(ddconfig, embed_dim=4)


def test_incomplete_autoencoders(tmp_path):
    state = released(autoencoder())
    del state["quant_conv.weight"]
    with pytest.raises(UserError, match=r"not a complete KL autoencoder of CompVis's \('quant_conv.weight' is missing"):
        read_compvis(saved(state, tmp_path))
    with pytest.raises(UserError, match="not a CompVis autoencoder"):
        read_compvis(saved(unet().state_dict(), tmp_path))


# ------------------------------------------------------------------------------------------------- containers, damage


def test_bookkeeping_of_lightning_is_passed_over(tmp_path):
    """Old checkpoints name classes: they are neither imported nor in the way."""
    net = autoencoder()
    content = {
        "state_dict": released(net),
        "callbacks": {ModelCheckpoint: {"best_model_score": np.float64(0.5)}},
        "hyper_parameters": {"config": OmegaConf.create({"a": [1], "b": {"c": None}}), "args": argparse.Namespace(b=2)},
        "best": np.arange(3),
    }
    state, _ = read_compvis(saved(content, tmp_path))
    assert_same(state, net.state_dict())


def test_old_checkpoints_that_are_no_zip_files(tmp_path):
    net = autoencoder()
    torch.save({"state_dict": released(net)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert_same(read_compvis(tmp_path / "old.ckpt")[0], net.state_dict())


class Evil:
    """Pickles as a shell command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("is_zip", [True, False])
def test_nothing_that_a_checkpoint_names_is_run(tmp_path, read, is_zip):
    marker = tmp_path / "marker"
    for content in (
        Evil(f"touch {marker}"),
        {"state_dict": {**unet().state_dict(), **released(autoencoder())}, "callbacks": [Evil(f"touch {marker}")]},
    ):
        torch.save(content, tmp_path / "evil.ckpt", _use_new_zipfile_serialization=is_zip)
        with pytest.raises(UserError, match=r"evil.ckpt: ") as raised:
            read(tmp_path / "evil.ckpt")
        assert "\n" not in str(raised.value)
        assert not marker.exists()
        torch.load(tmp_path / "evil.ckpt", weights_only=False)
        assert marker.exists(), "this file was no danger in the first place"
        marker.unlink()


def test_what_stands_in_for_bookkeeping_is_inert(tmp_path):
    """A name of a known package that does something is not called either."""
    marker = tmp_path / "marker"

    class Saves:
        def __reduce__(self):
            return np.save, (str(marker), 1)

    content = {"state_dict": released(autoencoder()), "callbacks": [Saves()]}
    read_compvis(saved(content, tmp_path))
    assert not marker.with_suffix(".npy").exists()
    torch.load(tmp_path / "model.ckpt", weights_only=False)
    assert marker.with_suffix(".npy").exists()


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "content",
    [b"", b"PK\3\4", b"not a checkpoint", b"\x80\x02}.", pickle.dumps([1], 2), pickle.dumps({"state_dict": 3}, 2)],
)
def test_files_that_are_no_checkpoints(tmp_path, read, content):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.ckpt: ") as raised:
        read(tmp_path / "x.ckpt")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("read", READERS)
def test_other_contents(tmp_path, read):
    for content in ([torch.zeros(1)], {"state_dict": [1]}, {"state_dict": {}}, {"a": 1}):
        with pytest.raises(UserError, match=r"model\.ckpt: ") as raised:
            read(saved(content, tmp_path))
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "none.ckpt")
    with pytest.raises(UserError, match="not a file"):
        read(tmp_path)


@pytest.mark.parametrize("read", READERS)
def test_truncated_checkpoints(tmp_path, read):
    small = {"state_dict": {"net.0.main.0.weight": torch.zeros(3), "encoder.conv_in.weight": torch.zeros(3)}}
    whole = saved(small, tmp_path).read_bytes()
    for length in random.Random(0).sample(range(len(whole)), 40):
        (tmp_path / "cut.ckpt").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.ckpt: ") as raised:
            read(tmp_path / "cut.ckpt")
        assert "\n" not in str(raised.value)
