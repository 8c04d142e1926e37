"""Stages of Imagen: the noised small image, in training and in sampling, and a whole cascade."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_lab.autoencoders.identity import IdentityAutoencoder
from ldm_lab.batch import Batch
from ldm_lab.condition_sources.noised_low_res import NoisedLowRes
from ldm_lab.conditions import ConditionRequest
from ldm_lab.config import build, load, to_yaml
from ldm_lab.errors import UserError
from ldm_lab.sampling import SamplingOptions
from ldm_lab.schedules import LogSNR
from ldm_lab.training.cost import config_cost


def batch_of(images):
    return Batch([""] * len(images), [""] * len(images), images)


def from_batch(source, images, seed=0):
    return source.from_batch(batch_of(images), images, IdentityAutoencoder(), torch.Generator().manual_seed(seed))


def test_in_training_each_image_is_noised_at_a_level_of_its_own():
    source, images = NoisedLowRes(scale_factor=4, most=0.6), torch.rand(400, 3, 8, 8) * 2 - 1
    given = from_batch(source, images)
    level = given["low_res_level"]
    assert given["low_res"].shape == images.shape and level.shape == (400,)
    assert level.min() < 0.05 and 0.55 < level.max() <= 0.6 and level.unique().numel() > 390
    alpha, sigma = (part[:, None, None, None] for part in LogSNR("linear").alpha_sigma(level))
    clean = source.enlarge(source.reduce(images), (8, 8))
    noise = (given["low_res"] - alpha * clean) / sigma
    assert noise.std().item() == pytest.approx(1, abs=0.02) and abs(noise.mean()) < 0.02
    again = from_batch(source, images)
    assert all(torch.equal(given[name], again[name]) for name in given)
    assert not torch.equal(given["low_res"], from_batch(source, images, seed=1)["low_res"])


def test_in_sampling_the_level_is_given_and_noise_is_of_each_images_seed():
    source = NoisedLowRes(scale_factor=2, level=0.3)
    low, x = torch.rand(2, 3, 4, 4) * 2 - 1, torch.zeros(2, 3, 8, 8)
    noise = torch.randn(2, 3, 8, 8)

    def asked(level):
        return source.from_request(ConditionRequest(x, low, low_res_level=level, noise=lambda x: noise))

    own, none, much = asked(None), asked(0.0), asked(1.0)
    assert own["low_res_level"].tolist() == pytest.approx([0.3, 0.3]) and none["low_res_level"].tolist() == [0, 0]
    assert torch.allclose(none["low_res"], source.enlarge(low, (8, 8)), atol=0.05)
    assert torch.allclose(much["low_res"], noise, atol=0.02)
    with pytest.raises(UserError, match="upsampler"):
        source.from_request(ConditionRequest(x))


def test_what_it_refuses():
    for wrong in ({"level": 1.5}, {"level": -0.1}, {"most": 2.0}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))}: a number from 0 to 1 is needed"):
            build("condition_source", {"name": "noised_low_res", **wrong})
    with pytest.raises(UserError, match="scale_factor"):
        build("condition_source", {"name": "noised_low_res", "scale_factor": 1})
    images = torch.zeros(1, 3, 8, 8)
    with pytest.raises(UserError, match="is for models of pixels"):
        NoisedLowRes().from_batch(batch_of(images), torch.zeros(1, 4, 1, 1), IdentityAutoencoder(), None)
    with pytest.raises(UserError, match="images are needed to train a super-resolution stage"):
        NoisedLowRes().from_batch(Batch([""], [""]), images, IdentityAutoencoder(), None)


def test_a_level_belongs_to_a_stage_that_is_told_of_it():
    for level in (1.5, -0.1):
        with pytest.raises(UserError, match="low_res_level: a number from 0 to 1 is needed"):
            SamplingOptions(low_res_level=level)
    assert SamplingOptions(low_res_level=0.3).low_res_level == 0.3


WORDS = '''
"""A text as the states of its words, each drawn by its letters: what a frozen language model gives, without one."""

import torch

from ldm_lab.config import register
from ldm_lab.interfaces import Conditioner, TokenStates

WIDTH, LENGTH = 12, 8


@register("conditioner", "word_states")
class WordStates(Conditioner):
    """States of words."""

    spec = {"token_states": TokenStates(WIDTH, LENGTH)}

    def from_batch(self, batch):
        """Return the states of captions."""
        return self.from_prompts(batch.text, [])

    def from_prompts(self, texts, images):
        """Return the states of texts."""
        states, mask = torch.zeros(len(texts), LENGTH, WIDTH), torch.zeros(len(texts), LENGTH, dtype=torch.bool)
        for row, text in enumerate(texts):
            for place, word in enumerate(text.split()[:LENGTH]):
                seed = sum(ord(letter) * 31**i for i, letter in enumerate(word))
                states[row, place] = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
                mask[row, place] = True
        return {"token_states": states, "token_states_mask": mask}
'''
UNET = {
    **{"name": "imagen_unet", "base_channels": 8, "multipliers": [1, 2], "blocks_per_level": [1], "heads": 2},
    **{"head_width": 4, "attention_levels": [1], "text_levels": [1], "text_latents": 2},
}


def recipe(folder, name, size, **sections):
    config = {
        **{"task": "diffusion", "run": name, "seed": 0, "imports": ["word_states"]},
        "data": {"name": "shapes", "folder": str(folder / f"shapes{size}"), "count": 16, "shards": 2,
                 "image_size": size, "batch_size": 4, "workers": 0},
        "autoencoder": {"name": "identity"}, "conditioner": {"name": "word_states", "dropout": 0.1},
        "denoiser": UNET, "objective": {"name": "continuous"}, "ema": {"from_step": [0], "decay": [0.5]},
        "trainer": {"accelerator": "cpu", "max_steps": 2, "threads": 1},
        "checkpoint": {"every": 2}, "logging": {"every": 1},
    }  # fmt: skip
    config |= sections
    (folder / f"{name}.yaml").write_text(to_yaml(config))
    return folder / f"{name}.yaml"


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "word_states.py").write_text(WORDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


EFFICIENT = {**UNET, "memory_efficient": True}


@pytest.mark.parametrize("dropout", [0.1, 0.0], ids=["guided", "never_without_text"])
def test_a_stage_is_trained_and_draws_what_it_enlarges(here, program, dropout):
    """A stage that knows no picture without a text is not guided, unless it is asked for, which is refused at once."""
    config = recipe(
        here, "sr32", 32, denoiser=EFFICIENT, condition_sources={"noised_low_res": {"scale_factor": 2}},
        trainer={"accelerator": "cpu", "max_steps": 1, "threads": 1}, enlargements={"every": 1, "images": 2},
        conditioner={"name": "word_states", "dropout": dropout},
    )  # fmt: skip
    code, _, err = program("train", "--config", config)
    assert code == 0, err
    assert list((here / "runs/sr32/enlargements").glob("*.png"))
    if not dropout:
        code, _, err = program("train", "--config", config, "run=other", "enlargements.sampling.guidance=2")
        assert code == 2 and "enlargements: guidance needs a model that was trained with dropped conditions" in err
        assert not list((here / "runs/other").glob("*.ckpt"))


def test_what_a_step_costs_is_told_without_the_language_model(here):
    config = recipe(here, "base", 16, imports=[], conditioner={"name": "t5", "model": "google/t5-v1_1-small"})
    cost = config_cost(load(config))
    assert cost.flops > 0 and cost.frozen < 1000


@pytest.mark.slow
def test_a_cascade_is_trained_and_sampled(here, program):
    """Base of 16 pixels, a stage to 32 and one to 64, each with its own YAML, all in one command."""
    stages = [
        recipe(here, "base", 16, objective={"name": "continuous", "prediction": "eps", "weighting": "p2"}),
        recipe(here, "sr32", 32, denoiser=EFFICIENT, condition_sources={"noised_low_res": {"scale_factor": 2}}),
        recipe(
            here, "sr64", 64, denoiser={**EFFICIENT, "attention_levels": []},
            objective={"name": "continuous", "curve": "linear"},
            condition_sources={"noised_low_res": {"scale_factor": 2, "resize": "nearest", "level": 0.1}},
        ),
    ]  # fmt: skip
    for config in stages:
        code, _, err = program("train", "--config", config)
        assert code == 0, err
    base = ("sample", "--imports", "word_states", "--checkpoint", "runs/base", "a red star", "--device", "cpu")
    last = ("--upsampler", "runs/sr64")

    def made(folder, *more):
        steps = ("-n", 2, "--steps", 3, "--upsampler-steps", 2)
        code, _, err = program(*base, "--upsampler", "runs/sr32", *last, *steps, *more, "--out", here / folder)
        assert code == 0, err
        pictures = [np.asarray(Image.open(here / folder / f"00000{stage}.png")) for stage in ("_stage1", "")]
        assert [picture.shape[0] for picture in pictures] == [32, 64]
        return pictures

    plain, other, again = made("plain"), made("other", "--upsampler.2.low-res-level", 0.9), made("again")
    assert np.array_equal(plain[0], other[0]) and not np.array_equal(plain[1], other[1])
    assert np.array_equal(plain[1], again[1])
    code, _, err = program(*base, *last, "--out", here / "odd")
    assert code == 2 and "it was trained to enlarge 32 px to 64, and gets 16x16" in err and len(err.splitlines()) == 1
