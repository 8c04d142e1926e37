"""A linear head: LAION's first aesthetic predictors (LAION-AI/aesthetic-predictor), and any other of that form."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_lab.config import PositiveInt, register
from ldm_lab.curation.heads.head import Head, Output, option_problems


@register("head", "linear")
class Linear(Head):
    """score = weight . e + bias, on the unit-length embedding e. Nothing bounds it."""

    def __init__(
        self, *, embed_dim: PositiveInt, embedder: dict[str, str], column: str = "score", output: Output = "number"
    ) -> None:
        """Build it with zeros.

        Args:
            embed_dim: width of the embeddings.
            embedder: whose embeddings: name, and model with pretrained, or sha256 of the weights.
            column: what the prediction is called in tables.
            output: "number", or "probability" for its sigmoid.
        """
        super().__init__(embed_dim, embedder, column, output)
        self.weight = nn.Parameter(torch.zeros(1, embed_dim))  # [1, D]
        self.bias = nn.Parameter(torch.zeros(1))  # [1]

    @staticmethod
    def check(*, embedder: dict[str, str], column: str) -> list[str]:
        """Return what is wrong with the options."""
        return option_problems(embedder, column)

    def raw(self, embeds: Tensor) -> Tensor:
        return F.linear(embeds, self.weight, self.bias)[:, 0]  # [N]
