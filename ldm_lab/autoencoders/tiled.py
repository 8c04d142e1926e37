"""Convolutions of feature maps that stay in main memory, tile by tile: a tile at a time is on the device.

What comes out is what the whole map gives: every tile sees as far beyond its edges as the convolution reaches, and
norms are calculated over the whole map before its tiles are cut.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

Pointwise = Callable[[Tensor], Tensor]  # a part of a map -> the same part of what the convolution gets


@dataclass(frozen=True)
class Tiles:
    """How a map is cut.

    Attributes:
        side: of a tile, in elements of the map.
        device: where a tile is convolved.
    """

    side: int
    device: torch.device

    def convolve(
        self, conv: nn.Conv2d, x: Tensor, before: Pointwise | None = None, onto: Tensor | None = None, scale: int = 1
    ) -> Tensor:
        """Return a convolution of stride 1 that keeps the size, [B, c, scale * h, scale * w] in main memory.

        Args:
            conv: the convolution.
            x: in main memory, [B, C, h, w].
            before: what is done with x first.
            onto: what the result is added to, in place; None: nothing.
            scale: how many times `before` enlarges.
        """
        reach, (height, width) = conv.kernel_size[0] // 2, x.shape[2:]
        out = onto
        if out is None:
            out = x.new_zeros(len(x), conv.out_channels, scale * height, scale * width)  # [B, c, H, W]
        for top in range(0, height, self.side):
            for left in range(0, width, self.side):
                rows, above, below = self._cut(top, height, reach, scale)
                columns, before_it, behind = self._cut(left, width, reach, scale)
                part = x[:, :, rows, columns].to(self.device)  # [B, C, <= side + 2 reach, <= side + 2 reach]
                part = part if before is None else before(part)  # [B, C, ...]
                part = F.pad(part, (before_it, behind, above, below))  # [B, C, ...]
                tile = F.conv2d(part, conv.weight, conv.bias)  # [B, c, <= scale * side, <= scale * side]
                y, z = scale * top, scale * left
                out[:, :, y : y + tile.shape[2], z : z + tile.shape[3]] += tile.to(out.device)
        return out

    def _cut(self, start: int, size: int, reach: int, scale: int) -> tuple[slice, int, int]:
        """Return what a tile sees along a side, and the zeros on both sides of it; below 0 it is cut off again."""
        first, last = max(start - reach, 0), min(start + self.side + reach, size)
        end = min(start + self.side, size)
        return slice(first, last), reach - scale * (start - first), reach - scale * (last - end)

    def activation(self, norm: nn.GroupNorm, x: Tensor) -> Pointwise:
        """Return group norm and SiLU of a map x [B, C, h, w] as a function of parts of it, on the device."""
        groups = rearrange(x, "b (g c) h w -> b g (c h w)", g=norm.num_groups)  # [B, g, n]
        variance, mean = torch.var_mean(groups, 2, correction=0)  # [B, g], [B, g]
        share = norm.num_channels // norm.num_groups
        factor = repeat((variance + norm.eps).rsqrt(), "b g -> b (g c) 1 1", c=share).to(self.device)  # [B, C, 1, 1]
        center = repeat(mean, "b g -> b (g c) 1 1", c=share).to(self.device)  # [B, C, 1, 1]
        weight, bias = (rearrange(p, "c -> 1 c 1 1") for p in (norm.weight, norm.bias))  # [1, C, 1, 1] each
        return lambda part: F.silu((part - center) * factor * weight + bias)


def doubled(part: Tensor) -> Tensor:
    """Return a part with every element repeated 2x2."""
    return F.interpolate(part, scale_factor=2.0, mode="nearest")
