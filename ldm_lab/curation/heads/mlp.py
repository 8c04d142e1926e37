"""An MLP head: the improved aesthetic predictor (christophschuhmann/improved-aesthetic-predictor) and its like."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

import torch
from annotated_types import MinLen
from torch import Tensor, nn

from ldm_lab.config import NonNegativeInt, PositiveInt, ShareBelowOne, register
from ldm_lab.curation.heads.head import Head, Output, option_problems
from ldm_lab.curation.heads.linear import Linear


@register("head", "mlp")
class MLP(Head):
    """Linear layers with or without ReLU, and dropout in training, between them.

    The best known released one, sac+logos+ava1-l14-linearMSE, has no activation: its five layers are one affine map.
    """

    def __init__(
        self,
        *,
        widths: Annotated[list[PositiveInt], MinLen(2)],
        embedder: dict[str, str],
        activation: Literal["none", "relu"],
        column: str = "score",
        output: Output = "number",
        dropout: list[ShareBelowOne] = (),
        bare: list[NonNegativeInt] = (),
    ) -> None:
        """Build it with torch's initial weights.

        Args:
            widths: of the embedding, of each hidden layer, and 1.
            embedder: whose embeddings: name, and model with pretrained, or sha256 of the weights.
            activation: behind every layer but the last, and those of `bare`.
            column: what the prediction is called in tables.
            output: "number", or "probability" for its sigmoid.
            dropout: shares behind the first layers, as many as are given; in training alone.
            bare: hidden layers, counted from 0, that the next one follows directly.
        """
        super().__init__(widths[0], embedder, column, output)
        self.widths, self.activation, self.dropout, self.bare = list(widths), activation, list(dropout), list(bare)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    @staticmethod
    def check(
        *,
        widths: Sequence[int],
        embedder: dict[str, str],
        activation: str,
        column: str,
        dropout: Sequence[float],
        bare: Sequence[int],
    ) -> list[str]:
        """Return what is wrong with the options, and across them."""
        problems = option_problems(embedder, column)
        if widths[-1] != 1:
            problems.append(f"widths: of the embedding, of hidden layers, and 1 at the end are needed, not {widths}")
        if len(dropout) > len(widths) - 2:
            problems.append(f"dropout: at most one share per hidden layer is needed, not {list(dropout)}")
        hidden = set(range(len(widths) - 2))
        if not set(bare) <= hidden:
            problems.append(f"bare: hidden layers are {sorted(hidden)}, not {sorted(set(bare))}")
        if hidden and set(bare) == hidden and activation == "relu":
            problems.append(
                "activation: 'relu' has no place, each layer follows directly on the one before; it is none"
            )
        return problems

    def raw(self, embeds: Tensor) -> Tensor:
        x = embeds  # [N, D]
        for i, layer in enumerate(self.layers):
            x = layer(x)  # [N, widths[i + 1]]
            if i < len(self.layers) - 1:
                x = x.relu() if self.activation == "relu" and i not in self.bare else x
                if i < len(self.dropout):
                    x = nn.functional.dropout(x, self.dropout[i], self.training)
        return x[:, 0]  # [N]

    @torch.no_grad()
    def fused(self) -> Head:
        """Return the same map as one linear layer, computed in float64, if there is no activation between its layers.

        768 multiplications an embedding instead of 0.93 million, for the released one.
        """
        if self.activation != "none":
            return self
        weight, bias = torch.eye(self.embed_dim, dtype=torch.float64), torch.zeros(self.embed_dim, dtype=torch.float64)
        for layer in self.layers:
            weight = layer.weight.double() @ weight  # [width, D]
            bias = layer.weight.double() @ bias + layer.bias.double()  # [width]
        linear = Linear(embed_dim=self.embed_dim, embedder=self.embedder, column=self.column, output=self.output)
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
        return linear.eval().requires_grad_(False)
