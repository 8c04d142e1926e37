"""What the metrics come to: distances between sets, means, their margins (`ldm_lab.metrics` says which there are)."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ldm_lab.evaluation.distances import (
    KID_SIZE,
    Moments,
    check_rows,
    covered,
    frechet,
    neighbor_radii,
    recall,
)
from ldm_lab.evaluation.feature_files import VALUES, PictureRows
from ldm_lab.evaluation.kernels import (
    Tell,
    cmmd_of_draws,
    cmmd_within,
    kid_of_draws,
    kid_within,
    tell_nobody,
)
from ldm_lab.metrics import METRICS, NEIGHBORS, Space
from ldm_lab.progress import Bar

MarginOf = Literal["seeds", "bootstrap", ""]
CLIP_SCORE = VALUES + "clip_score"
LONG = 10**10  # multiplications; twenty times as many take seconds
NORMAL = 1.96  # the 97.5 % quantile of the normal distribution


# ------------------------------------------------------------------------------------------------------------- values


@dataclass(frozen=True)
class Value:
    """A number with its margin.

    Attributes:
        value: of all pictures; of several seeds their mean.
        margin: half of the 95 % confidence interval; None where there is none.
        margin_of: what it is made of.
        margin_count: of how many of these.
    """

    value: float
    margin: float | None = None
    margin_of: MarginOf = ""
    margin_count: int = 0

    @property
    def is_finite(self) -> bool:
        """Whether it is a number: pictures may come out NaN, or features of them."""
        return math.isfinite(self.value)

    def __str__(self) -> str:
        shown = f"{self.value:.4g}" if self.is_finite else "not finite"
        return shown + ("" if self.margin is None else f" ± {self.margin:.2g}")


def student_quantile(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t with so many degrees of freedom, one or more.

    The share between -t and t is a finite sum in the angle atan(t / sqrt(degrees)) (Abramowitz & Stegun 1964, 26.7.3
    and 26.7.4), which is halved until it lies at 95 %.
    """
    low, high = 0.0, math.pi / 2
    while low < (angle := (low + high) / 2) < high:
        cosine, is_odd = math.cos(angle), degrees % 2
        term = cosine if is_odd else 1.0
        total = 0.0
        for power in range(1 + is_odd, degrees, 2):
            total += term
            term *= power / (power + 1) * cosine**2
        total *= math.sin(angle)
        if is_odd:
            total = 2 / math.pi * (angle + total)
        low, high = (angle, high) if total < 0.95 else (low, angle)
    return math.sqrt(degrees) * math.tan(angle)


def over_seeds(values: Sequence[float]) -> Value:
    """Return the mean of several seeds' values, with Student's interval; of one it has none."""
    if len(values) < 2:
        return Value(values[0])
    margin = student_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Value(statistics.fmean(values), margin, "seeds", len(values))


def by_bootstrap(value: float, again: Callable[[Tensor], float], count: int, times: int) -> Value:
    """Return a value with a margin by bootstrap (`with_margin`).

    Args:
        value: of all pictures.
        again: from the numbers of drawn pictures, int64 [count], to their value.
        count: pictures.
        times: how often they are drawn; 0 gives no margin.
    """
    return with_margin(value, [again(rows) for rows in drawn_again(count, times)])


def drawn_again(count: int, times: int) -> list[Tensor]:
    """Return the numbers of pictures, drawn again with replacement, int64 [count] each; none for less than 2 times."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(count, (count,), generator=generator) for _ in range(times if times > 1 else 0)]


def with_margin(value: float, drawn: Sequence[float]) -> Value:
    """Return a value with a margin by bootstrap (Efron 1979), of the values of pictures that were drawn again.

    The real images stay as they are. Drawing a picture twice moves some distances as a whole, so that the interval lies
    around the value itself, and only its width, 1.96 standard deviations, is the bootstrap's.
    """
    return Value(value, NORMAL * statistics.stdev(drawn), "bootstrap", len(drawn)) if drawn else Value(value)


@dataclass
class RealSet:
    """Features of real images, and what is computed of them once for all that is compared with them.

    Attributes:
        rows: of the images.
    """

    rows: PictureRows
    _moments: dict[str, Moments] = field(default_factory=dict)
    _radii: dict[str, Tensor] = field(default_factory=dict)
    _kid: dict[int, Tensor] = field(default_factory=dict)
    _cmmd: dict[str, float] = field(default_factory=dict)

    def moments(self, space: str) -> Moments:
        """Return the moments of the features of a space."""
        if space not in self._moments:
            self._moments[space] = Moments.of(self.rows.features(space))
        return self._moments[space]

    def radii(self, space: str) -> Tensor:
        """Return how far each one's nearest neighbors are, squared, [N]."""
        if space not in self._radii:
            self._radii[space] = neighbor_radii(self.rows.features(space), NEIGHBORS)
        return self._radii[space]

    def kid_within(self, count: int) -> Tensor:
        """Return what KID's subsets of the real images are in themselves, beside so many pictures, [S]."""
        if count not in self._kid:
            self._kid[count] = kid_within(self.rows.features("inception"), count)
        return self._kid[count]

    def cmmd_within(self, space: str) -> float:
        """Return what the real images are in themselves for CMMD."""
        if space not in self._cmmd:
            self._cmmd[space] = cmmd_within(self.rows.features(space))
        return self._cmmd[space]


def distance(name: str, real: RealSet, made: Tensor, space: Space) -> float:
    """Return the value of a metric that compares sets, for features [n, D] of one of them. Raises as `distances`."""
    return distances(name, real, made, space)[0]


def distances(
    name: str, real: RealSet, made: Tensor, space: Space, draws: Sequence[Tensor] = (), tell: Tell = tell_nobody
) -> list[float]:
    """Return the values of a metric that compares sets: of features [n, D] of one of them, and of rows drawn from it.

    Args:
        name: of the metric.
        real: images that are compared with.
        made: features of the others, [n, D].
        space: of the features.
        draws: numbers of rows, int64 [n] each.
        tell: told the share that is done.

    Raises:
        UserError: too few pictures, features that are not finite.
    """
    theirs = real.rows.features(space)
    for what, rows in (("real images", theirs), ("pictures", made)):
        check_rows(f"{name}: {what}", rows, METRICS[name].least)
    every = [torch.arange(len(made)), *draws]
    if name == "kid":
        return kid_of_draws(theirs, made, every, real.kid_within(len(made)), tell)
    if name == "cmmd":
        return cmmd_of_draws(theirs, made, every, real.cmmd_within(space), tell)
    if name == "precision":
        inside = covered(made, theirs, real.radii(space)).double()  # [n]
        tell(1)
        return [float(inside[rows].mean()) for rows in every]
    values = []
    for number, rows in enumerate(every):
        some = made[rows] if number else made  # [n, D]
        is_frechet = name in ("fid", "fd", "rfid", "rfd")
        values.append(frechet(real.moments(space), Moments.of(some)) if is_frechet else recall(theirs, some))
        tell((number + 1) / len(every))
    return values


def picture_value(name: str, real: RealSet | None, made: PictureRows, times: int) -> Value:
    """Return the value of a metric for made pictures, with a margin by bootstrap. Errors are those of `distances`."""
    metric = METRICS[name]
    if metric.kind == "captions":
        scores = made.tensors[CLIP_SCORE].double()  # [n]
        check_rows(f"{name}: pictures", scores[:, None])
        return by_bootstrap(float(scores.mean()), lambda rows: float(scores[rows].mean()), len(scores), times)
    assert metric.space is not None and real is not None, f"{name} compares features with those of real images"
    space, features = metric.space, made.features(metric.space)
    draws = drawn_again(len(features), times)
    with Bar(f"{name} and its margin", "draw", len(draws) + 1, shown=_takes_long(real, features, times)) as bar:
        value, *others = distances(
            name, real, features, space, draws, lambda share: bar.advance(int(share * (len(draws) + 1)))
        )
    return with_margin(value, others)


def _takes_long(real: RealSet, made: Tensor, times: int) -> bool:
    """Return whether a margin takes more than a few seconds, so that a bar shows how far it is."""
    n, width = made.shape
    return times > 1 and (n + width) * (n + width + len(real.rows)) * width > LONG


def few_images(names: Iterable[str], counts: Mapping[str, int], widths: Mapping[Space, int]) -> list[str]:
    """Return what has to be said of numbers of images that are small for what is measured, a line each.

    Args:
        names: of metrics.
        counts: images by whose they are, "real images" and "pictures".
        widths: D by kind of features.
    """
    lines = []
    for name in names:
        space, (who, count) = METRICS[name].space, min(counts.items(), key=lambda item: item[1])
        if name in ("fid", "fd", "rfid", "rfd") and space is not None and count <= widths[space]:
            lines.append(
                f"{name}: {count:,} {who} for {widths[space]:,} features: covariances are singular and the distance "
                "comes out too large; compare it between equal numbers of images alone"
            )
        if name == "kid" and count < KID_SIZE:
            lines.append(f"kid: {count:,} {who}, fewer than a subset's {KID_SIZE:,}: all of them are one subset")
    return lines
