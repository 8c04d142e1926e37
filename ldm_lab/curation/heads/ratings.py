"""Rated images as embeddings and numbers: out of tables, of samples' json, of arrays."""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm_lab.checkpoints import embedders
from ldm_lab.curation.scoring.files import read_embeddings
from ldm_lab.data.samples import SkippedSample
from ldm_lab.data.tar import read_files
from ldm_lab.errors import UserError, first_line, unknown
from ldm_lab.io.arrays import open_npy
from ldm_lab.io.json_files import parse_json

TABLES = (".parquet", ".csv", ".tsv")


def read_table(path: Path, key: str, column: str) -> dict[str, float]:
    """Return key -> rating of a Parquet, CSV or TSV with a header; of several ratings of one image their mean.

    Raises:
        UserError: missing or damaged file, no such column, a column that is no number.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv as csv
    import pyarrow.parquet as pq

    if not path.is_file():
        raise UserError(f"{path}: no such file (ratings)")
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path)
        else:
            options = csv.ConvertOptions(column_types={key: pa.string()})  # "00012" is no number
            table = csv.read_csv(
                path,
                parse_options=csv.ParseOptions(delimiter="\t" if path.suffix == ".tsv" else ","),
                convert_options=options,
            )
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a readable table ({first_line(error)})") from None
    for name in (key, column):
        if name not in table.column_names:
            raise UserError(f"{path}: {unknown('column', name, table.column_names)}")
    try:
        keys = pc.cast(table[key], pa.string()).to_pylist()
        ratings = pc.cast(table[column], pa.float64()).to_pylist()
    except pa.ArrowException:
        raise UserError(f"{path}: the column {column!r} is of type {table[column].type}, not a number") from None
    sums: dict[str, list[float]] = {}
    for name, rating in zip(keys, ratings):
        if name is not None and rating is not None:
            sums.setdefault(name, []).append(rating)
    return {name: float(np.mean(values)) for name, values in sums.items()}


def read_json_ratings(address: str, field: str) -> dict[str, float]:
    """Return key -> rating of the samples of a shard whose json has a number under `field`."""
    found: dict[str, float] = {}
    for item in read_files(address, ("json",)):
        if isinstance(item, SkippedSample):
            continue
        value = parse_json(item[1].get("json")).get(field)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found.setdefault(item[0], float(value))
    return found


class Rated:
    """Embeddings with their ratings, gathered file by file.

    Attributes:
        embedder: whose embeddings; None as long as no file has said it.
        filtered: reason -> images that were not taken.
    """

    def __init__(self, embedder: dict[str, str] | None = None) -> None:
        self.embedder = embedder
        self.filtered: Counter[str] = Counter()
        self._embeds: list[Tensor] = []
        self._ratings: list[np.ndarray] = []

    def add_file(self, path: Path, ratings: dict[str, float]) -> None:
        """Add the images of a file of embeddings that have a rating. Raises UserError for a .npy, which has no keys."""
        embeds, keys, embedder = read_embeddings(path)
        if keys is None:
            raise UserError(f"{path}: has no keys that ratings could be found by; give --ratings as a .npy, row by row")
        self.add(path, embeds, np.array([ratings.get(key, np.nan) for key in keys]), embedder, "without a rating")

    def add_rows(self, path: Path, ratings: np.ndarray) -> None:
        """Add all images of a file of embeddings, with the ratings of its rows. Raises UserError for another length."""
        embeds, _, embedder = read_embeddings(path)
        if ratings.ndim != 1 or len(ratings) != len(embeds):
            raise UserError(f"{path}: {len(embeds)} embeddings, but the ratings are {list(ratings.shape)}: one each")
        self.add(path, embeds, ratings, embedder, "rated NaN")

    def add(
        self, path: Path, embeds: Tensor, ratings: np.ndarray, embedder: dict[str, str] | None, unrated: str
    ) -> None:
        """Add embeddings [N, D] with ratings [N]; those that are not finite are left out and counted."""
        if embedder is not None and self.embedder is not None:
            embedders.check_same(str(path), embedder, self.embedder)
        self.embedder = self.embedder or embedder
        if self._embeds and self._embeds[0].shape[1] != embeds.shape[1]:
            raise UserError(
                f"{path}: embeddings of width {embeds.shape[1]}, those before have {self._embeds[0].shape[1]}"
            )
        sound = embeds.isfinite().all(dim=1).numpy()  # [N]
        rated = np.isfinite(ratings)  # [N]
        self.filtered[unrated] += int((~rated).sum())
        self.filtered["with a non-finite embedding"] += int((rated & ~sound).sum())
        good = rated & sound
        self._embeds.append(embeds[torch.from_numpy(good)])
        self._ratings.append(ratings[good])

    def all(self) -> tuple[Tensor, Tensor]:
        """Return embeddings [N, D] and ratings, float64 [N]. Raises UserError if there is none."""
        embeds = torch.cat(self._embeds) if self._embeds else torch.zeros(0, 1)  # [N, D]
        if not len(embeds):
            raise UserError(f"no rated image: {self.summary() or 'no embeddings at all'}")
        return embeds, torch.from_numpy(np.concatenate(self._ratings))  # [N, D], [N]

    def summary(self) -> str:
        """Return what was left out, in words; "" for nothing."""
        return ", ".join(f"{count:,} {reason}" for reason, count in self.filtered.items() if count)


def read_rating_rows(path: Path) -> np.ndarray:
    """Return the ratings in a .npy, float64 [N]. Raises UserError if it is none."""
    array = open_npy(path)
    if array.dtype.kind not in "fiu":
        raise UserError(f"{path}: numbers are needed as ratings")
    return array.reshape(-1).astype(np.float64) if array.ndim == 2 and array.shape[1] == 1 else array.astype(np.float64)
