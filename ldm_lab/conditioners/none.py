"""No condition: unconditional training and sampling."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from ldm_lab.config import PositiveInt, register
from ldm_lab.interfaces import Batch, Conditioner, Conditions, ConditionSpec, Embedding


@register("conditioner", "none")
class NoConditioner(Conditioner):
    """Zeros in place of an embedding, whatever is asked for."""

    is_unconditional = True
    zeros: Tensor

    def __init__(self, *, embed_dim: PositiveInt = 64) -> None:
        """Build the zeros.

        Args:
            embed_dim: D, the width of the zeros; the denoiser's input is as wide.
        """
        super().__init__()
        self.embed_dim = embed_dim
        self.register_buffer("zeros", torch.zeros(1, embed_dim), persistent=False)  # [1, D]

    @property
    def spec(self) -> ConditionSpec:
        return {"embed": Embedding(self.embed_dim)}

    def from_batch(self, batch: Batch) -> Conditions:
        """Return zeros, [B, D], for a batch of B samples."""
        return {"embed": self.zeros.repeat(len(batch), 1)}  # [B, D]

    def from_prompts(self, texts: Sequence[str], images: Sequence[Image.Image]) -> Conditions:
        """Return zeros, [n, D], for n prompts."""
        return {"embed": self.zeros.repeat(len(texts) + len(images), 1)}  # [n, D]
