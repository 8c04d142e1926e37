"""Heads learned from rated images: ridge regression in closed form, or a small MLP, judged on ratings held out."""

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional import mean_absolute_error, mean_squared_error, pearson_corrcoef, spearman_corrcoef

from ldm_lab.checkpoints.importer import Section
from ldm_lab.config import build
from ldm_lab.curation.heads.head import Head, l2_normalize
from ldm_lab.errors import UserError
from ldm_lab.progress import Bar

LEAST = 10  # rated images, below which nothing can be said
RIDGES = torch.logspace(-8, 2, 41, dtype=torch.float64)  # tried, in units of the mean eigenvalue
LOGISTIC_RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # tried for probabilities


class Split(NamedTuple):
    """Rated embeddings, divided at random.

    Attributes:
        train, held_out: (unit embeddings [n, D], ratings [n]), both float32.
    """

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]


def split(embeds: Tensor, ratings: Tensor, share: float, seed: int) -> Split:
    """Return embeddings [N, D] with their ratings [N] divided in two, `share` of them held out.

    Raises:
        UserError: too few, or ratings that are all the same.
    """
    count = len(ratings)
    held = round(share * count)
    if count < LEAST or held < 2 or count - held < 2:
        raise UserError(f"{count} rated images, {held} of them held out, are too few to learn from and to judge by")
    ratings = ratings.float()  # [N]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))  # [N]
    rows = l2_normalize(embeds)  # [N, D]
    train, held_out = order[held:], order[:held]
    if float(ratings[train].std()) == 0:
        those = f"all {count} ratings" if float(ratings.std()) == 0 else f"all {len(train)} ratings to learn from"
        raise UserError(f"{those} are {float(ratings[train[0]]):g}: there is nothing to learn")
    return Split((rows[train], ratings[train]), (rows[held_out], ratings[held_out]))


def fit_linear(section: Section, x: Tensor, y: Tensor, ridge: float | None) -> tuple[Head, dict[str, float]]:
    """Return a linear head and facts about it.

    Args:
        section: its config section.
        x, y: unit embeddings [n, D] and ratings [n].
        ridge: weight of ||w||^2 against the sum of squared errors; None takes the one with the least generalised
            cross-validation error (Golub, Heath and Wahba 1979), n RSS / (n - degrees of freedom)^2.
    """
    head = build("head", section)
    if head.output == "probability":
        return _fit_probability(head, x, y, ridge)
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(dim=0), y.mean()  # [D], []
    x, y = x - mean_x, y - mean_y
    eigenvalues, vectors = torch.linalg.eigh(x.T @ x)  # [D], [D, D]
    eigenvalues = eigenvalues.clamp(min=0)  # [D]
    along = vectors.T @ (x.T @ y)  # [D]
    if ridge is None:
        ridges = RIDGES * eigenvalues.mean()  # [R]
        damped = eigenvalues + ridges[:, None]  # [R, D]
        residual = y @ y - (along**2 * (2 / damped - eigenvalues / damped**2)).sum(dim=1)  # [R]
        free = len(y) - 1 - (eigenvalues / damped).sum(dim=1)  # [R]
        error = torch.where(free > 0.5, len(y) * residual.clamp(min=0) / free**2, torch.inf)  # [R]
        ridge = float(ridges[error.argmin()])
    weight = vectors @ (along / (eigenvalues + ridge).clamp(min=1e-300))  # [D]
    with torch.no_grad():
        head.weight.copy_(weight[None])
        head.bias.copy_(mean_y - weight @ mean_x)
    return head, {"ridge": ridge}


def _fit_probability(head: Head, x: Tensor, y: Tensor, ridge: float | None) -> tuple[Head, dict[str, float]]:
    """Return a linear head whose sigmoid is the probability of 1.

    Where no ridge is given, the one is taken that predicts a fifth of the images best from the others.
    """
    _check_probabilities(y)
    head.double()
    x, y = x.double(), y.double()
    if ridge is None:
        fifth = torch.arange(len(y)) % 5 == 0  # [n]; the images come in a random order
        errors = []
        for tried in LOGISTIC_RIDGES:
            _fit_logistic(head, x[~fifth], y[~fifth], tried)
            with torch.no_grad():
                errors.append(float(F.binary_cross_entropy_with_logits(head.raw(x[fifth]), y[fifth])))
        ridge = LOGISTIC_RIDGES[errors.index(min(errors))]
    _fit_logistic(head, x, y, ridge)
    return head.float(), {"ridge": ridge}


def _fit_logistic(head: Head, x: Tensor, y: Tensor, ridge: float) -> None:
    """Minimise the cross-entropy + ridge ||w||^2 / 2, summed over all images, by L-BFGS."""
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=500, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        fit = F.binary_cross_entropy_with_logits(head.raw(x), y, reduction="sum")
        loss = fit + ridge / 2 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


@dataclass(frozen=True)
class MLPOptions:
    """How an MLP learns: passes over the images, images per step, learning rate of Adam, seed."""

    epochs: int
    batch_size: int
    lr: float
    seed: int


def fit_mlp(section: Section, x: Tensor, y: Tensor, options: MLPOptions) -> tuple[Head, dict[str, float]]:
    """Return an MLP head and facts about it: Adam on the squared error, or on the cross-entropy of a probability.

    Ratings are brought to mean 0 and deviation 1 while it learns; the last layer takes them back.
    """
    torch.manual_seed(options.seed)
    head = build("head", section).train()
    is_number = head.output == "number"
    if not is_number:
        _check_probabilities(y)
    mean, deviation = (y.mean(), y.std()) if is_number else (0.0, 1.0)  # [], []
    target = (y - mean) / deviation  # [n]
    optimizer = torch.optim.Adam(head.parameters(), lr=options.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    loss_of = F.mse_loss if is_number else F.binary_cross_entropy_with_logits
    with Bar("train", "epoch", options.epochs) as bar:
        for _ in range(options.epochs):
            for rows in torch.randperm(len(x)).split(options.batch_size):
                loss = loss_of(head.raw(x[rows]), target[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            bar.update()
    with torch.no_grad():
        last = head.layers[-1]
        last.weight.mul_(deviation)
        last.bias.mul_(deviation).add_(mean)
    if not all(p.isfinite().all() for p in head.parameters()):
        raise UserError(f"--lr {options.lr:g}: the head's weights did not stay finite numbers; a smaller one is needed")
    return head.eval(), {"epochs": options.epochs, "batch_size": options.batch_size, "lr": options.lr}


def _check_probabilities(y: Tensor) -> None:
    if not ((y >= 0) & (y <= 1)).all():
        raise UserError(f"--output probability: ratings from 0 to 1 are needed, these are {y.min():g} to {y.max():g}")


@dataclass(frozen=True)
class Evaluation:
    """How good a head is on ratings that it has not seen.

    Attributes:
        pearson, spearman: correlations; NaN where all predictions, or all ratings, are the same.
        rmse, mae: in units of the rating.
        rmse_of_mean: the error of always saying the mean.
    """

    pearson: float
    spearman: float
    rmse: float
    mae: float
    rmse_of_mean: float

    def finite(self) -> dict[str, float]:
        """Return the numbers by name without NaN, which JSON does not know."""
        return {name: value for name, value in asdict(self).items() if math.isfinite(value)}

    def __str__(self) -> str:
        return (
            f"Pearson {self.pearson:.4f}, Spearman {self.spearman:.4f}, RMSE {self.rmse:.4g}, MAE {self.mae:.4g} "
            f"(RMSE of the mean rating: {self.rmse_of_mean:.4g})"
        )


@torch.no_grad()
def evaluate(head: Head, x: Tensor, y: Tensor, train_mean: float) -> Evaluation:
    """Return how good a head is on unit embeddings [n, D] with ratings [n].

    Args:
        train_mean: mean of the ratings that it has learned from.
    """
    predicted = head(x)  # [n]
    spread = float(predicted.std()) > 0 and float(y.std()) > 0
    return Evaluation(
        pearson=float(pearson_corrcoef(predicted, y)) if spread else float("nan"),
        spearman=float(spearman_corrcoef(predicted, y)) if spread else float("nan"),
        rmse=float(mean_squared_error(predicted, y, squared=False)),
        mae=float(mean_absolute_error(predicted, y)),
        rmse_of_mean=float(mean_squared_error(torch.full_like(y, train_mean), y, squared=False)),
    )
