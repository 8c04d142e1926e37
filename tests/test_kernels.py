"""Kernel distances of many draws at once are those of each draw by itself."""

import pytest
import torch

from ldm_lab.evaluation import kernels
from ldm_lab.evaluation.distances import cmmd, kid, precision, recall
from ldm_lab.evaluation.feature_files import FEATURES, PictureRows
from ldm_lab.evaluation.metrics import RealSet, by_bootstrap, distance, drawn_again, picture_value


def sets(n: int, m: int, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.rand(n, width, generator=generator), torch.rand(m, width, generator=generator) + 0.1


@pytest.mark.parametrize("way", ["whole", "blocks", "one-by-one"])
@pytest.mark.parametrize(
    ("n", "m", "size"),
    [(30, 30, 8), (40, 9, 12), (9, 40, 12), (7, 8, 100)],
    ids=["equal", "few-made", "few-real", "all"],
)
def test_kid_of_draws_is_kid_of_each(monkeypatch, way, n, m, size):
    if way == "blocks":
        monkeypatch.setattr(kernels, "ELEMENTS", 100)
    monkeypatch.setattr(kernels, "is_cheaper", lambda *asked: way != "one-by-one")
    x, y = sets(n, m)
    draws = [torch.arange(m), *drawn_again(m, 3)]
    own, told = kernels.kid_within(x, m, 6, size, 1), []
    found = kernels.kid_of_draws(x, y, draws, own, told.append, subsets=6, size=size, seed=1)
    assert found == pytest.approx([kid(x, y[rows], 6, size, 1) for rows in draws], abs=1e-12)
    assert told == sorted(told) and told[-1] == pytest.approx(1)


@pytest.mark.parametrize("elements", [10**6, 50], ids=["whole", "blocks"])
def test_cmmd_of_draws_is_cmmd_of_each(monkeypatch, elements):
    monkeypatch.setattr(kernels, "ELEMENTS", elements)
    x, y = sets(23, 17)
    draws = [torch.arange(17), *drawn_again(17, 4)]
    found = kernels.cmmd_of_draws(x, y, draws, kernels.cmmd_within(x))
    assert found == pytest.approx([cmmd(x, y[rows]) for rows in draws], abs=1e-9)


@pytest.mark.parametrize(
    ("name", "alone"), [("kid", kid), ("cmmd", cmmd), ("precision", precision), ("recall", recall)]
)
def test_margins_are_those_of_draws_one_by_one(name, alone):
    x, y = sets(20, 16)
    space = "inception" if name == "kid" else "embedding"
    real, made = (PictureRows({FEATURES + space: rows}, [""] * len(rows)) for rows in (x, y))
    found = picture_value(name, RealSet(real), made, 5)
    expected = by_bootstrap(alone(x, y), lambda rows: alone(x, y[rows]), len(y), 5)
    assert found.value == pytest.approx(expected.value, abs=1e-9) == distance(name, RealSet(real), y, space)
    assert found.margin == pytest.approx(expected.margin, abs=1e-9) and found.margin_of == "bootstrap"


def test_what_real_images_are_in_themselves_is_computed_once(monkeypatch):
    x, y = sets(20, 16)
    real = RealSet(PictureRows({FEATURES + "inception": x, FEATURES + "embedding": x}, [""] * 20))
    first = [distance(name, real, y, space) for name, space in (("kid", "inception"), ("cmmd", "embedding"))]
    monkeypatch.setattr("ldm_lab.evaluation.metrics.kid_within", lambda *asked: pytest.fail("again"))
    monkeypatch.setattr("ldm_lab.evaluation.metrics.cmmd_within", lambda *asked: pytest.fail("again"))
    assert first == [distance(name, real, y, space) for name, space in (("kid", "inception"), ("cmmd", "embedding"))]


def test_memory_is_bounded_for_fifty_thousand_images():
    """No block of a kernel has more than `ELEMENTS`, and of large sets the subsets alone are looked at."""
    n = 50_000
    assert max(block.stop - block.start for block in kernels.blocks(n, n)) * n <= kernels.ELEMENTS
    subsets = [[torch.arange(1000)] * 100] * 21
    assert not kernels.is_cheaper(n, n, 2048, subsets) and kernels.is_cheaper(2500, 2500, 2048, subsets)
    assert kernels.is_cheaper(10_000, 10_000, 2048, subsets)
