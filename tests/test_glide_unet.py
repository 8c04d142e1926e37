"""GLIDE's U-Net beyond parity: parameter counts, sizes, half precision, checkpointing, initial weights, messages."""

import pytest
import torch
from tiny_glide import conditions

from ldm_lab.config import build
from ldm_lab.denoisers.glide_unet import GlideUNet
from ldm_lab.errors import UserError
from ldm_lab.schedules import Discrete

TINY = {
    "base_channels": 32, "multipliers": [1, 2], "blocks_per_level": 1, "attention": [2], "head_width": 16,
    "text_width": 24, "text_layers": 2, "text_heads": 2,
}  # fmt: skip
UPSAMPLER = {"multipliers": [1, 1, 2, 2, 4, 4], "blocks_per_level": 2, "attention": [8, 16, 32]}
MINI = {"base_channels": 96, "head_width": 32}


def tiny(forms: dict | None = None, **options) -> GlideUNet:
    torch.manual_seed(0)
    net = GlideUNet(3, conditions(50, 6, **(forms or {})), **{**TINY, **options})
    with torch.no_grad():  # what begins as zero would hide what comes before it
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return net


def inputs(*size: int, batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(batch, 3, *size, generator=generator),
        "time": torch.rand(batch, generator=generator) * 1000 - 1,
        "token_ids": torch.randint(0, 49, (batch, 6), generator=generator),
        "token_ids_mask": torch.tensor([[True] * 4 + [False] * 2, [False] * 6] * batch)[:batch],
    }


@pytest.mark.parametrize(
    ("form", "options", "parameters", "tensors"),
    [
        ({}, {}, 385_030_726, 783),
        ({"upsampler": True}, UPSAMPLER, 398_361_286, 797),
        ({"inpaint": True}, {}, 385_037_638, 783),
        ({"upsampler": True, "inpaint": True}, UPSAMPLER, 398_368_198, 797),
        ({}, MINI, 156_947_494, 783),
    ],
)
def test_parameter_counts_of_the_released_models(form, options, parameters, tensors):
    with torch.device("meta"):
        net = GlideUNet(3, conditions(50257, 128, **form), **options)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert len(net.state_dict()) == tensors
    assert net.multiple_of == (32 if "upsampler" in form else 8)
    assert net.spec == conditions(50257, 128, **form)


def test_parameter_count_of_the_latent_form():
    with torch.device("meta"):
        spec = conditions(50257, 128, clip_width=768)
        net = GlideUNet(4, spec, multipliers=[1, 2, 4], attention=[1, 2, 4])
    names = set(net.state_dict())
    assert {"clip_to_time.0.weight", "clip_to_time.2.weight", "clip_to_xf.weight"} <= names
    assert net.clip_to_xf.out_features == 4 * 512


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@torch.no_grad()
def test_any_number_of_levels_and_any_size(levels):
    net = tiny(multipliers=[1, 2, 1, 3][:levels], attention=[2 ** (levels - 1)]).eval()
    unit = 2 ** (levels - 1)
    assert net.multiple_of == unit
    for height, width in ((unit, unit), (unit, 3 * unit)):
        out = net(**inputs(height, width))
        assert out.shape == (2, 6, height, width)
        assert out.isfinite().all()
    assert tiny(learn_variance=False)(**inputs(4, 4)).shape == (2, 3, 4, 4)


@torch.no_grad()
def test_rows_do_not_depend_on_each_other():
    net, given = tiny().eval(), inputs(8, 8, batch=3)
    together = net(**given)
    alone = torch.cat([net(**{name: value[i : i + 1] for name, value in given.items()}) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_time_text_and_conditions_matter():
    given = inputs(8, 8)
    net = tiny({"upsampler": True, "inpaint": True}).eval()
    more = {"low_res": torch.randn(2, 3, 2, 2), "inpaint_image": torch.randn(2, 3, 8, 8)}
    more["inpaint_mask"] = (torch.rand(2, 1, 8, 8) > 0.5).float()
    out = net(**given, **more)
    changes = [
        {"time": given["time"] / 2},
        {"token_ids": given["token_ids"].flip(1)},
        {"low_res": more["low_res"] / 2},
        {"inpaint_image": more["inpaint_image"] / 2},
        {"inpaint_mask": 1 - more["inpaint_mask"]},
    ]
    for change in changes:
        assert (net(**{**given, **more, **change}) - out).abs()[0].max() > 1e-4, change.keys()
    # What an empty text has for tokens does not matter: its padding is what is read.
    other = {**given, "token_ids": torch.stack([given["token_ids"][0], given["token_ids"][1].flip(0)])}
    torch.testing.assert_close(net(**{**other, **more}), out)


def test_times_of_the_grid_are_whole_timesteps():
    net = tiny()
    for steps in (100, 1000, 4000):
        schedule = Discrete("squaredcos_cap_v2", steps)
        seen = []
        net.time_embed[0].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        index = torch.arange(steps)
        net.time_embedding(schedule.time(((index + 1) / steps).float(), net.time_input))
        angle = index.float()[:, None] * torch.exp(-torch.arange(16) * torch.tensor(10_000.0).log() / 16)
        torch.testing.assert_close(seen[0], torch.cat([angle.cos(), angle.sin()], dim=1), rtol=0, atol=2e-4)
        assert torch.equal(seen[0][:, 0], index.float().cos()), "a float32 t gives the timestep itself"
        net.time_embedding(schedule.time(torch.tensor([(3.5 + 1) / steps]), net.time_input))
        torch.testing.assert_close(seen[1][0, 0], torch.tensor(3.5).cos(), rtol=0, atol=3e-4)


def gradients(net: GlideUNet, **autocast) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(5)  # of the dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast.get("bf16", False)):
        out = net(**inputs(8, 8))
    out.float().square().mean().backward()
    return out.detach(), {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("bf16", [False, True])
def test_gradient_checkpointing_changes_no_number(bf16):
    plain, wanted = gradients(tiny(dropout=0.3), bf16=bf16)
    recomputed, got = gradients(tiny(dropout=0.3, gradient_checkpointing=True), bf16=bf16)
    assert torch.equal(plain, recomputed), "the same dropout"
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_gradient_checkpointing_keeps_fewer_tensors():
    def kept(checkpointing: bool) -> int:
        sizes = []
        net = tiny(gradient_checkpointing=checkpointing, blocks_per_level=2)
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: sizes.append(saved.numel()) or saved, lambda s: s):
            net(**inputs(16, 16))
        return sum(sizes)

    assert kept(True) < kept(False) / 3


def test_gradient_checkpointing_recomputes_every_block():
    net = tiny(gradient_checkpointing=True)
    calls = {}
    blocks = [m for m in net.modules() if type(m).__name__ in ("ResBlock", "AttentionBlock", "TextBlock")]
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, i=i: calls.update({i: calls.get(i, 0) + 1}))
    net(**inputs(8, 8)).mean().backward()
    assert calls == dict.fromkeys(range(len(blocks)), 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_near_and_its_norms_are_in_float32(dtype):
    net, given = tiny().eval(), inputs(8, 8)
    exact = net(**given)
    with torch.autocast("cpu", dtype):
        half = net(**given)
        x = 1000 + 2 * torch.randn(4, 32, 6, 6).to(dtype)  # [4, 32, 6, 6]
        norm = net.input_blocks[1][0].in_layers[0]
        ours = norm(x)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), torch.nn.GroupNorm.forward(norm, x.float()), rtol=0.01, atol=0.02)
    assert float((half.float() - exact).norm() / exact.norm()) < (0.03 if dtype == torch.bfloat16 else 0.004)


def test_initial_weights_are_all_set():
    torch.manual_seed(0)
    net = GlideUNet(3, conditions(50, 6), **TINY)
    assert 0.005 < net.positional_embedding.std() < 0.02 and 0.01 < net.padding_embedding.std() < 0.03
    assert all(p.isfinite().all() for p in net.parameters())
    zero = {name for name, p in net.named_parameters() if name.endswith("weight") and not p.any()}
    assert "out.2.weight" in zero and "middle_block.1.proj_out.weight" in zero
    assert "input_blocks.1.0.out_layers.3.weight" in zero
    given = inputs(8, 8)
    assert not net(**given).any(), "the untrained network predicts nothing"


@torch.no_grad()
def test_with_groups_of_one_channel_an_image_s_mean_is_lost():
    """Why narrow networks need fewer groups: the last norm decides what the mean of the output can depend on."""
    spreads = []
    for groups in (32, 4):
        norm = tiny(norm_groups=groups).out[0]
        assert norm.num_groups == groups
        levels = torch.linspace(-1, 1, 5)[:, None, None, None] * torch.randn(1, 32, 1, 1) + torch.randn(5, 32, 8, 8) / 4
        spreads.append(float(norm(levels).mean((2, 3)).std(0).mean()))
    assert spreads[0] < 1e-5 < 0.1 < spreads[1]


def test_groups_that_can_be_frozen_are_those_of_glide_finetune():
    net = tiny()
    groups = net.freeze_groups()
    names = {id(p): name for name, p in net.named_parameters()}
    text = {names[id(p)] for p in groups["text_transformer"]}
    unet = {names[id(p)] for p in groups["unet"]}
    assert not text & unet
    assert {name.split(".")[0] for name in text} == {
        "token_embedding", "positional_embedding", "padding_embedding", "transformer", "final_ln", "transformer_proj",
    }  # fmt: skip
    left = set(names.values()) - text - unet
    assert left and all(".encoder_kv." in name for name in left), "it is how the U-Net reads the text"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_channels": 40}, "base_channels: makes a level 40 wide, which is no multiple of 32 \\(norm_groups\\)"),
        ({"head_width": 24}, "head_width: 24 does not divide 64"),
        ({"attention": [3]}, r"attention: 2 levels are at 1/1, 1/2; not \[3\]"),
        ({"text_heads": 5}, "text_heads: 5 heads do not divide text_width 24"),
        ({"multipliers": []}, "multipliers: 1 or more entries"),
        ({"dropout": 1.0}, "dropout: a number from 0 to less than 1"),
        ({"text_layers": 0}, "text_layers: at least 1"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(UserError, match=message):
        build("denoiser", {"name": "glide_unet", **TINY, **options}, 3, conditions(50, 6))


@pytest.mark.parametrize(
    ("forms", "change", "message"),
    [
        ({}, {"x": torch.zeros(2, 3, 5, 4)}, "multiples of 2, not 5x4"),
        ({}, {"low_res": torch.zeros(2, 3, 2, 2)}, "a base model"),
        ({"upsampler": True}, {}, "is an upsampler"),
        ({}, {"inpaint_image": torch.zeros(2, 3, 4, 4)}, "not trained for inpainting"),
        ({}, {"token_ids": torch.zeros(2, 7).long()}, "reads 6 tokens, and the conditioner gives 7"),
    ],
)
def test_conditions_that_a_form_does_not_have(forms, change, message):
    with pytest.raises(UserError, match=message):
        tiny(forms)(**{**inputs(4, 4), **change})
