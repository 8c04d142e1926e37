"""The recorded networks out of files laid out as released ones, by the commands that a user types."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from compared import check_autoencoder, check_cloob, check_glide, check_unet
from safetensors.torch import save_file

from ldm_lab.checkpoints.formats import diffusers_vae
from ldm_lab.checkpoints.models import read_model
from ldm_lab.checkpoints.parts import load_part, load_strictly
from ldm_lab.condition_sources import build_sources, given_conditions
from ldm_lab.conditions import Embedding
from ldm_lab.config import build
from ldm_lab.schedules.discrete import beta_table

NETWORK = 1e-5  # relative L2 that a float32 port may be away
AUTOENCODERS = ("ckpt", "zip", "diffusers folder", "diffusers file", "within a latent diffusion model")


def write_autoencoder(layout: str, recorded, folder: Path) -> Path:
    """Write the case's autoencoder as it would be released."""
    weights, config = recorded.weights(), recorded.config
    state = {**weights, "loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(2, 3)}
    if layout.startswith("diffusers"):
        levels = len(config["ddconfig"]["ch_mult"])
        renamed = {}
        for name, value in weights.items():
            theirs = diffusers_vae.diffusers_name(name, levels)
            is_matrix = ".attentions." in theirs and value.ndim == 4
            renamed[theirs] = value[:, :, 0, 0].contiguous() if is_matrix else value
        save_file(renamed, folder / "diffusion_pytorch_model.safetensors")
        if layout == "diffusers file":
            return (folder / "diffusion_pytorch_model.safetensors").rename(folder / "vae.safetensors")
        theirs = {"_class_name": "AutoencoderKL", "latent_channels": config["embed_dim"], "scaling_factor": 0.5}
        (folder / "config.json").write_text(json.dumps(theirs))
        return folder
    if layout.startswith("within"):
        content = {"state_dict": {f"first_stage_model.{name}": value for name, value in state.items()}}
        torch.save(content, folder / "model.ckpt")
        return folder / "model.ckpt"
    torch.save({"state_dict": state, "epoch": 1, "global_step": 2, "callbacks": {}}, folder / "model.ckpt")
    params = {"ddconfig": config["ddconfig"], "embed_dim": config["embed_dim"], "lossconfig": {"target": "x.y"}}
    (folder / "model.yaml").write_text(yaml.safe_dump({"model": {"target": "ldm.X", "params": params}}))
    if layout == "ckpt":
        return folder / "model.ckpt"
    with zipfile.ZipFile(folder / "kl.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / "model.ckpt", "model.ckpt")
        archive.write(folder / "model.yaml", "model.yaml")
    return folder / "kl.zip"


@torch.no_grad()
@pytest.mark.parametrize("layout", AUTOENCODERS)
def test_autoencoders(case, program, tmp_path, layout):
    recorded = case("kl_autoencoder", at_most=NETWORK)
    (tmp_path / "released").mkdir()
    source = write_autoencoder(layout, recorded, tmp_path / "released")
    out = tmp_path / "kl.safetensors"
    code, _, err = program("ldm_lab.__main__", "convert", source, out)
    assert code == 0, err
    kept, named = (load_part("autoencoder", {"name": "kl_f8", "weights": str(path)}) for path in (out, source))
    assert float(kept.latent_std) == (2.0 if layout == "diffusers folder" else 1.0)
    assert all(torch.equal(value, named.state_dict()[name]) for name, value in kept.state_dict().items())
    check_autoencoder(recorded, kept)
    recorded.finish()


@torch.no_grad()
def test_an_autoencoder_out_to_diffusers_and_back(case, program, tmp_path):
    recorded = case("kl_autoencoder", at_most=NETWORK)
    if recorded.config["ddconfig"]["z_channels"] != recorded.config["embed_dim"]:
        pytest.skip("diffusers has one number for z_channels and embed_dim, the case has two")
    source = write_autoencoder("ckpt", recorded, tmp_path)
    scale = recorded.config["autoencoder_scale"]
    for args in (
        (source, tmp_path / "vae", "--format", "diffusers", "--scale", scale),
        (tmp_path / "vae", tmp_path / "b.safetensors"),
    ):
        code, _, err = program("ldm_lab.__main__", "convert", *args)
        assert code == 0, err
    net = load_part("autoencoder", {"name": "kl_f8", "weights": str(tmp_path / "b.safetensors")})
    assert float(net.latent_std) == pytest.approx(scale, rel=1e-6)
    check_autoencoder(recorded, net)
    recorded.finish()


@torch.no_grad()
def test_the_pickle_of_cloob(case, program, tmp_path):
    recorded = case("cloob", at_most=NETWORK)
    pickled = recorded.folder / recorded.json["pickle"]
    if not pickled.is_file():
        pytest.skip("the case is without its pickle")
    heads = {f"{tower}_heads": recorded.config[f"{tower}_encoder"]["n_heads"] for tower in ("image", "text")}
    out = tmp_path / "cloob.safetensors"
    code, _, err = program("ldm_lab.__main__", "convert", pickled, out, *(f"{key}={n}" for key, n in heads.items()))
    assert code == 0, err
    named = load_part("conditioner", {"name": "cloob", "weights": str(pickled), **heads})
    kept = load_part("conditioner", {"name": "cloob", "weights": str(out)})
    assert all(torch.equal(value, named.state_dict()[name]) for name, value in kept.state_dict().items())
    check_cloob(recorded, kept)
    for name in ("token_ids", "token_ids_wrapper"):
        recorded.check(name, recorded.recorded(name))  # the tokenizer is in no file
    recorded.finish()


def write_ccld(layout: str, case, folder: Path) -> Path:
    """Write the case's U-Net as a sampling checkpoint, or as a training checkpoint with the frozen parts inside."""
    recorded = case("ccld_unet")
    scale = torch.tensor(recorded.config["autoencoder_scale"])
    unet = {**recorded.weights(), "autoencoder_scale": scale}
    if layout == "slim":
        torch.save(unet, folder / "unet.pth")
        return folder / "unet.pth"
    state = {"scale_factor": scale}
    state |= {f"ae_model.{name}": value for name, value in case("kl_autoencoder").weights().items()}
    state |= {f"cloob.{name}": value for name, value in case("cloob").weights().items()}
    state |= {f"model.{name}": value + 1 for name, value in unet.items()}
    state |= {f"model_ema.{name}": value for name, value in unet.items()}
    content = {
        "state_dict": state,
        "epoch": 0,
        "global_step": 7,
        "optimizer_states": [{"param_groups": [{"lr": 3e-5}]}],
    }
    torch.save(content, folder / "epoch=0-step=7.ckpt")
    return folder / "epoch=0-step=7.ckpt"


@torch.no_grad()
@pytest.mark.parametrize("layout", ["slim", "training"])
def test_checkpoints_of_ccld(case, program, tmp_path, layout):
    recorded = case("ccld_unet", at_most=NETWORK)
    out = tmp_path / "model.safetensors"
    code, _, err = program("ldm_lab.__main__", "convert", write_ccld(layout, case, tmp_path), out)
    assert code == 0, err
    config, state, _ = read_model(out)
    assert config["autoencoder"]["latent_std"] == pytest.approx(recorded.config["autoencoder_scale"])
    first = recorded.suffixes("x_")[0]
    channels, width = (recorded.inputs[f"{name}_{first}"].shape[1] for name in ("x", "embed"))
    net = build("denoiser", config["denoiser"], channels, {"embed": Embedding(width)})
    load_strictly(net, state, out)
    check_unet(recorded, net)
    recorded.finish()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "layout"),
    [("unet", "flat"), ("unet", "miniGLIDE"), ("upsampler", "pyglide"), ("inpaint", "compiled"),
     ("inpaint_upsampler", "safetensors"), ("latent", "flat")],
)  # fmt: skip
def test_checkpoints_of_glide(case, program, tmp_path, name, layout):
    recorded = case(f"glide_{name}")
    weights, theirs, source = recorded.weights(), recorded.config, tmp_path / "released.pt"
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4}]}
    if layout == "miniGLIDE":
        torch.save({"model": weights, "optimizer": optimizer, "scheduler": {"last_epoch": 1}, "epoch": 2}, source)
    elif layout == "pyglide":
        torch.save({"epoch": 1, "weights": {f"module.{n}": w for n, w in weights.items()}, "opt_state": {}}, source)
    elif layout == "compiled":
        torch.save({f"_orig_mod.{name}": value for name, value in weights.items()}, source)
    elif layout == "safetensors":
        save_file(weights, source)
    else:
        torch.save(weights, source)
    out = tmp_path / "model.safetensors"
    given = (f"head_width={theirs['num_head_channels']}", f"text_heads={theirs['xf_heads']}")
    code, printed, err = program("ldm_lab.__main__", "convert", source, out, *given)
    assert code == 0, err
    assert f"{sum(w.numel() for w in weights.values()):,} parameters" in printed
    config, state, _ = read_model(out)
    channels = build("autoencoder", config["autoencoder"]).channels if name != "latent" else 4
    sources = build_sources(config.get("condition_sources"))
    given = given_conditions(build("conditioner", config["conditioner"]), sources)
    net = build("denoiser", config["denoiser"], channels, given).eval()
    load_strictly(net, state, out)
    assert config["objective"]["betas"] == {"upsampler": "linear", "inpaint_upsampler": "linear",
                                            "latent": "linear_latent"}.get(name, "squaredcos_cap_v2")  # fmt: skip
    check_glide(recorded, net)
    if name == "latent":
        recorded.check("linear_latent_betas", beta_table("linear_latent", 1000))
    recorded.finish()


@torch.no_grad()
def test_the_parts_inside_a_training_checkpoint_of_ccld(case, program, tmp_path):
    source = write_ccld("training", case, tmp_path)
    autoencoder, cloob = case("kl_autoencoder", at_most=NETWORK), case("cloob", at_most=NETWORK)
    heads = [f"{tower}_heads={cloob.config[f'{tower}_encoder']['n_heads']}" for tower in ("image", "text")]
    for role, given in (("autoencoder", []), ("conditioner", heads)):
        code, _, err = program(
            "ldm_lab.__main__", "convert", source, tmp_path / f"{role}.safetensors", *given, "--part", role
        )
        assert code == 0, err
    net = load_part("autoencoder", {"name": "kl_f8", "weights": str(tmp_path / "autoencoder.safetensors")})
    assert float(net.latent_std) == pytest.approx(case("ccld_unet").config["autoencoder_scale"])
    check_autoencoder(autoencoder, net)
    autoencoder.finish()
    check_cloob(
        cloob, load_part("conditioner", {"name": "cloob", "weights": str(tmp_path / "conditioner.safetensors")})
    )
    for name in ("token_ids", "token_ids_wrapper"):
        cloob.check(name, cloob.recorded(name))  # the tokenizer is in no file
    cloob.finish()


def test_a_yaml_that_says_otherwise(case, program, tmp_path):
    recorded = case("kl_autoencoder")
    source = write_autoencoder("ckpt", recorded, tmp_path)
    text = (tmp_path / "model.yaml").read_text()
    dim, ddconfig = recorded.config["embed_dim"], recorded.config["ddconfig"]

    def saying(embed_dim: int = dim, **changes: object) -> str:
        params = {"ddconfig": {**ddconfig, **changes}, "embed_dim": embed_dim}
        return yaml.safe_dump({"model": {"target": "ldm.X", "params": params}})

    attended = [ddconfig["resolution"]] if ddconfig["resolution"] not in ddconfig["attn_resolutions"] else []
    for change, message in (
        (saying(dim + 1), f"its model.yaml says embed_dim {dim + 1}, the weights have {dim}"),
        (saying(attn_resolutions=attended), "its model.yaml says the levels with attention ["),
        (saying(double_z=False), "ddconfig.double_z: only True is supported"),
        (text.replace(" ch: ", " x: &a 1\n      y: *a\n      ch: "), "not a readable YAML (it has aliases)"),
        (text + "\t{", "not a readable YAML"),
    ):
        assert change != text
        (tmp_path / "model.yaml").write_text(change)
        code, _, err = program("ldm_lab.__main__", "convert", source, tmp_path / "kl.safetensors")
        assert code == 2
        assert message in err
    shutil.copy(tmp_path / "model.ckpt", tmp_path / "other.ckpt")
    (tmp_path / "other.yaml").write_text("task: diffusion\n")  # about something else
    assert program("ldm_lab.__main__", "convert", tmp_path / "other.ckpt", tmp_path / "kl.safetensors")[0] == 0
