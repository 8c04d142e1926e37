"""The way down and up of GLIDE's U-Net and of IF's: its blocks, what goes through them, and their options."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm_lab.denoisers.glide_layers import AttentionBlock, Builder, GroupNorm, ResBlock, zeroed
from ldm_lab.denoisers.unet import UNet
from ldm_lab.interfaces import ImageCondition


class GlideLevels(UNet):
    """Residual blocks and attention on levels, between a first and a last convolution, under the original's names."""

    def add_levels(self, build: Builder, channels: int, widths: list[int], activation: type[nn.Module]) -> None:
        """Add the U-Net, whose levels are `widths` wide.

        Args:
            build: makes the blocks.
            channels: C of x, beside which images are concatenated.
            widths: of the levels, the finest first.
            activation: before the last convolution.
        """
        extra = sum(kind.channels for kind in self.spec.values() if isinstance(kind, ImageCondition))
        self.input_blocks, skips = build.down(channels + extra, widths)
        self.middle_block = build.middle(widths[-1])
        self.output_blocks = build.up(widths, skips)
        last = zeroed(nn.Conv2d(widths[0], channels * (1 + bool(self.learns_variance)), 3, padding=1))
        self.out = nn.Sequential(GroupNorm(build.groups, widths[0]), activation(), last)

    def through_levels(self, h: Tensor, emb: Tensor, *text: Tensor | None) -> Tensor:
        """Return the output, [B, C or 2C, h, w].

        Args:
            h: x with what is concatenated to it, [B, C + ., h, w].
            emb: embedding of the time and more, [B, e].
            text: what attention blocks take beside the pixels: the sequence, [B, w, L], and perhaps its mask.
        """
        skips = []
        for block in self.input_blocks:
            h = self._through(block, h, emb, text)  # [B, c, h / 2**i, w / 2**i]
            skips.append(h)
        h = self._through(self.middle_block, h, emb, text)  # [B, c, h / multiple_of, w / multiple_of]
        for block in self.output_blocks:
            h = self._through(block, torch.cat([h, skips.pop()], dim=1), emb, text)  # [B, c, h / 2**i, w / 2**i]
        return self.out(h)

    def _through(self, block: nn.Sequential, h: Tensor, emb: Tensor, text: tuple[Tensor | None, ...]) -> Tensor:
        """Return what the layers of a block make of h [B, c, h, w]."""
        for layer in block:
            if isinstance(layer, ResBlock):
                h = self.run(layer, h, emb)
            elif isinstance(layer, AttentionBlock):
                h = self.run(layer, h, *text)
            else:
                h = layer(h)
        return h


def level_problems(
    base_channels: int, multipliers: Sequence[int], attention: Sequence[int], head_width: int, norm_groups: int
) -> list[str]:
    """Return what is wrong across the options of the levels, each as "key: what"."""
    widths = [base_channels * multiplier for multiplier in multipliers]
    scales, problems = [2**level for level in range(len(widths))], []
    if unknown := [scale for scale in attention if scale not in scales]:
        problems.append(f"attention: {len(widths)} levels are at 1/{', 1/'.join(map(str, scales))}; not {unknown}")
    for scale, width in zip(scales, widths):
        if width % norm_groups:
            why = f"which is no multiple of {norm_groups} (norm_groups)"
            return [*problems, f"base_channels: makes a level {width} wide, {why}"]
        if (scale in attention or scale == scales[-1]) and width % head_width:
            return [*problems, f"head_width: {head_width} does not divide {width}, a level's width with attention"]
    return problems
