"""Imagen's U-Net: sizes of the originals, conditions, what it refuses; files of imagen-pytorch's programs."""

import hashlib
import re

import pytest
import torch

from ldm_lab.checkpoints.importer import detect_format
from ldm_lab.checkpoints.models import read_model
from ldm_lab.conditions import ImageCondition, Level, TokenStates
from ldm_lab.config import build
from ldm_lab.denoisers.imagen_unet import ImagenUNet
from ldm_lab.errors import UserError

TEXT = {"token_states": TokenStates(20, 7)}
SMALL_IMAGE = {"low_res": ImageCondition(3, 4, enlarged=True), "low_res_level": Level("linear")}
TINY = {
    **{"base_channels": 8, "multipliers": [1, 2], "blocks_per_level": [1], "heads": 2, "head_width": 4},
    **{"attention_levels": [1], "text_levels": [1], "text_latents": 3, "text_width": 12},
}
BASE = {"multipliers": [1, 2, 3, 4], "blocks_per_level": [3]}
LAST = {"attention_levels": [3], "text_levels": [3], "memory_efficient": True}
SUPER = {"multipliers": [1, 2, 4, 8], "blocks_per_level": [2, 4, 8, 8], **LAST}
# name -> (options, width of the text's states, whether it enlarges, the original's parameters, and of the library's own
# presets a digest of their names and shapes, 1x1 convolutions as matrices)
SPACEFORGE = {"text_width": 512, "layout": "group"}
BASE_64, SR_256 = {**BASE, "base_channels": 512}, {**SUPER, "base_channels": 128}
SR_1024, OLD = {**SR_256, "attention_levels": []}, {"layout": "group"}
SIZES = {
    "spaceforge_small_1": ({**BASE, **SPACEFORGE, "base_channels": 128}, 2048, False, "120.0", None),
    "spaceforge_small_2": ({**SUPER, **SPACEFORGE, "base_channels": 64}, 2048, True, "197.9", None),
    "spaceforge_medium_1": ({**BASE, **SPACEFORGE, "base_channels": 192}, 2048, False, "248.2", None),
    "spaceforge_medium_2": ({**SUPER, **SPACEFORGE, "base_channels": 96}, 2048, True, "427.5", None),
    "spaceforge_paper_1": ({**BASE, **SPACEFORGE, "base_channels": 256}, 2048, False, "426.3", None),
    "spaceforge_paper_2": ({**SUPER, **SPACEFORGE, "base_channels": 128}, 2048, True, "747.8", None),
    "base_64": (BASE_64, 4096, False, "1627.446052", "ec5de9a74bb447d3"),
    "base_64_old": ({**BASE_64, **OLD}, 4096, False, "1639.065252", "28e68ac113af6f18"),
    "sr_256": (SR_256, 4096, True, "732.462738", "7c239b9657a8b213"),
    "sr_256_old": ({**SR_256, **OLD}, 4096, True, "736.800402", "ef17894f1f783984"),
    "sr_1024": (SR_1024, 4096, True, "721.670546", "d082a52c77238e92"),
    "sr_1024_old": ({**SR_1024, **OLD}, 4096, True, "726.008466", "4a42b843449de71e"),
}


@pytest.mark.parametrize("name", SIZES)
def test_full_sizes(name):
    """Names, shapes and counts of imagen-pytorch 2.0.0 and 1.7.2, which were read off their own classes."""
    options, width, upsampler, millions, digest = SIZES[name]
    given = {"token_states": TokenStates(width, 256), **(SMALL_IMAGE if upsampler else {})}
    with torch.device("meta"):
        net = ImagenUNet(3, given, **options)
    count = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    assert f"{count:.{len(millions.partition('.')[2])}f}" == millions
    lines = sorted(f"{key} {[size for size in value.shape if size > 1]}" for key, value in net.state_dict().items())
    assert digest is None or hashlib.sha256("\n".join(lines).encode()).hexdigest().startswith(digest)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    net = ImagenUNet(3, {**TEXT, **SMALL_IMAGE}, **TINY, memory_efficient=True).eval()
    torch.nn.init.normal_(net.final_conv.weight, std=0.1)
    return net


def inputs(rows=2, size=8):
    generator = torch.Generator().manual_seed(1)
    x, low_res = torch.randn(2, rows, 3, size, size, generator=generator)
    states = torch.randn(rows, 7, 20, generator=generator)
    mask = torch.arange(7)[None] < torch.tensor([[3], [5]])[:rows]
    return {
        **{"x": x, "time": torch.linspace(-3, 4, rows), "token_states": states, "token_states_mask": mask},
        **{"low_res": low_res, "low_res_level": torch.linspace(0.1, 0.7, rows)},
    }


@torch.no_grad()
def test_no_row_depends_on_another_and_padding_says_nothing(tiny):
    given = inputs()
    whole = tiny(**given)
    for row in range(2):
        alone = tiny(**{name: value[row : row + 1] for name, value in given.items()})
        assert torch.allclose(whole[row], alone[0], atol=1e-5)
    other = {**given, "token_states": torch.where(given["token_states_mask"][..., None], given["token_states"], 9.0)}
    assert torch.equal(tiny(**other), whole)
    shorter = {**given, **{name: given[name][:, :5] for name in ("token_states", "token_states_mask")}}
    assert torch.allclose(tiny(**shorter), whole, atol=1e-6)


@torch.no_grad()
def test_the_network_heeds_text_image_and_level(tiny):
    given, changed = inputs(), {}
    whole = tiny(**given)
    changed["token_states"] = given["token_states"] + 1
    changed["token_states_mask"] = torch.zeros_like(given["token_states_mask"])
    changed["low_res"], changed["low_res_level"] = given["low_res"] + 1, given["low_res_level"] + 0.2
    for name, value in changed.items():
        assert not torch.allclose(tiny(**{**given, name: value}), whole, atol=1e-4), name
    nothing = {**given, "token_states_mask": changed["token_states_mask"]}
    assert torch.equal(tiny(**nothing), tiny(**{**nothing, "token_states": changed["token_states"]}))


def test_gradient_checkpointing_changes_nothing(tiny):
    given = inputs()
    tiny(**given).square().sum().backward()
    plain = {name: parameter.grad.clone() for name, parameter in tiny.named_parameters() if parameter.grad is not None}
    assert plain.keys() >= {name for name, _ in tiny.named_parameters()} - {"attn_pool.pos_emb.weight"}
    tiny.zero_grad()
    tiny.checkpointing = True
    tiny(**given).square().sum().backward()
    for name, parameter in tiny.named_parameters():
        if name in plain:
            assert torch.allclose(parameter.grad, plain[name], atol=1e-5), name


def test_the_layers_that_read_and_write_pictures(tiny):
    modules = dict(tiny.named_modules())
    layers = [modules[name] for name in tiny.outer_layers()]
    assert [layer.in_channels for layer in layers] == [6, 6, 6, 8 + 3] and layers[-1].out_channels == 3


@torch.no_grad()
def test_without_a_text(tiny):
    net = ImagenUNet(3, {}, **TINY)
    assert net.multiple_of == 2 and tiny.multiple_of == 4
    assert net(torch.zeros(1, 3, 8, 8), torch.zeros(1)).shape == (1, 3, 8, 8)
    with pytest.raises(UserError, match="reads no text"):
        net(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, 7, 20), torch.ones(1, 7, dtype=torch.bool))


@torch.no_grad()
@pytest.mark.parametrize("layout", ["rms", "group"])
def test_bfloat16_is_near(layout):
    torch.manual_seed(0)
    net = ImagenUNet(3, {**TEXT, **SMALL_IMAGE}, **TINY, layout=layout).eval()
    torch.nn.init.normal_(net.final_conv.weight, std=0.1)
    for name, parameter in net.named_parameters():  # as drawn, one text alone is attended to, or another one
        if name.endswith("q_scale"):
            torch.nn.init.constant_(parameter, 0.1)
    exact = net(**inputs())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = net(**inputs())
    assert (rounded.float() - exact).norm() < 0.03 * exact.norm()


WRONG = {
    "level": ({"attention_levels": [2]}, "attention_levels: levels are 0 to 1, of which 2 is none"),
    "blocks": ({"blocks_per_level": [1, 2, 3]}, "blocks_per_level: 3 numbers for 2 levels"),
    "group": ({"layout": "group", "base_channels": 12}, "base_channels: the layout group needs a multiple of 8"),
    "narrow": ({"base_channels": 2}, "base_channels: at least 4 are needed, not 2"),
}


@pytest.mark.parametrize("what", WRONG)
def test_options_that_contradict_each_other(what):
    options, message = WRONG[what]
    with pytest.raises(UserError, match=message):
        build("denoiser", {"name": "imagen_unet", **TINY, **options}, 3, TEXT)


def test_conditions_that_do_not_belong_together(tiny):
    for given in (
        {"low_res": ImageCondition(3, 4, enlarged=True)},
        {"low_res_level": Level()},
        {"low_res": ImageCondition(3, 4), "low_res_level": Level()},
    ):
        with pytest.raises(UserError, match=r"condition_sources\.noised_low_res gives both"):
            ImagenUNet(3, given, **TINY)
    with pytest.raises(UserError, match="up to 512 token states, not 600"):
        ImagenUNet(3, {"token_states": TokenStates(20, 600)}, **TINY)
    given = inputs()
    for wrong, message in (
        ({"x": torch.zeros(2, 3, 6, 8)}, "multiples of 4, not 6x8"),
        ({"low_res": None}, "upsampler"),
        ({"token_states": None}, "token_states: this denoiser needs them"),
        ({"token_states": torch.zeros(2, 9, 20)}, "up to 7 token states, and the conditioner gives 9"),
    ):
        with pytest.raises(UserError, match=message):
            tiny(**{**given, **wrong})
    with pytest.raises(UserError, match="base model"):
        ImagenUNet(3, TEXT, **TINY)(**given)


# ------------------------------------------------------------------------------------------------------------- files


def theirs(net, old=False):
    """Return a network's weights under the names, and in the shapes, of imagen-pytorch 2, or of 1.7."""
    state = dict(net.state_dict())
    if not old:
        return state
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"(block\d)\.norm", r"\1.groupnorm", name)
        name = name.replace("mid_attn.layers.0.0.", "mid_attn.fn.fn.").replace("cross_attn.", "cross_attn.fn.")
        if not name.startswith("attn_pool"):
            name = name.replace("layers.0.0.", "layers.0.0.fn.")
            if re.search(r"layers\.0\.1\.\d\.(g|weight)$", name):
                value = value[None, :, None, None] if value.ndim == 1 else value[:, :, None, None]
        renamed[name] = value
    return renamed


def stages(layout="rms"):
    torch.manual_seed(0)
    base = ImagenUNet(3, TEXT, **TINY, layout=layout)
    return base, ImagenUNet(3, {**TEXT, **SMALL_IMAGE}, **TINY, memory_efficient=True, layout=layout)


def cascade(nets, old=False):
    return {f"unets.{i}.{name}": value for i, net in enumerate(nets) for name, value in theirs(net, old).items()}


def same(state, net, add=0.0):
    return state.keys() == net.state_dict().keys() and all(
        torch.equal(state[name], value + add) for name, value in net.state_dict().items()
    )


@pytest.mark.parametrize("old", [False, True], ids=["2.x", "1.7"])
def test_files_of_a_network_and_of_a_cascade(tmp_path, capfd, old):
    base, upsampler = nets = stages("group" if old else "rms")
    torch.save(theirs(base, old), tmp_path / "unet.pt")
    torch.save({"model": cascade(nets, old), "version": "1.7.2", "steps": torch.tensor([7, 9])}, tmp_path / "both.pt")
    assert detect_format(tmp_path / "unet.pt").kind == detect_format(tmp_path / "both.pt").kind == "imagen"
    config, state, extra = read_model(tmp_path / "unet.pt")
    assert same(state, base) and extra["image_size"] == "64"
    assert config["objective"]["prediction"] == "eps" and config["objective"]["curve"] == "cosine"
    assert build("denoiser", config["denoiser"], 3, TEXT).spec == base.spec
    assert same(read_model(tmp_path / "both.pt").state, base)
    assert "read as U-Net 1 of 1, 2; not in the file, and assumed: prediction=eps" in capfd.readouterr().err
    config, state, extra = read_model(tmp_path / "both.pt", overrides={"unet": 2, "prediction": "v", "image_size": 32})
    assert same(state, upsampler) and extra["image_size"] == "32" and config["objective"]["prediction"] == "v"
    assert config["condition_sources"] == {"noised_low_res": {"scale_factor": 4, "resize": "nearest"}}
    for wrong, message in (
        ({"unet": 3}, "unet: .* has the U-Nets 1, 2, not 3"),
        ({"prediction": "w"}, "prediction: "),
        ({"heads": 3}, "heads: "),
        ({"image_size": 0}, "image_size: a positive whole number is needed, not 0"),
        ({"last_time": 2}, "last_time: a number above 0"),
    ):
        with pytest.raises(UserError, match=message):
            read_model(tmp_path / "both.pt", overrides=wrong)


def test_a_trainers_averages_are_taken(tmp_path, capfd):
    nets = stages()
    average = {f"{i}.online_model.{name}": value for i, net in enumerate(nets) for name, value in theirs(net).items()}
    for i, net in enumerate(nets):
        average |= {f"{i}.ema_model.{name}": value + 1 for name, value in theirs(net).items()}
        average |= {f"{i}.initted": torch.tensor(True), f"{i}.step": torch.tensor(3)}
    torch.save({"model": cascade(nets), "ema": average, "version": "2.0.0"}, tmp_path / "imagen.pt")
    for number, net in enumerate(nets, 1):
        assert same(read_model(tmp_path / "imagen.pt", overrides={"unet": number}).state, net, add=1.0)
    assert "averaged weights (EMA, 'ema') are taken" in capfd.readouterr().err


@pytest.mark.parametrize("between", ["1.11", "1.22"])
def test_layouts_in_between_are_named(tmp_path, between):
    state = theirs(stages("group")[0], old=True)
    if between == "1.11":  # pixels unshuffled in place of strides
        weight = state.pop("downs.0.4.weight")
        state["downs.0.4.1.weight"] = weight.reshape(len(weight), -1, 2, 2)[..., :1, :1]
    else:
        state["downs.1.1.cross_attn.fn.q_scale"] = torch.ones(4)
    torch.save(state, tmp_path / "unet.pt")
    with pytest.raises(UserError, match=r"between 1\.11 and 1\.26, whose layout is not read"):
        read_model(tmp_path / "unet.pt")


def test_incomplete_files(tmp_path):
    for missing in ("mid_attn.layers.0.0.null_kv", "ups.1.0.block1.project.weight", "norm_cond.weight"):
        state = theirs(stages()[0])
        del state[missing]
        torch.save(state, tmp_path / "unet.pt")
        with pytest.raises(UserError, match="not a complete U-Net of Imagen"):
            read_model(tmp_path / "unet.pt")
