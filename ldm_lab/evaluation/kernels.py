"""Kernel distances of one set of rows and of many that are drawn from it: each pair's kernel is computed once.

A subset, or a set that is drawn again with replacement, is a column of counts: how often it has each row. The sum of
the kernel over all pairs of two such sets is c K d, so that hundreds of them cost little more than one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_lab.evaluation.distances import (
    CMMD_SCALE,
    CMMD_SIGMA,
    KID_SIZE,
    KID_SUBSETS,
    polynomial_kernel,
    squared_distances,
)

Kernel = Callable[[Tensor, Tensor], Tensor]  # rows [n, D] and [m, D], float64 -> [n, m]
Tell = Callable[[float], None]  # told the share that is done, up to 1
ELEMENTS = 2**23  # of a kernel's block that is in memory at once: 64 MiB
MOST_COUNTS = 2**27  # elements of all columns of counts: 1 GiB


def tell_nobody(share: float) -> None:
    """Forget what is done."""


@dataclass(frozen=True)
class Subsets:
    """Rows that are taken of two sets, several times.

    Attributes:
        of_x, of_y: numbers of rows, int64 [n] and [m] each.
    """

    of_x: list[Tensor]
    of_y: list[Tensor]

    @classmethod
    def drawn(cls, n: int, m: int, subsets: int, size: int, seed: int) -> "Subsets":
        """Return subsets of sets of n and m rows, without replacement; those that are no larger are taken whole, once.

        Args:
            n, m: rows of the sets.
            subsets: how many.
            size: of each.
            seed: of the drawing.
        """
        if size >= n and size >= m:
            return cls([torch.arange(n)], [torch.arange(m)])
        generator = torch.Generator().manual_seed(seed)
        pairs = [[torch.randperm(count, generator=generator)[:size] for count in (n, m)] for _ in range(subsets)]
        return cls([of_x for of_x, _ in pairs], [of_y for _, of_y in pairs])


def counts(columns: Sequence[Tensor], rows: int) -> Tensor:
    """Return how often each of so many rows is in sets of row numbers, float64 [rows, sets]."""
    return torch.stack([torch.bincount(column, minlength=rows) for column in columns], 1).double()


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Yield the rows of a kernel that are computed at once."""
    size = max(1, ELEMENTS // max(columns, 1))
    for first in range(0, rows, size):
        yield slice(first, min(first + size, rows))


def within(kernel: Kernel, x: Tensor, of_x: Tensor, tell: Tell = tell_nobody) -> Tensor:
    """Return the sums of a symmetric kernel over all pairs of rows of each set, [S].

    Args:
        kernel: of rows.
        x: rows, float64 [N, D].
        of_x: counts, [N, S].
        tell: told what is done.
    """
    total = torch.zeros(of_x.shape[1], dtype=torch.float64)  # [S]
    for block in blocks(len(x), len(x)):
        some = kernel(x[block], x[block.start :])  # [b, N - start]: the rest is the same, mirrored
        size = block.stop - block.start
        own = some[:, :size] @ of_x[block]  # [b, S]
        behind = some[:, size:] @ of_x[block.stop :]  # [b, S]
        total += (of_x[block] * (own + 2 * behind)).sum(0)
        tell(1 - (1 - block.stop / len(x)) ** 2)
    return total


def between(kernel: Kernel, x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor, tell: Tell = tell_nobody) -> Tensor:
    """Return the sums of a kernel over all pairs of rows of sets of x and of y, [draws, S].

    Args:
        kernel: of rows.
        x, y: rows, float64 [N, D] and [M, D].
        of_x: counts, [N, S].
        of_y: counts of every draw's sets, each of which meets the set of x at its place, [M, draws * S].
        tell: told what is done.
    """
    of_each = of_y.view(len(y), -1, of_x.shape[1])  # [M, draws, S]
    total = torch.zeros(of_each.shape[1:], dtype=torch.float64)  # [draws, S]
    for block in blocks(len(y), len(x)):
        sums = kernel(y[block], x) @ of_x  # [b, S]
        total += (of_each[block] * sums[:, None]).sum(0)
        tell(block.stop / len(y))
    return total


def gaussian_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return exp(-|a - b|^2 / (2 sigma^2)) of all pairs of rows of x [n, D] and y [m, D], [n, m], as CMMD has it."""
    return squared_distances(x, y).div_(-2 * CMMD_SIGMA**2).exp_()


def cmmd_within(x: Tensor) -> float:
    """Return the mean of CMMD's kernel over all pairs of rows [n, D], each with itself, too."""
    x = x.double().cpu()
    return float(within(gaussian_kernel, x, counts([torch.arange(len(x))], len(x)))) / len(x) ** 2


def cmmd_of_draws(x: Tensor, y: Tensor, draws: Sequence[Tensor], own_x: float, tell: Tell = tell_nobody) -> list[float]:
    """Return `distances.cmmd` of x [n, D] and of y's rows [m, D] as they are drawn, m each.

    Args:
        x, y: embeddings.
        draws: numbers of rows of y, int64 [m] each.
        own_x: `cmmd_within` of x.
        tell: told what is done.
    """
    x, y = x.double().cpu(), y.double().cpu()
    of_x, of_y = counts([torch.arange(len(x))], len(x)), counts(draws, len(y))
    own_y = within(gaussian_kernel, y, of_y, lambda share: tell(share / 2)) / len(y) ** 2  # [draws]
    both = between(gaussian_kernel, x, y, of_x, of_y, lambda share: tell(0.5 + share / 2))[:, 0] / (len(x) * len(y))
    return (CMMD_SCALE * (own_x + own_y - 2 * both)).tolist()


def kid_within(x: Tensor, m: int, subsets: int = KID_SUBSETS, size: int = KID_SIZE, seed: int = 0) -> Tensor:
    """Return the mean of KID's kernel over the pairs of two rows of each subset of x, beside a set of m rows, [S]."""
    taken = Subsets.drawn(len(x), m, subsets, size, seed).of_x
    if is_cheaper(len(x), 0, x.shape[1], [taken]):
        rows = x.double().cpu()
        sums = within(polynomial_kernel, rows, of_x := counts(taken, len(x)))
        return (sums - _own(rows) @ of_x) / _pairs(taken)
    return torch.stack([_mean_of_pairs(x[rows].double().cpu()) for rows in taken])


def kid_of_draws(
    x: Tensor,
    y: Tensor,
    draws: Sequence[Tensor],
    own_x: Tensor,
    tell: Tell = tell_nobody,
    *,
    subsets: int = KID_SUBSETS,
    size: int = KID_SIZE,
    seed: int = 0,
) -> list[float]:
    """Return `distances.kid` of x [n, D] and of y's rows [m, D] as they are drawn, m each.

    Args:
        x, y: features.
        draws: numbers of rows of y, int64 [m] each.
        own_x: `kid_within` of x beside y.
        tell: told what is done.
        subsets, size, seed: as `kid` takes them.
    """
    taken = Subsets.drawn(len(x), len(y), subsets, size, seed)
    of_draws = [[rows[numbers] for numbers in taken.of_y] for rows in draws]  # numbers of rows of y, [m] each
    columns = [column for one in of_draws for column in one]
    if not is_cheaper(len(y), len(x), x.shape[1], of_draws):
        return _one_by_one(x, y, taken, of_draws, own_x, tell)
    x, y = x.double().cpu(), y.double().cpu()
    of_x, of_y = counts(taken.of_x, len(x)), counts(columns, len(y))
    sums = within(polynomial_kernel, y, of_y, lambda share: tell(share / 2)) - _own(y) @ of_y  # [draws * S]
    own_y = (sums / _pairs(columns)).view(len(draws), -1)  # [draws, S]
    sizes = torch.tensor([len(a) * len(b) for a, b in zip(taken.of_x, taken.of_y, strict=True)])  # [S]
    both = between(polynomial_kernel, x, y, of_x, of_y, lambda share: tell(0.5 + share / 2)) / sizes  # [draws, S]
    return (own_x + own_y - 2 * both).mean(1).tolist()


def _one_by_one(
    x: Tensor, y: Tensor, taken: Subsets, of_draws: Sequence[Sequence[Tensor]], own_x: Tensor, tell: Tell
) -> list[float]:
    """Return the same, pair of subsets by pair: of large sets, whose subsets have few of all pairs."""
    total = torch.zeros(len(of_draws), dtype=torch.float64)
    for place, of_x in enumerate(taken.of_x):
        some_x = x[of_x].double().cpu()  # [n, D]
        for number, one in enumerate(of_draws):
            some_y = y[one[place]].double().cpu()  # [m, D]
            both = polynomial_kernel(some_x, some_y).mean()
            total[number] += own_x[place] + _mean_of_pairs(some_y) - 2 * both
            tell((place + (number + 1) / len(of_draws)) / len(taken.of_x))
    return (total / len(taken.of_x)).tolist()


def is_cheaper(m: int, n: int, width: int, of_draws: Sequence[Sequence[Tensor]]) -> bool:
    """Return whether all pairs of m rows, and of them with n others, cost less than those of all subsets."""
    columns = [column for one in of_draws for column in one]
    subsets, size = len(of_draws[0]), len(columns[0])
    whole = m * m / 2 * (width + len(columns)) + m * n * (width + subsets)
    single = len(columns) * (size**2 + min(size, n) * size) * width
    return whole < single and max(m, n) * len(columns) <= MOST_COUNTS


def _mean_of_pairs(rows: Tensor) -> Tensor:
    """Return the mean of KID's kernel over the pairs of two of these rows, float64 [n, D]: 0-dim."""
    n = len(rows)
    return (polynomial_kernel(rows, rows).sum() - _own(rows).sum()) / (n * (n - 1))


def _own(rows: Tensor) -> Tensor:
    """Return KID's kernel of each row [n, D] with itself, [n]."""
    return (rows.square().sum(1) / rows.shape[1] + 1) ** 3


def _pairs(columns: Sequence[Tensor]) -> Tensor:
    """Return how many pairs of two different places sets have, [sets]."""
    return torch.tensor([len(column) * (len(column) - 1) for column in columns])
