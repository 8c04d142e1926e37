"""An MLP on standardized embeddings: LAION's NSFW detectors (LAION-AI/CLIP-based-NSFW-Detector), found by AutoKeras."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from annotated_types import MinLen
from torch import Tensor

from ldm_lab.config import NonNegativeInt, PositiveInt, ShareBelowOne, register
from ldm_lab.curation.heads.head import Head, Output
from ldm_lab.curation.heads.mlp import MLP

SMALLEST_STD = 1e-7  # Keras's
MICRO = 1_000_000  # a table's keys are numbers as texts with six digits behind the point


@register("head", "standardized_mlp")
class StandardizedMLP(MLP):
    """score = MLP((e - mean) / std), of the unit-length embedding e, column by column.

    AutoKeras takes a column for a category if it has few values in training, and so it did with some of LAION's
    embeddings, which were rounded to float16. Such a column is looked up in a table, as a text with six digits behind
    the point; what is not in the table is 0.
    """

    mean: Tensor
    variance: Tensor
    table_keys: Tensor
    table_values: Tensor

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
        table_columns: list[NonNegativeInt] = (),
        table_sizes: list[NonNegativeInt] = (),
    ) -> None:
        """Build it with torch's initial weights, mean 0 and variance 1.

        Args:
            widths: of the embedding, of each hidden layer, and 1.
            embedder: whose embeddings: name, and model with pretrained, or sha256 of the weights.
            activation: behind every layer but the last, and those of `bare`.
            column: what the prediction is called in tables.
            output: "number", or "probability" for its sigmoid.
            dropout: shares behind the first layers, as many as are given; in training alone.
            bare: hidden layers, counted from 0, that the next one follows directly.
            table_columns: columns of the embedding that are looked up in a table.
            table_sizes: entries of their tables.
        """
        super().__init__(
            widths=widths,
            embedder=embedder,
            activation=activation,
            column=column,
            output=output,
            dropout=dropout,
            bare=bare,
        )
        self.table_columns, self.table_sizes = list(table_columns), list(table_sizes)
        self.register_buffer("mean", torch.zeros(self.embed_dim))  # [D]
        self.register_buffer("variance", torch.ones(self.embed_dim))  # [D]
        self.register_buffer("table_keys", torch.zeros(sum(table_sizes), dtype=torch.int64))  # [K], of all tables
        self.register_buffer("table_values", torch.zeros(sum(table_sizes)))  # [K]

    @staticmethod
    def check(
        *,
        widths: Sequence[int],
        embedder: dict[str, str],
        activation: str,
        column: str,
        dropout: Sequence[float],
        bare: Sequence[int],
        table_columns: Sequence[int],
        table_sizes: Sequence[int],
    ) -> list[str]:
        """Return what is wrong with the options, and across them."""
        problems = MLP.check(
            widths=widths, embedder=embedder, activation=activation, column=column, dropout=dropout, bare=bare
        )
        if len(table_columns) != len(table_sizes) or len({*table_columns}) != len(table_columns):
            problems.append(f"table_sizes: one for each of {list(table_columns)} is needed, not {list(table_sizes)}")
        if any(place >= widths[0] for place in table_columns):
            last = widths[0] - 1
            problems.append(f"table_columns: the last one of an embedding is {last}, not {max(table_columns)}")
        return problems

    def raw(self, embeds: Tensor) -> Tensor:
        std = self.variance.sqrt().clamp(min=SMALLEST_STD)  # [D]
        return super().raw((self.looked_up(embeds) - self.mean) / std)  # [N]

    def looked_up(self, embeds: Tensor) -> Tensor:
        """Return embeddings [N, D] with the tables' values in the columns that have one."""
        if not self.table_columns:
            return embeds
        x = embeds.clone()  # [N, D]
        keys, values = (table.split(self.table_sizes) for table in (self.table_keys, self.table_values))
        for place, known, found in zip(self.table_columns, keys, values):
            if not len(known):
                x[:, place] = 0.0
                continue
            ascending, order = known.sort()  # [K] each
            wanted = text_keys(embeds[:, place])  # [N]
            at = torch.searchsorted(ascending, wanted).clamp(max=len(known) - 1)  # [N]
            x[:, place] = torch.where(ascending[at] == wanted, found[order[at]], 0.0)  # [N]
        return x

    def fused(self) -> Head:
        """Return itself: the standardization is no linear layer's."""
        return self


def text_keys(values: Tensor) -> Tensor:
    """Return whole numbers, int64 of the same shape, that are equal where "%f" gives the same text.

    Twice the number of millionths, and one more for a minus: "-0.000000" is another text than "0.000000".
    """
    millionths = (values.double() * MICRO).round().abs().long()  # values' shape
    return 2 * millionths + values.signbit()  # values' shape
