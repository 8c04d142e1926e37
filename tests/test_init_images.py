"""What people give sampling to begin with: pictures of any aspect, masks of any kind, holes."""

import logging
from pathlib import Path

import numpy as np
import pytest
from image_makers import png16, profile, stored
from PIL import Image, ImageDraw
from test_sampling import options

from ldm_lab.errors import UserError
from ldm_lab.io.images import fit, open_image, to_rgb
from ldm_lab.sampling import Model, Pipeline

CASES = Path(__file__).parent / "data" / "cases" / "images"
SIZE = 64
FAST = {"sampler": {"name": "ddim", "steps": 2}}


@pytest.fixture
def pipeline(parts):
    return Pipeline(Model(**parts, dropout=0.2, image_size=(SIZE, SIZE)))


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(to_rgb(image)).astype(int)


def changed(pipeline: Pipeline, picture: Image.Image | Path, **choices) -> np.ndarray:
    """Return which pixels of a picture come out otherwise, bool [H, W], after inpainting it."""
    (image,) = pipeline(["red"], options(init_image=picture, **FAST, **choices))
    known = open_image(str(picture)) if isinstance(picture, Path) else picture
    return (levels(image) != levels(fit(known, image.height, image.width, choices.get("resize", "crop")))).any(-1)


def test_a_stroke_on_a_transparent_layer_paints_the_stroke_alone(pipeline):
    where = changed(pipeline, CASES / "base.png", mask=CASES / "mask_strokes_rgba.png")
    with Image.open(CASES / "mask_strokes_rgba.png") as mask:
        stroke = np.asarray(mask)[..., 3] > 0
    assert not where[~stroke].any() and where[stroke].mean() > 0.8


def test_a_sixteen_bit_mask_keeps_what_is_dark(pipeline):
    where = changed(pipeline, CASES / "base.png", mask=CASES / "mask16.png")
    with Image.open(CASES / "mask16.png") as mask:
        white = np.asarray(mask) > 40000
    assert not where[~white].any() and where[white].mean() > 0.8


def test_a_wide_picture_keeps_its_aspect_and_its_mask(pipeline):
    where = changed(pipeline, CASES / "wide.png", mask=CASES / "wide_mask.png")
    assert where.shape == (32, 112)  # about as many pixels as 64 x 64, in multiples of 16
    white = np.asarray(Image.open(CASES / "wide_mask.png").resize((112, 32), Image.Resampling.BOX)) > 200
    assert where[white].mean() > 0.8


def test_what_lies_outside_of_a_crop_is_one_clear_line(pipeline, caplog):
    crop = {"mask": CASES / "wide_mask.png", "resize": "crop"}
    with pytest.raises(UserError, match="all that is white in it lies outside of the 64x64 pixels"):
        changed(pipeline, CASES / "wide.png", **crop)
    with pytest.raises(UserError, match="all that is white in it lies outside of the 64x64 pixels"):
        changed(pipeline, CASES / "wide.png", mask=CASES / "wide_mask.png", size=64)
    for resize in ("pad", "stretch"):
        where = changed(pipeline, CASES / "wide.png", mask=CASES / "wide_mask.png", resize=resize)
        assert where.shape == (64, 64) and where.any()
    partly = Image.open(CASES / "wide_mask.png").convert("L")
    partly.paste(255, (80, 10, 110, 40))
    with caplog.at_level(logging.WARNING):
        changed(pipeline, CASES / "wide.png", mask=partly, resize="crop")
    assert any("of what is white in it lies outside" in record.getMessage() for record in caplog.records)


def test_strokes_thinner_than_the_downscaling_count(pipeline):
    picture = Image.new("RGB", (1024, 1024), (10, 200, 90))
    mask = Image.new("L", picture.size, 0)
    ImageDraw.Draw(mask).line((0, 500, 1023, 520), fill=255, width=1)
    where = changed(pipeline, picture, mask=mask)
    assert where.any(0).mean() > 0.8 and where.any(1).sum() <= 4


def test_an_erased_hole_needs_no_mask(pipeline, caplog):
    picture = Image.open(CASES / "base.png").convert("RGBA")
    alpha = Image.new("L", picture.size, 255)
    alpha.paste(0, (10, 12, 30, 40))
    picture.putalpha(alpha)
    with caplog.at_level(logging.WARNING):
        where = changed(pipeline, picture)
    hole = np.asarray(alpha) == 0
    assert not where[~hole].any() and where[hole].mean() > 0.8
    assert [record.getMessage() for record in caplog.records if "transparent" in record.getMessage()] == [
        "init_image: its transparent part is painted anew (13.7% of it)"
    ]
    request = pipeline.check(["red"], options(init_image=picture))
    assert request.options.strength == 1.0
    assert pipeline.check(["red"], options(init_image=picture.convert("RGB"))).options.strength == 0.7


def test_grey_blends_and_black_stays(pipeline):
    picture = Image.open(CASES / "base.png")
    masks = [Image.new("L", picture.size, level) for level in (255, 128)]
    for mask in masks:
        mask.paste(0, (0, 0, 32, 64))
    full, half = (levels(pipeline(["red"], options(init_image=picture, mask=mask, **FAST))[0]) for mask in masks)
    known = levels(picture)
    assert (half[:, :32] == known[:, :32]).all()
    assert np.abs(half - (full + known) / 2)[:, 32:].max() <= 2


def test_inverted_and_blurred(pipeline):
    picture, mask = Image.open(CASES / "base.png"), Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 16, 48, 48))
    where = changed(pipeline, picture, mask=mask, invert_mask=True)
    assert not where[16:48, 16:48].any() and where[:16].mean() > 0.8
    soft, hard = changed(pipeline, picture, mask=mask, mask_blur=3.0), changed(pipeline, picture, mask=mask)
    assert hard[:, :16].sum() == 0 < soft[:, 10:16].sum() and soft[:, :2].sum() == 0


def test_a_strength_of_no_step_says_so(pipeline, caplog):
    choices = {"init_image": CASES / "base.png", "sampler": {"name": "ddim", "steps": 10}}
    with caplog.at_level(logging.WARNING):
        pipeline.check(["red"], options(strength=0.04, **choices))
        pipeline.check(["red"], options(strength=0.06, **choices))
        pipeline.check(["red"], options(strength=0.0, **choices))
    said = [record.getMessage() for record in caplog.records]
    assert said == ["strength: 0.04 of 10 steps is none: the image comes back as the autoencoder gives it"]


def test_a_picture_as_a_mask_is_refused(pipeline):
    with pytest.raises(UserError, match="mask: it is a picture in color"):
        changed(pipeline, CASES / "base.png", mask=CASES / "base.png")


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"resize": "crop"}, "resize: belongs to init_image"),
        ({"mask_blur": 3.0}, "mask_blur: belongs to init_image"),
        ({"init_image": CASES / "base.png", "invert_mask": True}, "invert_mask: belongs to mask"),
        ({"init_image": CASES / "base.png", "resize": "fill"}, "resize: "),
        ({"init_image": CASES / "base.png", "mask_blur": -1.0}, "mask_blur: "),
    ],
)
def test_options_that_do_not_go_together(choices, message):
    with pytest.raises(UserError, match=message):
        options(**choices)


def test_an_init_image_of_any_depth_and_colors(pipeline, tmp_path):
    """The same picture, in 16 bits and with a profile, begins alike."""
    picture = np.asarray(Image.open(CASES / "base.png"))
    files = {"8.png": stored(Image.fromarray(picture)), "16.png": png16(picture.astype(np.uint16) * 257)}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    known = [pipeline.check(["red"], options(init_image=tmp_path / name)).init_image.fitted(64, 64) for name in files]
    assert known[0].tobytes() == known[1].tobytes() == Image.fromarray(picture).tobytes()
    wide = Image.fromarray(picture)
    (tmp_path / "p.png").write_bytes(stored(wide, icc_profile=profile("swapped")))
    swapped = pipeline.check(["red"], options(init_image=tmp_path / "p.png")).init_image.fitted(64, 64)
    assert np.abs(levels(swapped) - picture).mean() > 10
