"""Imagen's U-Net (Saharia et al. 2022, arXiv 2205.11487), in the form of lucidrains/imagen-pytorch and under its names.

The states of a text, pooled to a few tokens, stand beside the pixels in attention; their mean, projected, is added to
the embedding of the time, which is the log SNR. A super-resolution model sees the enlarged small image beside x, at the
input and before the last convolution, and how noised it is as it sees the time.
"""

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from annotated_types import Gt, MinLen
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ldm_lab.conditions import UPSAMPLER_ALONE
from ldm_lab.config import NonNegativeInt, PositiveInt, check_options, register, signature_options
from ldm_lab.denoisers.imagen_layers import (
    FREQUENCIES,
    GROUPS,
    POSITIONS,
    TIME_TOKENS,
    AttentionPool,
    BiasedLayerNorm,
    CrossAttention,
    Fourier,
    Heads,
    Layout,
    MultiKernelConv,
    ResnetBlock,
    TransformerBlock,
    Upsample,
    WideningConv,
    downsample,
)
from ldm_lab.errors import UserError
from ldm_lab.interfaces import (
    ConditionKind,
    ConditionSpec,
    Denoiser,
    ImageCondition,
    Level,
    TokenStates,
)
from ldm_lab.schedules.log_snr import LOG_SNR

MIDDLE_HEADS = (8, 64)  # heads of the text attention in the middle, and their width, whatever the options say
SKIP = 2**-0.5  # factor of what comes from the way down


@register("denoiser", "imagen_unet")
class ImagenUNet(Denoiser):
    """The U-Net of Imagen: base or memory-efficient, with a text or without, for pixels or from a smaller image.

    Attributes:
        multiple_of: what height and width have to be multiples of.
        text_size: token states per text; 0 without a text.
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
            base_channels: level i is base_channels * multipliers[i] wide where it ends.
            multipliers: one per level; level 0 is the finest.
            blocks_per_level: gated residual blocks after a level's first, on the way down and up: one number for all
                levels, or one for each.
            attention_levels: the levels whose pixels attend to one another, and to the text.
            text_levels: the levels whose first block attends to the text.
            heads: of all attention, but that to the text in the middle, which has 8 of 64.
            head_width: channels of each.
            feed_forward: width of the networks after attention, in widths of the level.
            text_width: channels of the tokens that the network reads (default: base_channels).
            text_latents: learned tokens that a text is pooled to, beside 4 of its mean.
            memory_efficient: halve the size before a level's blocks instead of after them (the paper's Efficient
                U-Net, section 2.4): faster, for super-resolution.
            layout: "rms" is that of imagen-pytorch 2, for new models; "group" that of 1.7 to 1.10, in which
                spaceforge's were trained.
            gradient_checkpointing: recompute each block in the backward pass; less memory, a third more time.

        Raises:
            UserError: options that contradict each other; an image without its noise level, or the reverse.
        """
        super().__init__()
        given = {key: value for key, value in locals().items() if key in signature_options(ImagenUNet)}
        check_options(ImagenUNet, **given)
        self.spec = _taken(conditions)
        self.channels, self.checkpointing = channels, gradient_checkpointing
        self.multiple_of = 2 ** (len(multipliers) - (0 if memory_efficient else 1))
        self.tokens_width = text_width or base_channels
        image = self.spec.get("low_res")
        extra = image.channels if isinstance(image, ImageCondition) else 0
        self.vector_width = 4 * base_channels * (2 if extra else 1)
        self._add_times()
        self._add_text(text_latents, Heads(heads, head_width, layout))
        builder = _Builder(self.vector_width, self.tokens_width, Heads(heads, head_width, layout), feed_forward)
        widths = [base_channels, *(base_channels * times for times in multipliers)]
        blocks = [*blocks_per_level] * (len(multipliers) if len(blocks_per_level) == 1 else 1)
        plan = [
            _Level(i, widths[i], widths[i + 1], blocks[i], i in attention_levels, i in text_levels)
            for i in range(len(multipliers))
        ]
        self.init_conv = MultiKernelConv(channels + extra, base_channels)
        self.init_resnet_block = builder.block(base_channels, base_channels, gated=True) if memory_efficient else None
        self.downs = nn.ModuleList(builder.down(level, memory_efficient, level is plan[-1]) for level in plan)
        self.mid_block1 = builder.middle(widths[-1])
        middle = feed_forward if layout == "rms" else None
        self.mid_attn = TransformerBlock(widths[-1], builder.heads, None, middle)
        self.mid_block2 = builder.middle(widths[-1])
        self.ups = nn.ModuleList(builder.up(level, memory_efficient) for level in reversed(plan))
        self.final_res_block = builder.block(base_channels, base_channels, gated=True)
        self.final_conv = nn.Conv2d(base_channels + extra, channels, 3, padding=1)
        nn.init.zeros_(self.final_conv.weight)
        nn.init.zeros_(self.final_conv.bias)

    def _add_times(self) -> None:
        """Add what reads the time, and how noised the small image is if there is one."""
        self.to_time_hiddens, self.to_time_cond, self.to_time_tokens = self._level_reader()
        if "low_res_level" in self.spec:
            readers = self._level_reader()
            self.to_lowres_time_hiddens, self.to_lowres_time_cond, self.to_lowres_time_tokens = readers
        self.norm_cond = BiasedLayerNorm(self.tokens_width)

    def _level_reader(self) -> tuple[nn.Sequential, nn.Sequential, nn.Sequential]:
        width = self.vector_width
        tokens = nn.Linear(width, TIME_TOKENS * self.tokens_width)
        return (
            nn.Sequential(Fourier(), nn.Linear(1 + 2 * FREQUENCIES, width), nn.SiLU()),
            nn.Sequential(nn.Linear(width, width)),
            nn.Sequential(tokens, nn.Unflatten(1, (TIME_TOKENS, self.tokens_width))),
        )

    def _add_text(self, latents: int, heads: Heads) -> None:
        """Add what reads the text's states, if there are any."""
        text, width, vector = self.spec.get("token_states"), self.tokens_width, self.vector_width
        self.text_size = text.length if isinstance(text, TokenStates) else 0
        if not isinstance(text, TokenStates):
            return
        if text.length > POSITIONS:
            raise UserError(f"denoiser.name: imagen_unet reads up to {POSITIONS} token states, not {text.length}")
        self.text_to_cond = nn.Linear(text.width, width)
        self.null_text_embed = nn.Parameter(torch.randn(1, text.length, width))  # [1, L, w]
        self.null_text_hidden = nn.Parameter(torch.randn(1, vector))  # [1, T]
        self.attn_pool = AttentionPool(width, latents, heads)
        self.to_text_non_attn_cond = nn.Sequential(
            BiasedLayerNorm(width), nn.Linear(width, vector), nn.SiLU(), nn.Linear(vector, vector)
        )

    @staticmethod
    def check(
        *, base_channels: int, multipliers: Sequence[int], blocks_per_level: Sequence[int],
        attention_levels: Sequence[int], text_levels: Sequence[int], layout: str) -> list[str]:  # fmt: skip
        """Return what is wrong across the options."""
        levels, problems = len(multipliers), []
        if len(blocks_per_level) not in (1, levels):
            problems.append(f"blocks_per_level: {len(blocks_per_level)} numbers for {levels} levels; give one, or all")
        for key, places in (("attention_levels", attention_levels), ("text_levels", text_levels)):
            if odd := [place for place in places if place >= levels]:
                problems.append(f"{key}: levels are 0 to {levels - 1}, of which {odd[0]} is none")
        if layout == "group" and base_channels % GROUPS:
            problems.append(f"base_channels: the layout group needs a multiple of {GROUPS}, not {base_channels}")
        if base_channels < 4:
            problems.append(f"base_channels: at least 4 are needed, not {base_channels}")
        return problems

    def freeze_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return what reads the text, as `text`, and all else, as `unet`."""
        named = ("text_to_cond", "null_text", "attn_pool", "to_text_non_attn_cond")
        text = [p for name, p in self.named_parameters() if name.startswith(named)]
        unet = [p for name, p in self.named_parameters() if not name.startswith(named)]
        return {"text": text, "unet": unet}

    # -------------------------------------------------------------------------------------------------- conditions

    def encode_text(self, states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return a text's tokens, [B, 4 + text_latents, w], and its vector, [B, T].

        Args:
            states: [B, L, D], L up to `text_size`.
            mask: bool [B, L], false where there is padding, which is read as no text; a row without any true is no
                text at all. None: all that is given counts, and zeros in the places behind it.
        """
        given = states.shape[1]
        if given > self.text_size:
            raise UserError(f"this model reads up to {self.text_size} token states, and the conditioner gives {given}")
        tokens = F.pad(self.text_to_cond(states.to(self.text_to_cond.weight)), (0, 0, 0, self.text_size - given))
        if mask is not None:
            known = F.pad(mask.bool(), (0, self.text_size - given))  # [B, L]
            tokens = torch.where(known[..., None], tokens, self.null_text_embed.to(tokens))  # [B, L, w]
        pooled = self.attn_pool(tokens)  # [B, 4 + N, w]
        vector = self.to_text_non_attn_cond(pooled.mean(1))  # [B, T]
        if mask is not None:
            vector = torch.where(mask.bool().any(1, keepdim=True), vector, self.null_text_hidden.to(vector))  # [B, T]
        return pooled, vector

    def encode_conditions(
        self, log_snr: Tensor, low_res_level: Tensor | None, states: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the vector that scales and shifts, [B, T], and the tokens of attention, [B, M, w]."""
        hidden = self.to_time_hiddens(log_snr)  # [B, T]
        vector, tokens = self.to_time_cond(hidden), [self.to_time_tokens(hidden)]  # [B, T], [B, 2, w]
        level = self.spec.get("low_res_level")
        if isinstance(level, Level) and low_res_level is not None:
            hidden = self.to_lowres_time_hiddens(LOG_SNR[level.schedule](low_res_level.float()))  # [B, T]
            vector = vector + self.to_lowres_time_cond(hidden)  # [B, T]
            tokens.append(self.to_lowres_time_tokens(hidden))  # [B, 2, w]
        if states is not None:
            pooled, of_text = self.encode_text(states, mask)  # [B, 4 + N, w], [B, T]
            vector = vector + of_text  # [B, T]
            tokens.append(pooled)
        return vector, self.norm_cond(torch.cat(tokens, dim=1))  # [B, T], [B, M, w]

    # ------------------------------------------------------------------------------------------------------- image

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
            h = self._run(self.init_resnet_block, h, vector, tokens)  # [B, c, h, w]
        skips: list[Tensor] = []
        for level in self.downs:
            before, first, blocks, attention, after = level.children()
            h = self._run(first, before(h), vector, tokens)  # [B, c, h', w']
            for block in blocks.children():
                h = self._run(block, h, vector, tokens)  # [B, c, h', w']
                skips.append(h)
            h = self._attend(attention, h, tokens)  # [B, c, h', w']
            skips.append(h)
            h = after(h)  # [B, c', h'', w'']
        h = self._run(self.mid_block1, h, vector, tokens)
        h = self._attend(self.mid_attn, h, tokens)
        h = self._run(self.mid_block2, h, vector, tokens)
        for level in self.ups:
            first, blocks, attention, larger = level.children()
            for block in (first, *blocks.children()):
                h = torch.cat([h, skips.pop() * SKIP], dim=1)  # [B, c + c', h', w']
                h = self._run(block, h, vector, tokens)  # [B, c, h', w']
            h = larger(self._attend(attention, h, tokens))  # [B, c, h'', w'']
        h = self._run(self.final_res_block, h, vector, tokens)  # [B, c, h, w]
        out: Tensor = self.final_conv(torch.cat([h, *(image.to(h) for image in beside)], dim=1))  # [B, C, h, w]
        return out

    def _check_given(
        self, x: Tensor, states: Tensor | None, low_res: Tensor | None, low_res_level: Tensor | None
    ) -> None:
        """Raise UserError for a size or conditions that this form does not have."""
        height, width = x.shape[2:]
        if height % self.multiple_of or width % self.multiple_of:
            raise UserError(f"height and width have to be multiples of {self.multiple_of}, not {height}x{width}")
        if (states is not None) != ("token_states" in self.spec):
            raise UserError("token_states: this denoiser " + ("needs them" if states is None else "reads no text"))
        if "low_res" in self.spec and (low_res is None or low_res_level is None):
            raise UserError(UPSAMPLER_ALONE)
        if "low_res" not in self.spec and (low_res is not None or low_res_level is not None):
            raise UserError("this denoiser is a base model: it takes no low-resolution picture, an upsampler does")

    def _attend(self, attention: nn.Module, h: Tensor, tokens: Tensor) -> Tensor:
        """Return what a level's attention makes of h [B, c, h, w]; h itself where there is none."""
        return h if isinstance(attention, nn.Identity) else self._run(attention, h, tokens)

    def _run(self, module: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Run a module; with gradient checkpointing none of its inner results is kept for the backward pass."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)


class _Level:
    """A level: its place, the widths of the finer and the coarser side, its blocks, where it attends."""

    def __init__(self, place: int, fine: int, coarse: int, blocks: int, attends: bool, reads_text: bool) -> None:
        self.place, self.fine, self.coarse = place, fine, coarse
        self.blocks, self.attends, self.reads_text = blocks, attends, reads_text


class _Builder:
    """The levels; `downs.1.2.0` and the like come from the positions used here."""

    def __init__(self, vector_width: int, tokens_width: int, heads: Heads, feed_forward: float) -> None:
        self.vector_width, self.tokens_width = vector_width, tokens_width
        self.heads, self.feed_forward = heads, feed_forward

    def block(self, c_in: int, c_out: int, *, gated: bool = False, text: Heads | None = None) -> ResnetBlock:
        cross = None if text is None else CrossAttention(c_out, text, self.tokens_width)
        return ResnetBlock(c_in, c_out, self.vector_width, self.heads.layout, cross, gated)

    def middle(self, width: int) -> ResnetBlock:
        return self.block(width, width, text=Heads(*MIDDLE_HEADS, self.heads.layout))

    def attention(self, level: _Level, width: int) -> nn.Module:
        if not level.attends:
            return nn.Identity()
        return TransformerBlock(width, self.heads, self.tokens_width, self.feed_forward)

    def down(self, level: _Level, efficient: bool, last: bool) -> nn.ModuleList:
        """Return [smaller size before, first block, blocks, attention, smaller size after]."""
        width, layout = level.coarse if efficient else level.fine, self.heads.layout
        before = downsample(level.fine, level.coarse, layout) if efficient else nn.Identity()
        after: nn.Module = nn.Identity()
        if not efficient:
            after = WideningConv(level.fine, level.coarse) if last else downsample(level.fine, level.coarse, layout)
        first = self.block(width, width, text=self.heads if level.reads_text else None)
        blocks = nn.ModuleList(self.block(width, width, gated=True) for _ in range(level.blocks))
        return nn.ModuleList([before, first, blocks, self.attention(level, width), after])

    def up(self, level: _Level, efficient: bool) -> nn.ModuleList:
        """Return [first block, blocks, attention, larger size]."""
        width = level.coarse
        c_in = width + (level.coarse if efficient else level.fine)
        first = self.block(c_in, width, text=self.heads if level.reads_text else None)
        blocks = nn.ModuleList(self.block(c_in, width, gated=True) for _ in range(level.blocks))
        larger = Upsample(width, level.fine) if efficient or level.place else nn.Identity()
        return nn.ModuleList([first, blocks, self.attention(level, width), larger])


def _taken(conditions: ConditionSpec) -> ConditionSpec:
    """Return those of the given conditions that the network takes. Raises UserError for half of a pair."""
    taken: dict[str, ConditionKind] = {}
    if isinstance(text := conditions.get("token_states"), TokenStates):
        taken["token_states"] = text
    image, level = conditions.get("low_res"), conditions.get("low_res_level")
    if isinstance(image, ImageCondition) != isinstance(level, Level) or (
        isinstance(image, ImageCondition) and not image.enlarged
    ):
        raise UserError(
            "denoiser.name: imagen_unet takes a small image enlarged, and how noised it is; "
            "condition_sources.noised_low_res gives both"
        )
    if isinstance(image, ImageCondition) and isinstance(level, Level):
        taken |= {"low_res": image, "low_res_level": level}
    return taken
