"""Imagen's U-Net (Saharia et al. 2022, arXiv 2205.11487), in the form of lucidrains/imagen-pytorch and under its names.

The states of a text, pooled to a few tokens, stand beside the pixels in attention; their mean, projected, is added to
the embedding of the time, which is the log SNR. A super-resolution model sees the enlarged small image beside x, at the
input and before the last convolution, and how noised it is as it sees the time.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Gt, MinLen
from torch import Tensor, nn

from ldm_lab.conditions import UPSAMPLER_ALONE
from ldm_lab.config import NonNegativeInt, PositiveInt, check_options, register, signature_options
from ldm_lab.denoisers.glide_layers import zeroed
from ldm_lab.denoisers.imagen_attention import Heads, Layout, TransformerBlock
from ldm_lab.denoisers.imagen_conditions import ConditionReader, taken_conditions
from ldm_lab.denoisers.imagen_layers import GROUPS, Builder, LevelPlan, MultiKernelConv, ResnetBlock
from ldm_lab.denoisers.unet import check_size, per_level, per_level_problems
from ldm_lab.errors import UserError
from ldm_lab.interfaces import ConditionSpec, ImageCondition
from ldm_lab.sampling_defaults import SamplingDefaults

SKIP = 2**-0.5  # factor of what comes from the way down


@register("denoiser", "imagen_unet")
class ImagenUNet(ConditionReader):
    """The U-Net of Imagen: base or memory-efficient, with a text or without, for pixels or from a smaller image.

    Attributes:
        multiple_of: what height and width have to be multiples of.
    """

    time_input = "log_snr"
    learns_variance = False
    block_types = (ResnetBlock, TransformerBlock)
    architecture_keys = (
        *("base_channels", "multipliers", "blocks_per_level", "attention_levels", "text_levels", "heads", "head_width"),
        *("feed_forward", "text_width", "text_latents", "memory_efficient", "layout"),
    )
    unordered_keys = ("attention_levels", "text_levels")
    most_guidance = 10.0
    sampling_defaults = SamplingDefaults(
        guidance=5.0, upsampler_guidance=5.0, upsampler_temperature=1.0, thresholding="dynamic"
    )

    def __init__(
        self,
        channels: int,
        conditions: ConditionSpec,
        *,
        base_channels: PositiveInt = 128,
        multipliers: Annotated[list[PositiveInt], MinLen(1)] = (1, 2, 3, 4),
        blocks_per_level: Annotated[list[PositiveInt], MinLen(1)] = (3,),
        attention_levels: list[NonNegativeInt] = (1, 2, 3),
        text_levels: list[NonNegativeInt] = (1, 2, 3),
        heads: PositiveInt = 8,
        head_width: PositiveInt = 64,
        feed_forward: Annotated[float, Gt(0)] = 2.0,
        text_width: PositiveInt | None = None,
        text_latents: PositiveInt = 32,
        memory_efficient: bool = False,
        layout: Layout = "rms",
        gradient_checkpointing: bool = False,
    ) -> None:
        """Build the network with initial weights for training from scratch; the defaults are a small base model's.

        Args:
            channels: C of the images, or latents.
            conditions: what is given; of it token states, a small image and its noise level are taken.
            base_channels: level i, of which 0 is the finest, is base_channels * multipliers[i] wide where it ends.
            multipliers: one per level.
            blocks_per_level: gated residual blocks after a level's first, on the way down and up: one number for all
                levels, or one for each.
            attention_levels: the levels whose pixels attend to one another, and to the text.
            text_levels: the levels whose first block attends to the text.
            heads: of all attention, but that to the text in the middle, which has 8 of 64.
            head_width: channels of each.
            feed_forward: width of the networks after attention, in widths of the level.
            text_width: channels of the tokens that the network reads (default: base_channels).
            text_latents: learned tokens that a text is pooled to, beside 4 of its mean.
            memory_efficient: halve the size before a level's blocks instead of after them, for super-resolution (the
                paper's Efficient U-Net, section 2.4).
            layout: "rms" of imagen-pytorch 2, for new models; "group" of 1.7 to 1.10, spaceforge's.
            gradient_checkpointing: recompute each block in the backward pass; less memory, a third more time.

        Raises:
            UserError: options that contradict each other; an image without its noise level, or the reverse.
        """
        super().__init__()
        given = {key: value for key, value in locals().items() if key in signature_options(ImagenUNet)}
        check_options(ImagenUNet, **given)
        self.spec = taken_conditions(conditions)
        self.channels, self.checkpointing = channels, gradient_checkpointing
        self.multiple_of = 2 ** (len(multipliers) - (0 if memory_efficient else 1))
        self.tokens_width = text_width or base_channels
        extra = sum(kind.channels for kind in self.spec.values() if isinstance(kind, ImageCondition))
        self.vector_width = 4 * base_channels * (2 if extra else 1)
        self.add_times()
        self.add_text(text_latents, Heads(heads, head_width, layout))
        self.init_conv = MultiKernelConv(channels + extra, base_channels)
        builder = Builder(self.vector_width, self.tokens_width, Heads(heads, head_width, layout), feed_forward)
        blocks = per_level(blocks_per_level, len(multipliers))
        widths = [base_channels, *(base_channels * times for times in multipliers)]
        self._add_levels(builder, widths, blocks, attention_levels, text_levels, memory_efficient)
        self.final_conv = zeroed(nn.Conv2d(base_channels + extra, channels, 3, padding=1))

    def _add_levels(
        self,
        build: Builder,
        widths: Sequence[int],
        blocks: Sequence[int],
        attention_levels: Sequence[int],
        text_levels: Sequence[int],
        efficient: bool,
    ) -> None:
        """Add all between the first and the last convolution; `widths` are those between the levels, one more."""
        plan = [
            LevelPlan(i, widths[i], widths[i + 1], count, i in attention_levels, i in text_levels)
            for i, count in enumerate(blocks)
        ]
        self.init_resnet_block = build.block(widths[0], widths[0], gated=True) if efficient else None
        self.downs = nn.ModuleList(build.down(level, efficient, level is plan[-1]) for level in plan)
        self.mid_block1 = build.middle(widths[-1])
        self.mid_attn = build.middle_attention(widths[-1])
        self.mid_block2 = build.middle(widths[-1])
        self.ups = nn.ModuleList(build.up(level, efficient) for level in reversed(plan))
        self.final_res_block = build.block(widths[0], widths[0], gated=True)

    def outer_layers(self) -> list[str]:
        """Return the names of the convolutions that read x, of which there are several, and of the last one."""
        return [*(f"init_conv.convs.{i}" for i in range(len(self.init_conv.convs))), "final_conv"]

    @staticmethod
    def check(
        *, base_channels: int, multipliers: Sequence[int], blocks_per_level: Sequence[int],
        attention_levels: Sequence[int], text_levels: Sequence[int], layout: str) -> list[str]:  # fmt: skip
        """Return what is wrong across the options."""
        levels = len(multipliers)
        problems = per_level_problems("blocks_per_level", blocks_per_level, levels)
        for key, places in (("attention_levels", attention_levels), ("text_levels", text_levels)):
            if odd := [place for place in places if place >= levels]:
                problems.append(f"{key}: levels are 0 to {levels - 1}, of which {odd[0]} is none")
        if layout == "group" and base_channels % GROUPS:
            problems.append(f"base_channels: the layout group needs a multiple of {GROUPS}, not {base_channels}")
        if base_channels < 4:
            problems.append(f"base_channels: at least 4 are needed, not {base_channels}")
        return problems

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        token_states: Tensor | None = None,
        token_states_mask: Tensor | None = None,
        low_res: Tensor | None = None,
        low_res_level: Tensor | None = None,
    ) -> Tensor:
        """Return [B, C, h, w].

        Args:
            x: noised images, [B, C, h, w].
            time: the log SNR, [B].
            token_states: of a model with a text: [B, L, D].
            token_states_mask: bool [B, L], false where there is padding; all false is no text (`encode_text`).
            low_res: of a super-resolution model: the small image, enlarged and noised, [B, C, h, w].
            low_res_level: how noised it is, [B] in [0, 1].

        Raises:
            UserError: h or w is not a multiple of `multiple_of`; a condition that this form does not have, or lacks.
        """
        self._check_given(x, token_states, low_res, low_res_level)
        vector, tokens = self.encode_conditions(time, low_res_level, token_states, token_states_mask)
        beside = [] if low_res is None else [low_res.to(x)]  # [B, C, h, w]
        h = self.init_conv(torch.cat([x, *beside], dim=1))  # [B, c, h, w]
        if self.init_resnet_block is not None:
            h = self.run(self.init_resnet_block, h, vector, tokens)  # [B, c, h, w]
        skips: list[Tensor] = []
        for level in self.downs:
            before, first, blocks, attention, after = level.children()
            h = self.run(first, before(h), vector, tokens)  # [B, c, h', w']
            for block in blocks.children():
                h = self.run(block, h, vector, tokens)  # [B, c, h', w']
                skips.append(h)
            h = self._attend(attention, h, tokens)  # [B, c, h', w']
            skips.append(h)
            h = after(h)  # [B, c', h'', w'']
        h = self.run(self.mid_block1, h, vector, tokens)
        h = self._attend(self.mid_attn, h, tokens)
        h = self.run(self.mid_block2, h, vector, tokens)
        for level in self.ups:
            first, blocks, attention, larger = level.children()
            for block in (first, *blocks.children()):
                h = torch.cat([h, skips.pop() * SKIP], dim=1)  # [B, c + c', h', w']
                h = self.run(block, h, vector, tokens)  # [B, c, h', w']
            h = larger(self._attend(attention, h, tokens))  # [B, c, h'', w'']
        h = self.run(self.final_res_block, h, vector, tokens)  # [B, c, h, w]
        out: Tensor = self.final_conv(torch.cat([h, *(image.to(h) for image in beside)], dim=1))  # [B, C, h, w]
        return out

    def _check_given(
        self, x: Tensor, states: Tensor | None, low_res: Tensor | None, low_res_level: Tensor | None
    ) -> None:
        """Raise UserError for a size or conditions that this form does not have."""
        check_size(x, self.multiple_of)
        if (states is not None) != ("token_states" in self.spec):
            raise UserError("token_states: this denoiser " + ("needs them" if states is None else "reads no text"))
        if "low_res" in self.spec and (low_res is None or low_res_level is None):
            raise UserError(UPSAMPLER_ALONE)
        if "low_res" not in self.spec and (low_res is not None or low_res_level is not None):
            raise UserError("this denoiser is a base model: it takes no low-resolution picture, an upsampler does")

    def _attend(self, attention: nn.Module, h: Tensor, tokens: Tensor) -> Tensor:
        """Return what a level's attention makes of h [B, c, h, w]; h itself where there is none."""
        return h if isinstance(attention, nn.Identity) else self.run(attention, h, tokens)
