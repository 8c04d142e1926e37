"""The autoencoders beyond parity: architectures, the latent scale, the posterior, error messages."""

import pytest
import torch

from ldm_lab.autoencoders.identity import IdentityAutoencoder
from ldm_lab.autoencoders.kl_f8 import Attention, KLAutoencoder, kl, split_moments
from ldm_lab.config import build
from ldm_lab.errors import UserError

TINY = {"ch": 8, "ch_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4}


def tiny(**options) -> KLAutoencoder:
    torch.manual_seed(0)
    return KLAutoencoder(**{**TINY, **options})


def noise_like(shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_the_released_architecture():
    with torch.device("meta"):
        net = KLAutoencoder()
    assert sum(p.numel() for p in net.parameters()) == 83_653_863
    assert sum(p.numel() for p in net.encoder.parameters()) == 34_163_592
    assert sum(p.numel() for p in net.decoder.parameters()) == 49_490_179
    assert (net.channels, net.downscale) == (4, 8)


@pytest.mark.parametrize("levels", [1, 2, 4])
@torch.no_grad()
def test_any_number_of_levels_and_any_size(levels):
    net = tiny(ch_mult=[1, 2, 1, 2][:levels], z_channels=3, embed_dim=5)
    unit = net.downscale
    assert unit == 2 ** (levels - 1)
    image = noise_like((2, 3, 2 * unit, 3 * unit))
    mean, logvar = net.moments(image)
    assert mean.shape == logvar.shape == (2, net.channels, 2, 3)
    assert net.decode(mean).shape == image.shape


def test_attention_goes_where_its_resolution_is():
    def attentive(**options) -> list[str]:
        return [name for name, module in tiny(**options).named_modules() if isinstance(module, Attention)]

    middle = ["encoder.mid.attn_1", "decoder.mid.attn_1"]
    assert attentive() == middle
    found = attentive(ch_mult=[1, 1, 1], attn_resolutions=[32], resolution=64)
    assert set(found) - set(middle) == {"encoder.down.1.attn.0", "decoder.up.1.attn.0", "decoder.up.1.attn.1"}


@torch.no_grad()
def test_mean_and_std_normalize_latents_and_change_no_image():
    net = tiny()
    image = noise_like((1, 3, 8, 8))
    raw = net.encode(image)
    assert net.latent_mean.shape == net.latent_std.shape == ()
    assert torch.equal(raw, net.moments(image)[0]), "nothing is taken off before they are set"
    pictured = net.decode(raw)
    net.set_latent_statistics(std=2.5)
    assert torch.equal(net.encode(image), raw / 2.5)
    torch.testing.assert_close(net.decode(raw / 2.5), pictured)
    assert net.state_dict()["latent_std"] == 2.5 and net.state_dict()["latent_mean"] == 0
    assert net.normalize(raw.half()).dtype == torch.float16
    mean, std = torch.arange(net.channels) / 4, torch.arange(net.channels) + 0.5  # [C] each
    net.set_latent_statistics(mean.tolist(), std.tolist())
    torch.testing.assert_close(net.encode(image), (raw - mean[:, None, None]) / std[:, None, None])
    torch.testing.assert_close(net.decode(net.encode(image)), pictured)


@torch.no_grad()
def test_the_posterior_is_what_its_moments_say():
    net = tiny()
    image = noise_like((1, 3, 8, 8))
    mean, logvar = net.moments(image)
    noise = noise_like(mean.shape)
    torch.testing.assert_close(net.encode(image, noise), mean + (0.5 * logvar).exp() * noise)
    torch.testing.assert_close(net.encode(image), mean)


def test_log_variances_are_clamped():
    raw = torch.tensor([1.0, -2.0, -99.0, 99.0]).view(1, 4, 1, 1)
    mean, logvar = split_moments(raw)
    assert mean.flatten().tolist() == [1, -2]
    assert logvar.flatten().tolist() == [-30, 20]


def test_kl_is_that_of_torch_and_per_sample():
    mean, logvar = noise_like((3, 2, 4, 4)), noise_like((3, 2, 4, 4)).flip(0)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(kl(mean, logvar), expected)
    assert kl(torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)).tolist() == [0, 0]


@torch.no_grad()
def test_rows_do_not_depend_on_each_other():
    net = tiny()
    images = noise_like((3, 3, 8, 8))
    torch.testing.assert_close(net.encode(images)[1:2], net.encode(images[1:2]), rtol=1e-5, atol=1e-6)
    z = noise_like((3, 4, 4, 4))
    torch.testing.assert_close(net.decode(z)[1:2], net.decode(z[1:2]), rtol=1e-5, atol=1e-6)


def test_gradients_reach_every_parameter():
    net = tiny(attn_resolutions=[256])
    image = noise_like((1, 3, 4, 4))
    mean, logvar = net.moments(image)
    (net.decode(net.sample(mean, logvar, noise_like(mean.shape))) - image).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("size", [(7, 8), (8, 9), (1, 1)])
def test_images_that_the_levels_do_not_divide(size):
    with pytest.raises(UserError, match=rf"multiples of 2 for this autoencoder, not {size[0]}x{size[1]}"):
        tiny().encode(torch.zeros(1, 3, *size))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ch": 6}, "ch: 6 makes a level 6 wide, which is no multiple of norm_groups"),
        ({"ch": 0}, "ch: at least 1 is needed, not 0"),
        ({"norm_groups": 0}, "norm_groups: at least 1"),
        ({"ch_mult": []}, "ch_mult: 1 or more entries"),
        ({"ch_mult": [1, 0]}, r"ch_mult: list of whole numbers \(at least 1\)"),
        ({"z_channels": 0}, "z_channels: at least 1"),
        ({"num_res_blocks": 0}, "num_res_blocks: at least 1"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(UserError, match=rf"^autoencoder\..*{message}"):
        tiny(**options)
    with pytest.raises(UserError, match=rf"^autoencoder\..*{message}"):
        build("autoencoder", {"name": "kl_f8", **TINY, **options})


def test_identity_is_the_image_itself():
    net = IdentityAutoencoder()
    image = noise_like((1, 3, 4, 5))
    mean, logvar = net.moments(image)
    assert torch.equal(net.sample(mean, logvar, noise_like(mean.shape)), image)
    assert torch.equal(net.decode(net.encode(image, noise_like(image.shape))), image)
    dark = IdentityAutoencoder(zero_to_one=True)
    assert torch.equal(dark.encode(torch.tensor([[[[-1.0, 0.0, 1.0]]]])), torch.tensor([[[[0.0, 0.5, 1.0]]]]))
    torch.testing.assert_close(dark.decode(dark.encode(image)), image)
    assert net.pixel_range == (-1, 1) and dark.pixel_range == (0, 1) and tiny().pixel_range is None
    net.latent_std.fill_(0.5)
    assert net.pixel_range == (-2, 2)
    assert torch.equal(net.encode(image), image * 2)
    assert torch.equal(net.decode(net.encode(image)), image)
