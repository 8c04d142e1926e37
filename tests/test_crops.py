"""Squares that are cut out of larger pictures: where they lie, what is too small, what a stage says of its size."""

import csv
import io
import re

import numpy as np
import pytest
import torch
from data_sets import keys, module, take, write_cache
from image_makers import stored
from PIL import Image
from test_imagen_stages import EFFICIENT, here, recipe  # noqa: F401
from test_squares import jpeg, picture

from ldm_lab.checkpoints.models import read_model
from ldm_lab.config import build
from ldm_lab.data.order import Order
from ldm_lab.data.samples import FilteredOut, RawSample, SkippedSample
from ldm_lab.errors import UserError
from ldm_lab.io.squares import read_square
from ldm_lab.training.caching import description_differences
from ldm_lab.training.laps import Laps

WHOLE = 2**31


def map_of(width: int, height: int) -> Image.Image:
    """Return an image whose red is x and whose green is y."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def source(**options):
    return build("data", {"name": "webdataset", "shards": "0.tar", "batch_size": 1, "image_size": 16, **options})


def write_folder(folder, sizes):
    folder.mkdir()
    for number, size in enumerate(sizes):
        (folder / f"{number:02}.png").write_bytes(stored(map_of(*size)))
    return {"name": "folder", "path": str(folder), "image_size": 16, "crop": "random"}


@pytest.mark.parametrize("road", ["fast", "exact"])
@pytest.mark.parametrize("given", [(60, 40), (31, 90), (24, 24)], ids=str)
def test_a_square_of_the_original_has_its_very_pixels(road, given):
    image = picture(*given)
    data = stored(image) if road == "exact" else jpeg(image, quality=95)
    pixels = np.asarray(image if road == "exact" else Image.open(io.BytesIO(data)).convert("RGB"))
    for across, down in ((0, 0), (1, 1), (0.3, 0.8)):
        square = read_square(data, 24, across, down, road, cut_from=WHOLE).permute(1, 2, 0)  # [24, 24, 3]
        left, top = round((given[0] - 24) * across), round((given[1] - 24) * down)
        assert np.array_equal(square, pixels[top : top + 24, left : left + 24])


@pytest.mark.parametrize("given", [(90, 61), (61, 90), (41, 300), (400, 48)], ids=str)
def test_a_square_of_a_reduced_picture_is_a_part_of_it(given):
    """On both roads; of a strip, too, that is cut before it is resized."""
    image = picture(*given)
    short = 40
    width, height = (int(short * side / min(given)) for side in given)
    whole = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS)).astype(int)
    for across, down in ((0, 0), (1, 1), (0.5, 0.25)):
        exact = read_square(stored(image), 24, across, down, cut_from=short).permute(1, 2, 0).numpy()
        left, top = round((width - 24) * across), round((height - 24) * down)
        assert np.abs(exact - whole[top : top + 24, left : left + 24]).max() <= (0 if max(given) <= 300 else 2)
        data = jpeg(image, quality=95)
        roads = [read_square(data, 24, across, down, road, cut_from=short).int() for road in ("fast", "exact")]
        assert (roads[0] - roads[1]).abs().max() <= 2
    assert roads[0].untyped_storage().nbytes() <= 4 * 24 * 24 * 3, "the picture it is cut from is not kept"


def test_random_squares_lie_anywhere_and_are_drawn_anew_in_each_epoch():
    data = stored(map_of(64, 48))
    cutting = source(crop="random", resize_to="original")
    places = set()
    for epoch in range(60):
        square = cutting.decode(RawSample("7", data), Order(0, epoch)).image  # [3, 16, 16]
        left, top = square[0, 0, 0].item(), square[1, 0, 0].item()
        assert torch.equal(square[0, 0], torch.arange(left, left + 16, dtype=torch.uint8)), "at full resolution"
        places.add((left, top))
    lefts, tops = ({place[axis] for place in places} for axis in (0, 1))
    assert len(places) > 50 and min(lefts) < 5 and max(lefts) > 43 and min(tops) < 4 and max(tops) > 28
    again = cutting.decode(RawSample("7", data), Order(0, 3)).image
    assert torch.equal(again, cutting.decode(RawSample("7", data), Order(0, 3)).image)
    assert not torch.equal(again, cutting.decode(RawSample("8", data), Order(0, 3)).image)
    center = source(resize_to="original").decode(RawSample("7", data), Order(0, 3)).image
    assert (center[0, 0, 0], center[1, 0, 0]) == (24, 16)


def test_larger_pictures_are_reduced_and_none_is_enlarged():
    cutting = source(resize_to=32)
    step = {}
    for side in (64, 32, 24, 16):
        square = cutting.decode(RawSample("7", stored(map_of(side, side))), Order(0, 0)).image.int()
        step[side] = (square[0, 8, 12] - square[0, 8, 4]).item() / 8  # pixels of the original between two of the square
    assert step == {64: 2, 32: 1, 24: 1, 16: 1}
    with pytest.raises(FilteredOut, match="too small"):
        cutting.decode(RawSample("7", stored(map_of(40, 15))), Order(0, 0))
    with pytest.raises(UserError, match=r"data\.resize_to: 12 is less than data\.image_size, 16"):
        source(resize_to=12)
    for wrong in (0, "largest", 1.5):
        with pytest.raises(UserError, match=r"data\.resize_to: .*'original'"):
            source(resize_to=wrong)


def test_what_is_too_small_as_asked_is_counted_and_no_reason_to_stop(tmp_path):
    """Half of the images are; `max_skipped` is for those that are broken."""
    folder = write_folder(tmp_path / "images", [(40, 30), (15, 99)] * 6)
    for asked in ({"resize_to": "original"}, {"resize_to": 16}, {"min_size": 17}):
        data = module({**folder, **asked, "max_skipped": 0.0}, epochs=1)
        assert keys(take(data)) and dict(data.filtered) == {"too small": 6} and not data.skipped
        assert "6 left out as asked (50.0%): too small 6 (e.g. " in data.summary()
    unasked = source().decode
    with pytest.raises(SkippedSample, match="too small") as raised:
        unasked(RawSample("7", stored(map_of(15, 20))), Order(0, 0))
    assert not isinstance(raised.value, FilteredOut), "nobody asked: a sign of a broken data set"


def test_a_resumed_run_has_the_squares_of_one_that_was_not_stopped(tmp_path):
    folder = write_folder(tmp_path / "images", [(60 + n, 50) for n in range(12)])
    section = {**folder, "resize_to": 48, "flip": True, "batch_size": 3}
    whole = take(module(section, epochs=2))
    first = module(section, epochs=2)
    begun = take(first, 3)
    second = module(section, epochs=2)
    second.load_rank_states([first.rank_state()], 0)
    both = begun + take(second)
    assert [batch.key for batch in both] == [batch.key for batch in whole] and len(whole) == 8
    assert all(torch.equal(one.image, other.image) for one, other in zip(both, whole))


def test_a_cache_knows_what_its_squares_were_cut_from(tmp_path):
    for stated, size in ((None, 8), (32, 32), ("original", None)):
        facts = {"image_size": 8, **({"data.resize_to": stated} if stated else {})}
        write_cache(tmp_path / str(stated), {"image": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)}, 4, **facts)
        cache = build("data", {"name": "cache", "path": str(tmp_path / str(stated)), "batch_size": 2})
        cache.open()
        assert (cache.image_size, cache.picture_size) == (8, size)
    before = {"image_size": "8"}  # of a cache from before there was the option
    assert description_differences(before, {**before, "data.resize_to": "null"}) == []
    assert description_differences(before, {**before, "data.resize_to": "32"}) == ["data.resize_to"]


def test_a_stage_trained_on_squares_is_one_of_the_pictures_that_they_are_cut_from(here, program):  # noqa: F811
    """It enlarges 32 px to 64, which is what sampling checks; its log tells where the time goes."""
    data = {**write_folder(here / "images", [(70, 64), (64, 90)] * 4), "batch_size": 2, "workers": 0, "resize_to": 64}
    config = recipe(
        here, "sr64", 16, data=data, denoiser={**EFFICIENT, "attention_levels": []},
        condition_sources={"noised_low_res": {"scale_factor": 2}},
        trainer={"accelerator": "cpu", "max_steps": 3, "threads": 1, "accumulate_grad_batches": 2},
        held_out={"data": {**data, "resize_to": 32}, "samples": 2, "levels": 1, "every": 3},
    )  # fmt: skip
    code, out, err = program("train", "--config", config)
    assert code == 0, err
    assert "data.min_size" not in out + err, "nothing is enlarged"
    assert "held_out.data.resize_to: is not data.resize_to, and losses depend on it" in out + err
    for name in ("ema.safetensors", "last.ckpt"):
        loaded, _, extra = read_model(here / "runs/sr64" / name)
        assert extra["image_size"] == "64" and loaded["condition_sources"]
    rows = list(csv.DictReader((here / "runs/sr64/metrics.csv").read_text().splitlines()))
    *_, last = rows
    parts = {name: float(last[f"speed/{name}_s"]) for name in ("fetch", "encode", "loss", "update", "rest")}
    assert all(seconds > 0 for seconds in parts.values()) and float(last["train/grad_norm"]) > 0
    assert sum(parts.values()) == pytest.approx(4 / float(last["speed/images_per_s"]), rel=0.05), "seconds a step"


def test_laps_are_summed_by_name_and_begin_anew_when_taken():
    nothing = Laps()
    nothing.begin()
    nothing.lap("loss")
    assert nothing.take() == {}
    laps = Laps(torch.device("cpu"))
    laps.lap("loss")
    assert laps.take() == {}, "nothing has begun"
    for _ in range(2):
        laps.begin()
        laps.lap("encode")
        laps.lap("loss")
    taken = laps.take()
    assert list(taken) == ["encode", "loss"] and all(seconds > 0 for seconds in taken.values())
    assert laps.take() == {}


def test_on_a_gpu_laps_are_times_between_events_of_its_queue(monkeypatch):
    """Nothing waits but `take`, or what would hold more events than it should, for one that is long done."""
    clock, waited = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.at = clock[0]

        def synchronize(self):
            waited.append(self.at)

        def elapsed_time(self, other):
            return other.at - self.at  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr("ldm_lab.training.laps.MOST_PENDING", 8)
    laps, steps = Laps(torch.device("cuda")), 20
    for _ in range(steps):
        clock[0] += 1000  # between two steps, of nobody
        laps.begin()
        for name, took in (("encode", 100), ("loss", 500), ("update", 50)):
            clock[0] += took
            laps.lap(name)
    assert waited and max(waited) < clock[0] and len(laps.pending) <= 9
    assert laps.take() == pytest.approx({"encode": 0.1 * steps, "loss": 0.5 * steps, "update": 0.05 * steps})
    assert waited[-1] == clock[0] and laps.take() == {}


@pytest.mark.slow
def test_both_stages_of_a_cascade_learn_from_images_of_many_sizes(here, program):  # noqa: F811
    """A base of whole pictures, a stage of squares cut out of them: losses fall, what is too small is counted."""
    (here / "images").mkdir()
    for number in range(48):
        large = number % 4  # every fourth is too small for the squares
        image = picture_of_waves(number).resize((90 + number, 70) if large else (30, 40))
        (here / f"images/{number:02}.jpg").write_bytes(stored(image, "jpeg"))
        (here / f"images/{number:02}.txt").write_text("waves")
    data = {"name": "folder", "path": str(here / "images"), "batch_size": 8, "workers": 0}
    run = {"trainer": {"accelerator": "cpu", "max_steps": 120, "threads": 1}, "optim": {"lr": 3e-3}, "ema": None}
    base = recipe(here, "base", 16, data={**data, "image_size": 16, "crop": "random"}, **run)
    stage = recipe(
        here, "sr", 32, data={**data, "image_size": 32, "crop": "random", "resize_to": 64, "flip": True},
        denoiser={**EFFICIENT, "attention_levels": []}, condition_sources={"noised_low_res": {"most": 0.3}}, **run,
    )  # fmt: skip
    for config, name in ((base, "base"), (stage, "sr")):
        code, out, err = program("train", "--config", config)
        assert code == 0, err
        rows = list(csv.DictReader((here / f"runs/{name}/metrics.csv").read_text().splitlines()))
        loss = [float(row["train/loss"]) for row in rows]
        assert np.mean(loss[-20:]) < 0.9 * np.mean(loss[:10]), (name, np.mean(loss[:10]), np.mean(loss[-20:]))
        left_out = re.search(r"left out as asked \(([\d.]+)%\): too small", out)
        assert (float(left_out[1]) if left_out else 0) == pytest.approx(25 if name == "sr" else 0, abs=1)


def picture_of_waves(number: int) -> Image.Image:
    """Return a soft image in two colors, another one for each number."""
    y, x = np.mgrid[:64, :64] / 64
    phase = np.sin(2 * np.pi * (x * (1 + number % 3) + y * (number % 2) + number / 48)) / 2 + 0.5  # [64, 64]
    colors = np.random.RandomState(number).randint(0, 256, (2, 3))
    return Image.fromarray((phase[..., None] * colors[0] + (1 - phase[..., None]) * colors[1]).astype(np.uint8))
