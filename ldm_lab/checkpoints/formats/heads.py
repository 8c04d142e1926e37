"""Importer of released heads on CLIP embeddings: LAION's aesthetic predictors, linear and improved (an MLP).

Their files are state dicts of 3 kB (linear: `weight` [1, D], `bias` [1]) and 3.7 MB (`layers.N.weight`, `layers.N.bias`
of an nn.Sequential). They do not say whose embeddings they take; for the released ones the catalogue does, by the
checksum of the file, or by its name.
"""

import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_lab.checkpoints.third_party import read_state_dict
from ldm_lab.errors import UserError
from ldm_lab.io.atomic import sha256
from ldm_lab.pretrained.catalogue import catalogue

LAYER = re.compile(r"layers\.(\d+)\.(weight|bias)")
# The indices of the linear layers in the two published variants of the improved predictor: dropout alone between
# them (linearMSE), or ReLU and dropout (reluMSE).
ACTIVATIONS = {(0, 2, 4, 6, 7): "none", (0, 3, 6, 9, 11): "relu"}
DROPOUT = (0.2, 0.2, 0.1)  # of the improved predictor, behind its first three layers; idle when it predicts


def is_linear(names: dict[str, Any]) -> bool:
    """Return whether a file's tensors are those of a linear head: one row of weights and a bias."""
    return set(names) == {"weight", "bias"} and len(names["weight"].shape) == 2 and names["weight"].shape[0] == 1


def is_mlp(names: Iterable[str]) -> bool:
    """Return whether a file's tensors are those of an MLP head."""
    return bool(names) and all(LAYER.fullmatch(name) for name in names)


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Return `(state_dict, config, extra)` of a released head.

    Args:
        path: a state dict, or a safetensors file with these names.

    Returns:
        Its tensors (an MLP's layers numbered without gaps), the keys of the part `linear` or `mlp` of role "head" that
        follow from the shapes and, for a released file, whose embeddings it takes; nothing else.

    Raises:
        UserError: missing or damaged file, or not such a head.
    """
    path = Path(path)
    state, _ = read_state_dict(path, "head")
    facts = known(path)
    if is_linear(state):
        return state, {"embed_dim": state["weight"].shape[1], **facts}, {}
    if not is_mlp(state):
        raise UserError(f"{path}: not a linear or an MLP head: {', '.join(sorted(state)[:3])} are in it")
    indices = tuple(sorted({int(LAYER.fullmatch(name)[1]) for name in state}))
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
    config = {"widths": [weights[0].shape[1], *(w.shape[0] for w in weights)], **facts}
    if indices in ACTIVATIONS:
        config |= {"activation": ACTIVATIONS[indices], "dropout": list(DROPOUT)}
    renamed = {
        f"layers.{n}.{kind}": state[f"layers.{i}.{kind}"] for n, i in enumerate(indices) for kind in ("weight", "bias")
    }
    return renamed, config, {}


def known(path: Path) -> dict[str, Any]:
    """Return what is known of a released head beside its file: `embedder` and `column`; nothing of another file."""
    checksum = sha256(path)
    heads = [entry for entry in catalogue().values() if entry.role == "head"]
    return dict(next((e.config for e in heads if checksum == e.sha256 or path.name == e.file), {}))
