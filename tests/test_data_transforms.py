"""Every kind of image comes out as upright RGB of the right values, size and place."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ldm_lab.config import build
from ldm_lab.data.order import Order
from ldm_lab.data.samples import RawSample
from ldm_lab.io.images import BadImage, decode_image, to_rgb
from ldm_lab.io.squares import resize_and_crop


def stored(image: Image.Image, kind: str = "png", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixel(data: bytes) -> tuple[int, int, int]:
    image = to_rgb(decode_image(data))
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def palette(transparency: int | bytes | None) -> bytes:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return stored(image, transparency=transparency) if transparency is not None else stored(image)


def animated(*colors: str) -> bytes:
    first, *others = (Image.new("RGB", (4, 4), color) for color in colors)
    return stored(first, "gif", save_all=True, append_images=others)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (stored(Image.new("RGB", (4, 4), (200, 100, 50))), (200, 100, 50)),
        (stored(Image.new("L", (4, 4), 77)), (77, 77, 77)),
        (stored(Image.new("1", (4, 4), 1)), (255, 255, 255)),
        (stored(Image.new("LA", (4, 4), (100, 0))), (255, 255, 255)),
        (stored(Image.new("LA", (4, 4), (0, 51))), (204, 204, 204)),
        (stored(Image.new("RGBA", (4, 4), (255, 0, 0, 255))), (255, 0, 0)),
        (stored(Image.new("RGBA", (4, 4), (255, 0, 0, 0))), (255, 255, 255)),
        (stored(Image.new("RGBA", (4, 4), (0, 100, 200, 51))), (204, 224, 244)),
        (stored(Image.new("RGB", (4, 4), (9, 8, 7)), transparency=(9, 8, 7)), (255, 255, 255)),
        (stored(Image.new("L", (4, 4), 9), transparency=9), (255, 255, 255)),
        (palette(None), (200, 100, 50)),
        (palette(1), (255, 255, 255)),
        (palette(bytes([255, 51])), (244, 224, 214)),
        (stored(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "tiff"), (255, 0, 0)),
        (stored(Image.new("CMYK", (4, 4), (0, 0, 0, 255)), "jpeg", quality=100), (0, 0, 0)),
        (stored(Image.new("YCbCr", (4, 4), (128, 128, 128)), "tiff"), (128, 128, 128)),
        (animated("red", "blue"), (254, 0, 0)),
        (b"P5 1 1 65535\n" + struct.pack(">H", 257 * 100), (100, 100, 100)),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else str(value),
)
def test_modes(data, expected):
    assert np.abs(np.subtract(pixel(data), expected)).max() <= 1


@pytest.mark.parametrize(("value", "level"), [(0, 0), (128, 0), (129, 1), (257 * 180, 180), (65535, 255)])
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bits(value, level, kind):
    image = Image.fromarray(np.full((4, 4), value, dtype=np.uint16))
    assert image.mode == "I;16"
    assert pixel(stored(image, kind)) == (level,) * 3


def test_sixteen_bit_integers():
    assert pixel(stored(Image.fromarray(np.full((4, 4), 257 * 60, dtype=np.int32)), "tiff")) == (60, 60, 60)


def test_transparency_goes_before_the_resize():
    """A transparent pixel has a color of its own, which must not bleed into its neighbors."""
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 255))
    image.paste((0, 0, 255, 0), (32, 0, 64, 64))
    shrunk = np.asarray(resize_and_crop(to_rgb(decode_image(stored(image))), 8))  # [8, 8, 3]
    assert (shrunk[:, 0] == (255, 0, 0)).all() and (shrunk[:, -1] == 255).all()
    assert (np.abs(shrunk[..., 2].astype(int) - shrunk[..., 1]) <= 1).all()  # red and white mix without any blue


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation):
    """All eight EXIF orientations of one scene show it upright: red above blue, a green column at the left."""
    upright = Image.new("RGB", (40, 60), (255, 0, 0))
    upright.paste((0, 0, 255), (0, 30, 40, 60))
    upright.paste((0, 255, 0), (0, 0, 10, 60))
    turn = Image.Transpose
    stored_as = {
        1: None, 2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE, 6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270,
    }[orientation]  # fmt: skip
    image = upright if stored_as is None else upright.transpose(stored_as)
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = decode_image(stored(image, "png", exif=exif))
    assert np.array_equal(np.asarray(seen), np.asarray(upright))


@pytest.mark.parametrize(
    ("given", "resized", "left", "top"),
    [
        ((300, 281), (34, 32), 1, 0),  # 34.16
        ((31, 64), (32, 66), 0, 17),  # 66.06
        ((7, 9), (32, 41), 0, 4),  # 41.14; 4.5 rounds to even
        ((45, 333), (32, 236), 0, 102),  # 236.8
        ((32, 35), (32, 35), 0, 2),  # 1.5 rounds to even
    ],
)
def test_resize_and_center_crop_are_the_originals(given, resized, left, top):
    """Torchvision's: the long side rounded down, the crop's place to the nearest, halves to even."""
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (*given[::-1], 3), dtype=np.uint8))
    reference = image.resize(resized, Image.Resampling.LANCZOS).crop((left, top, left + 32, top + 32))
    assert np.array_equal(resize_and_crop(image, 32), reference)


def test_crop_place():
    image = Image.fromarray(np.arange(256, dtype=np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2))
    left, middle, right = (np.asarray(resize_and_crop(image, 64, across))[0, 0, 0] for across in (0, 0.5, 1))
    assert (left, middle, right) == (0, 96, 192)


def test_a_long_strip_is_cut_before_it_is_resized():
    """Else 16 x 20000 pixels would become 64 x 80000; the place of the crop is the same."""
    row = np.linspace(0, 255, 20000).astype(np.uint8)  # [20000]
    strip = Image.fromarray(np.broadcast_to(row[None, :, None], (16, 20000, 3)).copy())
    for across in (0, 0.5, 1):
        square = np.asarray(resize_and_crop(strip, 64, across))  # [64, 64, 3]
        assert square.shape == (64, 64, 3)
        assert np.abs(square.astype(int) - int(255 * across)).max() <= 2


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: b"", "undecodable image"),
        (lambda data: b"GIF89a" + bytes(20), "undecodable image"),
        (lambda data: b"<html>not found</html>", "undecodable image"),
        (lambda data: data[: len(data) // 2], "truncated image"),
        (lambda data: data[:20], "undecodable image"),
    ],
)
@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_broken_bytes(spoil, reason, kind):
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8))
    with pytest.raises(BadImage) as error:
        decode_image(spoil(stored(noise, kind)))
    assert str(error.value) in (reason, "truncated image")
    if reason == "truncated image":
        assert str(error.value) == reason


def test_a_decompression_bomb_is_not_decoded():
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    with pytest.raises(BadImage, match="too many pixels"):
        decode_image(data)


def test_float_images_are_shares_of_white():
    assert pixel(stored(Image.new("F", (4, 4), 0.5), "tiff")) == (128, 128, 128)


def test_float_images_of_no_known_range_are_refused():
    with pytest.raises(BadImage, match="unknown range of values"):
        decode_image(stored(Image.new("F", (4, 4), 7.5), "tiff"))


@pytest.mark.filterwarnings("ignore")
def test_every_malformed_byte_string_is_a_bad_image():
    """Whatever a decoder raises, the reader goes on."""
    rng = np.random.RandomState(0)
    noise = Image.fromarray(rng.randint(0, 256, (16, 16, 3), dtype=np.uint8))
    usable = 0
    for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm"):
        data = stored(noise, kind)
        for _ in range(40):
            spoiled = bytearray(data)
            for place in rng.randint(0, min(len(spoiled), 200), 4):
                spoiled[place] = rng.randint(256)
            try:
                usable += to_rgb(decode_image(bytes(spoiled))).mode == "RGB"
            except BadImage:
                continue
    assert usable


def test_decoded_values_and_flip():
    """The model's range, and that about half of the images are mirrored, the same ones every time."""
    options = {"name": "webdataset", "shards": "0.tar", "batch_size": 1, "image_size": 32, "flip": True}
    source = build("data", options)
    ramp = np.arange(32, dtype=np.uint8)[None, :, None].repeat(32, 0).repeat(3, 2) * 8  # [32, 32, 3]
    data = stored(Image.fromarray(ramp))
    order = Order(seed=3, epoch=0)
    decoded = [source.decode(RawSample(f"{n}", data, b"\xef\xbb\xbf a cat \n"), order) for n in range(200)]
    mirrored = [bool(s.image[0, 0, 0] > s.image[0, 0, -1]) for s in decoded]
    assert 70 < sum(mirrored) < 130
    assert decoded[0].text == "a cat"
    again = [source.decode(RawSample(f"{n}", data), order).image for n in range(200)]
    assert all((a == b.image).all() for a, b in zip(again, decoded))
    batch = source.to_device_format(source.collate(decoded))
    assert batch.image.shape == (200, 3, 32, 32)
    assert batch.image.min() == -1 and batch.image.max() == pytest.approx(248 / 127.5 - 1, abs=1e-6)
    assert batch.key[5] == "5"
