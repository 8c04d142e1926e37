"""Distances between two sets of features: Fréchet, kernel MMD (KID, CMMD), precision and recall. All in float64."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ldm_lab.errors import UserError
from ldm_lab.metrics import NEIGHBORS

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # Jayasumana et al. 2024 (arXiv 2401.09603), section 4
KID_SUBSETS, KID_SIZE = 100, 1000  # as torch-fidelity and clean-fid draw them
CHUNK = 1024  # rows whose distances to all others are in memory at once


@dataclass(frozen=True)
class Moments:
    """The count, mean and scatter of rows; those of parts add up to those of the whole (Chan et al. 1979, eq. 2.1).

    Attributes:
        count: rows.
        mean: float64 [D].
        scatter: sum of the outer products of what differs from the mean, float64 [D, D].
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> "Moments":
        """Return the moments of rows [n, D]; chunk by chunk, so that float64 copies of all of them are never there."""
        width = rows.shape[1]
        moments = cls(0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64))
        for chunk in rows.split(CHUNK):
            part = chunk.double().cpu()  # [n, D]
            mean = part.mean(0)  # [D]
            moments += cls(len(part), mean, (part - mean).T @ (part - mean))
        return moments

    def __add__(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        if not self.count or not other.count:
            return other if not self.count else self
        apart = other.mean - self.mean  # [D]
        between = torch.outer(apart, apart) * (self.count * other.count / count)  # [D, D]
        return Moments(count, self.mean + apart * (other.count / count), self.scatter + other.scatter + between)

    def covariance(self) -> Tensor:
        """Return the unbiased covariance, [D, D]. Raises UserError for fewer than two rows."""
        if self.count < 2:
            raise UserError(f"a Fréchet distance needs at least 2 images on each side, not {self.count}")
        return self.scatter / (self.count - 1)

    @cached_property
    def root(self) -> Tensor:
        """The root of the covariance, [D, D]: computed once for all that is compared with it."""
        values, vectors = torch.linalg.eigh(self.covariance())  # [D], [D, D]
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # [D, D]


def check_rows(what: str, rows: Tensor, least: int = 1) -> None:
    """Raise UserError for features [n, D] that are too few, or not all finite.

    Args:
        what: whose they are.
        rows: the features.
        least: how many are needed.
    """
    if len(rows) < least:
        raise UserError(f"{what}: at least {least} images are needed, not {len(rows)}")
    if not rows.isfinite().all():
        bad = int((~rows.isfinite().all(1)).sum())
        raise UserError(f"{what}: features of {bad} of {len(rows)} images are not finite")


def frechet(a: Moments, b: Moments) -> float:
    """Return the squared Fréchet distance of two Gaussians (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

    The trace of (A B)^1/2 is that of (A^1/2 B A^1/2)^1/2, whose eigenvalues are real and not negative, whatever the
    ranks: with fewer images than features the covariances are singular, and a root of A B itself comes out complex.
    """
    ours, theirs = a.covariance(), b.covariance()
    product = a.root @ theirs @ a.root  # [D, D]
    shared = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + ours.trace() + theirs.trace() - 2 * shared
    return max(float(distance), 0.0)  # of two equal sets it is 0 but for rounding


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return the squared distances of rows [n, D] and [m, D], [n, m], in the rows' own precision."""
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp(min=0)


def gaussian_mean(x: Tensor, y: Tensor) -> float:
    """Return the mean of exp(-|a - b|^2 / (2 sigma^2)) over all pairs of rows of x [n, D] and y [m, D]."""
    y = y.double().cpu()  # [m, D]
    total = 0.0
    for part in x.split(CHUNK):
        total += float(squared_distances(part.double().cpu(), y).div_(-2 * CMMD_SIGMA**2).exp_().sum())
    return total / (len(x) * len(y))


def cmmd(x: Tensor, y: Tensor) -> float:
    """Return the MMD of two sets of embeddings [n, D] and [m, D], unit rows (Jayasumana et al. 2024, eq. 4).

    As in their program: the biased estimate, in which each row meets itself, squared, times 1000.
    """
    return CMMD_SCALE * (gaussian_mean(x, x) + gaussian_mean(y, y) - 2 * gaussian_mean(x, y))


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return (x y / D + 1)^3 of all pairs of rows of x [n, D] and y [m, D], [n, m]."""
    return (x @ y.T).div_(x.shape[1]).add_(1).pow_(3)


def polynomial_mmd(x: Tensor, y: Tensor) -> float:
    """Return the unbiased squared MMD of two sets [n, D] and [m, D] (Binkowski et al. 2018, arXiv 1801.01401, eq. 4).

    The kernel is `polynomial_kernel`.
    """
    x, y = x.double().cpu(), y.double().cpu()
    n, m = len(x), len(y)
    own_x, own_y = polynomial_kernel(x, x), polynomial_kernel(y, y)  # [n, n], [m, m]
    both = polynomial_kernel(x, y).mean()
    within_x = (own_x.sum() - own_x.trace()) / (n * (n - 1))
    within_y = (own_y.sum() - own_y.trace()) / (m * (m - 1))
    return float(within_x + within_y - 2 * both)


def kid(x: Tensor, y: Tensor, subsets: int = KID_SUBSETS, size: int = KID_SIZE, seed: int = 0) -> float:
    """Return the mean of `polynomial_mmd` over subsets; sets that are no larger than one are taken whole, once.

    Args:
        x, y: features, [n, D] and [m, D].
        subsets: how many.
        size: of each, drawn without replacement.
        seed: of the drawing.
    """
    if size >= len(x) and size >= len(y):
        return polynomial_mmd(x, y)
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(subsets):
        some_x, some_y = (rows[torch.randperm(len(rows), generator=generator)[:size]] for rows in (x, y))
        total += polynomial_mmd(some_x, some_y)
    return total / subsets


def neighbor_radii(rows: Tensor, k: int) -> Tensor:
    """Return each row's squared distance to its k-th nearest other one, float64 [n], of rows [n, D], n above k."""
    rows = rows.double().cpu()
    radii = []
    for first in range(0, len(rows), CHUNK):
        apart = squared_distances(rows[first : first + CHUNK], rows)  # [c, n]
        own = torch.arange(len(apart))
        apart[own, first + own] = torch.inf
        radii.append(apart.kthvalue(k, dim=1).values)  # [c]
    return torch.cat(radii)


def covered(rows: Tensor, centers: Tensor, radii: Tensor) -> Tensor:
    """Return whether rows [n, D] lie in a ball around centers [m, D] of squared radii [m], bool [n]."""
    centers = centers.double().cpu()
    parts = rows.split(CHUNK)
    return torch.cat([(squared_distances(part.double().cpu(), centers) <= radii).any(1) for part in parts])


def precision(real: Tensor, made: Tensor, k: int = NEIGHBORS) -> float:
    """Return the share of made features [m, D] that lie among the real ones [n, D] (Kynkäänniemi et al. 2019, eq. 2).

    A set's manifold is the union of balls around its features that reach to their k-th nearest neighbor.
    """
    return float(covered(made, real, neighbor_radii(real, k)).double().mean())


def recall(real: Tensor, made: Tensor, k: int = NEIGHBORS) -> float:
    """Return the share of real features [n, D] that lie among the made ones [m, D]: `precision` the other way round."""
    return float(covered(real, made, neighbor_radii(made, k)).double().mean())
