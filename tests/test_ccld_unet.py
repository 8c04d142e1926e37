"""The CCLD U-Net beyond parity: any number of levels, any latent size, initial weights, error messages."""

import math

import pytest
import torch
from fake_cuda import CUDA, fake_cuda, to_gpu
from tiny import embedding
from torch.nn import functional as F

from ldm_lab.attention import attention
from ldm_lab.config import build
from ldm_lab.denoisers.ccld_unet import BilinearUpsample, CCLDUNet, FourierFeatures, SelfAttention, WholeNorm
from ldm_lab.errors import UserError

TINY = {"base_channels": 16, "multipliers": [1, 2], "blocks_per_level": 2, "head_width": 16, "mapping_width": 24}


def tiny(**options) -> CCLDUNet:
    torch.manual_seed(0)
    return CCLDUNet(4, embedding(12), **{**TINY, **options})


def inputs(*size: int, batch: int = 2, channels: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, *size, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.randn(batch, 12, generator=generator)


def on_meta(**options) -> CCLDUNet:
    with torch.device("meta"):
        return CCLDUNet(4, embedding(512), **options)


@pytest.mark.parametrize(("base", "parameters"), [(192, 1_174_321_228), (128, 557_350_988)])
def test_parameter_counts_of_the_released_models(base, parameters):
    net = on_meta(base_channels=base)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert len(net.state_dict()) == 353
    assert net.multiple_of == 8


@pytest.mark.parametrize("levels", [2, 3, 4, 5])
@torch.no_grad()
def test_any_number_of_levels(levels):
    net = tiny(multipliers=[1, 2, 1, 3, 2][:levels])
    unit = 2 ** (levels - 1)
    assert net.multiple_of == unit
    for height, width in ((unit, unit), (unit, 3 * unit)):  # also a single pixel at the lowest level
        x, t, embed = inputs(height, width)
        v = net(x, t, embed)
        assert v.shape == x.shape
        assert v.isfinite().all()


@torch.no_grad()
def test_other_channels_and_one_block_per_level():
    net = CCLDUNet(3, embedding(12), **{**TINY, "blocks_per_level": 1})
    x, t, embed = inputs(4, 6, channels=3)
    assert net(x, t, embed).shape == x.shape


@torch.no_grad()
def test_rows_do_not_depend_on_each_other():
    net = tiny()
    x, t, embed = inputs(8, 8, batch=3)
    together = net(x, t, embed)
    alone = torch.cat([net(x[i : i + 1], t[i : i + 1], embed[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_only_the_direction_of_an_embedding_matters_and_zero_is_no_condition():
    net = tiny()
    x, t, embed = inputs(4, 4)
    v = net(x, t, embed)
    torch.testing.assert_close(net(x, t, 100 * embed), v, rtol=1e-4, atol=1e-5)
    null = net(x, t, torch.zeros_like(embed))
    assert null.isfinite().all()
    assert (null - v).abs().max() > 1e-4
    torch.testing.assert_close(net.conditioning(t, torch.zeros_like(embed)), net.mapping(
        torch.cat([torch.zeros_like(embed), net.mapping_timestep_embed(t)], dim=1)
    ))  # fmt: skip


@torch.no_grad()
def test_time_matters():
    net = tiny()
    x, t, embed = inputs(4, 4)
    assert (net(x, t, embed) - net(x, t / 2, embed)).abs().max() > 1e-4


def test_gradient_checkpointing_changes_no_number():
    x, t, embed = inputs(4, 4)
    results = []
    for checkpointing in (False, True):
        net = tiny(gradient_checkpointing=checkpointing)
        v = net(x, t, embed)
        v.square().mean().backward()
        results.append((v.detach(), {name: p.grad for name, p in net.named_parameters()}))
    (plain, gradients), (recomputed, recomputed_gradients) = results
    assert torch.equal(plain, recomputed)
    trained = {name for name, grad in gradients.items() if grad is not None}
    assert trained == {name for name, grad in recomputed_gradients.items() if grad is not None}
    assert all(torch.equal(gradients[name], recomputed_gradients[name]) for name in trained)


def test_gradient_checkpointing_keeps_fewer_tensors():
    def kept(checkpointing: bool) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: sizes.append(saved.numel()) or saved, lambda s: s):
            tiny(gradient_checkpointing=checkpointing)(*inputs(16, 16))
        return sum(sizes)

    assert kept(True) < kept(False) / 2


def test_fourier_weights_are_parameters_that_nothing_trains():
    net = tiny()
    net(*inputs(4, 4)).mean().backward()
    names = {name for name, p in net.named_parameters() if not p.requires_grad}
    assert names == {"mapping_timestep_embed.weight", "timestep_embed.weight"}
    assert all((p.grad is None) == (name in names) for name, p in net.named_parameters())
    features = FourierFeatures(6)(torch.tensor([0.0, 0.25]))
    assert features[0].tolist() == [1, 1, 1, 0, 0, 0]
    torch.testing.assert_close(features[:, :3] ** 2 + features[:, 3:] ** 2, torch.ones(2, 3))


def test_initial_weights():
    net = tiny(mapping_width=400)
    attention = next(module for module in net.modules() if isinstance(module, SelfAttention))
    assert torch.all(attention.norm.weight == math.sqrt(0.5))
    weight = net.mapping[0].main[0].weight  # uniform with variance 1 / (3 fan_in), damped by sqrt(1/2)
    assert weight.std().item() == pytest.approx(math.sqrt(0.5 / 3 / weight.shape[1]), rel=0.02)
    assert weight.abs().max() <= math.sqrt(0.5 / weight.shape[1])
    assert net.mapping_timestep_embed.weight.std().item() == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("size", [(6, 8), (8, 6), (2, 8), (7, 7)])
def test_a_latent_that_the_levels_do_not_divide(size):
    with pytest.raises(UserError, match=rf"multiples of 4, not {size[0]}x{size[1]}"):
        tiny(multipliers=[1, 1, 1])(*inputs(*size))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_channels": 56, "head_width": 64, "multipliers": [4, 4]}, "224 wide, not divisible by 3 heads"),
        ({"base_channels": 8}, "8 wide, less than a head of 16"),
        ({"base_channels": 0}, "base_channels: at least 1 is needed, not 0"),
        ({"multipliers": [4]}, "multipliers: 2 or more entries"),
        ({"multipliers": [4, 0]}, r"multipliers: list of whole numbers \(at least 1\)"),
        ({"blocks_per_level": 0}, "blocks_per_level: at least 1"),
        ({"mapping_width": -1}, "mapping_width: at least 1"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(UserError, match=message):
        tiny(**options)
    with pytest.raises(UserError, match=rf"^denoiser\..*{message}"):
        build("denoiser", {"name": "ccld_unet", **TINY, **options}, 4, embedding(12))


@pytest.mark.parametrize("base", [18, 24, 36])
def test_widths_that_are_no_multiples_of_64_as_the_original_allows_them(base):
    net = on_meta(base_channels=base)
    attention = next(module for module in net.modules() if isinstance(module, SelfAttention))
    assert attention.heads == base * 4 // 64


def test_half_precision_autocast_keeps_the_angles_of_time_exact():
    net = tiny()
    x, t, embed = inputs(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net.timestep_embed(t), FourierFeatures.forward(net.timestep_embed.float(), t))
        assert net.timestep_embed(t).dtype == torch.float32
        v = net(x, t, embed)
    torch.testing.assert_close(v.float(), net(x, t, embed), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 2, 1, 4)], ids=["odd", "one row"])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["plain", "channels last"])
def test_bilinear_upsampling_is_torch_s(shape, order):
    x = torch.randn(shape).contiguous(memory_format=order).requires_grad_()
    expected = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    got = BilinearUpsample()(x)
    assert torch.allclose(got, expected, atol=1e-6)
    assert got.is_contiguous(memory_format=order)
    towards = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(y, x, towards)[0] for y in (got, expected))
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("affine", [False, True])
def test_a_norm_that_keeps_channels_last_is_the_group_norm(affine):
    norm = WholeNorm(6, affine)
    if affine:
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x = torch.randn(3, 6, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    expected, got = norm(x), norm.with_channels_last(x)
    assert torch.allclose(got, expected, atol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last)
    towards = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(y, x, towards)[0] for y in (got, expected))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_channels_stay_last_through_the_whole_network_on_a_gpu():
    """A single layer that gives them back in another order has every convolution behind it copy its input."""
    net = tiny().to(memory_format=torch.channels_last)
    with fake_cuda():
        to_gpu(net)
        orders = {}
        for name, module in net.net.named_modules():
            module.register_forward_hook(
                lambda module, given, made, name=name: orders.update({name: made.stride(1) if made.ndim == 4 else 1})
            )
        x, t, embed = (torch.empty_like(each, device=CUDA) for each in inputs(8, 8))
        net(x, t, embed)
    assert len(orders) > 50
    assert not {name: stride for name, stride in orders.items() if stride != 1}


def test_attention_on_a_gpu_is_given_features_side_by_side(monkeypatch):
    seen = []
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *qkv, **rest: seen.extend(qkv) or kernel(*qkv, **rest)
    )
    with fake_cuda():
        attention(*torch.randn(3, 2, 4, 8, 16, device=CUDA).transpose(-1, -2))  # as convolutions lay them out
    assert [x.stride(-1) for x in seen] == [1, 1, 1]
