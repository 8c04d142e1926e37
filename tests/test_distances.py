"""Distances between sets of features, against other programs' ways of computing them and on recorded sets."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file

from ldm_lab.checkpoints.parts import load_part
from ldm_lab.data.shapes import draw
from ldm_lab.errors import UserError
from ldm_lab.evaluation import distances
from ldm_lab.evaluation.distances import Moments, cmmd, frechet, kid, polynomial_mmd, precision, recall
from ldm_lab.evaluation.feature_files import FEATURES, PictureRows
from ldm_lab.evaluation.features import EmbeddingFeatures, rows_of
from ldm_lab.evaluation.metrics import RealSet, by_bootstrap, distance, few_images, over_seeds, student_quantile

ROOT = Path(__file__).resolve().parents[1]
RECORDED = ROOT / "tests" / "data" / "evaluation"


@pytest.fixture(scope="module")
def recorded() -> dict[str, torch.Tensor]:
    return load_file(RECORDED / "sets.safetensors")


def by_scipy(x: np.ndarray, y: np.ndarray) -> float:
    """Return the Fréchet distance as pytorch-fid's users know it."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(np.real(root)))


def cmmd_by_loops(x: np.ndarray, y: np.ndarray) -> float:
    """Return CMMD pair by pair, as its paper's formula reads."""

    def mean(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.mean([np.exp(-((row - other) ** 2).sum(1) / 200.0) for row in one]))

    x, y = x.astype(np.float64), y.astype(np.float64)
    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def kid_by_loops(x: np.ndarray, y: np.ndarray) -> float:
    """Return the unbiased estimate by its sums over pairs of different rows."""

    def kernel(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return (one @ other.T / one.shape[1] + 1) ** 3

    x, y = x.astype(np.float64), y.astype(np.float64)
    own = [kernel(rows, rows)[~np.eye(len(rows), dtype=bool)].mean() for rows in (x, y)]
    return float(own[0] + own[1] - 2 * kernel(x, y).mean())


@pytest.mark.parametrize("pair", ["near", "far", "few"])
def test_recorded_sets_have_the_distances_of_independent_programs(recorded, pair):
    x, y = recorded[f"{pair}.real"].float(), recorded[f"{pair}.made"].float()
    told = json.loads((RECORDED / "distances.json").read_text())[pair]
    assert frechet(Moments.of(x), Moments.of(y)) == pytest.approx(told["fd"], abs=1e-3)
    assert polynomial_mmd(x, y) == pytest.approx(told["kid"], abs=1e-3)
    assert cmmd(x, y) == pytest.approx(told["cmmd"], abs=1e-3)
    assert told["cmmd"] == pytest.approx(cmmd_by_loops(x.numpy(), y.numpy()), abs=1e-6)
    assert told["kid"] == pytest.approx(kid_by_loops(x.numpy(), y.numpy()), abs=1e-6)
    if pair != "few":  # the root of a singular product is scipy's weak side
        assert told["fd"] == pytest.approx(by_scipy(x.numpy(), y.numpy()), abs=1e-3)


def test_fewer_images_than_features_give_a_real_distance_that_is_told(recorded):
    x, y = recorded["few.real"].float(), recorded["few.made"].float()
    assert len(x) < x.shape[1]
    a, b = np.cov(x.double().numpy(), rowvar=False), np.cov(y.double().numpy(), rowvar=False)
    shared = np.sqrt(np.clip(np.linalg.eigvals(a @ b).real, 0, None)).sum()  # of any rank
    expected = ((x - y.mean(0)).mean(0).double() ** 2).sum().item() + np.trace(a) + np.trace(b) - 2 * shared
    assert frechet(Moments.of(x), Moments.of(y)) == pytest.approx(expected, abs=1e-4)
    lines = few_images(["fid", "kid", "cmmd"], {"pictures": 12, "real images": 9}, {"inception": 2048})
    assert lines[0].startswith("fid: 9 real images for 2,048 features") and len(lines) == 2
    assert few_images(["fd"], {"pictures": 65}, {"embedding": 64}) == []


def test_a_set_is_at_no_distance_from_itself(recorded):
    rows = recorded["near.real"].float()
    moments = Moments.of(rows)
    assert frechet(moments, moments) < 1e-6 and abs(cmmd(rows, rows)) < 1e-9
    assert precision(rows, rows) == recall(rows, rows) == 1


def test_moments_of_parts_add_up_to_those_of_the_whole(monkeypatch):
    rows = torch.randn(333, 7, generator=torch.Generator().manual_seed(0)) * 3 + 100  # far from 0
    whole = Moments.of(rows)
    monkeypatch.setattr(distances, "CHUNK", 50)
    parts = Moments.of(rows[:100]) + Moments.of(rows[100:101]) + Moments.of(rows[101:]) + Moments.of(rows[:0])
    assert parts.count == 333
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.covariance(), torch.cov(rows.double().T), rtol=1e-10, atol=1e-10)


def test_chunks_change_no_distance(recorded, monkeypatch):
    x, y = recorded["near.real"].float(), recorded["near.made"].float()
    before = cmmd(x, y), precision(x, y), recall(x, y)
    monkeypatch.setattr(distances, "CHUNK", 17)
    assert (cmmd(x, y), precision(x, y), recall(x, y)) == pytest.approx(before, abs=1e-9)


def test_kid_of_subsets_is_unbiased(recorded):
    x, y = recorded["far.real"].float(), recorded["far.made"].float()
    assert kid(x, y) == polynomial_mmd(x, y)  # one subset has all
    assert kid(x, y, subsets=60, size=40) == pytest.approx(polynomial_mmd(x, y), rel=0.05)
    assert kid(x, y, subsets=3, size=40) == kid(x, y, subsets=3, size=40)
    generator = torch.Generator().manual_seed(0)
    same = [polynomial_mmd(*torch.randn(2, 30, 8, generator=generator)) for _ in range(200)]
    assert abs(sum(same) / len(same)) < 0.03  # with each row against itself it would be above 0.2


def test_precision_and_recall_see_what_is_missing():
    """Two clusters of real images: pictures of one cluster are precise, and half is missing; noise is not precise."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(60, 4, generator=generator) * 0.1 + shift for shift in (-5, 5))
    again = torch.randn(60, 4, generator=generator) * 0.1 - 5
    real = torch.cat([left, right])
    assert precision(real, again) > 0.8 and 0.35 < recall(real, again) < 0.55
    assert precision(real, torch.randn(50, 4, generator=generator) * 0.1) == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(3, 4), "precision: pictures: at least 4 images are needed, not 3"),
        (torch.full((5, 4), torch.nan), "precision: pictures: features of 5 of 5 images are not finite"),
    ],
    ids=["few", "nan"],
)
def test_what_cannot_be_compared_is_said(rows, message):
    real = RealSet(PictureRows({FEATURES + "embedding": torch.randn(9, 4)}, [""] * 9))
    with pytest.raises(UserError, match=message):
        distance("precision", real, rows, "embedding")
    with pytest.raises(UserError, match="at least 2 images"):
        frechet(Moments.of(torch.zeros(1, 4)), Moments.of(torch.zeros(5, 4)))


def test_the_quantile_of_student_is_that_of_scipy():
    for degrees in (*range(1, 41), 1000):
        assert student_quantile(degrees) == pytest.approx(scipy.stats.t.ppf(0.975, degrees), rel=1e-9)
    margin = over_seeds([float(n) for n in range(11)]).margin  # 10 degrees of freedom
    assert margin == pytest.approx(2.228139 * statistics.stdev(range(11)) / 11**0.5, rel=1e-6)


def test_margins_say_what_they_are_of():
    seeds = over_seeds([1.0, 2.0, 3.0])
    assert (seeds.value, seeds.margin_of) == (2.0, "seeds") and seeds.margin == pytest.approx(4.302653 / 3**0.5)
    assert over_seeds([1.5]).margin is None
    values = torch.randn(400, generator=torch.Generator().manual_seed(1)).double()
    drawn = by_bootstrap(float(values.mean()), lambda rows: float(values[rows].mean()), 400, 200)
    assert drawn.margin_of == "bootstrap" and drawn.margin == pytest.approx(1.96 / 20, rel=0.2)
    assert drawn == by_bootstrap(float(values.mean()), lambda rows: float(values[rows].mean()), 400, 200)
    assert by_bootstrap(1.0, lambda rows: 1.0, 4, 0).margin is None


# ----------------------------------------------------------------------------------------- what CMMD tells apart


@pytest.fixture(scope="module")
def looked_at() -> EmbeddingFeatures:
    conditioner = load_part("conditioner", {"name": "cloob", "weights": "assets/quickstart/cloob.safetensors"})
    return EmbeddingFeatures(conditioner, {"name": "cloob", "sha256": "0" * 64})


def noised(image: Image.Image, seed: int, deviation: float) -> Image.Image:
    levels = np.asarray(image, np.float64) + np.random.default_rng(seed).normal(0, deviation, (64, 64, 3))
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def test_cmmd_tells_real_images_from_spoiled_ones_and_from_those_of_other_captions(looked_at):
    """In the order of what was done to them, with the quickstart's own conditioner, offline."""
    device, count = torch.device("cpu"), 250
    real, fresh = ([draw(f"{name}/{i}", 64, 0.5)[0] for i in range(count)] for name in ("real", "fresh"))
    drawn = (draw(f"wrong/{i}", 64, 0.5) for i in range(10 * count))
    wrong = [image for image, its in drawn if its.color in ("red", "blue")]
    reference = rows_of(looked_at, real, device)
    sets = {
        "real": fresh,
        "blurred": [image.filter(ImageFilter.GaussianBlur(4)) for image in fresh],
        "very blurred": [image.filter(ImageFilter.GaussianBlur(8)) for image in fresh],
        "noised": [noised(image, i, 100) for i, image in enumerate(fresh)],
        "very noised": [noised(image, i, 150) for i, image in enumerate(fresh)],
        "of other captions": wrong[:count],
    }
    found = {name: cmmd(reference, rows_of(looked_at, its, device)) for name, its in sets.items()}
    assert found["real"] < found["blurred"] < found["very blurred"], found
    assert found["real"] < found["noised"] < found["very noised"], found
    assert 3 * found["real"] < found["of other captions"], found
