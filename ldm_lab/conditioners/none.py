"""No condition: unconditional training and sampling."""

import torch
from PIL import Image
from torch import Tensor, nn

from ldm_lab.config import register
from ldm_lab.interfaces import Batch


@register("conditioner", "none")
class NoConditioner(nn.Module):
    """Zeros in place of an embedding, whatever is asked for."""

    zeros: Tensor

    def __init__(self, *, embed_dim: int = 64) -> None:
        """`embed_dim`: D, the width of the zeros; the denoiser's input is as wide."""
        super().__init__()
        self.embed_dim = embed_dim
        self.register_buffer("zeros", torch.zeros(1, embed_dim), persistent=False)  # [1, D]

    def from_batch(self, batch: Batch) -> dict[str, Tensor]:
        """Return zeros, [B, D], for a batch of B samples."""
        return {"embed": self.zeros.repeat(len(batch), 1)}  # [B, D]

    def from_prompts(self, texts: list[str], images: list[Image.Image]) -> dict[str, Tensor]:
        """Return zeros, [n, D], for n prompts."""
        return {"embed": self.zeros.repeat(len(texts) + len(images), 1)}  # [n, D]

    def null(self, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return zeros, [B, D], for a condition of B rows."""
        return {name: torch.zeros_like(value) for name, value in cond.items()}  # [B, D]
