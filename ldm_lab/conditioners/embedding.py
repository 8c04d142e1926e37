"""The contract of conditioners whose texts and images share one space, and what they have in common."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ldm_lab.batch import Batch
from ldm_lab.conditions import Conditions, ConditionSpec, Embedding
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Conditioner


class EmbeddingConditioner(Conditioner):
    """A conditioner whose texts and images share one space: it compares them, too, and scores images.

    Attributes:
        embed_dim: D, the width of an embedding.
        text_size: L, positions of a tokenized text.
        image_transform: from a Pillow image of any mode and size to what `encode_pixels` takes, [3, S, S]; it can be
            sent to other processes.
    """

    embed_dim: int
    text_size: int

    @property
    def spec(self) -> ConditionSpec:
        return {"embed": Embedding(self.embed_dim)}

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.parameters()).device

    @property
    def image_transform(self) -> Callable[[Image.Image], Tensor]:
        raise NotImplementedError

    def tokenize(self, texts: Sequence[str], warn: bool = False) -> Tensor:
        """Return token ids, int64 [n, L]; too long texts are cut, if `warn` with a line in the log for each."""
        raise NotImplementedError

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of token ids [n, L], [n, D], of any length."""
        raise NotImplementedError

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Return the embeddings of images that `image_transform` prepared, [B, 3, S, S], [B, D], of any length."""
        raise NotImplementedError

    def encode_image(self, images: Tensor) -> Tensor:
        """Return the embeddings of images [B, 3, H, W] in [-1, 1], [B, D], unit rows; differentiable in the images."""
        raise NotImplementedError

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings of texts, [n, D], unit rows; a text that is too long is cut with a warning."""
        tokens = self.tokenize(texts, warn=True).to(self.device)  # [n, L]
        return F.normalize(self.encode_tokens(tokens), dim=-1)  # [n, D]

    def from_batch(self, batch: Batch) -> Conditions:
        """Return {"embed": [B, D]}, the embeddings of a batch's images. Raises UserError if it has none."""
        if batch.image is None:
            raise UserError(f"conditioner.name: {self.part_name} embeds images, and the data has none")
        return {"embed": self.encode_image(batch.image)}  # [B, D]

    def from_prompts(self, texts: Sequence[str], images: Sequence[Image.Image]) -> Conditions:
        """Return {"embed": [n, D]}, the embeddings of texts, then of images, unit rows."""
        embeds = [torch.zeros(0, self.embed_dim, device=self.device)]  # [0, D]
        if texts:
            embeds.append(self.encode_text(texts))  # [n_texts, D]
        if images:
            pixels = torch.stack([self.image_transform(image) for image in images])  # [n_images, 3, S, S]
            embeds.append(F.normalize(self.encode_pixels(pixels.to(self.device)), dim=-1))  # [n_images, D]
        return {"embed": torch.cat(embeds)}  # [n, D]
