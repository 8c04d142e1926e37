"""diffusers' VAEs in and out, compared with diffusers itself."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm_lab.autoencoders.kl_f8 import KLAutoencoder
from ldm_lab.checkpoints.formats import diffusers_vae
from ldm_lab.checkpoints.parts import load_part, load_strictly, read_part
from ldm_lab.errors import UserError

AutoencoderKL = pytest.importorskip("diffusers", reason="a dependency of development").AutoencoderKL

NEAR = 1e-5  # relative L2
TINY = {"ch": 8, "ch_mult": [1, 2, 4], "num_res_blocks": 1, "z_channels": 4, "embed_dim": 4, "norm_groups": 4}


def theirs(factor: float = 0.18215, **options) -> AutoencoderKL:
    """Return a VAE of Stable Diffusion's block structure, a thinner one, with random weights."""
    torch.manual_seed(0)
    levels = len(options.setdefault("block_out_channels", (8, 16, 32, 32)))
    defaults = {
        **{"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels},
        **{"layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 4, "sample_size": 64},
    }
    vae = AutoencoderKL(scaling_factor=factor, **{**defaults, **options}).eval()
    with torch.no_grad():  # initial gains and offsets are 1 and 0, which would hide a mix-up
        for value in vae.parameters():
            if value.ndim == 1:
                value.add_(0.1 * torch.randn_like(value))
    return vae


def saved(vae: AutoencoderKL, folder: Path, **options) -> Path:
    vae.save_pretrained(folder, **options)
    return folder


def ours(path: Path, **section) -> KLAutoencoder:
    return load_part("autoencoder", {"name": "kl_f8", "weights": str(path), **section})


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).norm() / b.norm())


@torch.no_grad()
def assert_same_network(net: KLAutoencoder, vae: AutoencoderKL, size: int = 32) -> None:
    """Compare the posterior's mean and log variance, and the decoded image, by the latents that diffusion sees."""
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(1, 3, size, size, generator=generator) * 2 - 1
    posterior = vae.encode(image).latent_dist
    mean, logvar = net.moments(image)
    assert distance(mean, posterior.mean) < NEAR
    assert distance(logvar, posterior.logvar) < NEAR
    z = net.encode(image)
    assert distance(z, posterior.mean * vae.config.scaling_factor) < NEAR
    assert distance(net.decode(z), vae.decode(z / vae.config.scaling_factor).sample) < NEAR


# ------------------------------------------------------------------------------------------------------------ import


@pytest.mark.parametrize("factor", [0.18215, 0.13025])
def test_a_vae_of_diffusers(tmp_path, factor):
    vae = theirs(factor)
    net = ours(saved(vae, tmp_path / "vae"))
    assert float(net.latent_std) == pytest.approx(1 / factor)
    assert net.downscale == 8
    assert_same_network(net, vae)


@pytest.mark.parametrize(("factor", "sample_size"), [(0.18215, 512), (0.13025, 1024)])
def test_vaes_of_the_configuration_of_stable_diffusion(tmp_path, factor, sample_size):
    """Those of 1.x and XL at their full width: 84 million parameters."""
    vae = theirs(factor, block_out_channels=(128, 256, 512, 512), norm_num_groups=32, sample_size=sample_size)
    net = ours(saved(vae, tmp_path / "vae"))
    assert sum(value.numel() for value in net.parameters()) == 83_653_863
    assert_same_network(net, vae, size=64)


def test_attention_in_the_levels(tmp_path):
    vae = theirs(
        block_out_channels=(8, 8, 16),
        down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
    )
    assert_same_network(ours(saved(vae, tmp_path / "vae")), vae)


def test_the_files_that_diffusers_writes(tmp_path):
    vae = theirs()
    expected = ours(saved(vae, tmp_path / "plain")).state_dict()
    for folder, options in (("bin", {"safe_serialization": False}), ("fp16", {"variant": "fp16"})):
        state = ours(saved(vae, tmp_path / folder, **options)).state_dict()
        assert all(torch.equal(state[name], expected[name]) for name in expected), folder
    file = tmp_path / "fp16" / "diffusion_pytorch_model.fp16.safetensors"  # its config lies beside it
    assert torch.equal(ours(file).state_dict()["latent_std"], expected["latent_std"])


def test_names_of_attention_before_diffusers_0_15(tmp_path):
    vae = theirs()
    folder = saved(vae, tmp_path / "vae")
    file = folder / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(file)
    for new, old in names.items():
        state = {name.replace(f".{new}.", f".{old}."): value for name, value in state.items()}
    assert "encoder.mid_block.attentions.0.query.weight" in state
    save_file(state, file)
    assert_same_network(ours(folder), vae)


def test_a_single_file_without_a_config(tmp_path):
    vae = theirs(norm_num_groups=8)
    shutil.copy(saved(vae, tmp_path / "vae") / "diffusion_pytorch_model.safetensors", tmp_path / "sd.safetensors")
    assert read_part(tmp_path / "sd.safetensors", "autoencoder", "kl_f8").state["latent_std"] == 1, "it does not say it"
    net = ours(tmp_path / "sd.safetensors", latent_std=1 / 0.18215, norm_groups=8)
    assert_same_network(net, vae)
    assert float(ours(tmp_path / "sd.safetensors", norm_groups=8).latent_std) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_quant_conv": False}, "use_quant_conv: only True is supported, not False"),
        ({"act_fn": "gelu"}, "act_fn: only 'silu' is supported, not gelu"),
        ({"shift_factor": 0.1159}, "shift_factor: only None is supported, not 0.1159"),
        ({"latents_mean": [0.1]}, r"latents_mean: only None is supported, not \[0.1\]"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention: only True"),
        ({"in_channels": 4}, "in_channels: only 3"),
        ({"_class_name": "AutoencoderTiny"}, "_class_name: only 'AutoencoderKL' is supported, not AutoencoderTiny"),
        ({"down_block_types": ["DownBlock2D"]}, "down_block_types: only DownEncoderBlock2D and AttnDown"),
        ({"down_block_types": 3}, "down_block_types has to be a list, not 3"),
        (
            {"block_out_channels": [8, 16]},
            r"block_out_channels is \[8, 16\], but the weights beside it have \[8, 16, 32",
        ),
        ({"scaling_factor": 0}, "scaling_factor has to be a number above 0, not 0"),
        ({"scaling_factor": "0.1"}, "scaling_factor has to be a number above 0"),
        ({"norm_num_groups": True}, "norm_num_groups has to be a whole number"),
        ({"new_option": 3}, "'new_option' is not known"),
    ],
)
def test_options_that_are_another_network(tmp_path, changes, message):
    folder = saved(theirs(), tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match=message):
        ours(folder)


def test_folders_and_configs_that_are_none(tmp_path):
    with pytest.raises(UserError, match=r"this one has none$"):
        ours(tmp_path)
    folder = saved(theirs(), tmp_path / "vae")
    with pytest.raises(UserError, match=r"this one has none; did you mean .*/vae\?"):
        ours(tmp_path)
    for text in ("{", "[]", "[" * 100_000, '{"a": "' + "x" * (1 << 20) + '"}', '{"a": "\udc80"}'):
        (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(
            UserError, match=r"config\.json: (not a readable config|a config is a JSON object)"
        ) as raised:
            ours(folder)
        assert len(str(raised.value)) < 500


def test_incomplete_vaes(tmp_path):
    folder = saved(theirs(), tmp_path / "vae")
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    for name, message in (
        ("quant_conv.weight", "'quant_conv.weight' is missing"),
        ("decoder.up_blocks.0.resnets.0.norm1.bias", "decoder.up.3.block.0.norm1.bias is missing"),
        ("encoder.mid_block.attentions.0.to_q.bias", "encoder.mid.attn_1.q.bias is missing"),
    ):
        save_file({n: value for n, value in state.items() if n != name}, file)
        with pytest.raises(UserError, match=message):
            ours(folder)
    save_file({**state, "encoder.extra": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"encoder\.extra is not of this architecture"):
        ours(folder)


# ------------------------------------------------------------------------------------------------------------ export


@pytest.mark.parametrize("options", [{}, {"attn_resolutions": [64], "num_res_blocks": 2}, {"ch_mult": [1, 1]}])
def test_diffusers_loads_what_is_exported(tmp_path, options):
    torch.manual_seed(0)
    net = KLAutoencoder(**{**TINY, **options}).eval()
    net.latent_std.fill_(7.5)
    config = {"attn_resolutions": [], "resolution": 256, **TINY, **options}
    diffusers_vae.write(tmp_path / "vae", net.state_dict(), config)
    vae, info = AutoencoderKL.from_pretrained(tmp_path / "vae", output_loading_info=True)
    assert not any(info.values()), "all tensors are taken, none is missing"
    assert vae.config.scaling_factor == pytest.approx(1 / 7.5)
    assert_same_network(net, vae.eval())
    part = read_part(tmp_path / "vae", "autoencoder", "kl_f8")
    again = KLAutoencoder(**part.options)
    load_strictly(again, part.state, "vae")
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in again.state_dict().items())


def test_what_diffusers_cannot_express(tmp_path):
    for options, message in (
        ({"ch_mult": [2, 4]}, "ch_mult: diffusers' first level"),
        ({"embed_dim": 3}, "embed_dim: "),
    ):
        config = {"attn_resolutions": [], "resolution": 256, **TINY, **options}
        with pytest.raises(UserError, match=message):
            diffusers_vae.write(tmp_path / "vae", KLAutoencoder(**config).state_dict(), config)
    assert not list(tmp_path.iterdir())
