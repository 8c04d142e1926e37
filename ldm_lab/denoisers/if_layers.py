"""What DeepFloyd IF's U-Net adds to GLIDE's: GELU, a pooled text, normalized keys and values, attention to text alone.

The names of the modules are those of the package deepfloyd-if 1.0.1.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_lab.attention import attention
from ldm_lab.denoisers.glide_layers import AttentionBlock, Builder, GroupNorm, LayerNorm, ResBlock, heads_of

SKIP = 0.7071  # of a block's result in the efficient form: 1 / sqrt(2), in four digits


@dataclass(kw_only=True)
class IFBuilder(Builder):
    """The blocks of IF, from the widths of the levels.

    Attributes:
        efficient: of the super-resolution stages: the time's embedding comes activated, sums are scaled.
        cross_only: pixels attend to the text alone.
    """

    efficient: bool
    cross_only: bool

    def res(self, c_in: int, c_out: int, resample: str | None = None) -> "IFResBlock":
        return IFResBlock(c_in, c_out, self.emb_width, self.groups, self.dropout, resample, self.efficient)

    def attention_block(self, width: int) -> "IFAttentionBlock":
        return IFAttentionBlock(width, self.head_width, self.groups, self.text_width, self.cross_only)


class IFResBlock(ResBlock):
    """GLIDE's residual block with GELU; in the efficient form it is handed an activated embedding, and scaled."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        emb_width: int,
        groups: int,
        dropout: float,
        resample: str | None,
        efficient: bool,
    ) -> None:
        super().__init__(c_in, c_out, emb_width, groups, dropout, resample)
        self.efficient = efficient
        self.in_layers[1], self.out_layers[1] = nn.GELU(), nn.GELU()
        self.emb_layers[0] = nn.Identity() if efficient else nn.GELU()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Return [B, c_out, h', w'] for x [B, c_in, h, w] and emb [B, e]."""
        out = super().forward(x, emb)  # [B, c_out, h', w']
        return out * SKIP if self.efficient else out


class IFAttentionBlock(AttentionBlock):
    """Attention of every pixel to the normalized text, and to all pixels unless `cross_only`, added to its input."""

    def __init__(self, channels: int, head_width: int, groups: int, text_width: int, cross_only: bool) -> None:
        super().__init__(channels, head_width, groups, text_width)
        self.cross_only = cross_only
        if cross_only:
            self.qkv = nn.Conv1d(channels, channels, 1)
        self.norm_encoder = GroupNorm(groups, text_width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return [B, c, h, w].

        Args:
            x: [B, c, h, w].
            text: the text's sequence, [B, w, L].
            mask: bool [B, L], where the sequence may be attended to, somewhere in each row; None is everywhere.
        """
        pixels = rearrange(x, "b c h w -> b c (h w)")
        parts = heads_of(self.qkv(self.norm(pixels)), self.heads, 1 if self.cross_only else 3)  # [., B, heads, hw, d]
        k, v = heads_of(self.encoder_kv(self.normalized(text, mask)), self.heads, 2)  # [B, heads, L, d] each
        if not self.cross_only:
            k, v = torch.cat([k, parts[1]], dim=2), torch.cat([v, parts[2]], dim=2)  # [B, heads, L + hw, d] each
        if mask is not None:
            mask = F.pad(mask, (0, k.shape[2] - mask.shape[1]), value=True)[:, None, None]  # [B, 1, 1, L or L + hw]
        attended = attention(parts[0], k, v, mask)  # [B, heads, hw, d]
        out = self.proj_out(rearrange(attended, "b n hw d -> b (n d) hw"))  # [B, c, hw]
        return x + rearrange(out, "b c (h w) -> b c h w", h=x.shape[2])  # [B, c, h, w]

    def normalized(self, text: Tensor, mask: Tensor | None) -> Tensor:
        """Return the sequence [B, w, L], groups of channels normalized over the places that the mask has."""
        norm = self.norm_encoder
        if mask is None:
            return norm(text)
        groups = rearrange(text.float(), "b (g c) l -> b g (c l)", g=norm.num_groups)  # [B, g, c * L]
        share = mask[:, None].expand(-1, text.shape[1] // norm.num_groups, -1).flatten(1)[:, None].float()  # [B, 1, .]
        share = share / share.sum(2, keepdim=True)  # [B, 1, c * L]
        groups = groups - (groups * share).sum(2, keepdim=True)  # [B, g, c * L]
        groups = groups * ((groups.square() * share).sum(2, keepdim=True) + norm.eps).rsqrt()  # [B, g, c * L]
        unit = groups.reshape(text.shape)  # [B, w, L]
        return torch.addcmul(norm.bias[:, None], unit, norm.weight[:, None]).to(text.dtype)  # [B, w, L]


class AttentionPooling(nn.Module):
    """One vector of a sequence: its mean, with a place of its own, attends to it and to itself."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(1, width) / width**0.5)  # [1, w]
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return [B, w] for x [B, L, w]; mask as in `IFAttentionBlock`."""
        if mask is None:
            mean = x.mean(1, keepdim=True)  # [B, 1, w]
        else:
            share = mask.to(x) / mask.sum(1, keepdim=True)  # [B, L]
            mean = torch.einsum("bl,blw->bw", share, x)[:, None]  # [B, 1, w]
            mask = F.pad(mask, (1, 0), value=True)[:, None, None]  # [B, 1, 1, 1 + L]
        first = mean + self.positional_embedding.to(x)  # [B, 1, w]
        x = torch.cat([first, x], dim=1)  # [B, 1 + L, w]
        q, k, v = (
            rearrange(layer(value), "b l (n d) -> b n l d", n=self.heads)
            for layer, value in ((self.q_proj, first), (self.k_proj, x), (self.v_proj, x))
        )
        attended = attention(q, k, v, mask)  # [B, heads, 1, d]
        return rearrange(attended, "b n 1 d -> b (n d)")  # [B, w]


def pooling(heads: int, text_width: int, width: int) -> nn.Sequential:
    """Return what makes a vector [B, width] of a text [B, L, text_width]."""
    return nn.Sequential(
        LayerNorm(text_width), AttentionPooling(heads, text_width), nn.Linear(text_width, width), LayerNorm(width)
    )


def gelu_mlp(width_in: int, width: int) -> nn.Sequential:
    """Return two linear layers with GELU between them."""
    return nn.Sequential(nn.Linear(width_in, width), nn.GELU(), nn.Linear(width, width))
