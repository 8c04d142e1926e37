"""The place of a CLIP vector in glide-finetune's latent models."""

import torch
from torch import Tensor

from ldm_lab.config import PositiveInt, register
from ldm_lab.interfaces import (
    Autoencoder,
    Batch,
    ConditionRequest,
    Conditions,
    ConditionSource,
    ConditionSpec,
    Embedding,
)


@register("condition_source", "clip_embed")
class ClipEmbed(ConditionSource):
    """A network with layers for a CLIP vector, which is left out: the text alone says what is to be made."""

    def __init__(self, *, width: PositiveInt = 768) -> None:
        """Set how wide the vector is.

        Args:
            width: of the vector that the network has layers for.
        """
        super().__init__()
        self.width = width

    @property
    def spec(self) -> ConditionSpec:
        return {"clip_embed": Embedding(self.width, optional=True)}

    def from_batch(
        self, batch: Batch, x0: Tensor, autoencoder: Autoencoder, generator: torch.Generator | None
    ) -> Conditions:
        """Return nothing: the network leaves its layers for the vector out."""
        return {}

    def from_request(self, request: ConditionRequest) -> Conditions:
        """Return nothing: the network leaves its layers for the vector out."""
        return {}
