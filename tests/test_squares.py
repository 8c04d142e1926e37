"""The two roads from a file to the square that is trained on: odd files come out the same, plain JPEGs nearly so."""

import io
import os
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import module, take
from image_makers import cmyk_profile, grey_profile, png16, profile, stored, tiff
from PIL import Image, ImageCms

from ldm_lab.config import build
from ldm_lab.data.order import Order
from ldm_lab.data.samples import RawSample, SkippedSample
from ldm_lab.data.tar import write_shard
from ldm_lab.io import jpeg as jpegs
from ldm_lab.io import squares
from ldm_lab.io.color import BadImage
from ldm_lab.io.jpeg import WithoutComplaints, plain_jpeg, simple_size
from ldm_lab.io.squares import Place, read_square, resize_and_crop

CASES = Path(__file__).parent / "data" / "cases"
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Return an image that is hard to resize: black and white noise, and a part in colors."""
    random = np.random.RandomState(seed)
    pixels = random.randint(0, 2, (height, width, 3)).astype(np.uint8) * 255  # [H, W, 3]
    pixels[: height // 2] = random.randint(0, 256, (height // 2, width, 3))
    return Image.fromarray(pixels).convert(mode)


def exif(orientation: int | None = None, index: str | None = None) -> Image.Exif:
    block = Image.Exif()
    block[0x010F] = "a camera"
    if orientation is not None:
        block[0x0112] = orientation
    if index is not None:
        block.get_ifd(0x8769)[0xA001] = 0xFFFF
        block.get_ifd(0x8769)[0xA005] = {1: index}
    return block


def jpeg(image: Image.Image | None = None, **options) -> bytes:
    return stored(image or picture(50, 37), "jpeg", **options)


def seen(data: bytes, road: squares.Road, **options) -> np.ndarray | str:
    """Return the square of a road, int [3, 24, 24], or what is said against the file."""
    try:
        return read_square(data, 24, 0.3, 0.8, road, **options).numpy().astype(int)
    except BadImage as problem:
        return str(problem)


def apart(data: bytes, **options) -> int:
    """Return how many levels the two roads differ by at most; what is said against a file has to be the same."""
    exact, fast = (seen(data, road, **options) for road in ("exact", "fast"))
    if isinstance(exact, str) or isinstance(fast, str):
        assert exact == fast
        return 0
    return int(np.abs(exact - fast).max())


def with_scan_cut(data: bytes) -> bytes:
    """Return a JPEG whose pixels break off, but not the file: it has its end marker."""
    return data[: len(data) * 2 // 3] + b"\xff\xd9"


def met() -> dict[str, bytes]:
    """Return the image files that were met: name -> content."""
    found = {path.name: path.read_bytes() for path in sorted((CASES / "images").iterdir())}
    for name in ("la", "jfif", "dots"):
        with tarfile.open(CASES / f"shards/{name}.tar") as archive:
            for member in archive:
                if member.isfile() and not member.name.endswith((".txt", ".json")):
                    found[f"{name}/{member.name}"] = archive.extractfile(member).read()
    return found


ODD = {
    "turned": jpeg(exif=exif(6)),
    "turned by XMP": jpeg(xmp=b'<x:xmpmeta xmlns:tiff="t"><a tiff:Orientation="3"/></x:xmpmeta>'),
    "Adobe RGB": jpeg(icc_profile=profile("adobe")),
    "Adobe RGB by EXIF": jpeg(exif=exif(index="R03")),
    "grey profile": jpeg(picture(50, 37, mode="L"), icc_profile=grey_profile(1.0)),
    "inks": jpeg(picture(50, 37, mode="CMYK")),
    "inks with a profile": jpeg(picture(50, 37, mode="CMYK"), icc_profile=cmyk_profile(swap=True)),
    "PNG": stored(picture(50, 37)),
    "16-bit PNG": png16(np.arange(50 * 37).reshape(37, 50).astype(np.uint16) * 30),
    "WebP": stored(picture(50, 37), "webp"),
    "GIF": stored(picture(50, 37), "gif"),
    "TIFF": tiff(np.asarray(picture(50, 37))),
    "transparent": stored(picture(50, 37, mode="RGBA"), "png"),
    "truncated": jpeg()[:-600],
    "truncated in its last bytes": jpeg()[:-3],
    "without its end marker": jpeg()[:-2],
    "truncated progressive": jpeg(progressive=True)[:-600],
    "header alone": jpeg()[:300],
    "12 bits": (lambda data: data[: data.index(b"\xff\xc0") + 4] + b"\x0c" + data[data.index(b"\xff\xc0") + 5 :])(
        jpeg()
    ),
    "no JPEG at all": b"\xff\xd8\xff" + bytes(100),
    "strip": jpeg(picture(600, 30)),
    "broken tables": jpeg().replace(b"\xff\xc4", b"\xff\xc4\xff", 1),
}
PLAIN = {
    "baseline": jpeg(),
    "progressive": jpeg(progressive=True),
    "4:4:4": jpeg(subsampling=0, quality=95),
    "grey": jpeg(picture(50, 37, mode="L")),
    "RGB inside": jpeg(keep_rgb=True),
    "restart markers": jpeg(restart_marker_blocks=2),
    "EXIF, upright": jpeg(exif=exif(1)),
    "EXIF without orientation": jpeg(exif=exif()),
    "a profile of sRGB": jpeg(icc_profile=SRGB),
    "comment and XMP": jpeg(comment=b"hello", xmp=b"<x:xmpmeta/>"),
    "bytes behind its end": jpeg() + bytes(64),
    "cut scan with an end marker": with_scan_cut(jpeg()),
    "tall": jpeg(picture(30, 130)),
    "wide": jpeg(picture(130, 31)),
    "enlarged": jpeg(picture(11, 17)),
    "its own size": jpeg(picture(24, 24)),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_files_come_out_the_same_on_both_roads(name):
    assert apart(ODD[name]) == 0
    assert plain_jpeg(ODD[name]) is None or name == "strip"


def test_files_that_were_met_come_out_the_same_on_both_roads():
    files = met()
    plain = {name for name, data in files.items() if plain_jpeg(data) is not None}
    assert {Path(name).parts[0] for name in plain} == {"dots", "jfif", "la"} and len(files) > len(plain) + 10
    for name, data in files.items():
        assert apart(data) <= (2 if name in plain else 0), name


@pytest.mark.parametrize("name", PLAIN)
def test_plain_jpegs_take_the_fast_road_and_differ_by_two_levels_at_most(name):
    data = PLAIN[name]
    pixels = plain_jpeg(data)  # [3, H, W]
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(pixels.permute(1, 2, 0), image.convert("RGB"))
    assert apart(data) <= 2


def test_what_is_plain_takes_another_road_indeed(monkeypatch):
    """The fast one: else nothing here would be measured."""
    monkeypatch.setattr(squares, "decode_image", None)
    assert read_square(PLAIN["baseline"], 24, road="fast").shape == (3, 24, 24)
    with pytest.raises(TypeError):
        read_square(PLAIN["baseline"], 24, road="exact")


@pytest.mark.parametrize("size", [2, 7, 16, 33])
def test_both_roads_at_all_aspects(size):
    for seed in range(24):
        width, height = np.random.RandomState(seed).randint(3, 90, 2)
        height = height if seed % 3 else 2 * width + seed // 3 - 4  # near where Pillow takes the columns first
        data = jpeg(picture(int(width), max(3, int(height)), seed), quality=90)
        across, down = np.random.RandomState(seed).rand(2)
        exact, fast = (read_square(data, size, across, down, road).int() for road in ("exact", "fast"))
        assert exact.shape == fast.shape == (3, size, size)
        assert (exact - fast).abs().max() <= 2, (width, height, size)


def test_a_torchvision_without_a_decoder_leaves_decoding_to_pillow(monkeypatch):
    wanted = {name: read_square(data, 24, road="fast") for name, data in PLAIN.items()}
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    for name, data in {**PLAIN, **ODD}.items():
        assert apart(data) <= (2 if name in PLAIN else 0), name
        assert name in ODD or torch.equal(read_square(data, 24, road="fast"), wanted[name])


def test_one_pixel():
    assert apart(jpeg()) <= 2 and read_square(jpeg(), 1, road="fast").shape == (3, 1, 1)


@pytest.mark.parametrize("known", [True, False])
def test_cropping_before_resizing_changes_no_pixel(known, monkeypatch):
    """The parts that are cropped away are left out of the work, whatever order Pillow takes rows and columns in."""
    assert squares._order_is_known()
    monkeypatch.setattr(squares, "_order_is_known", lambda: known)
    for seed in range(60):
        random = np.random.RandomState(seed)
        (width, height), size = random.randint(2, 120, 2), int(random.randint(1, 50))
        height = height if seed % 3 else max(2, 2 * width + seed // 3 - 10)
        image, (across, down) = picture(int(width), int(height), seed), random.rand(2)
        place = Place.of(image.size, size, across, down)
        if place.is_strip:
            continue
        whole = image.resize((place.width, place.height), Image.Resampling.LANCZOS)
        assert resize_and_crop(image, size, across, down) == whole.crop(place.box), (image.size, size)


SIMPLE = {
    "color": {}, "grey": {"mode": "L"}, "progressive": {"progressive": True}, "with a comment": {"comment": b"hello"},
    "no subsampling": {"subsampling": 0, "optimize": True}, "restarts": {"restart_marker_blocks": 2},
}  # fmt: skip


@pytest.mark.parametrize("options", SIMPLE.values(), ids=SIMPLE)
def test_simple_headers_are_read_without_pillow(options, monkeypatch):
    data = as_jpeg(**options)
    expected = plain_jpeg(as_jpeg(**options, exif=exif(1)))
    monkeypatch.setattr(jpegs.Image, "open", None)
    assert simple_size(data) == (30, 20) and torch.equal(plain_jpeg(data), expected)


@pytest.mark.parametrize(
    "options",
    [{"mode": "CMYK"}, {"exif": exif(6)}, {"icc_profile": SRGB}, {"keep_rgb": True}],
    ids=["CMYK", "Exif", "profile", "RGB"],
)
def test_other_headers_are_left_to_pillow(options):
    assert simple_size(as_jpeg(**options)) is None


def test_a_header_that_is_simple_is_one_that_pillow_opens():
    """Whatever has become of it: any bytes changed, lost, or too many."""
    random, simple = np.random.RandomState(0), 0
    whole = [as_jpeg(**options) for options in (*SIMPLE.values(), {"mode": "CMYK"}, {"exif": exif(6)})]
    for _ in range(2000):
        data = bytearray(whole[random.randint(len(whole))])
        header = data.index(b"\xff\xda") + 2
        for _ in range(random.randint(1, 3)):
            place = random.randint(2, header)
            byte = (random.randint(256), 0, 255, data[place] ^ 1)[random.randint(4)]
            data[place : place + random.randint(2)] = [byte] * random.randint(2)
        if size := simple_size(bytes(data)):
            simple += 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = Image.open(io.BytesIO(data))
            assert image.size == size and image.mode in jpegs.MODES and jpegs._is_plain(image)
    assert simple > 200


def as_jpeg(mode: str = "RGB", **options) -> bytes:
    stream = io.BytesIO()
    picture(30, 20).convert(mode).save(stream, "JPEG", **options)
    return stream.getvalue()


@pytest.mark.parametrize("place", [-2000, -900, -300])
def test_what_libjpeg_says_of_a_damaged_file_is_kept_off_the_terminal(place, capfd):
    image = np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=90)
    damaged = bytearray(stream.getvalue())
    damaged[place] ^= 0x55
    assert plain_jpeg(bytes(damaged)) is not None and apart(bytes(damaged)) <= 2
    assert capfd.readouterr().err == ""


def test_what_others_write_while_a_jpeg_is_decoded_is_handed_on(capfd, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with WithoutComplaints():
        os.write(2, b"a line of another thread\nCorrupt JPEG data: 3 extraneous bytes before marker 0xd9\nand half")
    assert capfd.readouterr().err == "a line of another thread\nand half"
    with pytest.raises(KeyError), WithoutComplaints():
        raise KeyError
    os.write(2, b"the terminal")
    assert capfd.readouterr().err == "the terminal"


@pytest.mark.parametrize("road", ["fast", "exact"])
def test_limits_hold_on_both_roads(road):
    data = jpeg()  # 50 x 37
    assert isinstance(seen(data, road, min_size=37, max_pixels=50 * 37), np.ndarray)
    assert seen(data, road, min_size=38) == "too small"
    assert seen(data, road, max_pixels=50 * 37 - 1) == "too many pixels"


def test_a_torch_without_lanczos_leaves_it_to_pillow_and_says_so(tmp_path, monkeypatch):
    write_shard(tmp_path / "0.tar", [(f"{n}", {"jpg": jpeg(picture(40, 30, n))}) for n in range(4)])
    section = {"name": "webdataset", "shards": str(tmp_path / "0.tar"), "image_size": 16}
    exact = torch.cat([batch.image for batch in take(module({**section, "resize": "exact"}, epochs=1))[:1]])
    fast = torch.cat([batch.image for batch in take(module(section, epochs=1))[:1]])
    assert 0 < (fast - exact).abs().max() <= 2 / 127.5 + 1e-6
    assert not any("resize" in line for line in module(section).source.found())
    monkeypatch.setattr(squares.F, "interpolate", lambda *args, **options: (_ for _ in ()).throw(NotImplementedError))
    squares.torch_has_lanczos.cache_clear()
    try:
        assert torch.equal(torch.cat([batch.image for batch in take(module(section, epochs=1))[:1]]), exact)
        assert any("torch 2.12" in line for line in module(section).source.found())
        assert not any("resize" in line for line in module({**section, "resize": "exact"}).source.found())
    finally:
        squares.torch_has_lanczos.cache_clear()


@pytest.mark.parametrize("road", ["fast", "exact"])
def test_a_truncated_jpeg_is_skipped_by_the_same_words(road):
    options = {"name": "webdataset", "shards": "0.tar", "batch_size": 1, "image_size": 24, "resize": road}
    source = build("data", options)
    for name in ("truncated", "truncated in its last bytes", "without its end marker", "truncated progressive"):
        with pytest.raises(SkippedSample, match="truncated image: 7"):
            source.decode(RawSample("7", ODD[name]), Order(0, 0))


@pytest.mark.parametrize("road", ["fast", "exact"])
def test_a_mirrored_square_is_the_mirror_of_the_square(road):
    options = {"name": "webdataset", "shards": "0.tar", "batch_size": 1, "image_size": 24, "resize": road}
    sources = [build("data", {**options, "flip": flip}) for flip in (False, True)]
    order = Order(0, 0)
    pairs = [[its.decode(RawSample(f"{n}", jpeg()), order).image for its in sources] for n in range(12)]
    mirrored = [not torch.equal(one, other) for one, other in pairs]
    assert {*mirrored} == {False, True}
    assert all(torch.equal(one.flip(2) if turned else one, other) for turned, (one, other) in zip(mirrored, pairs))
