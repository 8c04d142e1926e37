"""CLIP guidance: by a stand-in whose gradient is known, by the real network at a tiny size, and as a command."""

import json
from dataclasses import replace

import pytest
import tiny_glide
import torch
from stand_ins import FunctionDenoiser
from tiny_glide import SIDE

from ldm_lab.autoencoders.identity import IdentityAutoencoder
from ldm_lab.autoencoders.kl_f8 import KLAutoencoder
from ldm_lab.errors import UserError
from ldm_lab.guidance.clip import ClipGradient, ClipGuidance
from ldm_lab.guidance.noised_clip import NoisedCLIP
from ldm_lab.interfaces import Prediction
from ldm_lab.prompts import Prompt
from ldm_lab.sampling import Pipeline, SamplingOptions
from ldm_lab.sampling.prompts import target_embeddings
from ldm_lab.schedules import Discrete, Linear

FAST = {"name": "ddpm", "steps": 4}


class Bright:
    """Finds an image like "bright" the brighter it is, like "dark" the darker; remembers when it was asked."""

    image_size, timesteps, logit_scale = SIDE, 1000, 100.0

    def __init__(self):
        self.times, self.means = [], []

    def image_embedding(self, x, t):
        self.times.append(t)
        self.means.append(x.detach().mean())
        return torch.stack([x.flatten(1).mean(1), torch.ones(len(x))], dim=1)

    def text_embedding(self, texts):
        return torch.tensor([[{"bright": 1.0, "dark": -1.0}[text], 0.0] for text in texts])

    def check_size(self, height, width):
        assert height == width == SIDE

    def to(self, device):
        return self


@pytest.fixture(scope="module")
def base():
    return tiny_glide.pipeline()


def led_by(pipeline, clip):
    """The same model with a CLIP of its own."""
    return Pipeline(replace(pipeline.model, noised_clip=clip))


def test_the_gradient_is_that_of_the_likeness_to_the_text(base):
    x, t = torch.randn(2, 3, SIDE, SIDE), torch.full((2,), 0.5)
    clip, texts = Bright(), torch.tensor([[1.0, 0.0], [-0.5, 0.0]])

    def predict(x, t):
        return base.model.objective.predict(FunctionDenoiser(lambda x, t: torch.zeros(2, 6, SIDE, SIDE)), x, t, {})

    with torch.no_grad():
        led = ClipGradient(ClipGuidance(clip, 2.0), texts).wrap(predict, base.model.objective.schedule)(x, t)
    per_pixel = 2 * 100 / (3 * SIDE * SIDE)
    assert torch.allclose(led.gradient[0], torch.tensor(per_pixel))
    assert torch.allclose(led.gradient[1], torch.tensor(-0.5 * per_pixel))
    assert torch.equal(led.x0, predict(x, t).x0) and not x.requires_grad
    # Same betas, ten times as many timesteps: alpha at t is the same, and so is the t that the CLIP is asked at.
    assert clip.times[0].tolist() == pytest.approx([0.5, 0.5], abs=2e-3)


def test_the_clip_is_asked_at_the_noise_that_it_knows():
    """A model with other betas has the same noise at another time."""
    upsampler = tiny_glide.pipeline(upsampler=True).model  # linear betas
    schedule, clip = upsampler.objective.schedule, Bright()
    x, t = torch.zeros(1, 3, SIDE, SIDE), torch.tensor([0.3])
    objective, zeros = upsampler.objective, FunctionDenoiser(lambda x, t: torch.zeros(1, 6, SIDE, SIDE))
    guided = ClipGradient(ClipGuidance(clip), torch.zeros(1, 2)).wrap(
        lambda x, t: objective.predict(zeros, x, t, {}), schedule
    )
    guided(x, t)
    alpha, sigma = schedule.alpha_sigma(t)
    own_alpha, own_sigma = tiny_glide.pipeline().model.objective.schedule.alpha_sigma(clip.times[0])
    assert (sigma / alpha).item() == pytest.approx((own_sigma / own_alpha).item(), rel=0.05)
    assert abs(clip.times[0].item() - 0.3) > 0.05


def test_the_clip_sees_images_of_its_own_schedule():
    """Of a model whose variance is not preserved x is scaled to the CLIP's, and the gradient is that by x."""
    schedule, clip, t = Linear(), Bright(), torch.tensor([0.5])
    x = torch.full((1, 3, SIDE, SIDE), 0.3)
    clean = lambda x, t: Prediction(x, x)  # noqa: E731
    guided = ClipGradient(ClipGuidance(clip, 2.0), torch.tensor([[1.0, 0.0]])).wrap(clean, schedule)(x, t)
    scale = 0.5**0.5  # sqrt(alpha^2 + sigma^2)
    assert clip.means[0].item() == pytest.approx(0.3 / scale, rel=1e-6)
    assert torch.allclose(guided.gradient, torch.tensor(2 * 100 / (3 * SIDE * SIDE) / scale))
    own_alpha, own_sigma = Discrete("squaredcos_cap_v2").alpha_sigma(clip.times[0])
    assert (own_sigma / own_alpha).item() == pytest.approx(1.0, rel=1e-2)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "plms", "heun", "unipc", "dpmpp_2m"])
def test_pictures_follow_it_with_every_sampler(base, name):
    means = {}
    for text in ("bright", "dark"):
        options = SamplingOptions(seed=1, clip_guidance=20.0, sampler={"name": name, "steps": 6})
        (batch,) = led_by(base, Bright()).samples([[text]], options)
        means[text] = batch[0].pixels.mean().item()
    assert means["bright"] > means["dark"] + 0.05


def test_weighted_texts_lead_in_proportion_and_prompts_without_weight_do_not(base):
    bright = led_by(base, Bright())
    targets = target_embeddings(bright.model, [[Prompt("bright", 3.0), Prompt("dark", 1.0)]], 1.0)
    assert targets[0].tolist() == pytest.approx([0.5, 0.0])
    with pytest.raises(UserError, match="CLIP guidance: each picture needs a text with a weight above 0"):
        bright.check(["bright:0"], SamplingOptions(clip_guidance=3.0))
    scaled = tiny_glide.pipeline().model.autoencoder
    scaled.latent_std.fill_(2.0)
    for autoencoder, made in (
        (scaled, r"pixels in \[-0\.5, 0\.5\]"),
        (IdentityAutoencoder(zero_to_one=True), r"pixels in \[0, 1\]"),
        (KLAutoencoder(z_channels=3, ch=4, ch_mult=(1,), norm_groups=4), "latents"),
    ):
        other = Pipeline(replace(bright.model, autoencoder=autoencoder))
        with pytest.raises(UserError, match=rf"reads pixels in \[-1, 1\], and this model makes {made}$"):
            other.check(["bright"], SamplingOptions(size=SIDE, clip_guidance=3.0))


def tiny_clip():
    torch.manual_seed(0)
    return NoisedCLIP(
        image_size=SIDE, patch_size=4, image_width=32, image_layers=1, text_width=16, text_layers=1, embed_dim=8,
        head_width=64 // 4, vocab_size=49408, text_size=77, timesteps=100,
    )  # fmt: skip


def test_the_real_network_finds_its_pictures_more_like_the_text(base):
    clip = tiny_clip().eval().requires_grad_(False)
    target = clip.text_embedding(["a cat"])

    def likeness(scale):
        options = SamplingOptions(guidance=1.0, clip_guidance=scale, sampler={"name": "ddpm", "steps": 10})
        (batch,) = led_by(base, clip).samples(["a cat"] * 4, options)
        pixels = torch.stack([picture.pixels for picture in batch])
        return (clip.image_embedding(pixels, torch.full((4,), 0.01)) @ target[0]).mean().item()

    assert likeness(3.0) > likeness(None) + 0.02
    with pytest.raises(UserError, match=f"the noised CLIP sees {SIDE}x{SIDE} pixels, not {2 * SIDE}x{2 * SIDE}"):
        led_by(base, clip).check(["a cat"], SamplingOptions(size=2 * SIDE, clip_guidance=3.0, sampler=FAST))


def test_the_command(program, tmp_path):
    clip = tiny_clip()
    for tower in ("image", "text"):
        torch.save(getattr(clip, f"{tower}_encoder").state_dict(), tmp_path / f"{tower}.pt")
    checkpoint = tiny_glide.write(tmp_path / "base.safetensors")
    pictures = []
    for scale, out in ((3, "led"), (None, "plain")):
        towers = ("--noised-clip", tmp_path / "image.pt", tmp_path / "text.pt", "--noised-clip-head-width", 16)
        options = ("--clip-guidance", scale, *towers)
        code, _, err = program(
            "sample", "--checkpoint", checkpoint, "a cat", "-n", 1, *(options if scale else ("--guidance", 1)),
            "--sampler", "ddpm", "--steps", 5, "--out", tmp_path / out, "--device", "cpu",
        )  # fmt: skip
        assert code == 0, err
        (entry,) = json.loads((tmp_path / out / "samples.json").read_text())
        assert entry["guidance"] == 1.0 and entry.get("clip_guidance") == scale
        pictures.append((tmp_path / out / "00000.png").read_bytes())
    assert pictures[0] != pictures[1]
    code, _, err = program(
        "sample", "--checkpoint", checkpoint, "a cat", "--clip-guidance", 3, "--noised-clip", tmp_path / "text.pt",
        tmp_path / "image.pt", "--out", tmp_path / "no", "--device", "cpu",
    )  # fmt: skip
    assert code == 2 and "holds the text tower; the image tower is needed here" in err and len(err.splitlines()) == 1
