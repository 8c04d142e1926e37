"""Masks of all kinds mark the pixels that their makers meant."""

from pathlib import Path

import numpy as np
import pytest
import torch
from image_makers import grey_profile, png16, profile, stored, tiff
from PIL import Image, ImageDraw

from ldm_lab.errors import UserError
from ldm_lab.io.images import decode_image, fit, inner_box, open_image, own_size, to_rgb
from ldm_lab.io.masks import blur_mask, fit_mask, hole_of, latent_mask, lost_share, read_mask

CASES = Path(__file__).parent / "data" / "cases" / "images"


def painted(size=(64, 48), box=(10, 20, 30, 40)) -> Image.Image:
    """A white box on black."""
    image = Image.new("L", size, 0)
    image.paste(255, box)
    return image


TRUTH = np.asarray(painted()) / 255  # [48, 64]


def mask_of(data: bytes, **options) -> np.ndarray:
    return read_mask(decode_image(data), **options).numpy()


def test_sixteen_bits_are_eight():
    """One half is white, the other nearly black: 3000 of 65535, level 12 of 255."""
    mask = read_mask(open_image(str(CASES / "mask16.png")))
    assert mask.unique().tolist() == [0, 1] and mask.mean() == 0.5
    with Image.open(CASES / "mask16.png") as deep:
        flat = Image.fromarray((np.asarray(deep) // 257).astype(np.uint8))
    assert torch.equal(mask, read_mask(flat))
    assert read_mask(open_image(str(CASES / "mask8.png"))).sum() == 256


def test_a_stroke_on_a_transparent_layer_is_just_the_stroke():
    mask = read_mask(open_image(str(CASES / "mask_strokes_rgba.png")))
    assert mask.sum() == 256 and mask.unique().tolist() == [0, 1]


def layer(color, mode="RGBA", below=(255, 255, 255, 0)) -> Image.Image:
    image = Image.new("RGBA", (64, 48), below)
    image.paste(color, (10, 20, 30, 40))
    return image.convert(mode)


@pytest.mark.parametrize(
    "data",
    [
        stored(painted()),
        stored(painted().convert("1")),
        stored(painted().convert("RGB")),
        stored(painted().convert("P")),
        stored(painted().convert("RGB"), "jpeg", quality=75),
        stored(painted().convert("RGB"), "webp", quality=75),
        stored(painted().convert("CMYK"), "tiff"),
        stored(layer((255, 255, 255, 255))),
        stored(layer((255, 255, 255, 255), below=(0, 0, 0, 0))),
        stored(layer((255, 255, 255, 255), "LA")),
        stored(painted(), "gif", transparency=0),
        stored(painted(), icc_profile=grey_profile(1.0)),
        png16(np.asarray(painted()).astype(np.uint16) * 257),
        png16(np.asarray(painted().convert("RGB")).astype(np.uint16) * 257),
        tiff(np.asarray(painted()).astype(np.float32) / 255),
        tiff(255 - np.asarray(painted()), photometric=0),
        tiff(np.where(np.asarray(painted()) > 0, 0, 65535).astype(np.uint16), photometric=0),
        tiff(np.asarray(painted()).astype(np.int32) * 257, deflate=True, order=">"),
        tiff(np.stack([np.asarray(painted())] * 2, -1), extra={338: ("H", 1)}),
    ],
    ids=range(19),
)
def test_one_mask_in_many_files(data):
    found = mask_of(data)
    assert found.dtype == np.float32 and found.shape == TRUTH.shape
    lossy = data.startswith((b"\xff\xd8", b"RIFF"))
    assert np.abs(found - TRUTH).mean() < (0.03 if lossy else 1e-6)
    assert found[30, 20] == 1 and found[0, 60] == 0


def test_a_soft_brush_blends():
    ramp = np.tile(np.arange(256, dtype=np.uint8), (4, 1))  # [4, 256]
    image = Image.new("RGBA", (256, 4), "white")
    image.putalpha(Image.fromarray(ramp))
    for mask in (mask_of(stored(image)), mask_of(stored(Image.fromarray(ramp)))):
        assert mask[0, 0] == 0 and mask[0, 255] == 1 and mask[0, 128] == pytest.approx(0.5, abs=0.01)
        assert (np.diff(mask[0]) >= 0).all()


def test_inverted():
    assert np.abs(mask_of(stored(painted()), invert=True) - (1 - TRUTH)).max() == 0


@pytest.mark.parametrize(
    "image",
    [
        Image.open(CASES / "base.png"),
        layer((255, 0, 0, 255)),
        layer((255, 255, 0, 128), below=(0, 0, 0, 255)),
        painted().convert("P"),
        Image.merge("RGB", [painted(), painted(), painted(box=(10, 20, 30, 39))]),
    ],
)
def test_a_colored_picture_is_refused(image):
    if image.mode == "P":
        image.putpalette([0, 0, 0] * 255 + [255, 200, 0])
    with pytest.raises(UserError, match="mask: it is a picture in color; a mask is white where to paint"):
        mask_of(stored(image))


def test_colors_that_nobody_sees_are_none():
    """A transparent pixel has a color, too."""
    assert mask_of(stored(layer((255, 255, 255, 255), below=(255, 0, 0, 0)))).sum() == 400
    assert mask_of(stored(painted().convert("RGB"), icc_profile=profile("adobe"))).sum() == 400


def test_masks_in_which_nothing_is_painted():
    with pytest.raises(UserError, match=r"nothing in it is white \(its brightest level is 0 of 255\)"):
        mask_of(stored(Image.new("L", (8, 8), 0)))
    with pytest.raises(UserError, match=r"nothing in it is white \(its brightest level is 1 of 255\)"):
        mask_of(stored(painted().point(lambda v: v // 255)))
    with pytest.raises(UserError, match="nothing in it is black, and inverted"):
        mask_of(stored(Image.new("L", (8, 8), 255)), invert=True)
    assert mask_of(stored(Image.new("L", (8, 8), 0)), invert=True).min() == 1


def test_the_hole_of_a_picture():
    with Image.open(CASES / "base.png") as base:
        assert hole_of(base) is None
        picture = base.convert("RGBA")
    assert hole_of(picture) is None
    erased = Image.new("L", (64, 64), 255)
    erased.paste(0, (5, 6, 15, 26))
    picture.putalpha(erased)
    hole = hole_of(decode_image(stored(picture)))
    assert hole.sum() == 200 and hole[6:26, 5:15].min() == 1
    picture.putalpha(255)
    assert hole_of(picture) is None


# ------------------------------------------------------------------------------------------------------ another size


def test_a_mask_of_its_own_size_stays():
    mask = read_mask(painted())
    assert torch.equal(fit_mask(mask, 48, 64), mask)


@pytest.mark.parametrize("side", [1000, 1024, 1537])
def test_strokes_thinner_than_the_downscaling_count(side):
    image = Image.new("L", (side, side), 0)
    ImageDraw.Draw(image).line((3, 5, side - 5, side // 2), fill=255, width=1)
    fitted = fit_mask(read_mask(image), 64, 64)
    assert fitted.max() == 1 and (fitted.amax(0) == 1).all()  # an unbroken line from the left to the right
    latents = latent_mask(fitted, 8)
    assert latents.shape == (1, 1, 8, 8) and (latents.amax((0, 1, 2)) == 1).all()


def test_what_is_white_outside_of_the_crop():
    mask = read_mask(open_image(str(CASES / "wide_mask.png")))
    with pytest.raises(UserError, match="all that is white in it lies outside of the 64x64 pixels that are cut out"):
        fit_mask(mask, 64, 64)
    assert lost_share(mask, 64, 64) == 1 and lost_share(mask, 64, 64, "pad") == lost_share(mask, 64, 192) == 0
    for resize in ("pad", "stretch"):
        assert fit_mask(mask, 64, 64, resize).any()
    mask[:, 90:100] = 1
    assert 0 < lost_share(mask, 64, 64) < 1 and fit_mask(mask, 64, 64).any()


@pytest.mark.parametrize("resize", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(64, 64), (192, 64), (50, 97), (64, 48), (3, 1000)])
def test_a_mask_lies_where_its_picture_lies(resize, size):
    """A white box in the picture, and the mask of it, at another size."""
    image = Image.new("L", size, 0)
    box = (size[0] // 3, size[1] // 3, size[0] - size[0] // 3, size[1] - size[1] // 3)
    image.paste(255, box)
    picture = np.asarray(fit(image, 64, 96, resize).convert("L")) / 255.0
    mask = fit_mask(read_mask(image), 64, 96, resize).numpy()
    assert picture.shape == mask.shape == (64, 96)
    # The mask may reach a pixel further than the picture's box, which is blurred there.
    assert (mask - (picture > 0.9)).min() >= 0
    assert (mask > (picture > 0.02)).mean() < 0.08


def test_padding_repeats_the_edge():
    image = Image.new("RGB", (20, 10), (10, 20, 30))
    image.paste((200, 100, 50), (0, 5, 20, 10))
    padded = np.asarray(fit(image, 40, 40, "pad"))
    assert (padded[:8] == (10, 20, 30)).all() and (padded[-8:] == (200, 100, 50)).all()
    assert inner_box((20, 10), 40, 40, "pad") == (0, 10, 40, 20)
    assert inner_box((20, 10), 40, 40, "crop") == (-20, 0, 80, 40)
    assert np.array_equal(np.asarray(fit(image, 10, 20, "pad")), np.asarray(to_rgb(image)))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 64), (64, 64)),
        ((192, 64), (40, 112)),
        ((64, 192), (112, 40)),
        ((4000, 3000), (56, 72)),
        ((1, 5000), (184, 24)),
    ],
)
def test_a_picture_keeps_its_aspect(size, expected):
    assert own_size(size, 64, 64, 8) == expected


def test_blurred_edges():
    mask = read_mask(painted())
    assert torch.equal(blur_mask(mask, 0), mask)
    soft = blur_mask(mask, 3)
    assert soft.shape == mask.shape and 0 < soft[30, 9] < soft[30, 10] < 1 and soft[0, 63] == 0
    assert soft.sum() == pytest.approx(mask.sum().item(), rel=0.02)


def test_latent_elements_are_as_soft_as_their_pixels():
    mask = torch.zeros(64, 48)
    mask[3, 5], mask[20, 20] = 0.25, 1.0
    latents = latent_mask(mask, 8)
    assert latents.shape == (1, 1, 8, 6)
    assert latents[0, 0, 0, 0] == 0.25 and latents[0, 0, 2, 2] == 1 and latents.sum() == 1.25
