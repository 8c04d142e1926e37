"""What Imagen's U-Net is built of beside attention: gated residual blocks, changes of resolution, the levels.

The names of the modules are those of lucidrains/imagen-pytorch@c166739 (2.0.0), in two layouts (`imagen_attention`).
"""

import math

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_lab.denoisers.imagen_attention import CrossAttention, Heads, Layout, TransformerBlock

GROUPS = 8  # of channels that are normalized together in the layout "group"
FREQUENCIES = 8  # learned ones, of a noise level
KERNELS = (3, 7, 15)  # of the first convolutions, side by side
MIDDLE_HEADS = (8, 64)  # heads of the text attention in the middle, and their width, whatever the options say
TIME_TOKENS = 2  # that a noise level is made into


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


# ---------------------------------------------------------------------------------------------------------- levels


class LevelPlan:
    """A level: its place, the widths of the finer and the coarser side, its blocks, where it attends."""

    def __init__(self, place: int, fine: int, coarse: int, blocks: int, attends: bool, reads_text: bool) -> None:
        self.place, self.fine, self.coarse = place, fine, coarse
        self.blocks, self.attends, self.reads_text = blocks, attends, reads_text


class Builder:
    """The levels; `downs.1.2.0` and the like come from the positions used here."""

    def __init__(self, vector_width: int, tokens_width: int, heads: Heads, feed_forward: float) -> None:
        self.vector_width, self.tokens_width = vector_width, tokens_width
        self.heads, self.feed_forward = heads, feed_forward

    def block(self, c_in: int, c_out: int, *, gated: bool = False, text: Heads | None = None) -> ResnetBlock:
        cross = None if text is None else CrossAttention(c_out, text, self.tokens_width)
        return ResnetBlock(c_in, c_out, self.vector_width, self.heads.layout, cross, gated)

    def middle(self, width: int) -> ResnetBlock:
        return self.block(width, width, text=Heads(*MIDDLE_HEADS, self.heads.layout))

    def middle_attention(self, width: int) -> TransformerBlock:
        return TransformerBlock(width, self.heads, None, self.feed_forward if self.heads.layout == "rms" else None)

    def attention(self, level: LevelPlan, width: int) -> nn.Module:
        if not level.attends:
            return nn.Identity()
        return TransformerBlock(width, self.heads, self.tokens_width, self.feed_forward)

    def down(self, level: LevelPlan, efficient: bool, last: bool) -> nn.ModuleList:
        """Return [smaller size before, first block, blocks, attention, smaller size after]."""
        width, layout = level.coarse if efficient else level.fine, self.heads.layout
        before = downsample(level.fine, level.coarse, layout) if efficient else nn.Identity()
        after: nn.Module = nn.Identity()
        if not efficient:
            after = WideningConv(level.fine, level.coarse) if last else downsample(level.fine, level.coarse, layout)
        first = self.block(width, width, text=self.heads if level.reads_text else None)
        blocks = nn.ModuleList(self.block(width, width, gated=True) for _ in range(level.blocks))
        return nn.ModuleList([before, first, blocks, self.attention(level, width), after])

    def up(self, level: LevelPlan, efficient: bool) -> nn.ModuleList:
        """Return [first block, blocks, attention, larger size]."""
        width = level.coarse
        c_in = width + (level.coarse if efficient else level.fine)
        first = self.block(c_in, width, text=self.heads if level.reads_text else None)
        blocks = nn.ModuleList(self.block(c_in, width, gated=True) for _ in range(level.blocks))
        larger = Upsample(width, level.fine) if efficient or level.place else nn.Identity()
        return nn.ModuleList([first, blocks, self.attention(level, width), larger])
