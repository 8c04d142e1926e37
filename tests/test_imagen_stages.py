"""Stages of Imagen: the noised small image, in training and in sampling."""

import pytest
import torch

from ldm_lab.autoencoders.identity import IdentityAutoencoder
from ldm_lab.batch import Batch
from ldm_lab.condition_sources.noised_low_res import NoisedLowRes
from ldm_lab.conditions import ConditionRequest
from ldm_lab.config import build
from ldm_lab.errors import UserError
from ldm_lab.sampling import SamplingOptions
from ldm_lab.schedules import LogSNR


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
