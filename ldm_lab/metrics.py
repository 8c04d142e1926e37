"""The metrics by name: what each compares, on which features, which way is better, and how many pictures it needs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ldm_lab.errors import UserError, unknown

Space = Literal["inception", "embedding"]  # kinds of features
Kind = Literal["pictures", "captions", "data"]
ModelPart = Literal["denoiser", "autoencoder", "conditioner"]
WHOLE_MODEL: tuple[ModelPart, ...] = ("denoiser", "autoencoder", "conditioner")
CODEC: tuple[ModelPart, ...] = ("autoencoder",)
NEIGHBORS = 3  # Kynkäänniemi et al. 2019 (arXiv 1904.06991), section 3


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        kind: of made pictures against real ones, of pictures and their captions, or of a model on the real data alone.
        higher_is_better: which way is better.
        meaning: a line for the user.
        space: features that it compares; None for none.
        least: pictures that it needs on each side.
        parts: of a model that it looks at, where it looks at no picture that the model makes.
        is_unbiased: whether it comes out alike for few pictures and for many; other distances of sets do not.
        is_mean: whether it is the mean of a number of each image, so that images can be drawn again for a margin.
    """

    kind: Kind
    higher_is_better: bool
    meaning: str
    space: Space | None = None
    least: int = 2
    parts: tuple[ModelPart, ...] = ()
    is_mean: bool = False
    is_unbiased: bool = False


METRICS = {
    "fid": Metric("pictures", False, "Fréchet distance of Inception features", "inception"),
    "kid": Metric("pictures", False, "unbiased kernel distance of Inception features", "inception", is_unbiased=True),
    "fd": Metric("pictures", False, "Fréchet distance of embeddings", "embedding"),
    "cmmd": Metric("pictures", False, "kernel distance of embeddings, times 1000", "embedding"),
    "precision": Metric("pictures", True, "share of pictures among the real ones", "embedding", NEIGHBORS + 1),
    "recall": Metric("pictures", True, "share of real images among the pictures", "embedding", NEIGHBORS + 1),
    "clip_score": Metric(
        "captions", True, "100 x cosine of a picture's and its prompt's embedding", "embedding", 1, is_mean=True
    ),
    "loss": Metric("data", False, "the objective's loss on the data, by noise level", None, 1, WHOLE_MODEL),
    "psnr": Metric("data", True, "the autoencoder's reconstructions, decibels", None, 1, CODEC, is_mean=True),
    "lpips": Metric(
        "data", False, "the autoencoder's reconstructions, perceptual distance", None, 1, CODEC, is_mean=True
    ),
    "rfid": Metric("data", False, "FID of the autoencoder's reconstructions", "inception", parts=CODEC),
    "rfd": Metric("data", False, "fd of the autoencoder's reconstructions", "embedding", parts=CODEC),
    "retrieval": Metric(
        "data", True, "the conditioner finds captions of images, and images of captions", parts=("conditioner",)
    ),
}
DEFAULT = ("fd", "cmmd", "precision", "recall", "clip_score")  # what works offline


def check_names(names: Sequence[str], where: str) -> list[str]:
    """Return the names of metrics, each once. Raises UserError for an unknown one."""
    for name in names:
        if name not in METRICS:
            raise UserError(f"{where}: {unknown('metric', name, METRICS)}")
    return list(dict.fromkeys(names))


def spaces_of(names: Iterable[str]) -> list[Space]:
    """Return the kinds of features that metrics need, each once."""
    return list(dict.fromkeys(space for name in names if (space := METRICS[name].space) is not None))


def of_kind(names: Iterable[str], *kinds: Kind) -> list[str]:
    """Return those names that are of some kinds."""
    return [name for name in names if METRICS[name].kind in kinds]


def is_higher_better(column: str) -> bool:
    """Return whether larger values of a column are better: of a metric, perhaps as a log has it, or of a part of one.

    Of losses and distances, and of what nobody knows, smaller ones are.
    """
    name = column.rpartition("/")[2]
    return METRICS[name].higher_is_better if name in METRICS else "_to_" in name  # of retrieval, one way or the other
