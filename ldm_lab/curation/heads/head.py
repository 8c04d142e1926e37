"""What all heads have in common, and how one is found, read, checked and written."""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ldm_lab.checkpoints import embedders
from ldm_lab.checkpoints.importer import detect_format
from ldm_lab.checkpoints.native import part_config, save_part
from ldm_lab.checkpoints.parts import load_module
from ldm_lab.checkpoints.sharded import weights_checksum
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Part
from ldm_lab.io.json_files import Json, parse_json

Output = Literal["number", "probability"]
UNSAID = {"embedder": "whose embeddings it takes", "activation": "what is between its layers"}
EXAMPLES = {
    "embedder": "embedder='{name: clip, model: ViT-L-14-quickgelu, pretrained: openai}'",
    "activation": "activation=relu",
}
NEARLY_UNIT = 1e-3  # a row's length may be off by this much after rounding to float16


class Head(Part, nn.Module):
    """A predictor of one number.

    Attributes:
        embed_dim: D, the width of the embeddings.
        embedder: whose embeddings it takes (`ldm_lab.checkpoints.embedders`).
        column: what the number is called in tables.
        output: "number" as it comes, or "probability": the sigmoid of it.
    """

    def __init__(self, embed_dim: int, embedder: dict[str, str], column: str, output: Output) -> None:
        super().__init__()
        self.embed_dim, self.embedder, self.column, self.output = embed_dim, embedder, column, output

    def raw(self, embeds: Tensor) -> Tensor:
        """Return the head's number [N] for embeddings [N, D], taken as they are."""
        raise NotImplementedError

    def fused(self) -> "Head":
        """Return a head that gives the same numbers with less work; itself where there is none."""
        return self

    def forward(self, embeds: Tensor) -> Tensor:
        """Return the predictions, float32 [N], of embeddings [N, D] of any length and precision.

        Raises:
            UserError: embeddings of another width.
        """
        self.check_width(embeds.shape[-1])
        values = self.raw(l2_normalize(embeds))  # [N]
        return values.sigmoid() if self.output == "probability" else values

    def check_width(self, width: int) -> None:
        """Raise UserError if embeddings have another width."""
        if width != self.embed_dim:
            raise UserError(
                f"head {self.column}: takes embeddings of width {self.embed_dim} "
                f"({embedders.describe(self.embedder)}), these have {width}"
            )


def l2_normalize(embeds: Tensor) -> Tensor:
    """Return embeddings [N, D] as float32 rows of length 1; rows of zeros stay zeros.

    Rows in float16 that are of unit length but for rounding stay as they are: that is how LAION stored and scored its
    embeddings, and dividing once more moves a score by as much as the rounding did.
    """
    rows = embeds.float()  # [N, D]
    length = rows.norm(dim=-1, keepdim=True)  # [N, 1]
    divisor = torch.where(length > 0, length, 1.0)  # [N, 1]
    if embeds.dtype == torch.float16:
        divisor = torch.where((length - 1).abs() < NEARLY_UNIT, 1.0, divisor)  # [N, 1]
    return rows / divisor  # [N, D]


def option_problems(embedder: dict[str, str], column: str) -> list[str]:
    """Return what is wrong with the options that all heads have."""
    problems = embedders.problems(embedder)
    if not column.strip():
        problems.append("column: a name is needed")
    return problems


class LoadedHead(NamedTuple):
    """A head out of a file.

    Attributes:
        head: ready to predict.
        source: the name or path that it was asked by.
        sha256: checksum of the file.
        trained: what the file says of its training; empty for a released one.
    """

    head: Head
    source: str
    sha256: str
    trained: dict[str, Json]


def load_head(name: str | Path) -> LoadedHead:
    """Return the head of a released name, or in a file: one of ours, or a released state dict.

    Raises:
        UserError: missing, damaged or foreign file; one that does not say whose embeddings it takes.
    """
    found = detect_format(str(name))
    path = found.path
    if found.kind == "part":
        role, config = part_config(path, found.file.metadata)
        if role != "head":
            raise UserError(f"{path}: holds a part of role {role!r}, not a head")
        kind = config.get("name")
    elif "head" in found.importer.parts:
        kind = found.importer.parts["head"]
    else:
        raise UserError(f"{path}: not a head: it holds {found.title}")
    try:
        module, _ = load_module("head", {"name": kind}, found)
    except UserError as error:
        missing = [key for key in UNSAID if f"head.{key}: has to be given" in str(error)]
        if not missing:
            raise
        raise UserError(
            f"{path}: does not say {' and '.join(UNSAID[key] for key in missing)}. Say it once: python -m ldm_lab "
            f"convert {path} head.safetensors {' '.join(EXAMPLES[key] for key in missing)} column=NAME"
        ) from None
    trained = parse_json(found.file.metadata.get("trained", "{}").encode())
    module.eval().requires_grad_(False)
    module = module.fused()
    if not all(p.isfinite().all() for p in module.parameters()):
        raise UserError(f"{path}: its weights are not finite numbers")
    return LoadedHead(module, str(name), weights_checksum(path), trained)


def save_head(path: str | Path, head: Head, section: dict[str, Any], trained: dict[str, float]) -> None:
    """Write a head with its config section and what is known of its training, as plain values."""
    save_part(path, head, section, {"trained": json.dumps(trained)})
