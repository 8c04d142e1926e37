"""The KL-regularised autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752; CompVis/latent-diffusion).

Parameter names are CompVis's, so that its checkpoints load strictly; the buffers `latent_mean` and `latent_std` are
beside them. The name `kl_f8` stands for the family: with other multipliers it is kl-f4, f16 or f32, as `downscale`
follows from their number.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import torch
from annotated_types import MinLen
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_lab.attention import attention
from ldm_lab.autoencoders.tiled import Tiles, doubled
from ldm_lab.config import PositiveInt, check_options, register
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Autoencoder

INITIAL_LOGVAR = -6.0  # of the posterior, before training


@register("autoencoder", "kl_f8")
class KLAutoencoder(Autoencoder):
    """KL autoencoder of CompVis: with the defaults kl-f8, 3x256x256 -> 4x32x32; other sizes by other options.

    Attributes:
        channels: C of a latent, embed_dim.
        downscale: pixels per side of one latent element, 2 ** (levels - 1).
    """

    def __init__(
        self,
        *,
        ch: PositiveInt = 128,
        ch_mult: Annotated[list[PositiveInt], MinLen(1)] = (1, 2, 4, 4),
        num_res_blocks: PositiveInt = 2,
        z_channels: PositiveInt = 4,
        embed_dim: PositiveInt = 4,
        attn_resolutions: list[PositiveInt] = (),
        resolution: PositiveInt = 256,
        norm_groups: PositiveInt = 32,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
    ) -> None:
        """Build the network with PyTorch's default initial weights, but a posterior that starts almost without noise.

        Args:
            ch: the level at 1 / 2**i of the image's size is ch * ch_mult[i] wide.
            ch_mult: one per level; every level but the last halves the sides.
            num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
            z_channels: channels between encoder and decoder, before and after the 1x1 convolutions.
            embed_dim: channels of a latent.
            attn_resolutions: levels with attention, by their size in pixels at an image of `resolution`.
            resolution: only says which levels `attn_resolutions` means; images of any size go in.
            norm_groups: groups of every group norm; every width has to be a multiple.
            use_quant_conv: a 1x1 convolution behind the encoder; the VAEs of Stable Diffusion 3 and FLUX have none, and
                embed_dim is z_channels then.
            use_post_quant_conv: one before the decoder.

        Raises:
            UserError: options that contradict each other.
        """
        super().__init__()
        sizes = {"ch": ch, "num_res_blocks": num_res_blocks, "z_channels": z_channels, "embed_dim": embed_dim}
        quant = {"use_quant_conv": use_quant_conv, "use_post_quant_conv": use_post_quant_conv}
        check_options(KLAutoencoder, **sizes, **quant, ch_mult=ch_mult, norm_groups=norm_groups)
        self.channels = embed_dim
        self.downscale = 2 ** (len(ch_mult) - 1)
        widths = [ch * multiplier for multiplier in ch_mult]
        has_attention = [resolution // 2**level in attn_resolutions for level in range(len(widths))]
        self.encoder = Encoder(widths, ch, num_res_blocks, has_attention, 2 * z_channels, norm_groups)
        self.decoder = Decoder(widths, num_res_blocks, has_attention, z_channels, norm_groups)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, 1) if use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1) if use_post_quant_conv else nn.Identity()
        # Start almost without noise: with PyTorch's default it is as loud as the mean that the decoder has to hear.
        last = self.quant_conv if isinstance(self.quant_conv, nn.Conv2d) else self.encoder.conv_out
        nn.init.constant_(last.bias[embed_dim:], INITIAL_LOGVAR)

    @staticmethod
    def check(
        *,
        ch: int,
        ch_mult: Sequence[int],
        z_channels: int,
        embed_dim: int,
        norm_groups: int,
        use_quant_conv: bool,
        use_post_quant_conv: bool,
    ) -> list[str]:
        """Return what is wrong across the options."""
        for width in (ch, *(ch * multiplier for multiplier in ch_mult)):
            if width % norm_groups:
                return [f"ch: {ch} makes a level {width} wide, which is no multiple of norm_groups ({norm_groups})"]
        if embed_dim != z_channels and not (use_quant_conv and use_post_quant_conv):
            return [f"embed_dim: {embed_dim} is not z_channels ({z_channels}), and no 1x1 convolution is between them"]
        return []

    def raw_moments(self, image: Tensor) -> Tensor:
        """Return mean and unclamped log variance in one tensor, [B, 2C, h, w], for an image [B, 3, H, W] in [-1, 1].

        Raises:
            UserError: H or W is not a multiple of `downscale`.
        """
        height, width = image.shape[2:]
        if height % self.downscale or width % self.downscale:
            raise UserError(
                f"image height and width have to be multiples of {self.downscale} for this autoencoder, "
                f"not {height}x{width}"
            )
        return self.quant_conv(self.encoder(image))  # [B, 2C, h, w]

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of the raw latent, [B, C, h, w] each, for an image [B, 3, H, W] in [-1, 1]."""
        return split_moments(self.raw_moments(image))

    def decode(self, z: Tensor) -> Tensor:
        """Return the image [B, 3, H, W], about [-1, 1] but not clamped, of z [B, C, h, w]."""
        return self.decoder(self.post_quant_conv(self.denormalize(z)))  # [B, 3, H, W]

    @torch.no_grad()
    def tiled_decode(self, z: Tensor, tile: int) -> Tensor:
        """Return the same, in main memory, picture by picture; the larger levels go through the device in tiles."""
        features = (self.post_quant_conv(self.denormalize(one)) for one in z.split(1))  # [1, z_channels, h, w] each
        return torch.cat([self.decoder.tiled(one, Tiles(tile, z.device)) for one in features])  # [B, 3, H, W]


def split_moments(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and log variance clamped to [-30, 20], [B, C, h, w] each, of raw moments [B, 2C, h, w]."""
    mean, logvar = raw.chunk(2, dim=1)  # [B, C, h, w] each
    return mean, logvar.clamp(-30.0, 20.0)


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return the KL divergence from the standard normal, [B], a sum per sample (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(1)  # [B]


class Encoder(nn.Module):
    """Image [B, 3, H, W] -> features [B, 2 * z_channels, h, w]."""

    def __init__(
        self, widths: list[int], ch: int, blocks: int, has_attention: list[bool], c_out: int, groups: int
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            above = widths[level - 1] if level else ch
            stage = Stage(above, width, blocks, has_attention[level], groups)
            if level < len(widths) - 1:
                stage.downsample = Downsample(width)
            self.down.append(stage)
        self.mid = Middle(widths[-1], groups)
        self.norm_out = _norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], c_out, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Return [B, 2 * z_channels, h, w]."""
        x = self.conv_in(image)  # [B, ch, H, W]
        for stage in self.down:
            x = stage(x)  # [B, width, ., .]
            if stage.downsample is not None:
                x = stage.downsample(x)  # [B, width, ./2, ./2]
        x = self.mid(x)  # [B, width, h, w]
        return self.conv_out(F.silu(self.norm_out(x)))  # [B, 2 * z_channels, h, w]


class Decoder(nn.Module):
    """Features [B, z_channels, h, w] -> image [B, 3, H, W]."""

    def __init__(self, widths: list[int], blocks: int, has_attention: list[bool], c_in: int, groups: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(c_in, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList()  # up.0 is the level of full size, which comes last
        for level, width in enumerate(widths):
            below = widths[min(level + 1, len(widths) - 1)]
            stage = Stage(below, width, blocks + 1, has_attention[level], groups)
            if level > 0:
                stage.upsample = Upsample(width)
            self.up.append(stage)
        self.norm_out = _norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Return [B, 3, H, W]."""
        x = self.mid(self.conv_in(z))  # [B, width, h, w]
        for stage in reversed(self.up):
            x = stage(x)  # [B, width, ., .]
            if stage.upsample is not None:
                x = stage.upsample(x)  # [B, width, 2., 2.]
        return self.conv_out(F.silu(self.norm_out(x)))  # [B, 3, H, W]

    def tiled(self, z: Tensor, tiles: Tiles) -> Tensor:
        """Return the same in main memory; but for the level of z, attention included, a tile at a time is computed."""
        x = self.mid(self.conv_in(z)).cpu()  # [B, width, h, w]
        for stage in reversed(self.up):
            for i, block in enumerate(stage.block):
                x = block.tiled(x, tiles)  # [B, width, ., .]
                if len(stage.attn):
                    x = stage.attn[i](x.to(z.device)).cpu()  # [B, width, ., .]
            if stage.upsample is not None:
                x = tiles.convolve(stage.upsample.conv, x, doubled, scale=2)  # [B, width, 2., 2.]
                tiles = replace(tiles, side=2 * tiles.side)
        return tiles.convolve(self.conv_out, x, tiles.activation(self.norm_out, x))  # [B, 3, H, W]


class Stage(nn.Module):
    """The blocks of one level; the encoder puts `downsample`, the decoder `upsample` behind them."""

    def __init__(self, c_in: int, c_out: int, blocks: int, has_attention: bool, groups: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(c_out, groups) for _ in range(blocks if has_attention else 0))
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, c_out, h, w] for x [B, c_in, h, w]."""
        for i, block in enumerate(self.block):
            x = block(x)  # [B, c_out, h, w]
            if len(self.attn):
                x = self.attn[i](x)  # [B, c_out, h, w]
        return x


class Middle(nn.Module):
    """The blocks at the smallest size, with attention between them."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, groups)
        self.attn_1 = Attention(channels, groups)
        self.block_2 = ResBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, c, h, w] for x [B, c, h, w]."""
        return self.block_2(self.attn_1(self.block_1(x)))  # [B, c, h, w]


class ResBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice, added to the input."""

    def __init__(self, c_in: int, c_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(c_in, groups)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = _norm(c_out, groups)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)
        else:
            self.nin_shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, c_out, h, w] for x [B, c_in, h, w]."""
        h = self.conv1(F.silu(self.norm1(x)))  # [B, c_out, h, w]
        h = self.conv2(F.silu(self.norm2(h)))  # [B, c_out, h, w]
        return self.nin_shortcut(x) + h  # [B, c_out, h, w]

    def tiled(self, x: Tensor, tiles: Tiles) -> Tensor:
        """Return the same of x in main memory, which may be overwritten."""
        h = tiles.convolve(self.conv1, x, tiles.activation(self.norm1, x))  # [B, c_out, h, w]
        onto = tiles.convolve(self.nin_shortcut, x) if isinstance(self.nin_shortcut, nn.Conv2d) else x
        return tiles.convolve(self.conv2, h, tiles.activation(self.norm2, h), onto)  # [B, c_out, h, w]


class Attention(nn.Module):
    """Attention among all pixels with one head, added to its input."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, c, h, w] for x [B, c, h, w]."""
        h = self.norm(x)  # [B, c, h, w]
        q, k, v = (rearrange(proj(h), "b c h w -> b 1 (h w) c") for proj in (self.q, self.k, self.v))
        attended = attention(q, k, v)  # [B, 1, hw, c]
        attended = rearrange(attended, "b 1 (h w) c -> b c h w", h=x.shape[2])  # [B, c, h, w]
        return x + self.proj_out(attended)  # [B, c, h, w]


class Downsample(nn.Module):
    """3x3 convolution with stride 2, padded at the right and bottom only, as the released weights were trained."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, c, h/2, w/2] for x [B, c, h, w]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # [B, c, h/2, w/2]


class Upsample(nn.Module):
    """Every pixel repeated 2x2, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, c, 2h, 2w] for x [B, c, h, w]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # [B, c, 2h, 2w]


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)
