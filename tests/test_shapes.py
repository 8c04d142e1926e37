"""The built-in shapes: what is drawn, what is said about it, how it is kept, and the checker that reads it back."""

import hashlib
import itertools
import json
import random
import re
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from tiny import AUTOENCODER, CLOOB, DENOISER

from ldm_lab import config
from ldm_lab.config import check_section
from ldm_lab.data import shapes
from ldm_lab.data.datamodule import DataModule
from ldm_lab.data.shape_wordings import HELD_OUT_FAMILIES, WORDINGS
from ldm_lab.errors import UserError
from ldm_lab.evaluation.shapes_checker import check
from ldm_lab.sampling import Model, Pipeline, SamplingOptions

# Of the pixels that seed 0 draws. Another Pillow may round an edge differently: then look at the picture and renew it.
RECORDED = "144dea5a0c9813ab02750a4b9dc93ef90dd0e4f33abf0314d8bb83c1e5f44ad3"


def noisy(image: Image.Image) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 20, (64, 64, 3))  # [64, 64, 3], in 8-bit levels
    return np.clip(np.asarray(image) + noise, 0, 255)  # [64, 64, 3]


@pytest.mark.parametrize(
    ("degrade", "least"),
    [
        (lambda image: image, 0.99),
        (lambda image: image.filter(ImageFilter.GaussianBlur(2)), 0.99),
        (lambda image: image.reduce(4).resize((64, 64), Image.Resampling.BICUBIC), 0.99),
        (noisy, 0.99),
        (lambda image: image.reduce(8).resize((64, 64), Image.Resampling.BICUBIC), 0.8),
    ],
    ids=["drawn", "blurred", "coarse", "noisy", "8x8 pixels"],
)
def test_checker_reads_what_was_drawn(degrade, least):
    right = 0
    for index in range(500):
        image, attributes = shapes.draw(f"checker/{index}")
        right += check(degrade(image)) == (attributes.color, attributes.shape, attributes.background)
    assert right / 500 >= least


def test_checker_reads_the_smallest_drawings():
    """Those of the quickstart cascade's base, in which soft edges are most of a shape."""
    drawn = [shapes.draw(f"small/{index}", 16) for index in range(300)]
    assert sum(tuple(check(image)) == attributes[:3] for image, attributes in drawn) >= 0.99 * 300


def test_checker_takes_every_size_and_tells_shapes_of_one_kind_apart():
    for size in (32, 64, 128):
        for shape in shapes.SHAPES:
            attributes = shapes.Attributes("red", shape, "white", 0.6, 0.5, 0.5, 5)
            assert check(shapes.render(attributes, size)) == ("red", shape, "white")


def test_checker_reads_an_image_without_a_shape():
    reading = check(Image.new("RGB", (64, 64), (240, 240, 240)))
    assert reading.background == "white" and reading.color != "white"


def test_drawing_is_a_function_of_the_seed():
    image, attributes = shapes.draw(0)
    again, same = shapes.draw(random.Random(0))
    other, _ = shapes.draw(1)
    assert image.size == (64, 64) and image.mode == "RGB"
    assert hashlib.sha256(image.tobytes()).hexdigest() == RECORDED
    assert image.tobytes() == again.tobytes() != other.tobytes() and attributes == same


def test_drawings_stay_inside_and_cover_all_kinds():
    kinds = Counter()
    for index in range(4000):
        _, a = shapes.draw(f"kinds/{index}", 16)
        kinds[a.color, a.shape, a.background] += 1
        assert a.color != a.background
        assert all(a.extent / 4 < middle < 1 - a.extent / 4 for middle in (a.x, a.y))
    assert len(kinds) == 8 * 6 * 7
    assert max(kinds.values()) < 10 * min(kinds.values())


def test_frame_is_background():
    for index in range(100):
        image, a = shapes.draw(f"frame/{index}")
        frame = np.asarray(image).astype(int)  # [64, 64, 3]
        for edge in (frame[:2], frame[-2:], frame[:, :2], frame[:, -2:]):
            assert np.abs(edge - shapes.COLORS[a.background]).max() <= shapes.JITTER


def test_variety_says_how_much_images_of_a_kind_differ():
    for variety, off in ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0)):
        drawn = [shapes.draw(f"variety/{index}", 16, variety)[1] for index in range(300)]
        extents, angles = [a.extent for a in drawn], [a.angle for a in drawn]
        low, high = shapes.EXTENT
        assert max(map(abs, angles)) == pytest.approx(off * shapes.ANGLE, rel=0.05)
        assert max(extents) - min(extents) == pytest.approx(off * (high - low), rel=0.05)
        assert variety or all((a.x, a.y) == (0.5, 0.5) for a in drawn)
    image, attributes = shapes.draw("plain", 64, 0.0)
    assert image.tobytes() == shapes.render(attributes).tobytes()  # no other shade either


def test_captions_say_what_is_there_and_nothing_else():
    for wording in itertools.chain(WORDINGS, *HELD_OUT_FAMILIES.values()):
        for index in range(20):
            _, attributes = shapes.draw(f"caption/{index}", 16)
            words = re.findall(r"[a-z]+", shapes.caption(attributes, wording))
            assert [w for w in words if w in shapes.SHAPES] == [attributes.shape]
            assert sorted(w for w in words if w in shapes.COLORS) == sorted([attributes.color, attributes.background])


def test_captions_are_in_the_first_so_many_wordings():
    _, attributes = shapes.draw(3, 16)
    for wordings in (3, None):
        drawn = {shapes.random_caption(attributes, random.Random(seed), wordings) for seed in range(500)}
        assert drawn == {shapes.caption(attributes, wording) for wording in WORDINGS[:wordings]}


# -------------------------------------------------------------------------------------------------------- shards


def test_shards_have_img2dataset_layout(tmp_path):
    paths = shapes.write_shards(tmp_path / "shapes", count=10, shards=3, size=32, seed=7)
    assert [path.name for path in paths] == ["00000.tar", "00001.tar", "00002.tar"]
    keys = []
    for path in paths:
        with tarfile.open(path) as archive:
            names = archive.getnames()
            for key in sorted({name.partition(".")[0] for name in names}):
                about = json.load(archive.extractfile(f"{key}.json"))
                text = archive.extractfile(f"{key}.txt").read().decode()
                image = Image.open(archive.extractfile(f"{key}.png"))
                assert image.size == (32, 32) and about["key"] == key and about["caption"] == text
                assert {about["color"], about["shape"], about["background"]} <= set(re.findall("[a-z]+", text))
                keys.append(key)
    assert len(set(keys)) == 10 and keys[:2] == ["000000000", "000000001"] and keys[3] == "000010000"


def test_shards_are_written_once_and_the_same_everywhere(tmp_path):
    def contents(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    with ThreadPoolExecutor(4) as pool:  # as the ranks of a run would
        for paths in pool.map(lambda _: shapes.write_shards(tmp_path / "a", 12, 3, 16), range(4)):
            assert all(path.is_file() for path in paths)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    shapes.write_shards(tmp_path / "a", 12, 3, 16)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    shapes.write_shards(tmp_path / "b", 12, 3, 16)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]  # no drafts left


def test_other_shapes_are_not_overwritten(tmp_path):
    shapes.write_shards(tmp_path / "shapes", 4, 2, 16)
    with pytest.raises(UserError, match="count 4, not 5"):
        shapes.write_shards(tmp_path / "shapes", 5, 2, 16)
    with pytest.raises(UserError, match=r"variety 1\.0, not 0\.5"):
        shapes.write_shards(tmp_path / "shapes", 4, 2, 16, variety=0.5)
    with pytest.raises(UserError, match="wordings None, not 3"):
        shapes.write_shards(tmp_path / "shapes", 4, 2, 16, wordings=3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds other files than shapes"):
        shapes.write_shards(tmp_path / "mine", 4, 2, 16)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_source_gives_batches(tmp_path):
    section = {
        "name": "shapes",
        "folder": str(tmp_path / "shapes"),
        "count": 12,
        "shards": 2,
        "image_size": 32,
        "batch_size": 4,
        "workers": 0,
        "require_text": True,
    }
    data = DataModule(config.build("data", section), seed=0, epochs=1)
    data.prepare_data()
    data.setup()
    batches = list(data.train_dataloader())
    assert [tuple(batch.image.shape) for batch in batches] == [(4, 3, 32, 32)] * 3
    assert len({key for batch in batches for key in batch.key}) == 12
    for batch in batches:
        for image, text in zip(batch.image, batch.text):
            pixels = (image.permute(1, 2, 0).numpy() + 1) * 127.5  # [32, 32, 3]
            assert set(check(pixels)) <= set(re.findall("[a-z]+", text))


def test_source_refuses_what_cannot_be():
    section = {"name": "shapes", "folder": "x", "batch_size": 1, "image_size": 16, "count": 3, "shards": 4}
    (problem,) = check_section("data", section, "data")
    assert problem == "data.count: 3 images do not fill 4 shards; at least one in each is needed"
    problems = check_section("data", {**section, "image_size": 8, "variety": 2.0, "wordings": 21}, "data")
    assert problems == [
        "data.image_size: at least 16 is needed, not 8",
        "data.variety: a number from 0 to 1 is needed, not 2.0",
        "data.wordings: a number from 1 to 20 or 'grammar' is needed, not 21",
    ]


# ----------------------------------------------------------------------------------------------------- benchmark


def test_benchmark_asks_for_everything_evenly():
    from benchmarks import quickstart_accuracy as benchmark

    kinds = benchmark.kinds()
    assert len(set(kinds)) == 96 and all(color != background for color, _, background in kinds)
    assert set(Counter((color, shape) for color, shape, _ in kinds).values()) == {2}
    assert set(Counter(background for _, _, background in kinds).values()) == {12}
    for wordings in benchmark.FAMILIES.values():
        prompts = benchmark.prompts(wordings)
        assert len(set(prompts)) == 96
        for wording in wordings:  # none with one color alone
            colors = [names[0] for names, prompt in zip(kinds, prompts) if prompt == benchmark.say(names, wording)]
            assert len(set(colors)) == min(len(colors), 8) >= 4
        assert all(set(names) <= set(re.findall("[a-z]+", prompt)) for names, prompt in zip(kinds, prompts))


def test_benchmark_counts_what_is_right():
    from benchmarks.quickstart_accuracy import shares

    read = [("red", "star", "blue"), ("red", "ring", "blue"), ("cyan", "star", "blue"), ("red", "star", "blue")]
    assert shares(read, [("red", "star", "blue")] * 4) == [0.75, 0.75, 1.0, 0.5]


def test_benchmark_measures_a_model():
    from benchmarks.quickstart_accuracy import measure

    torch.manual_seed(0)
    autoencoder = config.build("autoencoder", AUTOENCODER).eval()
    conditioner = config.build("conditioner", CLOOB).eval()
    denoiser = config.build("denoiser", DENOISER, autoencoder.channels, conditioner.spec)
    objective = config.build("objective", {"name": "v_cosine"})
    shown = []
    rows = measure(
        Pipeline(Model(denoiser, objective, autoencoder, conditioner, dropout=0.2, image_size=(64, 64))),
        SamplingOptions(sampler={"name": "ddim", "steps": 1}, batch_size=96),
        drawings=8,
        families={"usual wordings": WORDINGS[:2], "one other": ["a {color} {shape} over {background}"]},
        show=lambda row, pictures, prompts: shown.append((row, len(pictures), len(prompts))),
    )
    assert rows["drawn afresh"] == (8, [1.0] * 4)
    assert all(0 <= share <= 1 for row in rows.values() for share in row.right)
    assert rows["reconstructed"].right[3] < 0.5 and rows["usual wordings"].right[3] < 0.5  # nothing here was trained
    assert shown == [("usual wordings", 96, 96), ("one other", 96, 96)]
    assert [rows[f"{family}, read by CLOOB"].count for family, *_ in shown] == [2 * 336, 336]


def test_benchmark_tells_the_mean_of_several_models():
    from benchmarks.quickstart_accuracy import Row, mean_lines

    one, two = ({"usual wordings": Row(96, [share] * 4)} for share in (0.9, 1.0))
    assert [line.split() for line in mean_lines([one])][1] == ["usual", "wordings", *["90.0%"] * 4, "96"]
    line = list(mean_lines([one, two]))[1]
    assert line.split() == ["usual", "wordings", *["95.0%"] * 4, "90.0%", "100.0%", "96"]
