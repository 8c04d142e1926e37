"""What Imagen's U-Net is built of: attention in three forms, gated residual blocks, changes of resolution.

The names of the modules are those of lucidrains/imagen-pytorch@c166739 (2.0.0). There are two layouts: "rms" is that of
its 2.x, "group" that of 1.7 to 1.10.
"""

import math
from typing import Literal, NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

Layout = Literal["rms", "group"]
GROUPS = 8  # of channels that are normalized together in the layout "group"
FREQUENCIES = 8  # learned ones, of a noise level
SCALE = 8.0  # of the products of queries and keys of unit length
KERNELS = (3, 7, 15)  # of the first convolutions, side by side
MEAN_LATENTS = 4  # tokens that the mean of a text is made into
POSITIONS = 512  # places of a text that have an embedding
POOL_LAYERS = 2
TIME_TOKENS = 2  # that a noise level is made into


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


class ChannelRMSNorm(nn.Module):
    """Every pixel's channels brought to a root mean square of 1, times a gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, 1, 1))  # [w, 1, 1]

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, w, h, w'] in x's own precision for x [B, w, h, w']."""
        unit = F.normalize(x.float(), dim=1) * math.sqrt(len(self.gamma))  # [B, w, h, w']
        return (unit * self.gamma).to(x.dtype)  # [B, w, h, w']


class GroupNorm(nn.GroupNorm):
    """Normalizes groups of channels, in float32 whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, w, h, w'] in x's own precision for x [B, w, h, w']."""
        return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


def pixel_norm(layout: Layout, width: int) -> nn.Module:
    """Return the normalization of a layout's residual blocks."""
    return ChannelRMSNorm(width) if layout == "rms" else GroupNorm(GROUPS, width)


# ------------------------------------------------------------------------------------------------------------ attention


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


# ------------------------------------------------------------------------------------------------- residual blocks


class Block(nn.Module):
    """Normalization, scale and shift, SiLU, a 3x3 convolution."""

    def __init__(self, c_in: int, c_out: int, layout: Layout) -> None:
        super().__init__()
        self.norm = pixel_norm(layout, c_in)
        self.project = nn.Conv2d(c_in, c_out, 3, padding=1)

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """Return [B, c_out, h, w] for x [B, c_in, h, w]; scale and shift are [B, c_in, 1, 1]."""
        x = self.norm(x)  # [B, c_in, h, w]
        if scale is not None and shift is not None:
            x = torch.addcmul(shift, x, scale + 1).to(x.dtype)  # [B, c_in, h, w]
        projected: Tensor = self.project(F.silu(x))  # [B, c_out, h, w]
        return projected


class GlobalContext(nn.Module):
    """A gate for each channel, made of a weighted mean over all pixels (Cao et al. 2019, arXiv 1904.11492)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = max(3, width // 2)
        self.to_k = nn.Conv2d(width, 1, 1)
        self.net = nn.Sequential(nn.Conv2d(width, inner, 1), nn.SiLU(), nn.Conv2d(inner, width, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """Return gates [B, w, 1, 1] for x [B, w, h, w']."""
        weights = self.to_k(x).float().flatten(2).softmax(-1).to(x.dtype)  # [B, 1, hw]
        mean = torch.einsum("b o p, b c p -> b c o", weights, x.flatten(2))  # [B, w, 1]
        gates: Tensor = self.net(mean[..., None].to(x.dtype))  # [B, w, 1, 1]
        return gates


class ResnetBlock(nn.Module):
    """Two blocks beside a skip connection, the second scaled and shifted by the time; between them perhaps the text."""

    def __init__(
        self, c_in: int, c_out: int, vector_width: int, layout: Layout, cross: CrossAttention | None, gated: bool
    ) -> None:
        super().__init__()
        self.time_mlp = nn.Sequential(nn.SiLU(), nn.Linear(vector_width, 2 * c_out))
        self.cross_attn = cross
        self.block1, self.block2 = Block(c_in, c_out, layout), Block(c_out, c_out, layout)
        self.gca = GlobalContext(c_out) if gated else None
        self.res_conv = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, vector: Tensor, context: Tensor) -> Tensor:
        """Return [B, c_out, h, w] for x [B, c_in, h, w], the time's vector [B, T] and the tokens [B, M, C]."""
        scale, shift = rearrange(self.time_mlp(vector), "b (two c) -> two b c 1 1", two=2)  # [B, c_out, 1, 1] each
        h = self.block1(x)  # [B, c_out, h, w]
        if self.cross_attn is not None:
            h = self.cross_attn(h, context) + h  # [B, c_out, h, w]
        h = self.block2(h, scale, shift)  # [B, c_out, h, w]
        if self.gca is not None:
            h = h * self.gca(h)  # [B, c_out, h, w]
        return h + self.res_conv(x)  # [B, c_out, h, w]


# ------------------------------------------------------------------------------------------------------ resolution


class MultiKernelConv(nn.Module):
    """The first convolution: three kernel sizes side by side, which make 1/2, 1/4 and 1/4 of the channels."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        widths = [c_out // 2, c_out // 4]
        widths.append(c_out - sum(widths))
        self.convs = nn.ModuleList(nn.Conv2d(c_in, w, k, padding=k // 2) for w, k in zip(widths, KERNELS))

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, c_out, h, w] for x [B, c_in, h, w]."""
        return torch.cat([conv(x) for conv in self.convs], dim=1)  # [B, c_out, h, w]


class WideningConv(nn.Module):
    """A 3x3 and a 1x1 convolution, added: what the last level ends with in place of a smaller size."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.fns = nn.ModuleList([nn.Conv2d(c_in, c_out, 3, padding=1), nn.Conv2d(c_in, c_out, 1)])

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, c_out, h, w] for x [B, c_in, h, w]."""
        wide, narrow = (conv(x) for conv in self.fns)  # [B, c_out, h, w] each
        return wide + narrow  # [B, c_out, h, w]


def downsample(c_in: int, c_out: int, layout: Layout) -> nn.Module:
    """Return a layer that halves height and width."""
    if layout == "group":
        return nn.Conv2d(c_in, c_out, 4, stride=2, padding=1)
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * c_in, c_out, 1))


class Upsample(nn.Module):
    """A 1x1 convolution whose channels become pixels: height and width double (Shi et al. 2016, arXiv 1609.05158)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        conv = nn.Conv2d(c_in, 4 * c_out, 1)
        # All four pixels of one begin alike (Aitken et al. 2017, arXiv 1707.02937): no checkerboard to unlearn.
        first = torch.empty_like(conv.weight[::4])  # [c_out, c_in, 1, 1]
        nn.init.kaiming_uniform_(first)
        conv.weight.data.copy_(repeat(first, "o ... -> (o four) ...", four=4))
        nn.init.zeros_(conv.bias)
        self.net = nn.Sequential(conv, nn.SiLU(), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, c_out, 2h, 2w] for x [B, c_in, h, w]."""
        larger: Tensor = self.net(x)  # [B, c_out, 2h, 2w]
        return larger


class Fourier(nn.Module):
    """A noise level as itself and sines and cosines of learned frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(FREQUENCIES))  # [f]

    def forward(self, level: Tensor) -> Tensor:
        """Return [B, 1 + 2f] for log SNRs [B]."""
        column = level.float()[:, None]  # [B, 1]
        angle = column * self.weights.float() * (2 * math.pi)  # [B, f]
        return torch.cat([column, angle.sin(), angle.cos()], dim=1)  # [B, 1 + 2f]
