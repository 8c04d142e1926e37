"""What GLIDE's U-Net is built of: residual blocks, attention to pixels and text, the text transformer.

The names of the modules are those of openai/glide-text2im@69b5307.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_lab.attention import attention

MAX_PERIOD = 10_000  # of the time's sinusoids
EXACT = 1e-3  # a timestep this near to a whole one is the whole one: what is missing is float32's rounding of t


def sinusoids(timestep: Tensor, width: int) -> Tensor:
    """Return cosines and sines of timesteps [B], 0 .. T - 1, float32 [B, width]."""
    index = timestep.float()  # [B]
    whole = index.round()  # [B]
    index = torch.where((index - whole).abs() < EXACT, whole, index)  # [B]
    half = width // 2
    place = torch.arange(half, dtype=torch.float32, device=index.device)  # [half]
    angle = index[:, None] * torch.exp(place * (-math.log(MAX_PERIOD) / half))  # [B, half]
    both = torch.cat([angle.cos(), angle.sin()], dim=1)  # [B, 2 * half]
    return F.pad(both, (0, width % 2))  # [B, width]


@dataclass
class Builder:
    """The blocks, from the widths of the levels; `input_blocks.5.0` and the like come from the positions used here.

    Attributes:
        blocks: residual blocks of each level on the way down.
        attention: the scales, 1, 2, 4, ..., at which there is attention.
        head_width: channels of an attention head.
        groups: of channels that are normalized together.
        dropout: in residual blocks.
        text_width: channels of the text's sequence.
        emb_width: of the time's embedding.
    """

    blocks: list[int]
    attention: list[int]
    head_width: int
    groups: int
    dropout: float
    text_width: int
    emb_width: int

    def res(self, c_in: int, c_out: int, resample: str | None = None) -> "ResBlock":
        return ResBlock(c_in, c_out, self.emb_width, self.groups, self.dropout, resample)

    def attend(self, level: int, width: int) -> list["AttentionBlock"]:
        return [self.attention_block(width)] if 2**level in self.attention else []

    def attention_block(self, width: int) -> "AttentionBlock":
        return AttentionBlock(width, self.head_width, self.groups, self.text_width)

    def down(self, c_in: int, widths: list[int]) -> tuple[nn.ModuleList, list[int]]:
        """Return the way down, and the width of each of its results."""
        modules = [nn.Sequential(nn.Conv2d(c_in, widths[0], 3, padding=1))]
        skips = [widths[0]]
        for level, width in enumerate(widths):
            for _ in range(self.blocks[level]):
                modules.append(nn.Sequential(self.res(skips[-1], width), *self.attend(level, width)))
                skips.append(width)
            if level < len(widths) - 1:
                modules.append(nn.Sequential(self.res(width, width, "down")))
                skips.append(width)
        return nn.ModuleList(modules), skips

    def middle(self, width: int) -> nn.Sequential:
        return nn.Sequential(self.res(width, width), self.attention_block(width), self.res(width, width))

    def up(self, widths: list[int], skips: list[int]) -> nn.ModuleList:
        """Return the way up; each block reads one result of the way down, the last one first."""
        modules, above, skips = [], widths[-1], list(skips)
        for level, width in reversed(list(enumerate(widths))):
            for i in range(self.blocks[level] + 1):
                layers = [self.res(above + skips.pop(), width), *self.attend(level, width)]
                if level and i == self.blocks[level]:
                    layers.append(self.res(width, width, "up"))
                modules.append(nn.Sequential(*layers))
                above = width
        return nn.ModuleList(modules)


class GroupNorm(nn.GroupNorm):
    """Normalizes groups of channels, in float32 whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, c, ...] in x's own precision for x [B, c, ...]."""
        return super().forward(x.float()).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Normalizes the last axis, in float32 whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., w] in x's own precision for x [..., w]."""
        return super().forward(x.float()).to(x.dtype)


class ResBlock(nn.Module):
    """Two 3x3 convolutions beside a skip connection, scaled and shifted by the time's embedding; may resample."""

    def __init__(
        self, c_in: int, c_out: int, emb_width: int, groups: int, dropout: float, resample: str | None
    ) -> None:
        """`resample`: "down" halves height and width, "up" doubles them, None leaves them."""
        super().__init__()
        self.resample = {"down": nn.AvgPool2d(2), "up": nn.Upsample(scale_factor=2), None: nn.Identity()}[resample]
        self.in_layers = nn.Sequential(GroupNorm(groups, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_width, 2 * c_out))
        self.out_layers = nn.Sequential(
            GroupNorm(groups, c_out), nn.SiLU(), nn.Dropout(dropout), zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        )
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Return [B, c_out, h', w'] for x [B, c_in, h, w] and emb [B, e]."""
        norm, activation, conv = self.in_layers
        h = conv(self.resample(activation(norm(x))))  # [B, c_out, h', w']
        scale, shift = rearrange(self.emb_layers(emb), "b (two c) -> two b c 1 1", two=2)  # [B, c_out, 1, 1] each
        norm, *rest = self.out_layers
        h = torch.addcmul(shift, norm(h), 1 + scale).to(h.dtype)  # [B, c_out, h', w']
        for layer in rest:
            h = layer(h)  # [B, c_out, h', w']
        return self.skip_connection(self.resample(x)) + h  # [B, c_out, h', w']


class AttentionBlock(nn.Module):
    """Attention of every pixel to the text and to all pixels, in one softmax, added to its input."""

    def __init__(self, channels: int, head_width: int, groups: int, text_width: int) -> None:
        super().__init__()
        self.heads = channels // head_width
        self.norm = GroupNorm(groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.encoder_kv = nn.Conv1d(text_width, 2 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """Return [B, c, h, w] for x [B, c, h, w] and the text's sequence [B, w, L]."""
        pixels = rearrange(x, "b c h w -> b c (h w)")
        q, k, v = heads_of(self.qkv(self.norm(pixels)), self.heads, 3)  # [B, heads, hw, d] each
        text_k, text_v = heads_of(self.encoder_kv(text), self.heads, 2)  # [B, heads, L, d] each
        k, v = torch.cat([text_k, k], dim=2), torch.cat([text_v, v], dim=2)  # [B, heads, L + hw, d] each
        attended = attention(q, k, v)  # [B, heads, hw, d]
        out = self.proj_out(rearrange(attended, "b n hw d -> b (n d) hw"))  # [B, c, hw]
        return x + rearrange(out, "b c (h w) -> b c h w", h=x.shape[2])  # [B, c, h, w]


def heads_of(x: Tensor, heads: int, parts: int) -> Tensor:
    """Return queries, keys, values (or the last two), [parts, B, heads, L, d], of x [B, heads * parts * d, L]."""
    return rearrange(x, "b (n parts d) l -> parts b n l d", n=heads, parts=parts)


class Transformer(nn.Module):
    """Blocks of attention among all positions, padding included, and an MLP."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(TextBlock(width, heads) for _ in range(layers))


class TextBlock(nn.Module):
    """Attention and MLP, each normalized before and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = TextAttention(width, heads)
        self.ln_2 = LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, L, w] for x [B, L, w]."""
        x = x + self.attn(self.ln_1(x))  # [B, L, w]
        return x + self.mlp(self.ln_2(x))  # [B, L, w]


class TextAttention(nn.Module):
    """Attention of every position to all."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_qkv = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, L, w] for x [B, L, w]."""
        qkv = rearrange(self.c_qkv(x), "b l (n qkv d) -> qkv b n l d", n=self.heads, qkv=3)
        attended = attention(*qkv)  # [B, heads, L, d]
        return self.c_proj(rearrange(attended, "b n l d -> b l (n d)"))  # [B, L, w]


class MLP(nn.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, L, w] for x [B, L, w]."""
        return self.c_proj(self.gelu(self.c_fc(x)))  # [B, L, w]


def zeroed(module: nn.Module) -> nn.Module:
    """Return a layer with zeros for weights: what it ends begins as nothing added."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
