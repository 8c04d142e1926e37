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
    cmmd,
    covered,
    frechet,
    kid,
    neighbor_radii,
    recall,
)
from ldm_lab.evaluation.feature_files import VALUES, PictureRows
from ldm_lab.metrics import METRICS, NEIGHBORS, Space

MarginOf = Literal["seeds", "bootstrap", ""]
CLIP_SCORE = VALUES + "clip_score"
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
    """Return a value with a margin by bootstrap (Efron 1979): pictures drawn again, with replacement, `times` times.

    The real images stay as they are. Drawing a picture twice moves some distances as a whole, so that the interval lies
    around the value itself, and only its width, 1.96 standard deviations, is the bootstrap's.

    Args:
        value: of all pictures.
        again: from the numbers of drawn pictures, int64 [count], to their value.
        count: pictures.
        times: 0 gives no margin.
    """
    if times < 2:
        return Value(value)
    generator = torch.Generator().manual_seed(0)
    drawn = [again(torch.randint(count, (count,), generator=generator)) for _ in range(times)]
    return Value(value, NORMAL * statistics.stdev(drawn), "bootstrap", times)


@dataclass
class RealSet:
    """Features of real images, and what is computed of them once for all that is compared with them.

    Attributes:
        rows: of the images.
    """

    rows: PictureRows
    _moments: dict[str, Moments] = field(default_factory=dict)
    _radii: dict[str, Tensor] = field(default_factory=dict)

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


def distance(name: str, real: RealSet, made: Tensor, space: Space) -> float:
    """Return the value of a metric that compares sets, for features [n, D] of one of them.

    Raises:
        UserError: too few pictures, features that are not finite.
    """
    theirs = real.rows.features(space)
    for what, rows in (("real images", theirs), ("pictures", made)):
        check_rows(f"{name}: {what}", rows, METRICS[name].least)
    if name in ("fid", "fd", "rfid", "rfd"):
        return frechet(real.moments(space), Moments.of(made))
    if name == "kid":
        return kid(theirs, made)
    if name == "cmmd":
        return cmmd(theirs, made)
    if name == "precision":
        return covered(made, theirs, real.radii(space))
    return recall(theirs, made)


def picture_value(name: str, real: RealSet | None, made: PictureRows, times: int) -> Value:
    """Return the value of a metric for made pictures, with a margin by bootstrap. Errors are those of `distance`."""
    metric = METRICS[name]
    if metric.kind == "captions":
        scores = made.tensors[CLIP_SCORE].double()  # [n]
        check_rows(f"{name}: pictures", scores[:, None])
        return by_bootstrap(float(scores.mean()), lambda rows: float(scores[rows].mean()), len(scores), times)
    assert metric.space is not None and real is not None, f"{name} compares features with those of real images"
    space, features = metric.space, made.features(metric.space)
    value = distance(name, real, features, space)
    return by_bootstrap(value, lambda rows: distance(name, real, features[rows], space), len(features), times)


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
