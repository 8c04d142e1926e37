"""Maps from texts' embeddings to images', fitted on pairs, and how well each finds images that it was not fitted on."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm_lab.conditioners.gap import ResidualMap, RidgeMap, TextMap, unit
from ldm_lab.errors import UserError

HELD_OUT = 0.2  # share of the pairs that a map is judged by
FEWEST = 10  # pairs that a map can be fitted on
STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)  # of ridge
HIDDEN, STEPS, RATE, DECAY = 256, 200, 2e-3, 1e-2  # of the residual network
INV_TAU = 20.0  # inverse temperature of its loss
MOST_COMPARED = 1000  # pairs among which one is sought


class Retrieval(NamedTuple):
    """How well texts find their own images.

    Attributes:
        at_1, at_5: share of texts whose own image is the nearest of all, or among the five nearest.
        cosine: mean of a pair.
        among: how many images one is sought.
    """

    at_1: float
    at_5: float
    cosine: float
    among: int

    def __str__(self) -> str:
        return f"cosine of a pair {self.cosine:.3f}, {self.at_1:.1%} at 1, {self.at_5:.1%} at 5 (of {self.among:,})"


class Fitted(NamedTuple):
    """A map and what it is worth.

    Attributes:
        map: fitted on all pairs; None for none.
        name: "none", or the map's.
        held_out: retrieval on pairs that a map of the others was not fitted on.
    """

    map: TextMap | None
    name: str
    held_out: Retrieval


def retrieval(texts: Tensor, images: Tensor) -> Retrieval:
    """Return how well texts [n, D] find images [n, D], unit rows; of many pairs the first ones are compared."""
    texts, images = texts[:MOST_COMPARED].float(), images[:MOST_COMPARED].float()  # [n, D] each
    cosine = texts @ images.T  # [n, n]
    own = cosine.diagonal()  # [n]
    nearer = (cosine > own[:, None]).sum(1)  # [n]
    at_1, at_5 = (float((nearer < most).float().mean()) for most in (1, 5))
    return Retrieval(at_1, at_5, float(own.mean()), len(cosine))


def split(count: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of pairs to fit on and of those held out. Raises UserError for too few pairs."""
    if count < FEWEST:
        raise UserError(f"conditioner.gap.map: {count} images with captions are too few, {FEWEST} are needed")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))  # [n]
    held = max(2, round(HELD_OUT * count))
    return order[held:], order[:held]


def fit(kind: str, texts: Tensor, images: Tensor) -> Fitted:
    """Return a map of a kind, "none", "ridge", "residual", or of all these the one that finds most ("best").

    Args:
        kind: of the map.
        texts, images: of the pairs, without their means, unit rows [n, D].

    Raises:
        UserError: too few pairs.
    """
    if kind == "ridge":
        return fit_ridge(texts, images)
    if kind == "residual":
        return fit_residual(texts, images)
    if kind == "none":
        return fit_none(texts, images)
    found = (fit_none(texts, images), fit_ridge(texts, images), fit_residual(texts, images))
    return max(
        found, key=lambda one: (round(one.held_out.at_1, 3), round(one.held_out.cosine, 3))
    )  # or the simpler one


def fit_none(texts: Tensor, images: Tensor) -> Fitted:
    """Return what the shift alone is worth, on the pairs that maps are judged by."""
    held = split(len(texts))[1]
    return Fitted(None, "none", retrieval(texts[held], images[held]))


# ----------------------------------------------------------------------------------------------------------- ridge


def ridge(texts: Tensor, images: Tensor, strength: float) -> RidgeMap:
    """Return the W that minimizes ||texts W - images||^2 + strength ||W - I||^2, in closed form.

    The fewer pairs there are, the nearer it stays to doing nothing: to the shift alone.
    """
    t, i = texts.double(), images.double()  # [n, D] each
    pull = strength * torch.eye(t.shape[1], dtype=t.dtype, device=t.device)  # [D, D]
    return RidgeMap(torch.linalg.solve(t.T @ t + pull, t.T @ i + pull).float())  # [D, D]


def fit_ridge(texts: Tensor, images: Tensor) -> Fitted:
    """Return the linear map whose strength suits held-out pairs best."""
    fitted, held = split(len(texts))

    def judged(strength: float) -> Retrieval:
        made = ridge(texts[fitted], images[fitted], strength)
        return retrieval(unit(made(texts[held])), images[held])

    found = {strength: judged(strength) for strength in STRENGTHS}
    best = max(found, key=lambda strength: found[strength].cosine)
    return Fitted(ridge(texts, images, best), RidgeMap.name, found[best])


# -------------------------------------------------------------------------------------------------------- residual


def fit_residual(texts: Tensor, images: Tensor) -> Fitted:
    """Return the network, trained for as many steps as suit held-out pairs best."""
    fitted, held = split(len(texts))
    found = _train(texts[fitted], images[fitted], STEPS, texts[held], images[held])
    steps = max(found.steps, key=lambda one: one[1].cosine)
    return Fitted(_train(texts, images, steps[0]).map, ResidualMap.name, steps[1])


class _Trained(NamedTuple):
    """A network, and retrieval on held-out pairs by steps."""

    map: ResidualMap
    steps: Sequence[tuple[int, Retrieval]]


def _train(
    texts: Tensor, images: Tensor, steps: int, held_texts: Tensor | None = None, held_images: Tensor | None = None
) -> _Trained:
    """Return a network trained to bring each text to its image, and away from the others of a batch (InfoNCE)."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        made = ResidualMap(texts.shape[1], HIDDEN)
        optimizer = torch.optim.AdamW(made.parameters(), lr=RATE, weight_decay=DECAY)
        found: list[tuple[int, Retrieval]] = []
        for step in range(steps + 1):
            if held_texts is not None and held_images is not None and step % 20 == 0:
                with torch.no_grad():
                    found.append((step, retrieval(unit(made(held_texts)), held_images)))
            rows = torch.randperm(len(texts))[:256]  # [B]
            said, shown = F.normalize(made(texts[rows]), dim=-1), images[rows]  # [B, D] each
            loss = F.cross_entropy(INV_TAU * said @ shown.T, torch.arange(len(rows)))
            loss = loss + 1 - (said * shown).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            if step < steps:
                optimizer.step()
    return _Trained(made.eval().requires_grad_(False), found)
