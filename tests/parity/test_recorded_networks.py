"""The networks and the importers of their released checkpoints against recordings of the originals."""

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from compared import check_autoencoder, check_cloob, check_glide, check_unet

from ldm_lab import clip_tokens
from ldm_lab.autoencoders.kl_f8 import KLAutoencoder
from ldm_lab.checkpoints.formats import ccld, compvis, glide, noised_clip
from ldm_lab.checkpoints.opened import open_weights
from ldm_lab.checkpoints.parts import load_strictly, read_part
from ldm_lab.conditioners.cloob import CLOOB
from ldm_lab.conditioners.glide_text import GlideText, gpt2_encoding
from ldm_lab.denoisers.ccld_unet import CCLDUNet
from ldm_lab.denoisers.glide_unet import GlideUNet
from ldm_lab.guidance.noised_clip import last_end
from ldm_lab.schedules.discrete import beta_table

SHARED = Path(__file__).resolve().parents[3] / "shared" / "golden"  # where GPT-2's merges may lie
NETWORK = 1e-5  # relative L2 that a float32 port may be away


@torch.no_grad()
def test_ccld_unet(case, tmp_path):
    recorded = case("ccld_unet", at_most=NETWORK)
    scale = torch.tensor(recorded.config["autoencoder_scale"])
    torch.save({**recorded.weights(), "autoencoder_scale": scale}, tmp_path / "unet.pth")
    tensors = open_weights(tmp_path / "unet.pth").read()
    state, config, shape = ccld.unet(tensors, "unet.pth")
    base, multipliers = recorded.config["base_channels"], recorded.config["channel_multipliers"]
    widths = [config["base_channels"] * multiplier for multiplier in config["multipliers"]]
    recorded.expect("widths", widths, [base * multiplier for multiplier in multipliers])
    recorded.expect("autoencoder_scale", ccld.latent_std(tensors, "unet.pth"), float(scale))
    net = CCLDUNet(*shape, **config)
    load_strictly(net, state, "unet.pth")
    check_unet(recorded, net)
    recorded.finish()


@torch.no_grad()
@pytest.mark.parametrize("name", ["unet", "upsampler", "inpaint", "inpaint_upsampler", "latent"])
def test_glide_networks(case, tmp_path, name):
    recorded = case(f"glide_{name}")
    theirs = recorded.config
    torch.save(recorded.weights(), tmp_path / "base.pt")
    unsaid = {"head_width": theirs["num_head_channels"], "text_heads": theirs["xf_heads"]}
    state, config, shape = glide.unet(open_weights(tmp_path / "base.pt").read(), "base.pt", unsaid)
    own = {
        "base_channels": theirs["num_channels"],
        "multipliers": [int(multiplier) for multiplier in theirs["channel_mult"].split(",")],
        "blocks_per_level": theirs["num_res_blocks"],
        "attention": sorted(theirs["image_size"] // int(side) for side in theirs["attention_resolutions"].split(",")),
        "text_width": theirs["xf_width"],
        "text_layers": theirs["xf_layers"],
        **unsaid,
    }
    recorded.expect("config", {key: config[key] for key in own}, own)
    given = shape.conditions
    forms = {
        "super_res": "low_res" in given,
        "inpaint": "inpaint_image" in given,
        "text_ctx": given["token_ids"].length,
    }
    recorded.expect("conditions", forms, {key: theirs[key] for key in forms})
    net = GlideUNet(*shape, **config).eval()
    load_strictly(net, state, "base.pt")
    check_glide(recorded, net)
    if name == "latent":
        recorded.check("linear_latent_betas", beta_table("linear_latent", 1000))
    recorded.finish()


def test_glide_tokens(case, golden, tmp_path, monkeypatch):
    recorded = case("glide_tokens")
    packed = [path for folder in (golden, SHARED) if (path := folder / "gpt2_bpe" / "vocab.bpe.gz").is_file()]
    if not packed:
        pytest.skip("GPT-2's merges are not here; they are not kept in the repository")
    (tmp_path / "gpt2/vocab.bpe").mkdir(parents=True)
    (tmp_path / "gpt2/vocab.bpe/vocab.bpe").write_bytes(gzip.decompress(packed[0].read_bytes()))
    monkeypatch.setenv("LDM_LAB_CACHE", str(tmp_path))
    gpt2_encoding.cache_clear()
    conditioner, prompts = GlideText(text_size=recorded.config["text_ctx"]), recorded.config["prompts"]
    made = conditioner.from_prompts(prompts, [])
    recorded.check("tokens", made["token_ids"])
    recorded.check("mask", made["token_ids_mask"].long())
    recorded.check("lengths", torch.tensor([len(conditioner.encode(prompt)) for prompt in prompts]))
    tokens = clip_tokens.tokenize(prompts, text_size=recorded.config["clip_ctx"])
    recorded.check("clip_tokens", tokens)
    recorded.check("clip_lengths", last_end(tokens) + 1)
    recorded.finish()


def test_glide_noised_clip(case, tmp_path):
    recorded = case("glide_clip")
    theirs = recorded.config
    for tower in ("image", "text"):
        torch.save(recorded.part(f"{tower}/"), tmp_path / f"clip_{tower}_enc.pt")
    net = noised_clip.load(tmp_path / "clip_image_enc.pt", tmp_path / "clip_text_enc.pt", theirs["n_head_state_image"])
    recorded.expect("image_size", net.image_size, theirs["image_size"])
    recorded.expect("timesteps", net.timesteps, theirs["n_timesteps"])
    tokens = clip_tokens.tokenize(theirs["prompts"], theirs["max_text_len"])
    recorded.check("tokens", tokens)
    recorded.check("lengths", last_end(tokens) + 1)
    texts = net.text_embedding(theirs["prompts"])  # [n, D]
    recorded.check("text_embeddings", texts)
    x, t = recorded.inputs["x"].requires_grad_(), (recorded.inputs["t"] + 1) / net.timesteps
    images = net.image_embedding(x, t)  # [B, D]
    recorded.check("image_embeddings", images)
    recorded.expect("logit_scale", math.isclose(net.logit_scale, theirs["logit_scale"]), True)
    (gradient,) = torch.autograd.grad(net.logit_scale * (texts * images).sum(), x)
    recorded.check("cond_gradient", theirs["grad_scale"] * gradient)
    recorded.finish()


@torch.no_grad()
def test_kl_autoencoder(case, tmp_path):
    recorded = case("kl_autoencoder", at_most=NETWORK)
    torch.save({"state_dict": {**recorded.weights(), "loss.logvar": torch.zeros(())}, "epoch": 1}, tmp_path / "kl.ckpt")
    part = read_part(tmp_path / "kl.ckpt", "autoencoder", "kl_f8")
    state, config = part.state, part.options
    released = compvis.config_of(recorded.config["ddconfig"], recorded.config["embed_dim"])
    for key in ("ch", "ch_mult", "num_res_blocks", "z_channels", "embed_dim"):
        recorded.expect(key, config[key], released[key])
    net = KLAutoencoder(**config)
    load_strictly(net, state, "kl.ckpt")
    check_autoencoder(recorded, net)
    recorded.finish()


def test_kl_autoencoder_keys(golden: Path, tmp_path):
    """A file with all the names of a released checkpoint is taken, whatever it holds beside the model."""
    if not (golden / "kl_autoencoder_keys.json").is_file():
        pytest.skip(f"{golden} has no case kl_autoencoder_keys")
    keys = json.loads((golden / "kl_autoencoder_keys.json").read_text(encoding="utf-8"))
    shapes = {**keys["model"], **keys["ignore"]}
    zero = torch.zeros(())
    torch.save({"state_dict": {name: zero.expand(shape) for name, shape in shapes.items()}}, tmp_path / "kl.ckpt")
    part = read_part(tmp_path / "kl.ckpt", "autoencoder", "kl_f8")
    state, config = part.state, part.options
    with torch.device("meta"):
        own = {name: list(value.shape) for name, value in KLAutoencoder(**config).state_dict().items()}
    assert {name: list(value.shape) for name, value in state.items()} == own
    assert {name: shape for name, shape in own.items() if not name.startswith("latent_")} == keys["model"]


@torch.no_grad()
def test_cloob(case):
    recorded = case("cloob", at_most=NETWORK)
    weights = recorded.weights()
    image, text = recorded.config["image_encoder"], recorded.config["text_encoder"]
    released = {
        "embed_dim": recorded.config["d_embed"],
        **{"image_size": image["image_size"], "patch_size": image["patch_size"]},
        **{"image_width": image["d_model"], "image_layers": image["n_layers"]},
        **{"text_size": text["text_size"], "vocab_size": text["vocab_size"]},
        **{"text_width": text["d_model"], "text_layers": text["n_layers"]},
    }
    pickled = recorded.folder / recorded.json["pickle"]
    if pickled.is_file():  # a folder may hold the case without it
        part = read_part(pickled, "conditioner", "cloob")
        state, config = part.state, part.options
        recorded.expect("names in the pickle", sorted(state), sorted(weights))
        different = [name for name in weights if not torch.equal(state.get(name, torch.empty(0)), weights[name])]
        recorded.expect("weights in the pickle that differ", different, [])
        recorded.expect("config in the pickle", config, released)
    cloob = CLOOB(**released, image_heads=image["n_heads"], text_heads=text["n_heads"])
    load_strictly(cloob, weights, recorded.name)

    check_cloob(recorded, cloob)
    for name in ("token_ids", "token_ids_wrapper"):
        ids = clip_tokens.tokenize(recorded.json["prompts"], text_size=recorded.recorded(name).shape[1])
        recorded.check(name, ids)
    recorded.finish()
