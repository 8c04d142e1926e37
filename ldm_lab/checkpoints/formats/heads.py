"""Importer of heads on CLIP embeddings: LAION's aesthetic predictors, linear and improved (an MLP), its NSFW heads.

Their files are state dicts of 3 kB (linear: `weight` [1, D], `bias` [1]) and 3.7 MB (`layers.N.weight`, `layers.N.bias`
of an nn.Sequential; others have another name before the number, or none). What lies between two linear layers is not in
a file, but how much of it is: nothing where the numbers follow on one another, an activation, dropout or both where one
or two numbers are left out. They do not say whose embeddings they take; for the released ones the catalogue does, by
the checksum of the file, or by its name.
"""

import re
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from ldm_lab.checkpoints.importer import Importer, LoadedPart, Section, register_importer
from ldm_lab.checkpoints.opened import OpenedFile, Shapes
from ldm_lab.errors import UserError
from ldm_lab.io.atomic import sha256
from ldm_lab.pretrained.catalogue import catalogue

LAYER = re.compile(r"(?:(\w+)\.)?(\d{1,4})\.(weight|bias)")
LARGEST_GAP = 3  # from one linear layer's place to the next one's: an activation and dropout are between them
# The indices of the linear layers in the two published variants of the improved predictor: dropout alone between
# them (linearMSE), or ReLU and dropout (reluMSE).
ACTIVATIONS = {(0, 2, 4, 6, 7): "none", (0, 3, 6, 9, 11): "relu"}
DROPOUT = (0.2, 0.2, 0.1)  # of the improved predictor, behind its first three layers; idle when it predicts


class _Head(Importer):
    """A released head."""

    def read(self, file: OpenedFile, role: str) -> LoadedPart:
        """Return the head with the options that follow from its shapes, and what the catalogue knows of the file."""
        state, options = head(file.read(), file.path)
        return LoadedPart(state, Section({"name": self.kind, **options, **known(file.path)}))


@register_importer
class LinearHead(_Head):
    """One row of weights and a bias."""

    kind = "linear"
    title = "a linear head on embeddings"
    parts = {"head": "linear"}

    def matches(self, file: OpenedFile) -> bool:
        """Return whether the tensors are those of a linear head."""
        return is_linear(file.tensors)


@register_importer
class MLPHead(_Head):
    """Several layers."""

    kind = "mlp"
    title = "an MLP head on embeddings"
    parts = {"head": "mlp"}

    def matches(self, file: OpenedFile) -> bool:
        """Return whether the tensors are those of an MLP head."""
        return is_mlp(file.tensors)


def is_linear(tensors: Shapes) -> bool:
    """Return whether tensors are those of a linear head: one row of weights and a bias."""
    return set(tensors) == {"weight", "bias"} and len(tensors["weight"].shape) == 2 and tensors["weight"].shape[0] == 1


def is_mlp(tensors: Shapes) -> bool:
    """Return whether tensors are those of linear layers in an nn.Sequential, under its name or bare."""
    matches = [LAYER.fullmatch(name) for name in tensors]
    names = {match[1] for match in matches if match}
    if not tensors or not all(matches) or len(names) != 1:
        return False
    flat = all(len(value.shape) == (2 if name.endswith("weight") else 1) for name, value in tensors.items())
    return names == {"layers"} or flat


def head(state: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], Section]:
    """Return a head's tensors, an MLP's layers numbered without gaps, and the options that follow from the shapes.

    Raises:
        UserError: not a whole head with one score.
    """
    if is_linear(state):
        return state, Section(embed_dim=state["weight"].shape[1])
    layers = {f"layers.{match[2]}.{match[3]}": state[name] for name in state if (match := LAYER.fullmatch(name))}
    state = layers if len(layers) == len(state) else state
    indices = tuple(sorted({int(name.split(".")[1]) for name in layers}))
    missing = [
        f"layers.{i}.{kind}" for i in indices for kind in ("weight", "bias") if f"layers.{i}.{kind}" not in state
    ]
    if missing:
        raise UserError(f"{path}: not a whole MLP head: {missing[0]} is missing")
    weights = [state[f"layers.{i}.weight"] for i in indices]
    if any(w.ndim != 2 for w in weights) or any(a.shape[0] != b.shape[1] for a, b in pairwise(weights)):
        raise UserError(f"{path}: not an MLP head: its layers do not follow on one another")
    if weights[-1].shape[0] != 1:
        raise UserError(f"{path}: not a head with one score: it puts out {weights[-1].shape[0]} numbers")
    options = Section(widths=[weights[0].shape[1], *(w.shape[0] for w in weights)])
    options |= between(indices, path)
    kinds = ("weight", "bias")
    return {f"layers.{n}.{kind}": state[f"layers.{i}.{kind}"] for n, i in enumerate(indices) for kind in kinds}, options


def between(indices: tuple[int, ...], path: Path) -> Section:
    """Return the options of `MLP` that follow from the places of the linear layers.

    Raises:
        UserError: places between which more must be than an `MLP` has.
    """
    if indices in ACTIVATIONS:
        return Section(activation=ACTIVATIONS[indices], dropout=list(DROPOUT))
    gaps = [b - a for a, b in pairwise(indices)]
    if indices[0] or any(gap > LARGEST_GAP for gap in gaps):
        where = f"{'before the first of' if indices[0] else 'between'} its layers {indices}"
        raise UserError(f"{path}: not supported: what is {where} is more than activation and dropout")
    bare = [i for i, gap in enumerate(gaps) if gap == 1]
    return Section(bare=bare) if bare else Section()


def known(path: Path) -> Section:
    """Return what is known of a released head beside its file: `embedder` and `column`; nothing of another file."""
    checksum = sha256(path)
    heads = [entry for entry in catalogue().values() if entry.role == "head"]
    return Section(next((e.config for e in heads if checksum == e.sha256 or path.name == e.file), {}))
