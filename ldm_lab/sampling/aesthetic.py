"""Aesthetics as a direction: the mean embedding of images of one rating, added to a prompt's.

LAION-Aesthetics published such embeddings for the ratings 0 to 9 of two CLIPs; clip-retrieval adds one to a query:

    q' = (q + weight * rating embedding) / ||q + weight * rating embedding||

row by row. A negative weight steers away.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm_lab.checkpoints import embedders
from ldm_lab.checkpoints.embedders import OPENAI
from ldm_lab.checkpoints.files import FORMAT, is_safetensors, read_safetensors, write_safetensors
from ldm_lab.checkpoints.importer import Section
from ldm_lab.errors import UserError, unknown
from ldm_lab.io.arrays import open_npy
from ldm_lab.io.atomic import existing_file, sha256
from ldm_lab.pretrained.catalogue import catalogue
from ldm_lab.pretrained.resolve import resolve_weights

ROLE = "rating_embeddings"
UNIT = 1e-3  # how far from 1 the length of a rating embedding may be


class RatingEmbeddings:
    """Mean embeddings of images by rating.

    Attributes:
        embeds: rating -> unit embedding, float32 [D]; a rating that no image had is missing.
        embedder: whose embeddings (`ldm_lab.checkpoints.embedders`).
        facts: how they came about, plain values.
    """

    def __init__(self, embeds: dict[int, Tensor], embedder: dict[str, str], facts: Section | None = None):
        self.embeds, self.embedder, self.facts = embeds, embedder, facts or Section()

    @classmethod
    def load(cls, name: str | Path, ratings: Sequence[int] | None = None) -> "RatingEmbeddings":
        """Return those of a file of ours, of a folder with LAION's rating0.npy ..., or of a released set's name.

        Args:
            name: such as `aesthetic/vit_l_14`.
            ratings: which are needed; others need not be downloaded. All by default.

        Raises:
            UserError: missing, damaged or foreign file; a rating that a released set does not have.
        """
        text = str(name)
        size = text.removeprefix("aesthetic/")
        if f"{text}/rating0" in catalogue():
            wanted = range(10) if ratings is None else ratings
            for rating in wanted:
                if not 0 <= rating < 10:
                    raise UserError(f"aesthetic: {unknown('rating', rating, map(str, range(10)))}")
            files = {rating: resolve_weights(f"{text}/rating{rating}", "rating embeddings") for rating in wanted}
            return cls({rating: _read_npy(path) for rating, path in files.items()}, OPENAI[size])
        path = Path(name).expanduser()
        if path.is_dir():
            return _read_folder(path)
        path = existing_file(path, f"rating embeddings; released are {', '.join(released())}")
        if not is_safetensors(path):
            raise UserError(
                f"{path}: no rating embeddings: a .safetensors file, or a folder of rating0.npy ..., is needed"
            )
        tensors, metadata = read_safetensors(path)
        if metadata.get("format") != FORMAT or metadata.get("role") != ROLE:
            raise UserError(
                f"{path}: no rating embeddings of ldm_lab's: it holds {metadata.get('role', 'something else')}"
            )
        try:
            facts = json.loads(metadata.get("facts", "{}"))
            embedder = json.loads(metadata["embedder"])
            wrong = embedders.problems(embedder)
            embeds = dict(zip(tensors["rating"].tolist(), tensors["embed"].float(), strict=True))
        except (KeyError, ValueError, TypeError):
            raise UserError(f"{path}: rating embeddings without ratings, embeddings or embedder") from None
        if wrong:
            raise UserError(f"{path}: {wrong[0]}")
        for embed in embeds.values():
            _check(embed, path)
        return cls(embeds, embedder, Section(facts) if isinstance(facts, dict) else None)

    def save(self, path: str | Path) -> None:
        """Write them to a `.safetensors` file."""
        ratings = sorted(self.embeds)
        tensors = {"rating": torch.tensor(ratings), "embed": torch.stack([self.embeds[r] for r in ratings])}
        texts = {"embedder": json.dumps(self.embedder), "facts": json.dumps(self.facts)}
        write_safetensors(path, tensors, {"format": FORMAT, "role": ROLE, **texts})


class Aesthetic:
    """A rating to guide toward, and how strongly.

    Args:
        ratings: mean embeddings by rating.
        rating: which of them.
        weight: of the rating's embedding against a prompt's, which has length 1; negative steers away.

    Raises:
        UserError: a rating that is not among them, a weight that is no finite number.
    """

    def __init__(self, ratings: RatingEmbeddings, rating: int, weight: float) -> None:
        if rating not in ratings.embeds:
            raise UserError(f"aesthetic: {unknown('rating', rating, map(str, ratings.embeds))}")
        if not math.isfinite(weight):
            raise UserError(f"aesthetic weight: a finite number is needed, not {weight}")
        self.embed, self.embedder, self.weight = ratings.embeds[rating], ratings.embedder, weight

    @classmethod
    def load(cls, rating: int, weight: float, name: str | Path | None, embedder: dict[str, str] | None) -> "Aesthetic":
        """Return the aesthetic of a set of rating embeddings.

        Args:
            rating, weight: as above.
            name: of the set (`RatingEmbeddings.load`); None takes the released one of an embedder.
            embedder: of the model's conditioner; None if nobody knows.

        Raises:
            UserError: no such set, or none for this embedder.
        """
        if name is None:
            if embedder is None:
                raise UserError(
                    "aesthetic: the model does not say whose embeddings it takes; aesthetic_embeddings has to"
                )
            name = released_for(embedder)
        return cls(RatingEmbeddings.load(name, [rating]), rating, weight)

    def check(self, embed_dim: int, embedder: dict[str, str] | None) -> None:
        """Raise UserError if the embeddings to be guided are of another width or another network.

        Args:
            embed_dim: their width.
            embedder: whose they are; None if that is not known, so that only the width can be compared.
        """
        if embedder is not None:
            embedders.check_same("aesthetic", self.embedder, embedder)
        if len(self.embed) != embed_dim:
            theirs = embedders.describe(self.embedder)
            raise UserError(
                f"aesthetic: embeddings of width {len(self.embed)} ({theirs}), the model's have {embed_dim}"
            )

    def guide(self, embeds: Tensor) -> Tensor:
        """Return unit embeddings [N, D], guided toward the rating, again of unit length."""
        moved = embeds + self.weight * self.embed.to(embeds)  # [N, D]
        unit: Tensor = moved / moved.norm(dim=-1, keepdim=True).clamp(min=1e-12)  # [N, D]
        return unit


def released() -> list[str]:
    """Return the names of the released sets of rating embeddings."""
    return [name.removesuffix("/rating0") for name in catalogue() if name.endswith("/rating0")]


def released_for(embedder: dict[str, str]) -> str:
    """Return the name of the released set for an embedder. Raises UserError if there is none."""
    for name in released():
        if embedders.same(OPENAI[name.removeprefix("aesthetic/")], embedder):
            return name
    raise UserError(
        f"aesthetic: no rating embeddings are released for {embedders.describe(embedder)}; "
        "`python -m ldm_lab rating-embeddings` makes some, --aesthetic-embeddings FILE takes them"
    )


def _read_folder(path: Path) -> RatingEmbeddings:
    """Return the embeddings of a folder of LAION's, told by its files' checksums or by its name."""
    files = {int(file.stem.removeprefix("rating")): file for file in path.glob("rating[0-9].npy")}
    if not files:
        raise UserError(f"{path}: no rating embeddings: a folder has to hold rating0.npy, rating1.npy, ...")
    first = sha256(min(files.values()))
    for name in released():
        size = name.removeprefix("aesthetic/")
        sums = {catalogue()[f"{name}/rating{rating}"].sha256 for rating in range(10)}
        if first in sums or path.name == f"{size}_embeddings":
            return RatingEmbeddings({rating: _read_npy(file) for rating, file in sorted(files.items())}, OPENAI[size])
    raise UserError(f"{path}: does not say whose embeddings these are: they are none of LAION's")


def _read_npy(path: Path) -> Tensor:
    """Return the embedding in a .npy file, float32 [D]."""
    array = open_npy(path)
    if array.dtype.kind != "f" or array.ndim == 0 or array.size != array.shape[-1]:
        raise UserError(f"{path}: one embedding is needed, [1, D] of floating-point numbers")
    embed = torch.from_numpy(array.reshape(-1).astype(np.float32))  # [D]
    _check(embed, path)
    return embed


def _check(embed: Tensor, path: Path) -> None:
    if embed.ndim != 1 or not embed.isfinite().all() or abs(float(embed.norm()) - 1) > UNIT:
        raise UserError(f"{path}: a rating embedding is a vector of length 1, of finite numbers")
