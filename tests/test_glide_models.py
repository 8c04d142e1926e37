"""Released networks of GLIDE's kind, inspected, converted and sampled by the user's own commands."""

import json

import pytest
import torch
from PIL import Image
from tiny_glide import SIDE, conditions

from ldm_lab.checkpoints.formats import glide, noised_clip
from ldm_lab.checkpoints.importer import Section, detect_format
from ldm_lab.checkpoints.models import read_model
from ldm_lab.checkpoints.opened import open_weights
from ldm_lab.condition_sources import build_sources, given_conditions
from ldm_lab.conditioners import glide_text
from ldm_lab.config import build
from ldm_lab.denoisers.glide_unet import GlideUNet
from ldm_lab.errors import UserError
from ldm_lab.guidance.noised_clip import NoisedCLIP
from ldm_lab.pretrained.catalogue import catalogue
from ldm_lab.sampling import Pipeline

# Heads of 64 channels, 8 in the text, as in all of OpenAI's networks: the files do not say it.
SMALL = {"base_channels": 64, "multipliers": [1, 1], "blocks_per_level": 1, "attention": [2], "head_width": 64,
         "text_width": 16, "text_layers": 1, "text_heads": 8}  # fmt: skip
TOWERS = {"image_size": 8, "patch_size": 4, "image_width": 64, "image_layers": 1, "text_width": 64, "text_layers": 1,
          "embed_dim": 6, "vocab_size": 49408, "timesteps": 10}  # fmt: skip


def small(seed: int = 0, vocab: int = 261, **forms) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return GlideUNet(3, conditions(vocab, 5, **forms), **SMALL).state_dict()


@pytest.fixture
def merges(tmp_path, monkeypatch):
    """Four merges in the place of GPT-2's: 261 ids."""
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\nĠ a\nr e\nre d\nĠ red\n", encoding="utf-8")
    monkeypatch.setattr(glide_text, "fetch", lambda name, folder=None: tmp_path / "vocab.bpe")
    glide_text.gpt2_encoding.cache_clear()
    yield
    glide_text.gpt2_encoding.cache_clear()


def test_a_base_model_is_sampled_from_its_file(program, merges, tmp_path):
    torch.save({"model": small(), "optimizer": {}, "epoch": 3}, tmp_path / "base.pt")
    torch.save(small(upsampler=True), tmp_path / "sr.pt")
    common = ("a red", "--steps", "2", "-n", "1", "--size", f"{SIDE}x{SIDE}", "--out", tmp_path / "out")
    code, _, err = program("sample", "--checkpoint", tmp_path / "base.pt", *common)
    assert code == 0, err
    assert Image.open(tmp_path / "out/00000.png").size == (SIDE, SIDE)
    cascade = ("sample", "--checkpoint", tmp_path / "base.pt", "--upsampler")
    code, _, err = program(*cascade, tmp_path / "sr.pt", "--upsampler-steps", "2", *common)
    assert code == 2 and "trained to enlarge 4 px to 16" in err, "so much is assumed of a file with two levels"
    assert err.count("not in the file, and assumed") == 1 and "image_size=16" in err
    converted = tmp_path / "sr.safetensors"
    code, _, err = program("ldm_lab.__main__", "convert", tmp_path / "sr.pt", converted, f"image_size={4 * SIDE}")
    assert code == 0 and "image_size" not in err.partition("assumed")[2], err
    code, _, err = program(*cascade, converted, "--upsampler-steps", "2", *common)
    assert code == 0, err
    assert Image.open(tmp_path / "out/00001.png").size == (4 * SIDE, 4 * SIDE), "GLIDE enlarges four times"
    code, _, err = program("sample", "--checkpoint", tmp_path / "sr.pt", *common)
    assert (
        code == 2
        and "upsampler" in err.splitlines()[-1]
        and [line[:6] for line in err.splitlines()].count("error:") == 1
    )
    code, _, err = program("sample", "--checkpoint", tmp_path / "base.pt", "--upsampler", tmp_path / "base.pt", *common)
    assert (
        code == 2
        and "upsampler" in err.splitlines()[-1]
        and [line[:6] for line in err.splitlines()].count("error:") == 1
    )


def test_what_is_assumed_of_a_file_is_said_with_the_way_out(program, tmp_path):
    torch.save(small(upsampler=True), tmp_path / "sr.pt")
    code, _, err = program("ldm_lab.__main__", "inspect", tmp_path / "sr.pt")
    assert code == 0 and err.count("\n") == 1
    assert "read as an upsampler of GLIDE's (64 channels, levels [1, 1], 261 tokens)" in err
    assumed = ("head_width=64 text_heads=8 norm_groups=32 timesteps=1000 scale_factor=4 zero_to_one=false "
               "betas=linear vocabulary=gpt2 image_size=16")  # fmt: skip
    assert f"assumed: {assumed}; where one is another: python -m ldm_lab convert {tmp_path / 'sr.pt'} OUT" in err
    said = {
        **{"head_width": 32, "text_heads": 4, "norm_groups": 16, "timesteps": 100, "scale_factor": 2},
        **{"zero_to_one": True, "vocabulary": "gpt2", "image_size": 32, "betas": "squaredcos_cap_v2"},
    }
    words = [f"{key}={str(value).lower()}" for key, value in said.items()]
    code, _, err = program("ldm_lab.__main__", "convert", tmp_path / "sr.pt", tmp_path / "sr.safetensors", *words)
    assert code == 0 and not err, "all is said"
    config, _, extra = read_model(tmp_path / "sr.safetensors")
    assert {key: config["denoiser"][key] for key in ("head_width", "text_heads", "norm_groups")} == {
        key: said[key] for key in ("head_width", "text_heads", "norm_groups")
    }
    assert config["objective"] == {"name": "eps_hybrid", "betas": "squaredcos_cap_v2", "timesteps": 100}
    assert config["condition_sources"] == {"low_res": {"scale_factor": 2}} and extra["image_size"] == "32"
    assert config["autoencoder"] == {"name": "identity", "zero_to_one": True}
    code, _, err = program("ldm_lab.__main__", "convert", tmp_path / "sr.pt", tmp_path / "b.safetensors", *words[:-1])
    assert code == 0 and "assumed: betas=linear; where" in err, "what is left"


def test_inspect_and_convert(program, tmp_path):
    half = {name: value.half() if "conv" in name or "qkv" in name else value for name, value in small().items()}
    torch.save({f"_orig_mod.{name}": value for name, value in half.items()}, tmp_path / "base.pt")
    code, out, err = program("ldm_lab.__main__", "inspect", tmp_path / "base.pt", "--json")
    report = json.loads(out)
    assert code == 0, err
    assert report["kind"] == "glide" and report["parameters"] == sum(v.numel() for v in half.values())
    assert report["config"]["denoiser"]["base_channels"] == 64
    assert report["config"]["objective"] == {"name": "eps_hybrid", "betas": "squaredcos_cap_v2", "timesteps": 1000}
    converted = tmp_path / "base.safetensors"
    code, out, err = program("ldm_lab.__main__", "convert", tmp_path / "base.pt", converted, "preset=miniglide")
    assert code == 0, err
    config, state, extra = read_model(converted)
    assert config["denoiser"]["head_width"] == 32 and "timesteps" not in config["denoiser"]
    assert config["objective"]["timesteps"] == 100 and extra["image_size"] == "16"
    assert config["conditioner"] == {"name": "glide_text", "vocab_size": 261, "text_size": 5, "dropout": 0.2}
    assert all(value.dtype == torch.float32 for value in state.values())
    for given, message in (
        ("preset=laion", "preset: no such preset: 'laion'"),
        ("preset=[laionide]", "preset: no such preset: ['laionide']"),
        ("heads=3", "heads: no such key"),
        ("timesteps=-1", "timesteps: a positive whole number"),
        ("head_width=48", "head_width: 48 does not divide"),
        ("norm_groups=48", "no multiple of 48 (norm_groups)"),
        ("betas=cosine", "betas: no such choice: 'cosine'"),
        ("zero_to_one=1", "zero_to_one: true or false is needed"),
        ("scale_factor=4", "scale_factor: no such key"),
    ):
        code, _, err = program("ldm_lab.__main__", "convert", tmp_path / "base.pt", tmp_path / "x.safetensors", given)
        assert code == 2 and message in err, err
        assert not (tmp_path / "x.safetensors").exists()


def test_what_the_shapes_tell(tmp_path):
    forms = [
        ({}, {}),
        ({"upsampler": True}, {"multipliers": [1, 1, 2], "attention": [2, 4], "blocks_per_level": 2}),
        ({"inpaint": True}, {"multipliers": [1], "attention": [1], "text_layers": 3}),
        ({"upsampler": True, "inpaint": True, "length": 9}, {"multipliers": [1, 2, 2, 3], "attention": [8]}),
        ({"clip_width": 7}, {"clip_positions": 2, "attention": []}),
    ]
    for form, sizes in forms:
        spec = conditions(**{"vocabulary": 70, "length": 5, "scale_factor": 4, **form})
        with torch.device("meta"):
            net = GlideUNet(3, spec, **{**SMALL, **sizes})
        config, given = glide.infer_config(net.state_dict()), {**SMALL, **sizes}
        assert config == {key: given[key] for key in config}, form
        assert set(given) - set(config) == {"head_width", "text_heads"}
        inferred = glide.infer_conditions(net.state_dict())
        assert inferred == spec == net.spec
        sources = build_sources(glide.infer_condition_sources(inferred, 3))
        text = build("conditioner", {"name": "glide_text", "vocabulary": "clip", "vocab_size": 600, "text_size": 5})
        assert {**given_conditions(text, sources), "token_ids": spec["token_ids"]} == spec


def test_what_is_said_by_width_and_name():
    knobs = {name: glide.unsaid(Section(), glide.Form(channels, 4, False, False, 50257), name) for name, channels in
             (("base.pt", 192), ("miniGLIDE.pt", 96), ("models/dogGLIDE.pt", 96), ("dog_model_1.pt", 96))}  # fmt: skip
    common = {"text_heads": 8, "norm_groups": 32, "betas": "squaredcos_cap_v2", "vocabulary": "gpt2", "image_size": 64}
    glide_ = {**common, "preset": "openai", "head_width": 64, "timesteps": 1000, "zero_to_one": False}
    assert knobs["base.pt"] == glide_
    mini = {**glide_, "preset": "miniglide", "head_width": 32, "timesteps": 100, "zero_to_one": True}
    assert knobs["miniGLIDE.pt"] == mini
    assert knobs["models/dogGLIDE.pt"] == knobs["dog_model_1.pt"] == {**mini, "preset": "dogglide", "timesteps": 1000}


def test_miniglide_s_pixels_are_from_0_to_1():
    for preset, section in (("miniglide", {"zero_to_one": True}), ("dogglide", {"zero_to_one": True}), ("openai", {})):
        config = glide.model(small(), "some.pt", overrides=Section(preset=preset)).config
        assert config["autoencoder"] == {"name": "identity", **section}
    with torch.device("meta"):
        mini = GlideUNet(3, conditions(70, 5), **{**SMALL, "base_channels": 96, "head_width": 32}).state_dict()
    assert glide.model(mini, "model.pt").config["autoencoder"] == {"name": "identity", "zero_to_one": True}


@pytest.mark.parametrize(
    "lost", ["output_blocks.0.0.in_layers.2.weight", "positional_embedding", "time_embed.0.weight"]
)
def test_incomplete_files_are_one_line(tmp_path, program, lost):
    state = small()
    del state[lost]
    torch.save(state, tmp_path / "base.pt")
    code, _, err = program("sample", "--checkpoint", tmp_path / "base.pt", "a red", "--steps", "2", "--size", "16x16")
    assert code == 2 and "Traceback" not in err and str(tmp_path / "base.pt") in err


@pytest.mark.parametrize("name", ["positional_embedding", "time_embed.0.weight", "token_embedding.weight"])
@pytest.mark.parametrize("shape", [(), (4,), (2, 2, 2)])
def test_misshapen_tensors_are_one_line(tmp_path, name, shape):
    torch.save({**small(), name: torch.zeros(shape)}, tmp_path / "base.pt")
    with pytest.raises(UserError):
        Pipeline.from_checkpoint(tmp_path / "base.pt")


def test_a_network_of_another_kind_is_one_line(tmp_path):
    state = small()
    state["input_blocks.0.0.weight"] = torch.zeros(64, 5, 3, 3)
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(UserError, match="2 channels beside 3, which no form of GLIDE has"):
        glide.unet(open_weights(tmp_path / "odd.pt").read(), tmp_path / "odd.pt")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="not a GLIDE network"):
        glide.unet(open_weights(tmp_path / "other.pt").read(), tmp_path / "other.pt")


def test_the_towers_of_the_noised_clip(tmp_path, program):
    torch.manual_seed(0)
    net = NoisedCLIP(**TOWERS, head_width=64)
    torch.save(net.image_encoder.state_dict(), tmp_path / "image.pt")
    torch.save(net.text_encoder.state_dict(), tmp_path / "text.pt")
    assert detect_format(tmp_path / "image.pt").kind == detect_format(tmp_path / "text.pt").kind == "noised_clip"
    loaded = noised_clip.load(tmp_path / "image.pt", tmp_path / "text.pt")
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    t = torch.tensor([0.1, 0.55])
    assert torch.equal(loaded.image_embedding(x, t), net.image_embedding(x, t))
    first, second = (
        loaded.image_embedding(x, torch.tensor([0.1, 0.1])),
        loaded.image_embedding(x, torch.tensor([0.1, 1.0])),
    )
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1]), "it sees the time"
    assert loaded.image_embedding(x, t).sum().backward() is None and x.grad.any()
    assert loaded.text_embedding(["a", "b c"]).norm(dim=1).allclose(torch.ones(2))
    with pytest.raises(UserError, match="the noised CLIP sees 8x8 pixels, not 16x16"):
        loaded.image_embedding(torch.zeros(1, 3, 16, 16), t[:1])
    with pytest.raises(UserError, match="holds the text tower; the image tower is needed"):
        noised_clip.load(tmp_path / "text.pt", tmp_path / "text.pt")
    torch.save(small(), tmp_path / "base.pt")
    with pytest.raises(UserError, match="is no noised CLIP"):
        noised_clip.load(tmp_path / "image.pt", tmp_path / "base.pt")
    code, _, err = program("ldm_lab.__main__", "convert", tmp_path / "image.pt", tmp_path / "x.safetensors")
    assert code == 2 and "CLIP guidance takes as it is" in err


def test_all_released_files_have_names():
    names = {entry.file: name for name, entry in catalogue().items()}
    for file in ("base", "upsample", "base_inpaint", "upsample_inpaint", "clip_image_enc", "clip_text_enc"):
        assert names[f"{file}.pt"].startswith("glide/")
        (mirror,) = catalogue()[names[f"{file}.pt"]].mirrors
        assert mirror == f"https://openaipublic.blob.core.windows.net/diffusion/dec-2021/{file}.pt"
    for file in ("v2-base", "v2-sr", "v3-base"):
        (mirror,) = catalogue()[f"laionide/{file}"].mirrors
        assert mirror.endswith(f"/laionide/releases/download/Checkpoints/laionide-{file}.pt")
    assert {"miniGLIDE.pt", "miniGLIDEsimple.pt", "dogGLIDE.pt", "vocab.bpe"} <= set(names)
    assert set(noised_clip.RELEASED) <= set(catalogue())
