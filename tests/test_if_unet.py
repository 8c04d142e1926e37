"""The U-Net of DeepFloyd IF: its conditions, masks and options; its files in both layouts, through every program."""

import json
import shutil

import pytest
import torch
from language_models import write_language_model
from PIL import Image
from tiny import make_run
from tiny_if import LENGTH, WIDTH, diffusers_unet, edit_json, tiny_if, write_own

from ldm_lab.__main__ import main
from ldm_lab.checkpoints.if_layouts import infer_config
from ldm_lab.checkpoints.importer import Section, detect_format
from ldm_lab.checkpoints.models import read_model
from ldm_lab.checkpoints.opened import open_weights
from ldm_lab.condition_sources.if_low_res import IFLowRes
from ldm_lab.conditioners.t5 import T5
from ldm_lab.conditions import ConditionRequest, ImageCondition, Level, TokenStates
from ldm_lab.config import build
from ldm_lab.denoisers.if_unet import IFUNet
from ldm_lab.denoisers.if_unet import _taken as _taken_by_if
from ldm_lab.denoisers.imagen_conditions import taken_conditions
from ldm_lab.errors import UserError
from ldm_lab.schedules import Discrete


def inputs(upsampler: bool = False, count: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    side = 32 if upsampler else 8
    given = {"x": torch.randn(count, 3, side, side, generator=generator), "time": torch.full((count,), 500.0)}
    given["token_states"] = torch.randn(count, LENGTH, WIDTH, generator=generator)
    given["token_states_mask"] = torch.ones(count, LENGTH, dtype=torch.bool)
    if upsampler:
        given["low_res"] = torch.randn(count, 3, side, side, generator=generator)
        given["low_res_level"] = torch.full((count,), 0.25)
    return given


# ------------------------------------------------------------------------------------------------------ the network


@torch.no_grad()
@pytest.mark.parametrize("upsampler", [False, True], ids=["base", "upsampler"])
def test_what_the_mask_leaves_out_is_not_seen(upsampler):
    """Whatever lies there; a text of its true places alone gives the same, and rows do not see one another."""
    net, given = tiny_if(upsampler), inputs(upsampler)
    whole = net(**given)
    assert torch.allclose(net(**{**given, "token_states_mask": None}), whole, atol=1e-5), "all true is no mask"
    given["token_states_mask"][0, 5:] = False
    out = net(**given)
    assert not torch.allclose(out[0], whole[0], atol=1e-3) and torch.allclose(out[1], whole[1], atol=1e-5)
    other = {**given, "token_states": given["token_states"].clone()}
    other["token_states"][0, 5:] = 1e3
    assert torch.allclose(net(**other), out, atol=1e-5)
    cut = {name: value[:1] for name, value in given.items()}
    cut |= {"token_states": cut["token_states"][:, :5], "token_states_mask": cut["token_states_mask"][:, :5]}
    assert torch.allclose(net(**cut), out[:1], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("upsampler", [False, True], ids=["base", "upsampler"])
def test_no_text_at_all_is_finite_and_the_same_whatever_lies_there(upsampler):
    net, given = tiny_if(upsampler), inputs(upsampler)
    given["token_states_mask"] = torch.zeros(2, LENGTH, dtype=torch.bool)
    out = net(**given)
    assert out.isfinite().all() and torch.equal(out, net(**{**given, "token_states": given["token_states"] * 1e4}))


@torch.no_grad()
def test_the_level_is_a_step_of_a_thousand():
    net, given = tiny_if(True), inputs(True)
    outs = [net(**{**given, "low_res_level": torch.full((2,), level)}) for level in (0.25, 0.2509, 0.251, 1.0, 0.9995)]
    assert torch.equal(outs[0], outs[1]) and not torch.allclose(outs[0], outs[2], atol=1e-6)
    assert torch.equal(outs[3], outs[4]), "1 is the last step, 999"


def test_checkpointing_changes_no_gradient():
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        net = tiny_if()
        net.checkpointing = checkpointing
        net(**inputs()).square().mean().backward()
        return [p.grad for p in net.parameters()]

    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients(False), gradients(True)))


def test_what_it_is_told_has_to_fit():
    states = {"token_states": TokenStates(WIDTH, LENGTH)}
    wrong = [
        ({}, "takes token_states"),
        ({**states, "low_res": ImageCondition(3, 4)}, "takes low_res_level"),
        ({**states, "low_res_level": Level()}, "takes low_res "),
    ]
    for spec, message in wrong:
        with pytest.raises(UserError, match=message):
            IFUNet(3, spec, base_channels=32, pool_heads=4, head_width=16)
    with pytest.raises(UserError, match="pool_heads: 5 heads do not divide token states of 48"):
        IFUNet(3, states, base_channels=32, pool_heads=5, head_width=16)
    options = [
        ({"blocks_per_level": [1, 2]}, "blocks_per_level: 2 numbers for 4 levels"),
        ({"attention": [3]}, "attention: 4 levels are at 1/1, 1/2, 1/4, 1/8; not"),
        ({"base_channels": 48}, "base_channels: makes a level 48 wide, which is no multiple of 32"),
        ({"text_width": 100}, "text_width: 100 is no multiple of 32"),
        ({"head_width": 60}, "head_width: 60 does not divide"),
    ]
    for changes, message in options:
        with pytest.raises(UserError, match=message):
            build("denoiser", {"name": "if_unet", "base_channels": 32, "pool_heads": 4, **changes}, 3, states)
    base, upsampler, given = tiny_if(), tiny_if(True), inputs(True)
    with pytest.raises(UserError, match="this denoiser is a base model"):
        base(**{**inputs(), "low_res_level": torch.zeros(2)})
    with pytest.raises(UserError, match="this model is an upsampler"):
        upsampler(**{**given, "low_res_level": None})
    with pytest.raises(UserError, match=r"low_res: 8x8, and x is 32x32: it has to come enlarged \(if_low_res\)"):
        upsampler(**{**given, "low_res": given["low_res"][..., :8, :8]})
    with pytest.raises(UserError, match="multiples of 4"):
        upsampler(**{**given, "x": given["x"][..., :30, :30]})


def test_the_small_image_is_noised_on_if_s_steps():
    source, noise = IFLowRes(scale_factor=4, level=0.1), torch.randn(1, 3, 16, 16)
    request = ConditionRequest(torch.zeros(1, 3, 16, 16), torch.rand(1, 3, 4, 4), noise=lambda like: noise)
    given, table = source.from_request(request), Discrete("squaredcos_cap_v2", 1000)
    alpha, sigma = table.alpha_sigma(table.at(torch.tensor(100)))
    large = torch.nn.functional.interpolate(request.low_res, (16, 16), mode="bilinear", align_corners=True)
    assert torch.allclose(given["low_res"], alpha * large + sigma * noise) and given["low_res_level"] == 0.1
    nearest = IFLowRes(enlarge="nearest", level=0.0).from_request(request)["low_res"]
    alpha, sigma = table.alpha_sigma(table.at(torch.tensor(0)))
    assert torch.allclose(
        nearest, alpha * request.low_res.repeat_interleave(4, 2).repeat_interleave(4, 3) + sigma * noise
    )


# --------------------------------------------------------------------------------------------------------- the files


@torch.no_grad()
@pytest.mark.parametrize("upsampler", [False, True], ids=["I", "II"])
def test_diffusers_networks_are_read_and_compute_the_same(upsampler, tmp_path):
    theirs = diffusers_unet(upsampler)
    theirs.save_pretrained(tmp_path / "unet")
    found = detect_format(tmp_path / "unet")
    loaded = read_model(tmp_path / "unet")
    assert found.kind == "diffusers-if" and loaded.extra["image_size"] == str(64 if upsampler else 16)
    shape = found.importer.denoiser_shape(found.file, True)
    spec = {"token_states": TokenStates(WIDTH, 77), **(IFLowRes().spec if upsampler else {})}
    assert (shape.channels, dict(shape.conditions)) == (3, spec)
    net = build("denoiser", loaded.config["denoiser"], *shape).eval()
    net.load_state_dict(loaded.state)
    given = inputs(upsampler)
    sample = torch.cat([given["x"], given["low_res"]], dim=1) if upsampler else given["x"]
    labels = {"class_labels": torch.tensor([250, 250])} if upsampler else {}
    expected = theirs(sample, given["time"], encoder_hidden_states=given["token_states"], **labels).sample
    ours = net(**given)
    assert float((ours - expected).norm() / expected.norm()) < 1e-5
    assert infer_config(loaded.state).items() <= loaded.config["denoiser"].items()


@pytest.mark.parametrize("upsampler", [False, True], ids=["I", "II"])
def test_if_s_own_files_are_read(upsampler, tmp_path, capsys):
    net = tiny_if(upsampler)
    folder = write_own(tmp_path / "IF", net)
    loaded = read_model(folder)
    assert detect_format(folder).kind == "deepfloyd-if" and "assumed: " in capsys.readouterr().err
    assert loaded.config["denoiser"].items() >= {"head_width": 16, "pool_heads": 4, "efficient": upsampler}.items()
    assert loaded.config["objective"] == {"name": "eps_hybrid", "betas": "squaredcos_cap_v2", "timesteps": 1000}
    expected = {"scale_factor": 4, "enlarge": "bilinear", "level": 0.25}
    assert loaded.config.get("condition_sources") == ({"if_low_res": expected} if upsampler else None)
    shape = detect_format(folder).importer.denoiser_shape(open_weights(folder / "pytorch_model.bin"), True)
    again = build("denoiser", loaded.config["denoiser"], *shape)
    again.load_state_dict(loaded.state)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values()))


def test_a_file_without_its_config_says_what_is_assumed(tmp_path, capsys):
    folder = write_own(tmp_path / "IF", tiny_if())
    (folder / "config.yml").unlink()
    loaded = read_model(folder, overrides=Section(head_width=16, pool_heads=4, image_size=16, text_size=8))
    said = capsys.readouterr().err
    assert "read as a U-Net of DeepFloyd IF's; not in the file, and assumed: norm_groups=32 efficient=false" in said
    assert loaded.config["conditioner"]["text_size"] == 8 and loaded.config["denoiser"]["head_width"] == 16
    wrong = [({"heads": 4}, "heads: .*head_width"), ({"head_width": 0}, "a positive"), ({"efficient": 3}, "true or")]
    for overrides, message in wrong:
        with pytest.raises(UserError, match=message):
            read_model(folder, overrides=Section(overrides))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "silu"}, "act_fn: only 'gelu' is supported, not silu"),
        ({"resnet_out_scale_factor": 2.0}, "resnet_out_scale_factor: 1 goes with the rest, not 2.0"),
        ({"resnet_skip_time_act": True}, "resnet_out_scale_factor: 1.4142"),
        ({"time_embedding_act_fn": "gelu"}, "time_embedding_act_fn: goes with"),
        ({"attention_head_dim": "16"}, "attention_head_dim: a positive whole number"),
        ({"down_block_types": ["DownBlock2D"]}, "down_block_types: only ResnetDownsampleBlock2D"),
        ({"attention_head_dim": 7}, "in heads of 7"),
    ],
    ids=["act_fn", "scale", "skip_act", "time_act", "head_text", "blocks", "heads"],
)
def test_another_network_of_diffusers_is_refused_by_the_key(changes, message, tmp_path):
    diffusers_unet().save_pretrained(tmp_path / "unet")
    edit_json(tmp_path / "unet" / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        read_model(tmp_path / "unet")


def test_damaged_files_are_one_line(tmp_path):
    folder = write_own(tmp_path / "IF", tiny_if(True))
    (folder / "config.yml").write_text("params: {efficient_activation: true}")
    with pytest.raises(UserError, match="efficient_activation and scale_skip_connection go together"):
        read_model(folder)
    (folder / "config.yml").write_text("params: [1, 2")
    with pytest.raises(UserError, match="not a readable config"):
        read_model(folder)
    (folder / "config.yml").write_text("a: &a [x, x]\nb: &b [*a, *a]\nparams: [*b, *b]")
    with pytest.raises(UserError, match="not a readable config: it has aliases"):
        read_model(folder)
    (folder / "config.yml").unlink()
    state = torch.load(folder / "pytorch_model.bin")
    for name in ("aug_proj.0.weight", "middle_block.1.encoder_kv.weight", "output_blocks.1.0.in_layers.2.weight"):
        torch.save({key: value for key, value in state.items() if key != name}, folder / "pytorch_model.bin")
        with pytest.raises(UserError, match="not a complete U-Net of IF"):
            read_model(folder)
    torch.save({**state, "out.2.weight": state["out.2.weight"].to(torch.int8)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"out\.2\.weight is torch\.int8"):
        read_model(folder)


@pytest.fixture(scope="module")
def written_text_model(tmp_path_factory):
    return write_language_model(tmp_path_factory.mktemp("text") / "t5", "t5", WIDTH)


@pytest.fixture
def text_model(written_text_model, tmp_path):
    """A language model beside the models that read it: what lies elsewhere only one's own runs may name."""
    return shutil.copytree(written_text_model, tmp_path / "t5")


@pytest.mark.parametrize("layout", ["own", "diffusers"])
def test_both_layouts_go_through_every_program(layout, text_model, tmp_path, monkeypatch, capsys):
    """inspect, convert, sample, a cascade of three, the last one in tiles, and init_from of a training."""
    monkeypatch.chdir(tmp_path)
    for name, upsampler in (("I", False), ("II", True), ("III", True)):
        if layout == "own":
            write_own(tmp_path / name, tiny_if(upsampler))
        else:
            diffusers_unet(upsampler).save_pretrained(tmp_path / name)
    assert not main(["inspect", "I", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["config"]["denoiser"]["name"] == "if_unet" and report["parameters"] > 10_000
    text = [f"model={text_model}", f"text_size={LENGTH}"]
    for name, more in (("I", []), ("II", ["image_size=32"]), ("III", [])):
        more += ["scale_factor=2"] if name != "I" else []
        assert not main(["convert", name, f"{name}.safetensors", *text, *more])
    shared = [
        "--device",
        "cpu",
        "--seed",
        "1",
        "-n",
        "1",
        "--steps",
        "2",
        "--upsampler-steps",
        "1",
        "--sampler",
        "ddpm",
    ]
    stages = ["--upsampler", "II.safetensors", "--upsampler", "III.safetensors", "--upsampler.2.tile-denoiser", "32"]
    loaded = []
    monkeypatch.setattr(T5, "load_pretrained", lambda self, load=T5.load_pretrained: loaded.append(load(self)))
    assert not main(["sample", "--checkpoint", "I.safetensors", *stages, "a red star", *shared, "--out", "out"])
    assert len(loaded) == 1, "the text encoder is in memory once"
    sizes = [Image.open(tmp_path / "out" / f"00000{name}.png").size for name in ("_base", "_stage1", "")]
    assert sizes == [(16, 16), (32, 32), (64, 64)]
    (tmp_path / "run").mkdir()
    config = make_run(
        tmp_path / "run",
        images=8,
        autoencoder={"name": "identity", "weights": None, "latent_std": None},
        conditioner=None,
        data={"image_size": 16, "crop": "center"},
        trainer={"max_steps": 1},
    )
    sections = {
        "denoiser": {"name": "if_unet", "base_channels": 32, "multipliers": [1, 2], "blocks_per_level": [1],
                     "attention": [2], "head_width": 16, "pool_heads": 4, "text_width": 64},
        "conditioner": {"name": "t5", "model": str(text_model), "text_size": LENGTH, "dropout": 0.1},
        "objective": {"name": "eps_hybrid"}, "autoencoder": {"name": "identity"},
    }  # fmt: skip
    import yaml

    run = {**yaml.safe_load(config.read_text()), **sections, "init_from": str(tmp_path / "I")}
    config.write_text(yaml.safe_dump(run))
    assert not main(["train", "--config", str(config)])
    assert "weights of" in (said := capsys.readouterr().out) and "not in the checkpoint" not in said
    assert (tmp_path / "runs" / "tiny" / "ema.safetensors").is_file()


@pytest.mark.parametrize(
    ("network", "schedule", "source"),
    [("if_unet", "linear", "if_low_res"), ("imagen_unet", "squaredcos_cap_v2", "noised_low_res")],
)
def test_a_noise_level_of_another_schedule_is_refused(network, schedule, source):
    """The network would be told another noise than there is."""
    given = {
        "token_states": TokenStates(WIDTH, LENGTH),
        "low_res": ImageCondition(3, 2, enlarged=True),
        "low_res_level": Level(schedule),
    }
    with pytest.raises(UserError, match=source):
        (_taken_by_if if network == "if_unet" else taken_conditions)(
            given, *(["if_unet"] if network == "if_unet" else [])
        )
