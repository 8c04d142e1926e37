"""Pillow images and tensors, grids, PNG files."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_lab.errors import UserError
from ldm_lab.io import images
from ldm_lab.io.images import grid, parse_size, save_png, to_images, to_tensor


def test_values_become_levels_clamped_and_cut_off():
    values = torch.tensor([-7.0, -1.0, -0.9961, -0.9921, 0.0, 0.9921, 0.9999, 1.0, 9.0])
    (image,) = to_images(values.expand(1, 3, 1, 9))
    assert np.array(image)[0, :, 0].tolist() == [0, 0, 0, 1, 127, 253, 254, 255, 255]


def test_channels_rows_and_columns_stay_in_their_places():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    tensor = to_tensor(Image.fromarray(pixels))
    assert tensor.shape == (3, 5, 7) and tensor.dtype == torch.float32
    assert torch.allclose(tensor, torch.from_numpy(pixels).permute(2, 0, 1) / 255 * 2 - 1, atol=1e-6)
    # Levels are cut off, so that rounding errors may cost one; half a level more makes the way back exact.
    (back,) = to_images(tensor[None] + 1 / 255)
    assert np.array_equal(np.array(back), pixels)


def test_a_batch_of_any_type_and_layout():
    batch = torch.linspace(-1, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    expected = [np.array(image) for image in to_images(batch)]
    for other in (batch.to(memory_format=torch.channels_last), batch.requires_grad_()):
        assert all(np.array_equal(a, np.array(b)) for a, b in zip(expected, to_images(other), strict=True))


@pytest.mark.parametrize(("written", "size"), [("256", (256, 256)), ("384x256", (256, 384)), ("64X128", (128, 64))])
def test_sizes(written, size):
    assert parse_size(written) == size


@pytest.mark.parametrize("written", ["", "x", "12x", "0", "1x2x3", "-4", "4.5", "big", "²"])
def test_unusable_sizes(written):
    with pytest.raises(UserError, match="write pixels as 256 or as WIDTHxHEIGHT"):
        parse_size(written)


def colors(count, size=(8, 6)):
    return [Image.new("RGB", size, (10 * i, 255 - 10 * i, 99)) for i in range(count)]


def test_a_plain_grid_has_the_images_pixels_row_by_row():
    page = grid(colors(16))
    assert page.size == (32, 24)
    assert page.getpixel((0, 0)) == (0, 255, 99)
    assert page.getpixel((31, 0)) == (30, 225, 99)
    assert page.getpixel((0, 23)) == (120, 135, 99)


def test_columns_and_a_last_row_that_is_not_full():
    assert grid(colors(5)).size == (24, 12)
    assert grid(colors(5), columns=2).size == (16, 18)
    assert grid(colors(2), columns=9).size == (16, 6)
    assert grid(colors(5), columns=2).getpixel((15, 17)) == (255, 255, 255)


def test_captions_stand_below_enlarged_images():
    page = grid(colors(2, (64, 64)), captions=["a red square", ""])
    pixels = np.array(page)
    inside = (pixels == (0, 255, 99)).all(-1)
    assert inside.sum() == 192 * 192  # 64 pixels, three times
    bottom = np.flatnonzero(inside.any(1)).max()
    dark = (pixels[bottom + 1 :] < 100).all(-1)
    left, right = dark[:, : page.width // 2].sum(), dark[:, page.width // 2 :].sum()
    assert left > 50 and right == 0  # ink below the first, none below the second


def test_large_images_keep_their_pixels_and_rows_their_own_label_heights():
    one, four = "short", "a caption that is long enough " * 4
    pages = [grid(colors(2, (200, 64)), columns=1, captions=captions) for captions in ([one, one], [one, four])]
    assert (np.array(pages[0]) == (0, 255, 99)).all(-1).sum() == 200 * 64
    assert pages[0].height < pages[1].height < grid(colors(2, (200, 64)), columns=1, captions=[four] * 2).height


def test_long_captions_are_wrapped_and_end_in_an_ellipsis():
    font = images._font("", 12)
    words = "the quick brown fox jumps over the lazy dog"
    lines = images._wrap(words, font, 90)
    assert " ".join(lines) == words
    assert all(font.getlength(line) <= 90 for line in lines)
    (*first, last) = images._wrap("supercalifragilistic" * 20, font, 90)
    assert len(first) == 3 and last.endswith("…")
    assert all(font.getlength(line) <= 90 for line in [*first, last])


def test_other_scripts_do_not_fail():
    page = np.array(grid(colors(1, (160, 16)), captions=["größe 猫 🦊"]))
    assert (page[30:] < 100).all(-1).sum() > 50


def test_png_with_metadata(tmp_path):
    path = tmp_path / "new" / "a.png"
    save_png(path, colors(1)[0], {"Description": "ein Bär: 猫", "seed": "3"})
    with Image.open(path) as image:
        assert image.text == {"Description": "ein Bär: 猫", "seed": "3"}
        assert image.getpixel((0, 0)) == (0, 255, 99)
    assert os.listdir(path.parent) == ["a.png"]


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_png(path, colors(1)[0])
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"a\.png: cannot be written: No space left on device"):
        save_png(path, colors(2)[1])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_png(tmp_path / "file" / "b.png", colors(1)[0])


def test_the_level_of_compression_changes_the_size_and_no_pixel(tmp_path):
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 1, 3)).astype(np.uint8).repeat(90, 1))
    for level in (0, 6):
        save_png(tmp_path / f"{level}.png", image, {"a": "b"}, level=level)
    assert (tmp_path / "0.png").stat().st_size > 5 * (tmp_path / "6.png").stat().st_size
    assert Image.open(tmp_path / "0.png").tobytes() == Image.open(tmp_path / "6.png").tobytes() == image.tobytes()
