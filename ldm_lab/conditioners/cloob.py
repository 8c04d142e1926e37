"""CLOOB's image and text towers (Fürst et al. 2022, arXiv 2110.11316), as trained by crowsonkb/cloob-training.

The layout and the parameter names are those of its PyTorch port, `model_pt.py`@de137c1, which
cloob-latent-diffusion runs; the defaults are the released ViT-B/16 models.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import torch
from annotated_types import Ge
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_lab import clip_tokens
from ldm_lab.conditioners.clip_preprocess import PIXEL_MEAN, PIXEL_STD, cropped, normalize_pixels
from ldm_lab.conditioners.embedding import EmbeddingConditioner
from ldm_lab.config import PositiveInt, check_options, register

HEAD_WIDTH = 64  # of all released towers


@register("conditioner", "cloob")
class CLOOB(EmbeddingConditioner):
    """CLOOB: embeddings of images in training, of texts (or images) in sampling; the two lie close together.

    Attributes:
        embed_dim: D, the width of an embedding.
        text_size: positions of a tokenized text.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        embed_dim: PositiveInt = 512,
        image_size: PositiveInt = 224,
        patch_size: PositiveInt = 16,
        image_width: PositiveInt = 768,
        image_layers: PositiveInt = 12,
        image_heads: PositiveInt | None = None,
        text_size: Annotated[int, Ge(2)] = 77,
        vocab_size: PositiveInt = clip_tokens.CLIP_VOCAB_SIZE,
        text_width: PositiveInt = 512,
        text_layers: PositiveInt = 12,
        text_heads: PositiveInt | None = None,
    ) -> None:
        """Build the towers with initial weights as CLIP's.

        Args:
            embed_dim: width of an embedding.
            image_size: pixels per side that the image tower sees.
            patch_size: pixels per side of a patch; divides image_size.
            image_width: width of the image tower's layers.
            image_layers: layers of the image tower.
            image_heads: attention heads of the image tower; divides image_width. null: image_width / 64.
            text_size: tokens that the text tower sees, start, end and padding included.
            vocab_size: tokens known to the text tower; fewer than 49408 keep the first of CLIP's merges.
            text_width: width of the text tower's layers.
            text_layers: layers of the text tower.
            text_heads: attention heads of the text tower; divides text_width. null: text_width / 64.

        Raises:
            UserError: sizes that do not divide each other.
        """
        super().__init__()
        sizes = {
            **{"embed_dim": embed_dim, "image_size": image_size, "patch_size": patch_size},
            **{"image_width": image_width, "image_layers": image_layers, "image_heads": image_heads},
            **{"text_size": text_size, "vocab_size": vocab_size},
            **{"text_width": text_width, "text_layers": text_layers, "text_heads": text_heads},
        }
        check_options(CLOOB, **sizes)
        image_heads, text_heads = image_heads or image_width // HEAD_WIDTH, text_heads or text_width // HEAD_WIDTH
        self.embed_dim, self.image_size = embed_dim, image_size
        self.text_size, self.vocab_size = text_size, vocab_size
        self.image_encoder = ImageEncoder(image_size, patch_size, image_width, image_layers, image_heads, embed_dim)
        self.text_encoder = TextEncoder(text_size, vocab_size, text_width, text_layers, text_heads, embed_dim)
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN), persistent=False)  # [3]
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD), persistent=False)  # [3]

    @staticmethod
    def check(
        *,
        image_size: int,
        patch_size: int,
        image_width: int,
        image_heads: int | None,
        text_width: int,
        text_heads: int | None,
    ) -> list[str]:
        """Return what is wrong across the options."""
        problems = []
        if image_size % patch_size:
            problems.append(f"image_size: {image_size} is no multiple of patch_size ({patch_size})")
        for tower, width, heads in (("image", image_width, image_heads), ("text", text_width, text_heads)):
            if heads is None and width % HEAD_WIDTH:
                where = f"{tower}_width ({width}) is no multiple of {HEAD_WIDTH}"
                problems.append(f"{tower}_heads: has to be given, as {where}")
            elif heads is not None and width % heads:
                problems.append(f"{tower}_width: {width} is no multiple of {tower}_heads ({heads})")
        return problems

    def freeze_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return both towers. Frozen images, trained texts: locked-image tuning (Zhai et al., arXiv 2111.07991)."""
        towers = {"image_tower": self.image_encoder, "text_tower": self.text_encoder}
        return {name: list(tower.parameters()) for name, tower in towers.items()}

    @property
    def image_transform(self) -> Callable[[Image.Image], Tensor]:
        """To [3, S, S] in [-1, 1] (see `images.center_crop_to`)."""
        return partial(cropped, self.image_size)

    def tokenize(self, texts: Sequence[str], warn: bool = False) -> Tensor:
        """Return token ids, int64 [n, text_size]; too long texts are cut, if `warn` with a line in the log for each."""
        return clip_tokens.tokenize(list(texts), self.text_size, self.vocab_size, warn)

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of token ids, int64 [n, text_size], [n, D], of any length."""
        return self.text_encoder(tokens)  # [n, D]

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Return the embeddings of images [B, 3, H, W] in [-1, 1], [B, D], of any length."""
        return self.image_encoder(self.normalize(self.resize((pixels + 1) / 2)))  # [B, D]

    def encode_image(self, images: Tensor) -> Tensor:
        """Return the embeddings of images [B, 3, H, W] in [-1, 1], [B, D], unit rows."""
        return F.normalize(self.encode_pixels(images), dim=-1)  # [B, D]

    def resize(self, images: Tensor) -> Tensor:
        """Return images of any size and range, [B, 3, H, W], as the tower's [B, 3, S, S].

        Bicubic, neither antialiased nor clamped: what the released diffusion models saw in training.
        """
        size = (self.image_size, self.image_size)
        return F.interpolate(images, size=size, mode="bicubic", align_corners=False)  # [B, 3, S, S]

    def normalize(self, images: Tensor) -> Tensor:
        """Return images in [0, 1], [B, 3, H, W], as the tower takes them."""
        return normalize_pixels(images, self.pixel_mean, self.pixel_std)  # [B, 3, H, W]


class ImageEncoder(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929) read off at its class token."""

    def __init__(self, image_size: int, patch_size: int, width: int, layers: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.class_embed = nn.Parameter(torch.randn(width) * width**-0.5)  # [width]
        self.embed = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.pos_embed = _embedding((image_size // patch_size) ** 2 + 1, width, std=width**-0.5)
        self.layers = nn.ModuleList(Layer(width, heads, layers) for _ in range(layers))
        self.proj = nn.Linear(width, embed_dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return embeddings before normalization, [B, D], for normalized pixels [B, 3, S, S]."""
        patches = rearrange(self.embed(pixels), "b w h_p w_p -> b (h_p w_p) w")  # [B, patches, width]
        class_token = repeat(self.class_embed, "w -> b 1 w", b=len(patches))  # [B, 1, width]
        x = torch.cat([class_token, patches], dim=1) + self.pos_embed.weight  # [B, 1 + patches, width]
        for layer in self.layers:
            x = layer(x)  # [B, 1 + patches, width]
        return self.proj(x[:, 0])  # [B, D]


class TextEncoder(nn.Module):
    """Transformer without a causal mask, read off at the start token."""

    def __init__(self, text_size: int, vocab_size: int, width: int, layers: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.end_token = vocab_size - 1
        self.embed = _embedding(vocab_size, width, std=0.02)
        self.pos_embed = _embedding(text_size, width, std=0.01)
        self.layers = nn.ModuleList(Layer(width, heads, layers) for _ in range(layers))
        self.proj = nn.Linear(width, embed_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return embeddings before normalization, [B, D], for token ids [B, text_size], padded to the full length."""
        is_end = (tokens == self.end_token).int()  # [B, L]
        # Up to and including the first end token; everything without one.
        valid = is_end.cumsum(1) - is_end == 0  # [B, L]
        x = self.embed(tokens) + self.pos_embed.weight  # [B, L, width]
        for layer in self.layers:
            x = layer(x, valid)  # [B, L, width]
        return self.proj(x[:, 0])  # [B, D]


class Layer(nn.Module):
    """Pre-norm attention, then a pre-norm MLP, each added to its input."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.attn = SelfAttention(width, heads, layers)
        self.ff = FeedForward(width, layers)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return [B, L, width] for x [B, L, width] and valid [B, L]."""
        x = x + self.attn(x, valid)  # [B, L, width]
        return x + self.ff(x)  # [B, L, width]


class SelfAttention(nn.Module):
    """Multi-head attention with one linear layer each for query, key, value and output."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        """`layers` of the tower only scales the initial weights, as CLIP's."""
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (_linear(width, width, std=width**-0.5) for _ in range(3))
        self.out = _linear(width, width, std=(2 * layers * width) ** -0.5)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return [B, L, width] for x [B, L, width]; where valid [B, L] is false a query attends evenly to everything.

        That is how the released text tower was trained: its padding mask was put on the queries, not on the keys. So
        the padding is seen by every valid query, and texts have to be padded to the full length.
        """
        x = self.norm(x)  # [B, L, width]
        q, k, v = (
            rearrange(proj(x), "b l (n d) -> b n l d", n=self.heads) for proj in (self.query, self.key, self.value)
        )
        if valid is not None:
            q = q * rearrange(valid, "b l -> b 1 l 1")  # [B, heads, L, d]; a query of zeros has equal logits
        attended = F.scaled_dot_product_attention(q, k, v)  # [B, heads, L, d]
        return self.out(rearrange(attended, "b n l d -> b l (n d)"))  # [B, L, width]


class FeedForward(nn.Module):
    """MLP of four times the width with the exact GELU, which the PyTorch port has (the JAX original: tanh)."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear_0 = _linear(width, 4 * width, std=(2 * width) ** -0.5)
        self.linear_1 = _linear(4 * width, width, std=(2 * layers * width) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, L, width] for x [B, L, width]."""
        return self.linear_1(F.gelu(self.linear_0(self.norm(x))))  # [B, L, width]


def _linear(width_in: int, width_out: int, std: float) -> nn.Linear:
    layer = nn.Linear(width_in, width_out)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


def _embedding(count: int, width: int, std: float) -> nn.Embedding:
    table = nn.Embedding(count, width)
    nn.init.normal_(table.weight, std=std)
    return table
