"""From pictures to the features that sets are compared by: Inception's, or the embeddings of a CLIP or CLOOB."""

import hashlib
import json
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_lab.checkpoints import embedders
from ldm_lab.conditioners.embedding import EmbeddingConditioner
from ldm_lab.embed import Prepare
from ldm_lab.evaluation.inception import SIDE, WIDTH, clean_resize, load_inception
from ldm_lab.io.atomic import sha256
from ldm_lab.metrics import Space


class Features(nn.Module):
    """A frozen network whose features of pictures are compared. `prepare` is sent to other processes, nothing else.

    Attributes:
        space: which kind.
        width: D of a row.
        prepare: from a Pillow picture of any mode and size to what `rows` takes.
        identity: what makes the numbers what they are: the weights, and how a picture is resized.
    """

    space: Space
    width: int
    prepare: Prepare
    identity: dict[str, str]

    def rows(self, prepared: Tensor) -> Tensor:
        """Return the features, float32 [B, D], of prepared pictures [B, 3, S, S]."""
        raise NotImplementedError

    def describe(self) -> str:
        """Return what it is in a few words, for the table."""
        raise NotImplementedError

    @property
    def key(self) -> str:
        """A few characters that stand for the identity, as part of a file's name."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:12]


class InceptionFeatures(Features):
    """Features of FID and KID."""

    space: Space = "inception"
    width = WIDTH

    def __init__(self, weights: str | None = None) -> None:
        """Load the network; arguments and errors are those of `load_inception`."""
        super().__init__()
        self.network, path = load_inception(weights)
        self.prepare = clean_resize
        self.identity = {"name": "inception", "sha256": sha256(path), "resize": f"clean-fid {SIDE}"}

    def rows(self, prepared: Tensor) -> Tensor:
        return self.network(prepared)  # [B, 2048]

    def describe(self) -> str:
        return f"Inception (sha256 {self.identity['sha256'][:12]}), resized as clean-fid does"


class EmbeddingFeatures(Features):
    """Embeddings of a conditioner whose texts and images share one space, unit rows."""

    space: Space = "embedding"

    def __init__(self, conditioner: EmbeddingConditioner, embedder: dict[str, str]) -> None:
        """Take a conditioner with its weights, and whose embeddings it gives (`ldm_lab.checkpoints.embedders`)."""
        super().__init__()
        self.conditioner, self.embedder = conditioner, embedder
        self.width = conditioner.embed_dim
        self.prepare = conditioner.image_transform
        self.identity = {**embedder, "resize": "its own"}

    def rows(self, prepared: Tensor) -> Tensor:
        return F.normalize(self.conditioner.encode_pixels(prepared).float(), dim=-1)  # [B, D]

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings of texts, float32 [n, D], unit rows; too long ones are cut."""
        tokens = self.conditioner.tokenize(list(texts)).to(self.conditioner.device)  # [n, L]
        return F.normalize(self.conditioner.encode_tokens(tokens).float(), dim=-1)  # [n, D]

    def describe(self) -> str:
        return f"embeddings of {embedders.describe(self.embedder)}"


@torch.no_grad()
def rows_of(features: Features, pictures: Sequence[Image.Image], device: torch.device) -> Tensor:
    """Return the features of pictures, float32 [n, D] on the CPU."""
    prepared = torch.stack([features.prepare(picture) for picture in pictures]).to(device)  # [n, 3, S, S]
    with torch.autocast(device.type, enabled=False):
        return features.rows(prepared).float().cpu()  # [n, D]
