"""Means of images and texts in files: in one of their own (`conditioner.gap.means`), and beside a model's weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ldm_lab.checkpoints import embedders
from ldm_lab.checkpoints.files import FORMAT, GAP_PREFIX, is_safetensors, read_safetensors, write_safetensors
from ldm_lab.checkpoints.importer import Section
from ldm_lab.conditioners.gap import Gap
from ldm_lab.conditions import ConditionSpec, Embedding, describe_conditions
from ldm_lab.errors import UserError
from ldm_lab.io.atomic import existing_file

ROLE = "gap"


class GapFile(NamedTuple):
    """What a file of means holds.

    Attributes:
        gap: the means, the measured noise, perhaps a map.
        embedder: whose embeddings they are of (`ldm_lab.checkpoints.embedders`).
        facts: how they came about, plain values.
    """

    gap: Gap
    embedder: dict[str, str]
    facts: Section

    def save(self, path: str | Path) -> None:
        """Write them to a `.safetensors` file."""
        texts = {"embedder": json.dumps(self.embedder), "facts": json.dumps(self.facts)}
        write_safetensors(path, self.gap.state_dict(), {"format": FORMAT, "role": ROLE, **texts})


def read_gap(path: str | Path, embedder: dict[str, str] | None = None, where: str = "conditioner.gap.means") -> GapFile:
    """Return what a file of means holds.

    Args:
        path: of the file.
        embedder: whose embeddings are to be shifted; None takes any.
        where: key path that names the file.

    Raises:
        UserError: missing, damaged or foreign file; means of another conditioner's embeddings.
    """
    path = existing_file(Path(path).expanduser(), f"{where}: means of images and texts (`python -m ldm_lab gap`)")
    tensors, metadata = read_safetensors(path) if is_safetensors(path) else ({}, {})
    if metadata.get("format") != FORMAT or metadata.get("role") != ROLE:
        held = metadata.get("role", "something else")
        raise UserError(f"{where}: {path}: no means of images and texts: it holds {str(held)[:100]}")
    try:
        its, facts = json.loads(metadata["embedder"]), json.loads(metadata.get("facts", "{}"))
    except (KeyError, ValueError, RecursionError):
        raise UserError(f"{where}: {path}: does not say whose embeddings these means are of") from None
    if wrong := embedders.problems(its):
        raise UserError(f"{where}: {path}: {wrong[0]}")
    if embedder is not None:
        embedders.check_same(f"{where}: {path}", its, embedder)
    gap = Gap.from_state(tensors, f"{where}: {path}")
    return GapFile(gap, its, Section(facts if isinstance(facts, dict) else {}))


def beside_weights(gap: Gap | None) -> dict[str, Tensor]:
    """Return the tensors of a `Gap` under the names that they have beside a model's weights; {} for none."""
    return {} if gap is None else {GAP_PREFIX + name: value for name, value in gap.state_dict().items()}


def split_gap(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a model's weights, and the tensors beside them that are of a `Gap`, under its own names."""
    own = {name: value for name, value in state.items() if not name.startswith(GAP_PREFIX)}
    return own, {name.removeprefix(GAP_PREFIX): value for name, value in state.items() if name not in own}


def gap_of(state: Mapping[str, Tensor], config: Section, given: ConditionSpec, path: str | Path) -> Gap | None:
    """Return what a model's embeddings are shifted by, None for nothing.

    Args:
        state: of the `Gap`, out of the model's file.
        config: the model's section of its conditioner.
        given: what the denoiser is told.
        path: of the file.

    Raises:
        UserError: the model was trained with means, and the file has none; or means that make no sense.
    """
    if not state and config.get("gap") is None:
        return None
    if not state:
        raise UserError(f"{path}: was trained with conditioner.gap, and does not hold its means")
    gap, embed = Gap.from_state(dict(state), str(path)), given.get("embed")
    if not isinstance(embed, Embedding) or embed.width != gap.width:
        raise UserError(
            f"{path}: holds means of {gap.width} numbers, and the denoiser takes {describe_conditions(given)}"
        )
    return gap
