"""Attention of Imagen's U-Net in its three forms: of pixels, of pixels to tokens, of tokens to a text.

The names of the modules are those of lucidrains/imagen-pytorch@c166739 (2.0.0). There are two layouts: "rms" is that of
its 2.x, "group" that of 1.7 to 1.10.
"""

from typing import Literal, NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

Layout = Literal["rms", "group"]
SCALE = 8.0  # of the products of queries and keys of unit length
MEAN_LATENTS = 4  # tokens that the mean of a text is made into
POSITIONS = 512  # places of a text that have an embedding
POOL_LAYERS = 2


class Heads(NamedTuple):
    """Attention: how many heads, how wide each is, and in which layout.

    Attributes:
        count: heads.
        width: channels of each.
        layout: "rms" has queries and keys of unit length, with learned gains.
    """

    count: int
    width: int
    layout: Layout

    @property
    def inner(self) -> int:
        return self.count * self.width


class LayerNorm(nn.Module):
    """Normalizes the last axis, with a gain and no bias, in float32 whatever comes in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(width))  # [w]

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., w] in x's own precision for x [..., w]."""
        return F.layer_norm(x.float(), self.g.shape, self.g.float()).to(x.dtype)  # [..., w]


class BiasedLayerNorm(nn.LayerNorm):
    """Normalizes the last axis, in float32 whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., w] in x's own precision for x [..., w]."""
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float()).to(x.dtype)


class AttentionBase(nn.Module):
    """What all attention has in common: the gains of queries and keys, and the attending itself."""

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.heads = heads
        if heads.layout == "rms":
            self.q_scale, self.k_scale = nn.Parameter(torch.ones(heads.width)), nn.Parameter(torch.ones(heads.width))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [B, L, H * d] for queries [B, H, L, d], keys and values [B, H, M, d] each."""
        if self.heads.layout == "rms":
            q, k = F.normalize(q, dim=-1) * self.q_scale, F.normalize(k, dim=-1) * self.k_scale  # [B, H, ., d] each
            out = F.scaled_dot_product_attention(q.to(v), k.to(v), v, scale=SCALE)  # [B, H, L, d]
        else:
            out = F.scaled_dot_product_attention(q, k, v)  # [B, H, L, d]; the scale is d^-0.5
        return rearrange(out, "b h l d -> b l (h d)")

    def split(self, x: Tensor) -> Tensor:
        """Return [B, H, L, d] of x [B, L, H * d]."""
        return rearrange(x, "b l (h d) -> b h l d", h=self.heads.count)


def _to_out(inner: int, width: int, norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inner, width, bias=False), norm)


class SelfAttention(AttentionBase):
    """Attention of every pixel to all, to nothing (a learned key), and to the text where there is one.

    All heads share one key and one value (Shazeer 2019, arXiv 1911.02150).
    """

    def __init__(self, width: int, heads: Heads, context_width: int | None) -> None:
        super().__init__(heads)
        self.null_kv = nn.Parameter(torch.randn(2, heads.width))  # [2, d]
        self.norm = LayerNorm(width)
        self.to_q = nn.Linear(width, heads.inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads.width, bias=False)
        if context_width is not None:
            self.to_context = nn.Sequential(BiasedLayerNorm(context_width), nn.Linear(context_width, 2 * heads.width))
        self.has_context = context_width is not None
        self.to_out = _to_out(heads.inner, width, LayerNorm(width))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Return [B, L, w] for x [B, L, w] and the tokens [B, M, C]."""
        x = self.norm(x)  # [B, L, w]
        keys = [repeat(self.null_kv, "kv d -> b 1 (kv d)", b=len(x)).to(x), self.to_kv(x)]  # [B, ., 2d] each
        if self.has_context:
            keys.insert(0, self.to_context(context))  # [B, M, 2d]
        k, v = torch.cat([rows.to(keys[-1]) for rows in keys], dim=1).chunk(2, dim=-1)  # [B, M + 1 + L, d] each
        k, v = (repeat(rows, "b m d -> b h m d", h=self.heads.count) for rows in (k, v))
        attended: Tensor = self.to_out(self.attend(self.split(self.to_q(x)), k, v))  # [B, L, w]
        return attended


class CrossAttention(AttentionBase):
    """Attention of every pixel to the tokens, and to nothing (a learned key); each head has keys of its own."""

    def __init__(self, width: int, heads: Heads, context_width: int) -> None:
        super().__init__(heads)
        self.null_kv = nn.Parameter(torch.randn(2, heads.width))  # [2, d]
        self.norm = LayerNorm(width)
        self.to_q = nn.Linear(width, heads.inner, bias=False)
        self.to_kv = nn.Linear(context_width, 2 * heads.inner, bias=False)
        self.to_out = _to_out(heads.inner, width, LayerNorm(width))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Return [B, w, h, w'] for x [B, w, h, w'] and the tokens [B, M, C]."""
        height = x.shape[2]
        k, v = (self.split(part) for part in self.to_kv(context).chunk(2, dim=-1))  # [B, H, M, d] each
        nothing = repeat(self.null_kv, "kv d -> kv b h 1 d", b=len(x), h=self.heads.count).to(k)  # [2, B, H, 1, d]
        k, v = torch.cat([nothing[0], k], dim=2), torch.cat([nothing[1], v], dim=2)  # [B, H, 1 + M, d] each
        pixels = self.norm(rearrange(x, "b c h w -> b (h w) c"))  # [B, hw, c]
        out = self.to_out(self.attend(self.split(self.to_q(pixels)), k, v))  # [B, hw, c]
        return rearrange(out, "b (h w) c -> b c h w", h=height)


class PerceiverAttention(AttentionBase):
    """Attention of latents to a text and to one another (Jaegle et al. 2021, arXiv 2103.03206)."""

    def __init__(self, width: int, heads: Heads) -> None:
        super().__init__(heads)
        self.norm, self.norm_latents = BiasedLayerNorm(width), BiasedLayerNorm(width)
        self.to_q = nn.Linear(width, heads.inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads.inner, bias=False)
        self.to_out = _to_out(heads.inner, width, BiasedLayerNorm(width))

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """Return [B, N, w] for a text [B, L, w] and latents [B, N, w]."""
        latents = self.norm_latents(latents)  # [B, N, w]
        k, v = self.to_kv(torch.cat([self.norm(x), latents], dim=1)).chunk(2, dim=-1)  # [B, L + N, H * d] each
        attended = self.attend(self.split(self.to_q(latents)), self.split(k), self.split(v))  # [B, N, H * d]
        out: Tensor = self.to_out(attended)  # [B, N, w]
        return out


def feed_forward(width: int, factor: float) -> nn.Sequential:
    """Return two linear layers without bias, each after a normalization, with GELU between them."""
    inner = int(width * factor)
    return nn.Sequential(
        LayerNorm(width),
        nn.Linear(width, inner, bias=False),
        nn.GELU(),
        LayerNorm(inner),
        nn.Linear(inner, width, bias=False),
    )


class AttentionPool(nn.Module):
    """A text of any length as few tokens: of its mean, and learned ones that attend to it."""

    def __init__(self, width: int, latents: int, heads: Heads) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, width))  # [N, w]
        self.pos_emb = nn.Embedding(POSITIONS, width)
        self.to_latents_from_mean_pooled_seq = nn.Sequential(
            LayerNorm(width), nn.Linear(width, MEAN_LATENTS * width), nn.Unflatten(1, (MEAN_LATENTS, width))
        )
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(width, heads), feed_forward(width, 4)]) for _ in range(POOL_LAYERS)
        )

    def forward(self, text: Tensor) -> Tensor:
        """Return [B, 4 + N, w] for a text [B, L, w]."""
        placed = text + self.pos_emb.weight[: text.shape[1]].to(text)  # [B, L, w]
        of_mean = self.to_latents_from_mean_pooled_seq(text.mean(1))  # [B, 4, w]
        learned = repeat(self.latents, "n d -> b n d", b=len(text)).to(of_mean)  # [B, N, w]
        latents = torch.cat([of_mean, learned], dim=1)  # [B, 4 + N, w]
        for layer in self.layers:
            attention, feed = layer.children()
            latents = attention(placed, latents) + latents  # [B, 4 + N, w]
            latents = feed(latents) + latents  # [B, 4 + N, w]
        return latents


class TransformerBlock(nn.Module):
    """Self-attention among pixels and a feed-forward network, each added to its input.

    In the layout "group" the middle of the network has no feed-forward network.
    """

    def __init__(self, width: int, heads: Heads, context_width: int | None, factor: float | None) -> None:
        super().__init__()
        layers: list[nn.Module] = [SelfAttention(width, heads, context_width)]
        if factor is not None:
            layers.append(feed_forward(width, factor))
        self.layers = nn.ModuleList([nn.ModuleList(layers)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Return [B, c, h, w] for x [B, c, h, w] and the tokens [B, M, C]."""
        height = x.shape[2]
        x = rearrange(x, "b c h w -> b (h w) c")
        for layer in self.layers:
            attention, *feeds = layer.children()
            x = attention(x, context) + x  # [B, hw, c]
            for feed in feeds:
                x = feed(x) + x  # [B, hw, c]
        return rearrange(x, "b (h w) c -> b c h w", h=height)
