"""The U-Net of DeepFloyd IF (2023; the package deepfloyd-if 1.0.1), under its own names: stages I, II and III.

It is GLIDE's with additions: the states of a frozen language model, projected, stand beside the pixels in attention;
pooled, they are added to the embedding of the time, and of a super-resolution stage the embedding of how noised the
enlarged small image is, too.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import MinLen
from einops import rearrange
from torch import Tensor, nn

from ldm_lab.conditions import UPSAMPLER_ALONE
from ldm_lab.config import PositiveInt, ShareBelowOne, check_options, register, signature_options
from ldm_lab.denoisers.glide_layers import sinusoids
from ldm_lab.denoisers.glide_levels import GlideLevels, level_problems
from ldm_lab.denoisers.if_layers import IFAttentionBlock, IFBuilder, IFResBlock, gelu_mlp, pooling
from ldm_lab.denoisers.unet import check_size, per_level, per_level_problems
from ldm_lab.errors import UserError
from ldm_lab.interfaces import (
    ConditionKind,
    ConditionSpec,
    ImageCondition,
    Level,
    TokenStates,
    required_condition,
)
from ldm_lab.sampling_defaults import SamplingDefaults
from ldm_lab.schedules.discrete import step_of_level

AUGMENTATION = "squaredcos_cap_v2"  # the schedule by which the small image is noised

LEVELS = 1000  # steps of the small image's noise


@register("denoiser", "if_unet")
class IFUNet(GlideLevels):
    """The U-Net of DeepFloyd IF: a base model of pixels, or a super-resolution stage where `low_res` is given.

    Attributes:
        multiple_of: what height and width have to be multiples of, 2 ** (levels - 1).
    """

    time_input = "timestep"
    block_types = (IFResBlock, IFAttentionBlock)
    architecture_keys = (
        *("base_channels", "multipliers", "blocks_per_level", "attention", "text_width", "efficient", "cross_only"),
    )
    unordered_keys = ("attention",)
    text_modules = ("encoder_proj.", "encoder_pooling.")
    sampling_defaults = SamplingDefaults(
        guidance=7.0, upsampler_guidance=4.0, upsampler_temperature=1.0,
        thresholding="dynamic", percentile=0.95, most=1.5, upsampler_most=1.0,
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        conditions: ConditionSpec,
        *,
        base_channels: PositiveInt = 192,
        multipliers: Annotated[list[PositiveInt], MinLen(1)] = (1, 2, 3, 4),
        blocks_per_level: Annotated[list[PositiveInt], MinLen(1)] = (3,),
        attention: list[PositiveInt] = (2, 4, 8),
        head_width: PositiveInt = 64,
        norm_groups: PositiveInt = 32,
        dropout: ShareBelowOne = 0.0,
        text_width: PositiveInt = 768,
        pool_heads: PositiveInt = 64,
        efficient: bool = False,
        cross_only: bool = False,
        learn_variance: bool = True,
        gradient_checkpointing: bool = False,
    ) -> None:
        """Build the network with initial weights for training from scratch; the defaults are those of IF-I-M.

        Args:
            channels: C of the images.
            conditions: what is given; of it token states, a small image and its noise level are taken.
            base_channels: the level at 1 / 2**i of the size is base_channels * multipliers[i] wide, a multiple of
                norm_groups.
            multipliers: one per level.
            blocks_per_level: residual blocks on the way down, one more on the way up: one number for all levels, or
                one for each.
            attention: there is attention where height and width are 1/2, 1/4, ... (a number from here) of the image's.
            head_width: channels of an attention head.
            norm_groups: groups of channels that are normalized together, 32 in all that was released.
            dropout: share of the features that training drops in each residual block.
            text_width: channels of the projected text; the last level's in stage I.
            pool_heads: heads of the attention that pools the text; they divide the width of its states.
            efficient: the form of stages II and III: the embedding is activated once, each block's result is scaled.
            cross_only: pixels attend to the text alone, as in stages II and III.
            learn_variance: 2C channels come out: eps, and where the variance lies between its two bounds.
            gradient_checkpointing: recompute each block in the backward pass; less memory, a third more time.

        Raises:
            UserError: options that contradict each other, no token states, an image without its noise level.
        """
        super().__init__()
        given = {key: value for key, value in locals().items() if key in signature_options(IFUNet)}
        check_options(IFUNet, **given)
        self.spec = _taken(conditions, self.part_name)
        self.channels, self.base_channels = channels, base_channels
        self.checkpointing, self.learns_variance = gradient_checkpointing, learn_variance
        self.multiple_of, widths = 2 ** (len(multipliers) - 1), [base_channels * times for times in multipliers]
        blocks, emb_width = per_level(blocks_per_level, len(multipliers)), max(widths)
        build = IFBuilder(
            *(blocks, attention, head_width, norm_groups, dropout, text_width, emb_width),
            efficient=efficient, cross_only=cross_only,
        )  # fmt: skip
        self._add_embeddings(text_width, emb_width, pool_heads)
        self.add_levels(build, channels, widths, nn.GELU)
        self.activation = nn.GELU() if efficient else nn.Identity()

    def _add_embeddings(self, width: int, emb_width: int, pool_heads: int) -> None:
        """Add what reads the token states, the time, and how noised the small image is."""
        states = required_condition(self.spec, "token_states", TokenStates, self.part_name)
        if states.width % pool_heads:
            raise UserError(f"denoiser.pool_heads: {pool_heads} heads do not divide token states of {states.width}")
        self.encoder_proj = nn.Identity() if states.width == width else nn.Linear(states.width, width)
        self.encoder_pooling = pooling(pool_heads, states.width, emb_width)
        self.time_embed = gelu_mlp(self.base_channels, emb_width)
        if "low_res" in self.spec:
            self.aug_proj = gelu_mlp(self.base_channels, emb_width)

    @staticmethod
    def check(
        *, base_channels: int, multipliers: Sequence[int], blocks_per_level: Sequence[int], attention: Sequence[int],
        head_width: int, norm_groups: int, text_width: int) -> list[str]:  # fmt: skip
        """Return what is wrong across the options."""
        problems = per_level_problems("blocks_per_level", blocks_per_level, len(multipliers))
        problems += level_problems(base_channels, multipliers, attention, head_width, norm_groups)
        if text_width % norm_groups:
            problems.append(f"text_width: {text_width} is no multiple of {norm_groups} (norm_groups)")
        return problems

    def encode_text(self, states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the text's sequence, [B, w, L], its vector, [B, e], and where it may be attended to, [B, L] or None.

        Args:
            states: [B, L, D].
            mask: bool [B, L], false where there is padding, which is not attended to. A row without any true is no
                text: all of its states are zeros. None: all that is given counts. The released networks were trained
                on the states of the padding, too: the mask of those is true in all places.
        """
        if mask is not None:
            mask = mask.bool()  # [B, L]
            known = mask.any(1, keepdim=True)  # [B, 1]
            states = torch.where(rearrange(mask, "b l -> b l 1"), states, torch.zeros_like(states))  # [B, L, D]
            mask = mask | ~known  # [B, L]
        states = states.to(self.encoder_pooling[0].weight)  # [B, L, D]
        norm, pool, project, last = self.encoder_pooling
        vector = last(project(pool(norm(states), mask)))  # [B, e]
        return rearrange(self.encoder_proj(states), "b l w -> b w l"), vector, mask

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        token_states: Tensor,
        token_states_mask: Tensor | None = None,
        low_res: Tensor | None = None,
        low_res_level: Tensor | None = None,
    ) -> Tensor:
        """Return [B, 2C, h, w]: eps and the learned variance's place; [B, C, h, w] without `learn_variance`.

        Args:
            x: noised images, [B, C, h, w].
            time: the timestep, 0 .. T - 1, [B]; fractions are taken as they are.
            token_states: [B, L, D].
            token_states_mask: bool [B, L] (`encode_text`).
            low_res: of a super-resolution stage: the small image, enlarged and noised at its level, [B, C, h, w].
            low_res_level: how noised it is, [B] in [0, 1].

        Raises:
            UserError: h or w is not a multiple of `multiple_of`; a condition that this form does not have, or lacks.
        """
        check_size(x, self.multiple_of)
        text, vector, mask = self.encode_text(token_states, token_states_mask)  # [B, w, L], [B, e], [B, L]
        weight = self.time_embed[0].weight
        emb = self.time_embed(sinusoids(time, self.base_channels).to(weight)) + vector  # [B, e]
        h = x
        if "low_res" in self.spec:
            if low_res is None or low_res_level is None:
                raise UserError(UPSAMPLER_ALONE)
            if low_res.shape[2:] != x.shape[2:]:
                sizes = ("x".join(map(str, image.shape[2:])) for image in (low_res, x))
                raise UserError("low_res: {}, and x is {}: it has to come enlarged (if_low_res)".format(*sizes))
            step = step_of_level(low_res_level, LEVELS)  # [B]
            emb = emb + self.aug_proj(sinusoids(step, self.base_channels).to(weight))  # [B, e]
            h = torch.cat([x, low_res.to(x)], dim=1)  # [B, C + C, h, w]
        elif low_res is not None or low_res_level is not None:
            raise UserError("this denoiser is a base model: it takes no low-resolution picture, an upsampler does")
        return self.through_levels(h, self.activation(emb), text, mask)  # [B, C or 2C, h, w]


def _taken(conditions: ConditionSpec, name: str) -> ConditionSpec:
    """Return those of the given conditions that IF takes. Raises UserError for no token states, or half a pair."""
    states = required_condition(conditions, "token_states", TokenStates, name)
    taken: dict[str, ConditionKind] = {"token_states": states}
    if "low_res" in conditions or "low_res_level" in conditions:
        taken["low_res"] = required_condition(conditions, "low_res", ImageCondition, name)
        level = required_condition(conditions, "low_res_level", Level, name)
        if level.schedule != AUGMENTATION:
            raise UserError(
                f"denoiser.name: {name} counts a small image's noise on the schedule {AUGMENTATION}, as "
                f"condition_sources.if_low_res does; it is given a {level}"
            )
        taken["low_res_level"] = level
    return taken
