"""A denoiser that sees larger pictures in overlapping tiles: the same where it looks at single pixels, never more."""

import logging

import pytest
import tiny_glide
import torch
from torch.nn import functional as F

from ldm_lab.conditions import Embedding, ImageCondition, Level
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Prediction
from ldm_lab.sampling import SamplingOptions, Stage, Stages
from ldm_lab.sampling.tiles import Tile, Tiles, in_tiles, unit_of

FAST = {"name": "ddim", "steps": 2}
SPEC = {
    **{"low_res": ImageCondition(3, 2), "beside": ImageCondition(1), "embed": Embedding(3), "low_res_level": Level()},
    "enlarged": ImageCondition(3, 4, enlarged=True),
}


def pointwise(x, t, conditions):
    """What a network says that looks at each pixel by itself, and at the same place of every image beside it."""
    low = F.interpolate(conditions["low_res"], x.shape[2:], mode="nearest")
    given = conditions["beside"] + conditions["enlarged"] + conditions["embed"][:, :, None, None]
    x0 = torch.tanh(x + low) + given * t[:, None, None, None] + conditions["low_res_level"][:, None, None, None]
    return Prediction(x0, x - x0, variance_fraction=x0.sigmoid())


@pytest.mark.parametrize(("side", "overlap"), [(4, 0), (4, 2), (8, 6), (12, 4), (64, 16)])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (12, 22), (4, 30)])
def test_what_depends_on_single_pixels_is_the_same(height, width, side, overlap):
    generator = torch.Generator().manual_seed(0)
    shapes = {"low_res": (3, height // 2, width // 2), "beside": (1, height, width), "embed": (3,), "low_res_level": ()}
    shapes |= {"enlarged": (3, height, width), "x": (3, height, width)}
    given = {name: torch.randn(2, *shape, generator=generator) for name, shape in shapes.items()}
    x, t, seen = given.pop("x"), torch.tensor([0.2, 0.9]), []

    def watched(x, t, conditions):
        seen.append(x.shape[2:])
        return pointwise(x, t, conditions)

    whole, tiles = pointwise(x, t, given), Tiles(side, overlap)
    tiled = in_tiles(watched, tiles, SPEC)(x, t, given)
    assert tiled.gradient is None
    for one, other in zip(whole[:3], tiled[:3]):
        assert torch.equal(one, other) if side == 64 else torch.allclose(one, other, atol=1e-5)
    assert max(max(size) for size in seen) <= side and len(seen) == tiles.count(height, width)


def test_a_tile_is_cut_where_a_smaller_image_can_be():
    assert unit_of(SPEC, 8) == 8 and unit_of({"low_res": ImageCondition(3, 3)}, 4) == 12
    whole = torch.zeros(1, 3, 16, 16)
    for image, tile in ((torch.zeros(1, 3, 5, 5), (0, 4)), (torch.zeros(1, 3, 4, 4), (2, 6))):
        with pytest.raises(UserError, match=r"an image of .* cannot be cut like one of 16x16"):
            Tile(slice(*tile), slice(*tile)).of(image, whole)


@pytest.fixture(scope="module")
def pipelines():
    return tiny_glide.pipeline(), tiny_glide.pipeline(upsampler=True)


def large(pipelines, **options):
    base, upsampler = pipelines
    stages = Stages(
        [Stage(base, SamplingOptions(sampler=FAST)), Stage(upsampler, SamplingOptions(sampler=FAST, **options))]
    )
    return stages(["a cat"], seeds=[3])[0][-1]


def told(caplog):
    return [record.getMessage() for record in caplog.records if "tile_denoiser" in record.getMessage()]


def test_a_tile_as_large_as_the_picture_is_the_picture(pipelines, caplog, monkeypatch):
    from ldm_lab.sampling import request

    request._tell_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert large(pipelines, tile_denoiser=32).tobytes() == large(pipelines).tobytes()
    assert told(caplog) == ["upsampler: tile_denoiser: without effect: 32x32 pixels fit into one of 32"]
    seen, forward = [], pipelines[1].model.denoiser.forward

    def watched(x, *args, **conditions):
        seen.append((x, conditions["low_res"]))
        return forward(x, *args, **conditions)

    monkeypatch.setattr(pipelines[1].model.denoiser, "forward", watched)
    large(pipelines)
    (whole, low), *_ = seen
    seen.clear()
    with caplog.at_level(logging.WARNING):
        large(pipelines, tile_denoiser=16, tile_overlap=8)
    (first, first_low), (second, second_low) = seen[:2]
    assert torch.equal(first, whole[:, :, :16, :16]) and torch.equal(second, whole[:, :, :16, 8:24])  # the same noise
    assert torch.equal(first_low, low[:, :, :8, :8]) and torch.equal(second_low, low[:, :, :8, 4:12])
    assert len(seen) == 2 * 9 and {x.shape[2:] for x, _ in seen} == {(16, 16)}
    assert "32x32 pixels in 9 tiles of 16: norms and attention see one at a time" in told(caplog)[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile_denoiser": 15}, "tile_denoiser: a multiple of 2 pixels is needed, not 15"),
        ({"tile_denoiser": 16, "tile_overlap": 16}, "tile_overlap: a multiple of 2 below 16"),
        ({"tile_denoiser": 16, "tile_overlap": 3}, "tile_overlap: a multiple of 2 below 16"),
        ({"tile_overlap": 4}, "tile_overlap: belongs to tile_denoiser, which is not given"),
        ({"tile_denoiser": 0}, "tile_denoiser: at least 1 is needed, not 0"),
    ],
    ids=["odd", "all", "odd overlap", "alone", "none"],
)
def test_tiles_that_cannot_be(pipelines, options, message):
    with pytest.raises(UserError, match=message):
        large(pipelines, **options)


def test_a_base_model_in_tiles_is_warned_of(pipelines, caplog):
    with caplog.at_level(logging.WARNING):
        pipelines[0].check(["a cat"], SamplingOptions(sampler=FAST, size=64, tile_denoiser=32))
    assert told(caplog)[-1].endswith("a base model draws its prompt in each of them")
