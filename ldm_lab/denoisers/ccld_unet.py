"""The U-Net of cloob-latent-diffusion (JD-P/cloob-latent-diffusion@19d20a8), under its own parameter names.

Each level halves the sides: the result of the level below is concatenated with what went into it. A conditioning
vector, made from the embedding and the time by a small mapping network, scales and shifts every normalized feature map.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import MinLen
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ldm_lab.attention import attention
from ldm_lab.config import PositiveInt, check_options, register
from ldm_lab.denoisers.unet import check_size
from ldm_lab.interfaces import ConditionSpec, Denoiser, Embedding, required_condition

MAPPING_FEATURES = 128  # Fourier features of t that the mapping network sees beside the embedding
PIXEL_FEATURES = 16  # Fourier features of t that are laid beside the channels of every pixel


@register("denoiser", "ccld_unet")
class CCLDUNet(Denoiser):
    """The U-Net of cloob-latent-diffusion: any number of levels, attention on all but the first, no dropout.

    Attributes:
        multiple_of: what latent height and width have to be multiples of, 2 ** (levels - 1).
    """

    learns_variance = False

    def __init__(
        self,
        channels: int,
        conditions: ConditionSpec,
        *,
        base_channels: PositiveInt,
        multipliers: Annotated[list[PositiveInt], MinLen(2)] = (4, 4, 8, 8),
        blocks_per_level: PositiveInt = 4,
        head_width: PositiveInt = 64,
        mapping_width: PositiveInt = 1024,
        gradient_checkpointing: bool = False,
    ) -> None:
        """Build the network with the original's initial weights.

        Args:
            channels: C of the latents.
            conditions: what is given; of it the embedding "embed" is taken.
            base_channels: the level at 1 / 2**i of the latent's size is base_channels * multipliers[i] wide.
            multipliers: one per level, at least two.
            blocks_per_level: convolution blocks on the way down, and again on the way up.
            head_width: attention has width // head_width heads; the number has to be at least 1 and divide the width.
            mapping_width: width of the conditioning vector.
            gradient_checkpointing: recompute each block in the backward pass; less memory, a third more time.

        Raises:
            UserError: options that contradict each other, or no embedding.
        """
        super().__init__()
        sizes = {"base_channels": base_channels, "blocks_per_level": blocks_per_level, "head_width": head_width}
        check_options(CCLDUNet, **sizes, mapping_width=mapping_width, multipliers=multipliers)
        embed = required_condition(conditions, "embed", Embedding, self.part_name)
        self.spec = {"embed": embed}
        self.multiple_of = 2 ** (len(multipliers) - 1)
        self.block_types = (ConvBlock, SelfAttention, BilinearUpsample)
        widths = [base_channels * multiplier for multiplier in multipliers]

        self.mapping_timestep_embed = FourierFeatures(MAPPING_FEATURES)
        self.mapping = nn.Sequential(
            ResidualMLP(embed.width + MAPPING_FEATURES, mapping_width),
            ResidualMLP(mapping_width, mapping_width, is_last=True),
        )
        self.timestep_embed = FourierFeatures(PIXEL_FEATURES)
        build = _Builder(widths, blocks_per_level, head_width, mapping_width, gradient_checkpointing)
        self.net = build.top_level(channels + PIXEL_FEATURES, channels)
        with torch.no_grad():  # the original damps every parameter, biases and gains included
            for parameter in (*self.mapping.parameters(), *self.net.parameters()):
                parameter.mul_(math.sqrt(0.5))

    @staticmethod
    def check(*, base_channels: int, multipliers: Sequence[int], head_width: int) -> list[str]:
        """Return what is wrong across the options."""
        for width in sorted({base_channels * multiplier for multiplier in multipliers}):
            heads = width // head_width
            if heads == 0 or width % heads:
                why = f"less than a head of {head_width}" if heads == 0 else f"not divisible by {heads} heads"
                return [
                    f"base_channels: {base_channels} makes a level {width} wide, {why}; widths that are multiples of "
                    f"{head_width} work (base_channels times multiplier), or choose another head_width"
                ]
        return []

    def outer_layers(self) -> list[str]:
        """Return what reads x and the time's features beside it, and what writes the output: skip connections, too."""
        first, last = "net.0", f"net.{len(self.net) - 1}"
        ends = [name for name, _ in self.named_modules() if name.startswith(f"{last}.main.")][-1:]
        return [f"{first}.main.0", f"{first}.skip", *ends, f"{last}.skip"]

    def conditioning(self, t: Tensor, embed: Tensor) -> Tensor:
        """Return the vector that modulates every block, [B, mapping_width], for t [B] and embed [B, D].

        The embedding's norm does not matter, except that zeros stay zeros: the unconditional input.
        """
        direction = F.normalize(embed, dim=-1) * math.sqrt(embed.shape[1])  # [B, D]
        return self.mapping(torch.cat([direction, self.mapping_timestep_embed(t)], dim=1))  # [B, mapping_width]

    def forward(self, x: Tensor, time: Tensor, embed: Tensor) -> Tensor:
        """Return [B, C, h, w] for x [B, C, h, w], the time t [B] in [0, 1], and embed [B, D] (0: no condition).

        Raises:
            UserError: h or w is not a multiple of `multiple_of`.
        """
        check_size(x, self.multiple_of)
        cond = self.conditioning(time, embed)  # [B, mapping_width]
        planes = repeat(self.timestep_embed(time), "b f -> b f h w", h=x.shape[2], w=x.shape[3])  # [B, 16, h, w]
        return self.net(torch.cat([x, planes], dim=1), cond)  # [B, C, h, w]


class _Builder:
    """The levels, from the widths; `net.4.main.9.main.1` and the like come from the positions used here."""

    def __init__(self, widths: list[int], blocks: int, head_width: int, cond_width: int, checkpointing: bool) -> None:
        self.widths, self.blocks, self.head_width, self.cond_width = widths, blocks, head_width, cond_width
        self.checkpointing = checkpointing

    def conv(self, c_in: int, c_mid: int, c_out: int, is_last: bool = False) -> "ConvBlock":
        return ConvBlock(c_in, c_mid, c_out, self.cond_width, is_last=is_last)

    def conv_attention(self, c_in: int, c_mid: int, c_out: int) -> list[nn.Module]:
        return [self.conv(c_in, c_mid, c_out), SelfAttention(c_out, self.head_width)]

    def sequence(self, modules: list[nn.Module]) -> "CondSequential":
        return CondSequential(*modules, checkpointing=self.checkpointing)

    def top_level(self, c_in: int, c_out: int) -> "CondSequential":
        """Return the whole net: the first level, without attention, around the others."""
        width = self.widths[0]
        down = [self.conv(c_in if i == 0 else width, width, width) for i in range(self.blocks)]
        up = [
            self.conv(
                2 * width if i == 0 else width, width, c_out if i == self.blocks - 1 else width, i == self.blocks - 1
            )
            for i in range(self.blocks)
        ]
        return self.sequence([*down, self.lower_level(1), *up])

    def lower_level(self, level: int) -> "WithInput":
        """Return one level below the first, with all that is below it; it ends in its upper neighbor's width."""
        above, width = self.widths[level - 1], self.widths[level]
        modules = [nn.AvgPool2d(2)]
        is_lowest = level == len(self.widths) - 1
        for i in range(self.blocks):
            modules += self.conv_attention(above if i == 0 else width, width, width)
        if not is_lowest:
            modules.append(self.lower_level(level + 1))
        for i in range(self.blocks):
            c_in = 2 * width if i == 0 and not is_lowest else width
            modules += self.conv_attention(c_in, width, above if i == self.blocks - 1 else width)
        modules.append(BilinearUpsample())
        return WithInput(self.sequence(modules))


class CondSequential(nn.Sequential):
    """A sequence whose blocks are handed the conditioning vector, too."""

    def __init__(self, *modules: nn.Module, checkpointing: bool) -> None:
        super().__init__(*modules)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Return the result, [B, c_out, h, w], for x [B, c_in, h, w] and cond [B, mapping_width]."""
        for module in self:
            if isinstance(module, ConvBlock | SelfAttention) and self.checkpointing and torch.is_grad_enabled():
                # Nothing in a block is random, but for LoRA's dropout: else there is no generator state to keep.
                is_random = any(isinstance(inner, nn.Dropout) for inner in module.modules())
                x = checkpoint(module, x, cond, use_reentrant=False, preserve_rng_state=is_random)  # [B, c, h, w]
            elif isinstance(module, ConvBlock | SelfAttention | WithInput):
                x = module(x, cond)  # [B, c, h, w]
            else:
                x = module(x)  # [B, c, h/2, w/2] or [B, c, 2h, 2w]
        return x


class WithInput(nn.Module):
    """A level with its own input concatenated behind its result."""

    def __init__(self, main: CondSequential) -> None:
        super().__init__()
        self.main = main

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Return [B, 2c, h, w] for x [B, c, h, w]."""
        return torch.cat([self.main(x, cond), x], dim=1)  # [B, 2c, h, w]


class ConvBlock(nn.Module):
    """Two 3x3 convolutions, each normalized, modulated and rectified, beside a skip connection."""

    def __init__(self, c_in: int, c_mid: int, c_out: int, cond_width: int, is_last: bool = False) -> None:
        """`is_last`: the net's last block ends with the second convolution, so that its output can take any sign."""
        super().__init__()
        first = [nn.Conv2d(c_in, c_mid, 3, padding=1), WholeNorm(c_mid), Modulation(cond_width, c_mid), nn.ReLU()]
        second = [nn.Conv2d(c_mid, c_out, 3, padding=1)]
        if not is_last:
            second += [WholeNorm(c_out), Modulation(cond_width, c_out), nn.ReLU()]
        self.main = nn.ModuleList([*first, *second])
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1, bias=False)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Return [B, c_out, h, w] for x [B, c_in, h, w] and cond [B, cond_width]."""
        h = x
        for module in self.main:
            h = module(h, cond) if isinstance(module, Modulation) else module(h)  # [B, c_mid or c_out, h, w]
        return h + self.skip(x)  # [B, c_out, h, w]


class WholeNorm(nn.GroupNorm):
    """Normalization over channels and pixels together: of one group, in whatever order the channels lie in memory.

    torch's kernel for GPUs gives back feature maps whose channels are no longer last, so that each convolution
    behind one would have its input copied.
    """

    def __init__(self, channels: int, affine: bool = False) -> None:
        super().__init__(1, channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, c, h, w] for x [B, c, h, w]."""
        if x.device.type == "cpu" or not _is_channels_last(x):
            return super().forward(x)
        return self.with_channels_last(x)

    def with_channels_last(self, x: Tensor) -> Tensor:
        """Return [B, c, h, w] for x [B, c, h, w], both with their channels last in memory."""
        rows = rearrange(x, "b c h w -> b (h w c)")  # [B, h w c], without a copy
        rows = F.layer_norm(rows, rows.shape[1:], eps=self.eps)
        x = rearrange(rows, "b (h w c) -> b c h w", h=x.shape[2], w=x.shape[3])  # [B, c, h, w]
        return x if self.weight is None else torch.addcmul(self.bias[:, None, None], x, self.weight[:, None, None])


class Modulation(nn.Module):
    """Scale and shift of every channel, from the conditioning vector (FiLM: Perez et al. 2018, arXiv 1709.07871)."""

    def __init__(self, cond_width: int, channels: int) -> None:
        super().__init__()
        self.layer = nn.Linear(cond_width, channels * 2, bias=False)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Return [B, c, h, w] for x [B, c, h, w] and cond [B, cond_width]."""
        scale, shift = rearrange(self.layer(cond), "b (two c) -> two b c 1 1", two=2)  # [B, c, 1, 1] each
        return torch.addcmul(shift, x, scale + 1)  # [B, c, h, w]


class SelfAttention(nn.Module):
    """Attention among all pixels, added to its input."""

    def __init__(self, channels: int, head_width: int) -> None:
        super().__init__()
        self.heads = channels // head_width  # where this does not divide, heads are wider than head_width
        self.norm = WholeNorm(channels, affine=True)
        self.qkv_proj = nn.Conv2d(channels, channels * 3, 1)
        self.out_proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Return [B, c, h, w] for x [B, c, h, w]; `cond` is not used."""
        qkv = self.qkv_proj(self.norm(x)).chunk(3, dim=1)  # [B, c, h, w] each
        q, k, v = (rearrange(part, "b (n d) h w -> b n (h w) d", n=self.heads) for part in qkv)  # [B, heads, hw, d]
        attended = attention(q, k, v)  # [B, heads, hw, d]
        attended = rearrange(attended, "b n (h w) d -> b (n d) h w", h=x.shape[2])  # [B, c, h, w]
        return x + self.out_proj(attended)  # [B, c, h, w]


class BilinearUpsample(nn.Upsample):
    """Twice the height and width: every new pixel is 3/4 of the nearest old one and 1/4 of the next, along each axis.

    torch's own kernel goes through all samples and channels one after the other on GPUs, which takes a sixth of a
    training step of the released size, and its gradient comes out a little different each time; on CPUs it takes three
    times as long as this.
    """

    def __init__(self) -> None:
        super().__init__(scale_factor=2, mode="bilinear", align_corners=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, c, 2h, 2w] for x [B, c, h, w]."""
        if _is_channels_last(x):
            return self.twice(x.movedim(1, -1), 1).movedim(-1, 1)  # [B, c, 2h, 2w], channels last as well
        return self.twice(x, 2)  # [B, c, 2h, 2w]

    @staticmethod
    def twice(x: Tensor, first: int) -> Tensor:
        """Return x with the sides `first` and `first + 1` twice as long."""
        for dim in (first, first + 1):
            size = x.shape[dim]
            before = torch.cat([x.narrow(dim, 0, 1), x.narrow(dim, 0, size - 1)], dim)  # the neighbors, as large as x
            after = torch.cat([x.narrow(dim, 1, size - 1), x.narrow(dim, size - 1, 1)], dim)
            x = torch.stack([x.lerp(before, 0.25), x.lerp(after, 0.25)], dim + 1).flatten(dim, dim + 1)
        return x


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class ResidualMLP(nn.Module):
    """Two linear layers with ReLU beside a skip connection; the last block of a stack ends without its ReLU."""

    def __init__(self, width_in: int, width: int, is_last: bool = False) -> None:
        super().__init__()
        layers = [nn.Linear(width_in, width), nn.ReLU(), nn.Linear(width, width)]
        self.main = nn.Sequential(*layers, *([] if is_last else [nn.ReLU()]))
        self.skip = nn.Identity() if width_in == width else nn.Linear(width_in, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, width] for x [B, width_in]."""
        return self.main(x) + self.skip(x)  # [B, width]


class FourierFeatures(nn.Module):
    """cos and sin of random multiples of t (Tancik et al. 2020, arXiv 2006.10739); drawn once, never trained.

    The multiples are a parameter, as in the original's checkpoints, but one without a gradient, so that no optimizer
    touches it.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features // 2, 1), requires_grad=False)  # [features / 2, 1]

    def forward(self, t: Tensor) -> Tensor:
        """Return [B, features] for t [B]: the cosines first, then the sines."""
        # A product, not a matrix product: under autocast that would be half precision, too coarse for an angle.
        angle = 2 * math.pi * t[:, None] * self.weight.T  # [B, features / 2]
        return torch.cat([angle.cos(), angle.sin()], dim=1)  # [B, features]
