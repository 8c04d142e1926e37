"""Image files as people have them: whatever depth, colors and metadata they have, the picture is the right one.

The files in tests/data/cases are some that were met; the others are made here.
"""

import io
import logging
import struct
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from data_sets import keys, module, take
from image_makers import (
    cmyk_profile,
    curve,
    grey_profile,
    png16,
    png_chunk,
    profile,
    srgb_of,
    stored,
    tiff,
    with_chunks,
)
from PIL import Image, ImageCms

from ldm_lab.config import build
from ldm_lab.data.order import Order
from ldm_lab.data.samples import RawSample
from ldm_lab.io import color
from ldm_lab.io.color import to_levels
from ldm_lab.io.decoding import IMAGE_ENDINGS
from ldm_lab.io.images import BadImage, center_crop_to, decode_image, flatten_alpha, open_image, to_rgb
from ldm_lab.io.metadata import jxl_size

CASES = Path(__file__).parent / "data" / "cases"
RAMP = np.tile(np.linspace(0, 255, 52).round().astype(np.uint8), (16, 1))  # [16, 52], greys
COLORS = np.random.RandomState(0).randint(0, 256, (12, 14, 3)).astype(np.uint8)  # [12, 14, 3]


def pixels(data: bytes | str | Path | Image.Image) -> np.ndarray:
    """Return the RGB pixels of an image file, int [H, W, 3]."""
    if not isinstance(data, Image.Image):
        data = decode_image(data) if isinstance(data, bytes) else open_image(str(data))
    return np.asarray(to_rgb(data)).astype(int)


def grey(levels: np.ndarray) -> np.ndarray:
    return np.repeat(levels[..., None], 3, -1).astype(int)


def distance(data: bytes | str | Path, truth: np.ndarray) -> float:
    found = pixels(data)
    assert found.shape == truth.shape
    return np.abs(found - truth).max()


# ------------------------------------------------------------------------------------------------------- files met


def test_sixteen_bits_are_the_eight_bit_picture():
    assert distance(CASES / "images/ramp16.png", pixels(CASES / "images/ramp8.png")) <= 1


def test_a_wide_gamut_becomes_srgb():
    found, truth = pixels(CASES / "images/adobe_rgb.png"), pixels(CASES / "images/adobe_rgb_truth.png")
    assert np.abs(found - truth).mean() < 0.5
    with Image.open(CASES / "images/adobe_rgb.png") as raw:
        assert np.abs(np.asarray(raw) - truth).max() > 15  # what it was without its profile


def test_a_picture_with_much_compressed_text():
    assert distance(CASES / "images/ztxt_2mb.png", pixels(CASES / "images/base.png")) == 0


def test_a_wrong_exif_tag_beside_a_valid_orientation(recwarn):
    with Image.open(CASES / "images/exif_types.jpg") as raw:
        turned = np.asarray(raw.transpose(Image.Transpose.ROTATE_270))
    assert distance(CASES / "images/exif_types.jpg", turned) == 0
    assert not recwarn.list


def test_premultiplied_grey():
    """Grey 100 with an alpha of 200 is 127.5 of 255 at 78 %; over white that is 155."""
    assert distance(CASES / "images/la_16x16.tif", np.full((16, 16, 3), 155)) <= 1


@pytest.mark.parametrize("name", ["la", "jfif"])
def test_every_image_of_shards_that_were_met(name):
    with tarfile.open(CASES / f"shards/{name}.tar") as archive:
        members = [member for member in archive if not member.name.endswith(".txt")]
        for member in members:
            assert member.name.rpartition(".")[2].lower() in IMAGE_ENDINGS
            assert pixels(archive.extractfile(member).read()).shape[2] == 3
    assert len(members) == {"la": 3, "jfif": 40}[name]


# ------------------------------------------------------------------------------------------------------------- depth


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        RAMP.astype(np.uint16) * 257,
        RAMP.astype(np.int32) * 257,
        RAMP.astype(np.int32),  # 8-bit levels in a larger type
        RAMP.astype(np.uint32) * 16843009,
        (RAMP.astype(np.int64) * (2**31 - 1) // 255).astype(np.int32),
        (RAMP.astype(np.int64) * 32767 // 255).astype(np.int16),
        (RAMP / 255).astype(np.float32),
        RAMP.astype(np.float32),
        RAMP.astype(np.float32) * 257,
        (RAMP / 255).astype(np.float16),
        RAMP / 255,
    ],
    ids=lambda values: f"{values.dtype}-{values.max():.6g}",
)
def test_every_depth_of_a_tiff(values, order, deflate):
    assert distance(tiff(values, order, deflate=deflate), grey(RAMP)) <= 1


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("bits", [10, 12, 14])
def test_packed_samples(bits, order, deflate):
    values = (RAMP.astype(int) * (2**bits - 1) // 255).astype(np.uint16)  # [16, 52]
    assert distance(tiff(values, order, bits, deflate=deflate), grey(RAMP)) <= 1
    odd = values[:, :51]  # rows end within a byte
    assert distance(tiff(odd, order, bits, deflate=deflate, rows=5), grey(RAMP[:, :51])) <= 1


def test_packed_samples_of_color():
    values = (COLORS.astype(int) * 4095 // 255).astype(np.uint16)
    assert distance(tiff(values, bits=12), COLORS) <= 1


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.float32])
def test_white_is_zero(dtype, order, deflate):
    white = 1 if dtype == np.float32 else np.iinfo(dtype).max
    values = ((255 - RAMP) / 255 * white).astype(dtype)
    assert distance(tiff(values, order, photometric=0, deflate=deflate), grey(RAMP)) <= 1


def test_white_is_zero_of_twelve_bits():
    values = ((255 - RAMP.astype(int)) * 4095 // 255).astype(np.uint16)
    assert distance(tiff(values, ">", 12, photometric=0), grey(RAMP)) <= 1


def test_a_stated_maximum_of_twelve_bits():
    values = (RAMP.astype(int) * 4095 // 255).astype(np.uint16)
    assert distance(tiff(values, extra={281: ("H", 4095)}), grey(RAMP)) <= 1


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"planar": True},
        {"tile": 16},
        {"tile": 16, "deflate": True, "planar": True},
        {"rows": 5, "deflate": True},
        {"deflate": True, "predictor": 2},
        {"deflate": True, "predictor": 2, "tile": 16},
        {"big": True},
        {"big": True, "rows": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.float32])
def test_deep_colors_however_they_are_laid_out(dtype, how, order):
    if dtype == np.float32 and how.get("predictor") == 2:
        how = {**how, "predictor": 3}
    white = 1 if dtype == np.float32 else np.iinfo(dtype).max
    colors = np.tile(COLORS, (3, 3, 1))  # [36, 42, 3]
    values = (colors / 255 * white).astype(dtype)
    assert distance(tiff(values, order, **how), colors) <= 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.float32])
@pytest.mark.parametrize("samples", [2, 4])
@pytest.mark.parametrize("premultiplied", [False, True])
def test_deep_transparency(dtype, samples, premultiplied):
    """A color at 60 % over white; where nothing is there, white."""
    white = 1 if dtype == np.float32 else np.iinfo(dtype).max
    shares = np.full((6, 8, samples), 0.6)
    shares[..., :-1] = np.array([0.2, 0.5, 0.9])[: samples - 1] * (0.6 if premultiplied else 1)
    shares[:, 4:, -1] = 0
    if premultiplied:
        shares[:, 4:] = 0
    data = tiff((shares * white).astype(dtype), extra={338: ("H", 1 if premultiplied else 2)})
    truth = np.full((6, 8, 3), 255.0)
    truth[:, :4] = 255 * (0.6 * np.resize([0.2, 0.5, 0.9][: samples - 1], 3) + 0.4)
    assert distance(data, truth) <= 2


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("where", ["behind", "below"])
def test_of_a_tiff_with_a_thumbnail_in_front_the_picture_is_read(dtype, order, where):
    scale = np.iinfo(dtype).max // 255
    picture = COLORS.astype(dtype) * scale
    both = np.concatenate([picture, picture[::4]])  # of which one directory says the first rows, and one the others
    strips = {"rows": len(picture)}

    def file(rows: np.ndarray, extra: dict) -> bytes:
        return tiff(rows, order, extra=extra, **strips)

    small = file(both[len(picture) :], {254: ("I", 1)} | ({330: ("I", 2**31)} if where == "below" else {}))
    large = file(picture, {254: ("I", 0)})
    room = len(small) + len(small) % 2
    moved = relocated(large, order, room)
    (start,) = struct.unpack_from(order + "I", large, 4)
    if where == "below":
        small = small.replace(struct.pack(order + "I", 2**31), struct.pack(order + "I", room + start))
    else:
        (first,) = struct.unpack_from(order + "I", small, 4)
        after = first + 2 + 12 * struct.unpack_from(order + "H", small, first)[0]
        small = small[:after] + struct.pack(order + "I", room + start) + small[after + 4 :]
    data = small.ljust(room, b"\0") + moved
    assert distance(data, COLORS) == 0
    assert decode_image(data, min_size=10).size == (14, 12)


def relocated(data: bytes, order: str, by: int) -> bytes:
    """Return a TIFF whose places count from `by` bytes before it."""
    moved = bytearray(data)
    (start,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, start)
    for place in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, number = struct.unpack_from(order + "HHI", data, place)
        (value,) = struct.unpack_from(order + "I", data, place + 8)
        if tag == 273 or number * {3: 2, 4: 4}[kind] > 4:
            struct.pack_into(order + "I", moved, place + 8, value + by)
    return bytes(moved)


def test_thumbnails_alone_and_directories_in_a_circle():
    data = bytearray(tiff(COLORS, extra={254: ("I", 1)}))
    assert distance(bytes(data), COLORS) == 0
    (start,) = struct.unpack_from("<I", data, 4)
    after = start + 2 + 12 * struct.unpack_from("<H", data, start)[0]
    for following in (start, 2**32 - 1, 3):
        struct.pack_into("<I", data, after, following)
        assert distance(bytes(data), COLORS) == 0


def test_a_fourth_channel_of_zeros_is_no_transparency():
    """Programs that know none leave it empty in TGA and BMP files; where something is opaque, it is meant."""
    filled = np.dstack([COLORS[..., ::-1], np.zeros((12, 14), np.uint8)])
    head = struct.pack("<3B5x4H2B", 0, 0, 2, 0, 0, 14, 12, 32, 0x20)
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    bitmap = struct.pack("<2sIHHI", b"BM", 138 + filled.size, 0, 0, 138)
    bitmap += struct.pack("<IiiHHIIiiII", 124, 14, -12, 1, 32, 3, filled.size, 0, 0, 0, 0) + masks.ljust(84, b"\0")
    for start in (head, bitmap):
        assert distance(start + filled.tobytes(), COLORS) == 0
        some = filled.copy()
        some[0, :, 3] = 255
        truth = np.full_like(COLORS, 255)
        truth[0] = COLORS[0]
        assert distance(start + some.tobytes(), truth) == 0


def test_jpeg_2000_in_which_white_may_be_black_is_refused():
    levels = np.where(COLORS < 9, 9, COLORS)
    fine = stored(Image.fromarray(levels), "jpeg2000", irreversible=False)
    assert distance(fine, levels) == 0
    start = fine.index(b"\xff\x4f\xff\x51")
    deep = bytearray(fine)
    deep[start + 42] = 11  # 12 bits
    assert pixels(bytes(deep)).shape == COLORS.shape
    levels[3, 3] = 0
    black = bytearray(stored(Image.fromarray(levels), "jpeg2000", irreversible=False))
    assert distance(bytes(black), levels) == 0
    black[start + 42] = 11
    with pytest.raises(BadImage, match="JPEG 2000 image of more than 8 bits"):
        decode_image(bytes(black))


def test_further_samples_without_a_meaning():
    values = np.concatenate([COLORS, np.zeros_like(COLORS)], -1).astype(np.uint16) * 257
    assert distance(tiff(values, extra={338: ("H", (0, 0, 0))}), COLORS) <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5, 3.0, 400.0, 1e9])
def test_values_of_no_known_range_are_refused_by_name(value):
    values = np.full((4, 4), 0.5, np.float32)
    values[0, 0] = value
    with pytest.raises(BadImage, match="unknown range of values"):
        decode_image(tiff(values))


def test_overshoot_of_a_resize_is_cut():
    values = np.full((4, 4), 1.03, np.float32)
    values[0] = -0.02
    assert pixels(tiff(values))[:, 0, 0].tolist() == [0, 255, 255, 255]


def test_light_with_lamps_is_refused_and_a_mask_in_levels_is_none():
    light = np.where(RAMP > 250, 40, RAMP / 255).astype(np.float32)
    with pytest.raises(BadImage, match="unknown range of values"):
        decode_image(tiff(light))
    stroke = np.where(RAMP > 250, 255, 0).astype(np.float32)
    assert distance(tiff(stroke), grey(stroke)) == 0


def test_signed_bytes():
    half = (RAMP >> 1).astype(np.int8)
    for deflate in (False, True):
        assert distance(tiff(half, deflate=deflate), grey(RAMP)) <= 2
        with pytest.raises(BadImage, match="unknown range of values"):
            decode_image(tiff((half - 9).astype(np.int8), deflate=deflate))


def test_negative_integers_are_refused():
    with pytest.raises(BadImage, match="unknown range of values"):
        decode_image(tiff(np.full((4, 4), -3, np.int16)))


@pytest.mark.parametrize(
    "data",
    [
        tiff(np.zeros((4, 4, 3), np.float32), photometric=8),
        tiff(np.zeros((4, 4), np.float32), extra={259: ("H", 7)}),
        tiff(np.zeros((4, 4, 2), np.uint16), photometric=2),
        tiff(np.zeros((4, 4), np.uint16), extra={339: ("H", 6)}),
    ],
)
def test_tiffs_of_other_kinds_are_refused_by_name(data):
    with pytest.raises(BadImage, match=r"unsupported image mode|undecodable image"):
        decode_image(data)


def test_a_deep_tiff_keeps_to_the_limits():
    data = tiff(np.zeros((20, 30, 3), np.float32))
    for limits in ({"min_size": 21}, {"max_pixels": 599}):
        with pytest.raises(BadImage, match=r"too small|too many pixels"):
            decode_image(data, **limits)
    with pytest.raises(BadImage, match="truncated image"):  # its only strip is said to go on behind the file's end
        decode_image(tiff(np.ones((20, 30, 3), np.float32), extra={279: ("I", 10**6)}))
    with pytest.raises(BadImage, match="truncated image"):  # strips for half of the rows
        decode_image(tiff(np.ones((20, 30), np.float32), rows=10, extra={257: ("I", 40)}))
    with pytest.raises(BadImage, match="too many pixels"):
        decode_image(tiff(np.zeros((4, 4), np.float64), extra={256: ("I", 10**6), 257: ("I", 10**6)}))
    with pytest.raises(BadImage, match="too many pixels"):  # a row is as long as its tile
        decode_image(tiff(np.zeros((4, 4), np.float64), tile=16, extra={322: ("I", 2**31)}))


@pytest.mark.filterwarnings("ignore")
def test_malformed_deep_tiffs_are_bad_images():
    rng = np.random.RandomState(0)
    usable = 0
    for how in ({}, {"tile": 16}, {"deflate": True, "predictor": 3}, {"big": True}, {"planar": True}):
        data = tiff((np.tile(COLORS, (2, 2, 1)) / 255).astype(np.float32), **how)
        for _ in range(60):
            spoiled = bytearray(data)
            for place in rng.randint(len(data) - 300, len(data), 3):
                spoiled[place] = rng.randint(256)
            try:
                usable += to_rgb(decode_image(bytes(spoiled))).mode == "RGB"
            except BadImage:
                continue
    assert usable


def test_sixteen_bit_pngs():
    assert distance(png16(RAMP.astype(np.uint16) * 257), grey(RAMP)) == 0
    assert distance(png16(COLORS.astype(np.uint16) * 257), COLORS) == 0
    half = np.stack([RAMP, np.full_like(RAMP, 51)], -1).astype(np.uint16) * 257  # [16, 52, 2]
    assert distance(png16(half), grey(RAMP * 0.2 + 204)) <= 1


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_pngs_of_twelve_bits_in_sixteen(bits):
    """Scaled to 16, as PNG demands it, or as they were; a dark picture without the chunk stays dark."""
    chunk = png_chunk(b"sBIT", bytes([bits]))
    raw = (RAMP.astype(int) * (2**bits - 1) // 255).astype(np.uint16)
    assert distance(png16(RAMP.astype(np.uint16) * 257, chunk), grey(RAMP)) == 0
    assert distance(png16(raw, chunk), grey(RAMP)) <= 1
    assert pixels(png16(raw)).max() == round(255 * (2**bits - 1) / 65535)


def test_a_transparent_value_of_sixteen_bits():
    """Only that very value is transparent, not its neighbors of the same 8-bit level."""
    values = np.full((4, 4), 1000, np.uint16)
    values[:, 2:] = 1001
    found = pixels(png16(values, png_chunk(b"tRNS", struct.pack(">H", 1000))))
    assert (found[:, :2] == 255).all() and (found[:, 2:] == 4).all()
    colors = np.full((4, 4, 3), 257 * 9, np.uint16)
    colors[:, 2:] = 257 * 80
    found = pixels(png16(colors, png_chunk(b"tRNS", struct.pack(">3H", *[257 * 9] * 3))))
    assert (found[:, :2] == 255).all() and (found[:, 2:] == 80).all()


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_transparent_grey_of_few_bits(depth):
    top = 2**depth - 1
    head = struct.pack(">2I5B", 8, 1, depth, 0, 0, 0, 0)
    ones = (np.array([top, 0] * 4)[:, None] >> np.arange(depth - 1, -1, -1)) & 1
    row = b"\0" + np.packbits(ones.reshape(-1)).tobytes()
    chunks = [
        png_chunk(b"IHDR", head),
        png_chunk(b"tRNS", struct.pack(">H", top)),
        png_chunk(b"IDAT", zlib.compress(row)),
    ]
    data = b"\x89PNG\r\n\x1a\n" + b"".join([*chunks, png_chunk(b"IEND", b"")])
    image = decode_image(data).convert("RGBA")
    assert [image.getpixel((x, 0))[3] for x in range(4)] == [0, 255, 0, 255]


@pytest.mark.parametrize("most", [1023, 4095, 65535])
def test_netpbm_files_of_more_than_eight_bits(most):
    values = (RAMP.astype(int) * most // 255).astype(">u2")
    assert distance(b"P5 52 16 %d\n" % most + values.tobytes(), grey(RAMP)) <= 1
    floats = np.flipud(RAMP / 255).astype("<f4")  # PFM goes from the bottom up
    assert distance(b"Pf\n52 16\n-1.0\n" + floats.tobytes(), grey(RAMP)) <= 1


def test_levels_of_large_types():
    assert to_levels(np.array([0, 2**63, 2**64 - 1], np.uint64)).tolist() == [0, 128, 255]
    assert to_levels(np.array([0, 300], np.int64)).tolist() == [0, 1]
    assert to_levels(np.zeros(0, np.float32)).size == 0


# ------------------------------------------------------------------------------------------------------------- colors


@pytest.mark.parametrize("space", ["adobe", "p3", "prophoto", "linear", "swapped"])
@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "webp", "avif"])
def test_color_profiles(space, kind):
    blocks = COLORS[:4, :4].repeat(16, 0).repeat(16, 1)  # [64, 64, 3]: JPEG keeps what is flat
    lossless = {"jpeg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}, "avif": {"quality": 100}}
    image = Image.fromarray(blocks)
    plain = pixels(stored(image, kind, **lossless.get(kind, {})))
    data = stored(image, kind, icc_profile=profile(space), **lossless.get(kind, {}))
    difference = np.abs(pixels(data) - srgb_of(plain, space))
    assert np.quantile(difference, 0.98) <= 1.5 and difference.mean() < 0.6


@pytest.mark.parametrize("space", ["adobe", "swapped"])
def test_profiles_of_images_with_transparency_and_palettes(space):
    image = Image.fromarray(COLORS).convert("RGBA")
    image.putalpha(51)
    over = srgb_of(COLORS, space) * 0.2 + 255 * 0.8
    assert distance(stored(image, icc_profile=profile(space)), over) <= 1.5
    image = Image.fromarray(COLORS[:8, :8]).quantize(64)
    truth = srgb_of(np.asarray(image.convert("RGB")), space)
    assert distance(stored(image, icc_profile=profile(space)), truth) <= 1.5


@pytest.mark.parametrize("gamma", [1.0, 1.8, 3.0])
def test_grey_profiles(gamma):
    truth = grey(curve((RAMP / 255) ** gamma))
    assert distance(stored(Image.fromarray(RAMP), icc_profile=grey_profile(gamma)), truth) <= 1.5
    assert distance(stored(Image.fromarray(RAMP), "jpeg", quality=100, icc_profile=grey_profile(gamma)), truth) <= 6
    values = RAMP.astype(np.uint16) * 257
    assert distance(tiff(values, extra={34675: ("B", grey_profile(gamma))}), truth) <= 1.5
    image = Image.fromarray(RAMP).convert("LA")
    image.putalpha(51)
    assert distance(stored(image, icc_profile=grey_profile(gamma)), truth * 0.2 + 204) <= 1.5


def test_a_grey_image_with_a_profile_of_colors():
    """Cameras write those: the greys are the profile's."""
    truth = srgb_of(grey(RAMP), "prophoto")
    assert distance(stored(Image.fromarray(RAMP), "tiff", icc_profile=profile("prophoto")), truth) <= 1.5


@pytest.mark.parametrize("kind", ["jpeg", "tiff"])
def test_profiles_of_inks(kind):
    cyan, magenta, black, paper = (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 0, 255), (0, 0, 0, 0)
    inks = {cyan: (0, 255, 255), magenta: (255, 0, 255), black: (0, 0, 0), paper: (255, 255, 255)}
    options = {"quality": 100} if kind == "jpeg" else {}
    for swap in (False, True):
        for given, expected in inks.items():
            data = stored(Image.new("CMYK", (8, 8), given), kind, icc_profile=cmyk_profile(swap), **options)
            if swap and given in (cyan, magenta):
                expected = inks[magenta if given == cyan else cyan]
            assert np.abs(pixels(data) - expected).max() <= 4


def test_lab():
    image = Image.new("LAB", (4, 4), (136, 81 + 47, 70 + 58))  # L 53.3, as Pillow stores a and b: with 128 added
    lab = ImageCms.applyTransform(
        Image.fromarray(COLORS),
        ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"),
    )
    assert image.mode == lab.mode
    assert np.abs(pixels(stored(lab, "tiff")) - COLORS).mean() < 3  # 8 bits of Lab are coarse


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
@pytest.mark.parametrize("embedded", [False, True])
def test_srgb_images_keep_every_value(mode, embedded):
    image = Image.fromarray(np.dstack([np.tile(COLORS, (8, 8, 1)), np.tile(COLORS[..., :1], (8, 8, 1))])).convert(mode)
    srgb = {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()} if embedded else {}
    data = stored(image, **srgb)
    with Image.open(io.BytesIO(data)) as raw:
        decoded = decode_image(data)
        assert decoded.mode == raw.mode and decoded.format == "PNG"
        assert np.array_equal(np.asarray(decoded), np.asarray(raw))


@pytest.mark.parametrize(
    ("image", "icc"),
    [
        (Image.fromarray(COLORS), b"no profile at all"),
        (Image.fromarray(COLORS), profile("adobe")[:200]),
        (Image.fromarray(COLORS), grey_profile(1.0)),
        (Image.fromarray(COLORS), cmyk_profile()),
        (Image.fromarray(RAMP), cmyk_profile()),
        (Image.fromarray(COLORS).convert("CMYK"), profile("adobe")),
    ],
)
def test_profiles_of_no_use_are_ignored_and_said_once(image, icc, caplog):
    color._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = pixels(stored(image, "tiff", icc_profile=icc))
    assert np.array_equal(found, np.asarray(image.convert("RGB")) if image.mode != "L" else grey(RAMP))
    assert [r.message for r in caplog.records if "color profile" in r.message] == [caplog.records[0].message]
    assert "ignored" in caplog.records[0].message


def test_adobe_rgb_as_cameras_say_it():
    """In the EXIF data: color space "uncalibrated", interoperability index R03, and no profile."""
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA001] = 0xFFFF
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    blocks = Image.fromarray(COLORS[:4, :4].repeat(16, 0).repeat(16, 1))
    data = stored(blocks, "jpeg", quality=100, subsampling=0, exif=exif)
    truth = srgb_of(pixels(stored(blocks, "jpeg", quality=100, subsampling=0)), "adobe")
    assert b"R03" in data and np.abs(pixels(data) - truth).mean() < 0.6


@pytest.mark.parametrize(
    ("chunks", "space"),
    [
        ([png_chunk(b"gAMA", struct.pack(">I", 100000))], "linear"),
        ([png_chunk(b"gAMA", struct.pack(">I", 45455))], None),
        ([png_chunk(b"gAMA", struct.pack(">I", 100000)), png_chunk(b"sRGB", b"\0")], None),
        (
            [
                png_chunk(b"gAMA", struct.pack(">I", 45471)),
                png_chunk(b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)),
            ],
            "adobe",
        ),
        ([png_chunk(b"cICP", bytes([1, 8, 0, 1]))], "linear"),
        ([png_chunk(b"cICP", bytes([1, 13, 0, 1]))], None),
        ([png_chunk(b"cICP", bytes([9, 16, 0, 1]))], None),  # what is brighter than white has no place here
        ([png_chunk(b"gAMA", bytes(4))], None),
    ],
)
def test_colors_that_a_png_states_without_a_profile(chunks, space):
    truth = COLORS if space is None else srgb_of(COLORS, space)
    assert distance(with_chunks(stored(Image.fromarray(COLORS)), *chunks), truth) <= (0 if space is None else 1.5)


# ----------------------------------------------------------------------------------------------------------- metadata


@pytest.mark.parametrize(
    "chunks",
    [
        [png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 3_000_000))],
        [png_chunk(b"iTXt", b"parameters\0\1\0\0\0" + zlib.compress(b"b" * 3_000_000))],
        [png_chunk(b"tEXt", b"a\0" + b"b" * 500_000)] * 140,
        [png_chunk(b"tEXt", b"Comment\0wrong", check=1)],
        [png_chunk(b"gAMA", b"\0")],
        [png_chunk(b"iCCP", b"name\0\0broken")],
        [png_chunk(b"iCCP", b"name\0\7broken")],
        [png_chunk(b"pHYs", b"")],
    ],
    ids=range(8),
)
def test_pngs_with_metadata_of_all_kinds(chunks):
    data = with_chunks(stored(Image.fromarray(COLORS)), *chunks)
    assert distance(data, COLORS) == 0
    behind = stored(Image.fromarray(COLORS))
    assert distance(behind[:-12] + b"".join(c for c in chunks if b"iCCP" not in c) + behind[-12:], COLORS) == 0


def test_what_counts_survives_the_loss_of_the_rest():
    """A profile of more than a megabyte, an orientation, a transparent color, beside a text that is too long."""
    exif = Image.Exif()
    exif[0x0112] = 6
    padded = profile("swapped") + bytes(2_000_000)
    padded = struct.pack(">I", len(padded)) + padded[4:]
    chunks = [
        png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 3_000_000)),
        png_chunk(b"iCCP", b"name\0\0" + zlib.compress(padded)),
        png_chunk(b"eXIf", exif.tobytes()[6:]),
    ]
    truth = np.rot90(srgb_of(COLORS, "swapped"), -1)
    assert distance(with_chunks(stored(Image.fromarray(COLORS)), *chunks), truth) <= 1.5


def test_xmp_orientation_beside_a_long_text():
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta tiff:Orientation="6"/>'
    chunks = [png_chunk(b"iTXt", xmp), png_chunk(b"zTXt", b"c\0\0" + zlib.compress(b"a" * 3_000_000))]
    assert distance(with_chunks(stored(Image.fromarray(COLORS)), *chunks), np.rot90(COLORS, -1)) == 0


def exif_block(order: str, *entries: bytes, more: bytes = b"", count: int | None = None) -> bytes:
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    number = struct.pack(f"{order}H", len(entries) if count is None else count)
    return b"Exif\0\0" + head + number + b"".join(entries) + bytes(4) + more


def entry(order: str, tag: int, kind: int, count: int, value: int) -> bytes:
    field = struct.pack(f"{order}H2x", value) if kind == 3 else struct.pack(f"{order}I", value)
    return struct.pack(f"{order}HHI", tag, kind, count) + field


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda o: exif_block(o, entry(o, 0x112, 3, 1, 6), entry(o, 0x11A, 5, 1, 9_999_999)),  # behind the end
        lambda o: exif_block(o, entry(o, 0x112, 3, 1, 6), entry(o, 0x8769, 4, 1, 5_000)),  # a directory that is not
        lambda o: exif_block(o, entry(o, 0x112, 4, 1, 6), entry(o, 0x128, 99, 1, 2)),  # a type that is not
        lambda o: exif_block(o, entry(o, 0x112, 3, 1, 6), count=900),  # breaks off
        lambda o: exif_block(o, entry(o, 0x112, 3, 1, 6), entry(o, 0x11A, 2, 4, 0x61626300)),  # text for a ratio
        lambda o: exif_block(o, entry(o, 0x112, 4, 2, 26), more=struct.pack(f"{o}II", 6, 6)),  # twice
        lambda o: exif_block(o, entry(o, 0x112, 3, 1, 6), entry(o, 0x8825, 4, 1, 3), entry(o, 0xA005, 4, 1, 4)),
    ],
)
def test_broken_exif_data_with_a_valid_orientation(spoil, kind, order):
    image = Image.fromarray(COLORS.repeat(8, 0).repeat(8, 1))
    lossless = {"jpeg": {"quality": 95}, "webp": {"lossless": True}}.get(kind, {})
    plain = pixels(stored(image, kind, **lossless))
    exif = spoil(order)
    data = stored(image, kind, exif=exif, **lossless)
    assert distance(data, np.rot90(plain, -1)) == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("value", [0, 9, 255, 40000])
def test_orientations_that_are_none(value):
    exif = exif_block("<", entry("<", 0x112, 3, 1, value))
    assert distance(stored(Image.fromarray(COLORS), exif=exif), COLORS) == 0


def test_random_exif_data_are_no_reason_to_refuse_a_picture(recwarn):
    rng = np.random.RandomState(0)
    image = Image.fromarray(COLORS)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x0132] = 1, "maker of cameras", "2020:01:01 00:00:00"
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    good = exif.tobytes()
    plain = pixels(stored(image, "jpeg"))
    for _ in range(200):
        spoiled = bytearray(good)
        for place in rng.randint(6, len(good), 4):
            spoiled[place] = rng.randint(256)
        found = pixels(stored(image, "jpeg", exif=bytes(spoiled)))
        assert found.shape in (plain.shape, (14, 12, 3))  # the orientation itself may have been hit


def test_a_jpeg_whose_other_segments_are_broken():
    data = stored(Image.fromarray(COLORS), "jpeg")
    truth = pixels(data)
    for kind, body in (
        (0xE2, b"MPF\0II*\0" + bytes(6)),
        (0xED, b"Photoshop 3.0\x008BIM\4\4"),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe"),
    ):
        segment = struct.pack(">BBH", 0xFF, kind, len(body) + 2) + body
        assert distance(data[:2] + segment + data[2:], truth) == 0


@pytest.mark.filterwarnings("ignore")
def test_a_tiff_whose_metadata_are_broken():
    for extra in ({270: ("I", 10**9)}, {34665: ("I", 10**9)}, {33723: ("H", (1, 2, 3))}, {282: ("B", b"abc")}):
        assert distance(tiff(COLORS, extra=extra), COLORS) == 0
    assert distance(tiff(COLORS, extra={274: ("H", 6), 34665: ("I", 10**9)}), np.rot90(COLORS, -1)) == 0
    assert distance(tiff(COLORS.astype(np.float32) / 255, extra={274: ("H", 6)}), np.rot90(COLORS, -1)) <= 1
    values = tiff(COLORS.astype(np.uint16) * 257, deflate=True, extra={34675: ("B", profile("swapped"))})
    assert distance(values, srgb_of(COLORS, "swapped")) <= 2


# ------------------------------------------------------------------------------------------- formats by other packages

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
JXL = b"\xff\x0a" + bytes(100)


@pytest.mark.parametrize(("data", "package", "name"), [(HEIC, "pillow_heif", "HEIC"), (JXL, "pillow_jxl", "JPEG XL")])
def test_formats_that_take_another_package_are_refused_by_name(data, package, name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        BadImage, match=rf"{name} image, which takes make setup EXTRAS=images, or pip install -e '.\[images\]'"
    ):
        decode_image(data)
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(Exception, match=rf"a: not a readable image: {name} image, which takes make setup"):
        open_image(str(tmp_path / "a"))


def scene() -> Image.Image:
    """Red above blue, a green column at the left; 40 x 60 pixels."""
    image = Image.new("RGB", (40, 60), (200, 30, 30))
    image.paste((30, 30, 200), (0, 30, 40, 60))
    image.paste((30, 200, 30), (0, 0, 10, 60))
    return image


def test_heic():
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = 6
    data = stored(scene().transpose(Image.Transpose.ROTATE_90), "heif", exif=exif.tobytes(), quality=95)
    assert np.abs(pixels(data) - np.asarray(scene())).mean() < 3
    data = stored(scene(), "heif", icc_profile=profile("swapped"), quality=95)
    assert np.abs(pixels(data) - srgb_of(np.asarray(scene()), "swapped")).mean() < 4


@pytest.mark.filterwarnings("ignore:Using JPEG reconstruction")
def test_jpeg_xl(tmp_path):
    """The code stream's own orientation counts, by which its decoder turns the picture; EXIF's only in a whole JPEG."""
    pytest.importorskip("pillow_jxl")
    assert np.abs(pixels(stored(scene(), "jxl", lossless=True)) - np.asarray(scene())).max() == 0
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = scene().transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "a.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        assert np.abs(pixels(stored(image, "jxl")) - np.asarray(scene())).mean() < 6
    assert np.abs(pixels(stored(scene(), "jxl", exif=exif.tobytes(), quality=95)) - np.asarray(scene())).mean() < 6
    square = scene().resize((64, 64))
    data = stored(square, "jxl", quality=95)
    bits = [data[2 + i // 8] >> i % 8 & 1 for i in range(9)]  # a size of 8 n by 8 n; what follows is all default
    bits += [0, 1, *(1, 0, 1), *[0] * 6, 1, 0, 0, 1, 1, 1, 0, 0, 1]  # orientation 6, the rest as it was
    header = sum(bit << i for i, bit in enumerate(bits)).to_bytes(4, "little")
    found = pixels(data[:2] + header + data[4:])
    assert np.abs(found - np.rot90(np.asarray(square), -1)).mean() < 6


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (40, 60), (600, 500), (1920, 1080), (300, 9000), (256, 128)])
def test_sizes_of_jpeg_xl(size):
    pytest.importorskip("pillow_jxl")
    for container in (False, True):
        assert jxl_size(stored(Image.new("RGB", size), "jxl", effort=1, use_container=container)) == size


def test_a_jpeg_xl_bomb_is_not_decoded(monkeypatch):
    monkeypatch.setattr("ldm_lab.io.decoding._need_plugin", lambda *given: None)
    bits = [0, *(1, 1), *[1] * 30, *(1, 0, 0)]  # 2^30 x 2^30
    header = sum(bit << i for i, bit in enumerate(bits)).to_bytes(16, "little")
    with pytest.raises(BadImage, match="too many pixels"):
        decode_image(b"\xff\x0a" + header + bytes(50))
    with pytest.raises(BadImage, match="truncated"):
        decode_image(b"\xff\x0a" + header[:3])


def test_avif_and_other_endings():
    assert np.abs(pixels(stored(scene(), "avif", quality=95)) - np.asarray(scene())).mean() < 4
    assert {"jfif", "jpe", "avif", "heic", "jxl", "tif", "webp"} <= set(IMAGE_ENDINGS)
    assert len(set(IMAGE_ENDINGS)) == len(IMAGE_ENDINGS) and all(e == e.lower() for e in IMAGE_ENDINGS)


# -------------------------------------------------------------------------------------------------- one way for all


@pytest.mark.parametrize("name", ["ramp16.png", "adobe_rgb.png", "la_16x16.tif", "ztxt_2mb.png"])
def test_every_reader_sees_the_same_picture(name):
    """Training, scores, image prompts, and what sampling begins with; also pictures that Pillow has opened."""
    path = CASES / "images" / name
    truth = pixels(path)
    height, width = truth.shape[:2]
    with_pillow = name != "ztxt_2mb.png"
    for image in (open_image(str(path)), *([Image.open(path)] if with_pillow else [])):
        for seen in (to_rgb(image), flatten_alpha(image), center_crop_to(image, height, width)):
            assert np.array_equal(np.asarray(seen), truth)


@pytest.mark.parametrize("name", ["jfif", "la"])
def test_training_reads_all_images_of_a_shard_and_of_the_same_folder(name, tmp_path):
    shard = CASES / f"shards/{name}.tar"
    with tarfile.open(shard) as archive:
        archive.extractall(tmp_path, filter="data")
    expected = {"jfif": 40, "la": 3}[name]
    from_shard = module({"name": "webdataset", "shards": str(shard), "shuffle_buffer": 0}, epochs=1)
    from_folder = module({"name": "folder", "path": str(tmp_path)}, epochs=1)
    read = {tuple(b.image.shape[1:]) for data in (from_shard, from_folder) for b in take(data)}
    assert read == {(3, 8, 8)}
    for data in (from_shard, from_folder):
        assert "none skipped" in data.summary() and f"{expected} samples read" in data.summary()


def test_a_folder_of_all_endings_and_one_of_images_that_take_another_package(tmp_path, monkeypatch):
    endings = [ending for ending in IMAGE_ENDINGS if ending not in ("heic", "heif", "hif", "jxl")]
    for i, ending in enumerate(endings):
        (tmp_path / f"{i}.{ending.upper() if i % 2 else ending}").write_bytes(stored(Image.new("RGB", (32, 32))))
    assert len(keys(take(module({"name": "folder", "path": str(tmp_path)}, epochs=1)))) == len(endings)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "photo.HEIC").write_bytes(HEIC)
    data = module({"name": "folder", "path": str(tmp_path), "max_skipped": 0.5}, epochs=1)
    assert len(keys(take(data))) == len(endings)
    assert (
        "HEIC image, which takes make setup EXTRAS=images, or pip install -e '.[images]' 1 (e.g. photo.HEIC)"
        in data.summary()
    )


def test_training_and_scores_see_what_prompts_see():
    """A 16-bit, wide-gamut picture, cropped in training as it is for a prompt."""
    side = 24
    levels = np.random.RandomState(1).randint(0, 256, (side, side, 3))
    data = tiff(levels.astype(np.uint16) * 257, extra={34675: ("B", profile("swapped"))})
    source = build("data", {"name": "webdataset", "shards": "0.tar", "batch_size": 1, "image_size": side})
    trained = source.decode(RawSample("0", data), Order(0, 0)).image
    truth = srgb_of(levels, "swapped")
    assert np.abs(trained.permute(1, 2, 0).numpy() - truth).max() <= 1.5
    assert np.array_equal(trained.permute(1, 2, 0).numpy(), np.asarray(flatten_alpha(decode_image(data))))
