"""The text-conditional U-Net of GLIDE (Nichol et al. 2022, arXiv 2112.10741; openai/glide-text2im@69b5307), under its
own parameter names: base, upsampler, inpainting and latent forms.

A transformer reads the tokens. Its last position, projected, is added to the embedding of the time, which scales and
shifts every residual block; its whole sequence stands beside the pixels in every attention.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ldm_lab.config import options, register
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Denoiser

LOW_RES_CHANNELS = 3  # an upsampler's condition is an RGB image
MAX_PERIOD = 10_000  # of the time's sinusoids
EXACT = 1e-3  # a timestep this near to a whole one is the whole one: what is missing is float32's rounding of t


@register("denoiser", "glide_unet")
class GlideUNet(Denoiser):
    """The U-Net of GLIDE with its text transformer; base, upsampler (super_res), inpainting, both, or for latents.

    Attributes:
        multiple_of: what height and width have to be multiples of, 2 ** (levels - 1).
        text_size: tokens per text.
        super_res, inpaint: which further conditions `forward` takes.
    """

    time_input = "timestep"
    takes = ("tokens", "mask")
    # Options that a checkpoint to begin with has to share: with others its tensors are of other places.
    SIZES = ("base_channels", "multipliers", "blocks_per_level", "attention", "text_width", "text_layers")

    def __init__(
        self,
        channels: int,
        embed_dim: int,
        *,
        base_channels: int = 192,
        multipliers: list[int] = (1, 2, 3, 4),
        blocks_per_level: int = 3,
        attention: list[int] = (2, 4, 8),
        head_width: int = 64,
        norm_groups: int = 32,
        dropout: float = 0.1,
        text_size: int = 128,
        text_width: int = 512,
        text_layers: int = 16,
        text_heads: int = 8,
        super_res: bool = False,
        inpaint: bool = False,
        clip_width: int | None = None,
        clip_positions: int = 4,
        learn_variance: bool = True,
        timesteps: int = 1000,
        gradient_checkpointing: bool = False,
    ) -> None:
        """Build the network with initial weights for training from scratch; the defaults are GLIDE's base model.

        Args:
            channels: C of the images, or latents.
            embed_dim: number of different tokens.
            base_channels: the level at 1 / 2**i of the size is base_channels * multipliers[i] wide, a multiple of
                norm_groups.
            multipliers: one per level.
            blocks_per_level: residual blocks on the way down; one more on the way up.
            attention: there is attention where height and width are 1/2, 1/4, ... (a number from here) of the image's.
            head_width: channels of an attention head of the U-Net.
            norm_groups: groups of channels that are normalised together, 32 in all that was released. Where a group is
                a single channel, every image's mean in it is lost, and with it the image's colour: take fewer for
                narrow networks.
            dropout: share of the features that training drops in each residual block.
            text_size: tokens per text, padding included.
            text_width: channels of the text transformer.
            text_layers: its blocks.
            text_heads: its attention heads.
            super_res: an upsampler: takes a low-resolution RGB image.
            inpaint: takes the known part of an image, and where it is known.
            clip_width: width of a CLIP vector that is taken beside the text (glide-finetune's latent form); null: none.
            clip_positions: places of the text sequence that the CLIP vector is turned into.
            learn_variance: 2C channels come out: eps, and where the variance lies between its two bounds.
            timesteps: of the noise schedule that is trained with.
            gradient_checkpointing: recompute each block in the backward pass; less memory, a third more time.

        Raises:
            UserError: options that contradict each other.
        """
        super().__init__()
        given = {key: value for key, value in locals().items() if key in options(GlideUNet)}
        problems = _problems(given)
        if problems:
            raise UserError(f"denoiser.{problems[0]}")
        self.channels, self.vocab_size = channels, embed_dim
        self.text_size, self.super_res, self.inpaint, self.clip_width = text_size, super_res, inpaint, clip_width
        self.clip_positions, self.timesteps, self.base_channels = clip_positions, timesteps, base_channels
        self.checkpointing = gradient_checkpointing
        self.multiple_of = 2 ** (len(multipliers) - 1)
        emb_width = 4 * base_channels

        self.token_embedding = nn.Embedding(embed_dim, text_width)
        self.positional_embedding = nn.Parameter(torch.empty(text_size, text_width))  # [L, w]
        self.padding_embedding = nn.Parameter(torch.empty(text_size, text_width))  # [L, w]
        self.transformer = Transformer(text_width, text_layers, text_heads)
        self.final_ln = LayerNorm(text_width)
        self.transformer_proj = nn.Linear(text_width, emb_width)
        if clip_width is not None:
            self.clip_to_time = nn.Sequential(
                nn.Linear(clip_width, emb_width), nn.SiLU(), nn.Linear(emb_width, emb_width)
            )
            self.clip_to_xf = nn.Linear(clip_width, clip_positions * text_width)

        self.time_embed = nn.Sequential(nn.Linear(base_channels, emb_width), nn.SiLU(), nn.Linear(emb_width, emb_width))
        extra = (channels + 1) * inpaint + LOW_RES_CHANNELS * super_res
        widths = [base_channels * multiplier for multiplier in multipliers]
        build = _Builder(blocks_per_level, attention, head_width, norm_groups, dropout, text_width, emb_width)
        self.input_blocks, skips = build.down(channels + extra, widths)
        self.middle_block = build.middle(widths[-1])
        self.output_blocks = build.up(widths, skips)
        self.out = nn.Sequential(
            GroupNorm(norm_groups, widths[0]),
            nn.SiLU(),
            zeroed(nn.Conv2d(widths[0], channels * (1 + learn_variance), 3, padding=1)),
        )
        # The original leaves the last two unset, whatever is in memory; the deviations are those of CLIP's embeddings.
        for embedding, deviation in (
            (self.token_embedding.weight, 0.02),
            (self.positional_embedding, 0.01),
            (self.padding_embedding, 0.02),
        ):
            nn.init.normal_(embedding, std=deviation)

    @staticmethod
    def check(section: dict[str, Any]) -> list[str]:
        """Return what is wrong across the keys of a config section."""
        return _problems({key: section.get(key, known.default) for key, known in options(GlideUNet).items()})

    @property
    def text_modules(self) -> list[nn.Module | nn.Parameter]:
        """The text transformer with its embeddings: all but the U-Net (glide-finetune's freeze group "transformer")."""
        own = [self.token_embedding, self.positional_embedding, self.padding_embedding]
        return [*own, self.transformer, self.final_ln, self.transformer_proj]

    def freeze_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the parts that training may leave as they are, each with its parameters.

        Those of glide-finetune: with the U-Net frozen, `encoder_kv`, by which it reads the text, is still trained.
        """
        text = [p for m in self.text_modules for p in ([m] if isinstance(m, nn.Parameter) else m.parameters())]
        known = {id(p) for p in text}
        unet = [p for name, p in self.named_parameters() if id(p) not in known and ".encoder_kv." not in name]
        return {"text_transformer": text, "unet": unet}

    # ------------------------------------------------------------------------------------------------------ text

    def encode_text(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pooled text, [B, 4 * base_channels], and the sequence, [B, text_width, L].

        Args:
            tokens: ids, int64 [B, L].
            mask: bool [B, L], false where there is padding. Padding is read like any other position.
        """
        if tokens.shape[1] != self.text_size:
            raise UserError(
                f"denoiser.text_size: this model reads {self.text_size} tokens, and the conditioner gives "
                f"{tokens.shape[1]}; conditioner.text_size={self.text_size} goes with it"
            )
        x = self.token_embedding(tokens) + self.positional_embedding  # [B, L, w]
        x = torch.where(mask.bool()[..., None], x, self.padding_embedding.to(x))  # [B, L, w]
        for block in self.transformer.resblocks:
            x = self._run(block, x)  # [B, L, w]
        x = self.final_ln(x)  # [B, L, w]
        return self.transformer_proj(x[:, -1]), x.transpose(1, 2)  # [B, e], [B, w, L]

    def _encode_clip(self, clip_emb: Tensor | None, emb: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return the time's embedding and the text's sequence with those of a CLIP vector added."""
        if clip_emb is None:
            return emb, text
        more = self.clip_to_xf(clip_emb).view(len(text), self.clip_positions, -1)  # [B, P, w]
        return emb + self.clip_to_time(clip_emb), torch.cat([text, more.transpose(1, 2)], dim=2)  # [B, e], [B, w, L+P]

    # ----------------------------------------------------------------------------------------------------- image

    def time_embedding(self, timestep: Tensor) -> Tensor:
        """Return the embedding of timesteps [B], 0 .. T - 1, [B, 4 * base_channels]."""
        index = timestep.float()  # [B]
        whole = index.round()  # [B]
        index = torch.where((index - whole).abs() < EXACT, whole, index)  # [B]
        half = self.base_channels // 2
        place = torch.arange(half, dtype=torch.float32, device=timestep.device)  # [half]
        angle = index[:, None] * torch.exp(place * (-math.log(MAX_PERIOD) / half))  # [B, half]
        sinusoids = torch.cat([angle.cos(), angle.sin()], dim=1)  # [B, base_channels]
        if self.base_channels % 2:
            sinusoids = F.pad(sinusoids, (0, 1))  # [B, base_channels]
        return self.time_embed(sinusoids.to(self.time_embed[0].weight.dtype))

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        tokens: Tensor,
        mask: Tensor,
        low_res: Tensor | None = None,
        inpaint_image: Tensor | None = None,
        inpaint_mask: Tensor | None = None,
        clip_emb: Tensor | None = None,
    ) -> Tensor:
        """Return [B, 2C, h, w]: eps and the learned variance's place; [B, C, h, w] without `learn_variance`.

        Args:
            x: noised images, [B, C, h, w].
            time: the timestep, 0 .. T - 1, [B]; fractions are taken as they are.
            tokens: ids, int64 [B, L].
            mask: bool [B, L], false where there is padding; all false is no condition.
            low_res: of an upsampler: RGB in [-1, 1] of any size, [B, 3, h', w'].
            inpaint_image: of an inpainting model: [B, C, h, w] in [-1, 1]; none is all unknown.
            inpaint_mask: 1 where `inpaint_image` is known, 0 where not, [B, 1, h, w].
            clip_emb: of a model with `clip_width`: [B, clip_width]; zeros are no condition.

        Raises:
            UserError: h or w is not a multiple of `multiple_of`; a condition that this form does not have, or lacks.
        """
        height, width = x.shape[2:]
        if height % self.multiple_of or width % self.multiple_of:
            raise UserError(
                f"height and width have to be multiples of {self.multiple_of} for a U-Net of "
                f"{self.multiple_of.bit_length()} levels, not {height}x{width}"
            )
        pooled, text = self.encode_text(tokens, mask)  # [B, e], [B, w, L]
        emb, text = self._encode_clip(clip_emb, self.time_embedding(time) + pooled, text)  # [B, e], [B, w, L + P]
        h = torch.cat([x, *self._beside(x, low_res, inpaint_image, inpaint_mask)], dim=1)  # [B, C + extra, h, w]
        skips = []
        for block in self.input_blocks:
            h = self._through(block, h, emb, text)  # [B, c, h / 2**i, w / 2**i]
            skips.append(h)
        h = self._through(self.middle_block, h, emb, text)  # [B, c, h / multiple_of, w / multiple_of]
        for block in self.output_blocks:
            h = self._through(block, torch.cat([h, skips.pop()], dim=1), emb, text)  # [B, c, h / 2**i, w / 2**i]
        return self.out(h)  # [B, C or 2C, h, w]

    def _beside(
        self, x: Tensor, low_res: Tensor | None, known: Tensor | None, known_mask: Tensor | None
    ) -> list[Tensor]:
        """Return what is laid beside the channels of x, in the original's order."""
        if (low_res is not None) != self.super_res:
            raise UserError(
                "this denoiser is an upsampler: it enlarges a picture, and cannot make one without a base model"
                if self.super_res
                else "this denoiser is a base model: it takes no low-resolution picture, an upsampler does"
            )
        if (known is not None or known_mask is not None) and not self.inpaint:
            raise UserError("this denoiser was not trained for inpainting: it takes no known part of a picture")
        beside = []
        if self.inpaint:
            if known is None or known_mask is None:
                known, known_mask = torch.zeros_like(x), torch.zeros_like(x[:, :1])  # [B, C, h, w], [B, 1, h, w]
            beside += [known * known_mask, known_mask]
        if self.super_res:
            beside.append(F.interpolate(low_res, x.shape[2:], mode="bilinear", align_corners=False))  # [B, 3, h, w]
        return [value.to(x) for value in beside]

    def _through(self, block: nn.Sequential, h: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        """Return what the layers of a block make of h [B, c, h, w]."""
        for layer in block:
            if isinstance(layer, ResBlock):
                h = self._run(layer, h, emb)
            elif isinstance(layer, AttentionBlock):
                h = self._run(layer, h, text)
            else:
                h = layer(h)
        return h

    def _run(self, module: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Run a module; with gradient checkpointing none of its inner results is kept for the backward pass."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)  # the same dropout again, from the saved generator
        return module(*inputs)


def _problems(sizes: dict[str, Any]) -> list[str]:
    """Return what is wrong with a network's options, each as "key: what"."""
    positive = (
        "base_channels",
        "blocks_per_level",
        "head_width",
        "norm_groups",
        "text_size",
        "text_width",
        "text_layers",
    )
    positive += ("text_heads", "clip_positions", "timesteps")
    problems = [f"{key}: at least 1 is needed, not {sizes[key]}" for key in positive if sizes[key] < 1]
    multipliers, attention = sizes["multipliers"], sizes["attention"]
    if not multipliers or min(multipliers) < 1:
        problems.append(f"multipliers: numbers from 1 on are needed, one per level, not {list(multipliers)}")
    if not 0 <= sizes["dropout"] < 1:
        problems.append(f"dropout: a share in [0, 1) is needed, not {sizes['dropout']}")
    if problems:
        return problems
    if sizes["text_width"] % sizes["text_heads"]:
        problems.append(f"text_heads: {sizes['text_heads']} heads do not divide text_width {sizes['text_width']}")
    scales = [2**level for level in range(len(multipliers))]
    if unknown := [scale for scale in attention if scale not in scales]:
        problems.append(f"attention: {len(multipliers)} levels are at 1/{', 1/'.join(map(str, scales))}; not {unknown}")
    for scale, multiplier in zip(scales, multipliers):
        width = sizes["base_channels"] * multiplier
        if width % sizes["norm_groups"]:
            groups = sizes["norm_groups"]
            return [
                *problems,
                f"base_channels: makes a level {width} wide, which is no multiple of {groups} (norm_groups)",
            ]
        if (scale in attention or scale == scales[-1]) and width % sizes["head_width"]:
            problems.append(
                f"head_width: {sizes['head_width']} does not divide {width}, a level's width with attention"
            )
            break
    return problems


class _Builder:
    """The blocks, from the widths of the levels; `input_blocks.5.0` and the like come from the positions used here."""

    def __init__(
        self,
        blocks: int,
        attention: list[int],
        head_width: int,
        groups: int,
        dropout: float,
        text_width: int,
        emb_width: int,
    ) -> None:
        self.blocks, self.attention, self.head_width, self.groups = blocks, attention, head_width, groups
        self.dropout, self.text_width, self.emb_width = dropout, text_width, emb_width

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
            for _ in range(self.blocks):
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
            for i in range(self.blocks + 1):
                layers = [self.res(above + skips.pop(), width), *self.attend(level, width)]
                if level and i == self.blocks:
                    layers.append(self.res(width, width, "up"))
                modules.append(nn.Sequential(*layers))
                above = width
        return nn.ModuleList(modules)


class GroupNorm(nn.GroupNorm):
    """Normalises groups of channels, in float32 whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, c, ...] in x's own precision for x [B, c, ...]."""
        return super().forward(x.float()).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Normalises the last axis, in float32 whatever comes in."""

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
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)  # [B, c_out, 1, 1] each
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
        pixels = x.flatten(2)  # [B, c, hw]
        q, k, v = _heads(self.qkv(self.norm(pixels)), self.heads, 3)  # [B, H, hw, d] each
        text_k, text_v = _heads(self.encoder_kv(text), self.heads, 2)  # [B, H, L, d] each
        k, v = torch.cat([text_k, k], dim=2), torch.cat([text_v, v], dim=2)  # [B, H, L + hw, d] each
        attended = F.scaled_dot_product_attention(q, k, v)  # [B, H, hw, d]
        return x + self.proj_out(attended.transpose(2, 3).reshape(pixels.shape)).view_as(x)  # [B, c, h, w]


def _heads(x: Tensor, heads: int, parts: int) -> tuple[Tensor, ...]:
    """Return queries, keys, values (or the last two), [B, H, L, d] each, of x [B, H * parts * d, L]."""
    return x.unflatten(1, (heads, parts, -1)).transpose(3, 4).unbind(2)  # of [B, H, parts, L, d]


class Transformer(nn.Module):
    """Blocks of attention among all positions, padding included, and an MLP."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(TextBlock(width, heads) for _ in range(layers))


class TextBlock(nn.Module):
    """Attention and MLP, each normalised before and added to its input."""

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
        q, k, v = _heads(self.c_qkv(x).transpose(1, 2), self.heads, 3)  # [B, H, L, d] each
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # [B, L, w]


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
