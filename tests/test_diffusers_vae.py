"""diffusers' VAEs in and out, compared with diffusers itself."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm_lab.__main__ import main
from ldm_lab.autoencoders.kl_f8 import KLAutoencoder
from ldm_lab.checkpoints.formats import diffusers_vae
from ldm_lab.checkpoints.parts import load_part, load_strictly, read_part, weights_sha256
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
    z, scale, shift = net.encode(image), vae.config.scaling_factor, vae.config.shift_factor or 0.0
    means = torch.tensor(vae.config.latents_mean or [shift]).view(-1, 1, 1)
    stds = torch.tensor(vae.config.latents_std or [1.0]).view(-1, 1, 1)
    expected = (posterior.mean - means) / stds * scale
    assert float((z - expected).abs().max()) < NEAR
    assert distance(z, expected) < NEAR
    assert distance(net.decode(z), vae.decode(z * stds / scale + means).sample) < NEAR


# ------------------------------------------------------------------------------------------------------------ import


@pytest.mark.parametrize("factor", [0.18215, 0.13025])
def test_a_vae_of_diffusers(tmp_path, factor):
    vae = theirs(factor)
    net = ours(saved(vae, tmp_path / "vae"))
    assert float(net.latent_std) == pytest.approx(1 / factor)
    assert net.downscale == 8
    assert_same_network(net, vae)


@pytest.mark.parametrize(
    ("factor", "sample_size"),
    [pytest.param(0.18215, 512, id="1.x"), pytest.param(0.13025, 1024, id="XL", marks=pytest.mark.slow)],
)
def test_vaes_of_the_configuration_of_stable_diffusion(tmp_path, factor, sample_size):
    """Those of 1.x and XL at their full width: 84 million parameters."""
    vae = theirs(factor, block_out_channels=(128, 256, 512, 512), norm_num_groups=32, sample_size=sample_size)
    net = ours(saved(vae, tmp_path / "vae"))
    assert sum(value.numel() for value in net.parameters()) == 83_653_863
    assert_same_network(net, vae, size=64)


NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}
KINDS = {
    "flux": {**NO_QUANT, "latent_channels": 16, "factor": 0.3611, "shift_factor": 0.1159},
    "sd3": {**NO_QUANT, "latent_channels": 16, "factor": 1.5305, "shift_factor": 0.0609},
    "eight channels with quant convolutions": {"latent_channels": 8, "factor": 0.5, "shift_factor": -0.25},
    "quant_conv alone": {"use_post_quant_conv": False, "latent_channels": 3},
    "post_quant_conv alone": {"use_quant_conv": False, "latent_channels": 5},
    "statistics by channel": {"factor": 0.5, "latents_mean": [-1.6, 0.5, 1.0, -0.3], "latents_std": [8.4, 5.7, 4.6, 1]},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_vaes_of_stable_diffusion_3_and_flux_and_their_kin(tmp_path, options):
    vae = theirs(**options)
    for name, saving in (("whole", {}), ("sharded", {"max_shard_size": "100KB"})):
        folder = saved(vae, tmp_path / name, **saving)
        assert (folder / "diffusion_pytorch_model.safetensors.index.json").exists() == (name == "sharded")
        assert_same_network(ours(folder), vae)
    for name, layout in (("ours.safetensors", []), ("back", ["--format", "diffusers"])):
        main(["convert", str(tmp_path / "sharded"), str(tmp_path / name), *layout])
    assert_same_network(ours(tmp_path / "ours.safetensors"), vae)
    again, info = AutoencoderKL.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values())
    assert_same_network(ours(tmp_path / "ours.safetensors"), again.eval())
    assert (again.config.shift_factor or 0) == pytest.approx(options.get("shift_factor", 0))


def test_the_case_of_a_small_flux_vae():
    folder = Path(__file__).parent / "data/cases/weights/vae_flux"
    net = ours(folder)
    assert net.channels == 16
    assert (float(net.latent_mean), float(net.latent_std)) == (pytest.approx(0.1159), pytest.approx(1 / 0.3611))
    assert_same_network(net, AutoencoderKL.from_pretrained(folder).eval())


def compvis_names(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a VAE as the single files of FLUX and Stable Diffusion 3 name them: CompVis's names."""
    state = ours(folder).state_dict()
    return {name: value for name, value in state.items() if not name.startswith("latent_")}


@pytest.mark.parametrize(
    ("prefix", "mark", "said"),
    [
        ("", None, {"latent_mean": 0.1159, "latent_std": 1 / 0.3611}),
        ("vae.", "model.diffusion_model.double_blocks.0.img_attn.qkv.weight", {}),
        ("first_stage_model.", "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", {}),
    ],
)
def test_single_files_of_flux_and_stable_diffusion_3(tmp_path, capfd, prefix, mark, said):
    kind = KINDS["sd3" if prefix == "first_stage_model." else "flux"]
    vae = theirs(**kind)
    state = {f"{prefix}{name}": value for name, value in compvis_names(saved(vae, tmp_path / "vae")).items()}
    save_file({**state, **({mark: torch.zeros(2, 2)} if mark else {})}, tmp_path / "ae.safetensors")
    net = ours(tmp_path / "ae.safetensors", norm_groups=4, **said)
    assert_same_network(net, vae)
    assert ("does not say shift and scale of its latents" in capfd.readouterr().err) == (mark is None)


def test_several_files_of_which_one_is_not_right(tmp_path):
    folder = saved(theirs(), tmp_path / "vae", max_shard_size="100KB")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = sorted(set(content["weight_map"].values()))[0]
    section = {"name": "kl_f8", "weights": str(folder)}
    pin = weights_sha256("autoencoder", section)
    (folder / "other.safetensors").write_bytes((folder / first).read_bytes())
    (folder / first).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    with pytest.raises(UserError, match=f"{first}: no weights: it is a Git LFS pointer"):
        ours(folder)
    assert weights_sha256("autoencoder", section) != pin, "every file counts"
    (folder / first).unlink()
    with pytest.raises(UserError, match=rf"index\.json: {first} of \d+ files that it names is missing"):
        ours(folder)
    for name, message in (("../x", "refused: '../x' is no file beside it"), (3, "refused: '3'"), ("", "refused")):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError, match=message):
            ours(folder)
    (folder / first).write_bytes((folder / "other.safetensors").read_bytes())
    index.write_text(json.dumps({"weight_map": {"strange.weight": first}}))
    with pytest.raises(UserError, match=rf"strange\.weight is not in {first}"):
        ours(folder)
    for text in ("{}", "[1]", "{"):
        index.write_text(text)
        with pytest.raises(UserError, match=r"index\.json: "):
            ours(folder)


def test_widths_that_are_no_multiples(tmp_path):
    folder = saved(theirs(block_out_channels=(8, 12)), tmp_path / "vae")
    with pytest.raises(UserError, match=r"not supported: levels \[8, 12\] wide, which are no multiples"):
        ours(folder)


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
        ({"use_quant_conv": False}, "use_quant_conv is False, but the weights beside it have True"),
        ({"use_post_quant_conv": None}, "use_post_quant_conv is None, but the weights"),
        ({"act_fn": "gelu"}, "act_fn: only 'silu' is supported, not gelu"),
        ({"shift_factor": "0.1"}, "shift_factor has to be a number, not 0.1"),
        ({"shift_factor": float("nan")}, "shift_factor has to be a number, not nan"),
        ({"latents_mean": [0.1]}, r"latents_mean has to be a list of 4 numbers, not \[0.1\]"),
        ({"latents_mean": [0.1] * 4}, "latents_std has to be a list of 4 numbers, not None"),
        ({"latents_mean": [0.1] * 4, "latents_std": [1, 1, 1, 0]}, "latents_std has to be a list of 4 numbers"),
        ({"latents_mean": [0] * 4, "latents_std": [1] * 4, "shift_factor": 1}, "shift_factor: 1.0 beside latents_mean"),
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
