"""The text-conditional U-Net of GLIDE (Nichol et al. 2022, arXiv 2112.10741; openai/glide-text2im@69b5307), under its
own parameter names: base, upsampler, inpainting and latent forms.

A transformer reads the tokens. Its last position, projected, is added to the embedding of the time, which scales and
shifts every residual block; its whole sequence stands beside the pixels in every attention.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import MinLen
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_lab.conditions import UPSAMPLER_ALONE
from ldm_lab.config import PositiveInt, ShareBelowOne, check_options, register, signature_options
from ldm_lab.denoisers.glide_layers import (
    AttentionBlock,
    Builder,
    LayerNorm,
    ResBlock,
    TextBlock,
    Transformer,
    sinusoids,
)
from ldm_lab.denoisers.glide_levels import GlideLevels, level_problems
from ldm_lab.denoisers.unet import check_size
from ldm_lab.errors import UserError
from ldm_lab.interfaces import (
    ConditionKind,
    ConditionSpec,
    Embedding,
    ImageCondition,
    TokenIds,
    required_condition,
)

FIRST = "input_blocks.0.0.weight"  # of the first convolution
IMAGES = ("inpaint_image", "inpaint_mask", "low_res")  # conditions that it sees beside x, in the original's order


@register("denoiser", "glide_unet")
class GlideUNet(GlideLevels):
    """The U-Net of GLIDE with its text transformer; base, upsampler, inpainting, both, or for latents.

    Which it is follows from the conditions: `low_res` makes an upsampler, `inpaint_image` with `inpaint_mask` an
    inpainting model, `clip_embed` is the CLIP vector beside the text that glide-finetune's latent form takes.

    Attributes:
        multiple_of: what height and width have to be multiples of, 2 ** (levels - 1).
        text_size: tokens per text.
    """

    time_input = "timestep"
    architecture_keys = ("base_channels", "multipliers", "blocks_per_level", "attention", "text_width", "text_layers")
    unordered_keys = ("attention",)

    def __init__(
        self,
        channels: int,
        conditions: ConditionSpec,
        *,
        base_channels: PositiveInt = 192,
        multipliers: Annotated[list[PositiveInt], MinLen(1)] = (1, 2, 3, 4),
        blocks_per_level: PositiveInt = 3,
        attention: list[PositiveInt] = (2, 4, 8),
        head_width: PositiveInt = 64,
        norm_groups: PositiveInt = 32,
        dropout: ShareBelowOne = 0.1,
        text_width: PositiveInt = 512,
        text_layers: PositiveInt = 16,
        text_heads: PositiveInt = 8,
        clip_positions: PositiveInt = 4,
        learn_variance: bool = True,
        gradient_checkpointing: bool = False,
    ) -> None:
        """Build the network with initial weights for training from scratch; the defaults are GLIDE's base model.

        Args:
            channels: C of the images, or latents.
            conditions: what is given; of it the token ids are taken, and images and a CLIP vector where there are any.
            base_channels: the level at 1 / 2**i of the size is base_channels * multipliers[i] wide, a multiple of
                norm_groups.
            multipliers: one per level.
            blocks_per_level: residual blocks on the way down; one more on the way up.
            attention: there is attention where height and width are 1/2, 1/4, ... (a number from here) of the image's.
            head_width: channels of an attention head of the U-Net.
            norm_groups: groups of channels that are normalized together, 32 in all that was released. Where a group is
                a single channel, every image's mean in it is lost, and with it the image's color: take fewer for
                narrow networks.
            dropout: share of the features that training drops in each residual block.
            text_width: channels of the text transformer.
            text_layers: its blocks.
            text_heads: its attention heads.
            clip_positions: places of the text sequence that a CLIP vector is turned into.
            learn_variance: 2C channels come out: eps, and where the variance lies between its two bounds.
            gradient_checkpointing: recompute each block in the backward pass; less memory, a third more time.

        Raises:
            UserError: options that contradict each other, or no token ids.
        """
        super().__init__()
        given = {key: value for key, value in locals().items() if key in signature_options(GlideUNet)}
        check_options(GlideUNet, **given)
        self.spec = _taken(conditions, channels, self.part_name)
        self.channels, self.base_channels, self.clip_positions = channels, base_channels, clip_positions
        self.block_types = (TextBlock, ResBlock, AttentionBlock)
        self.checkpointing, self.learns_variance = gradient_checkpointing, learn_variance
        self._add_text(text_width, text_layers, text_heads)
        self.multiple_of, widths = 2 ** (len(multipliers) - 1), [base_channels * times for times in multipliers]
        blocks = [blocks_per_level] * len(multipliers)
        build = Builder(blocks, attention, head_width, norm_groups, dropout, text_width, 4 * base_channels)
        self.time_embed = _mlp(base_channels, 4 * base_channels)
        self.add_levels(build, channels, widths, nn.SiLU)
        self._initialize_embeddings()

    def _add_text(self, width: int, layers: int, heads: int) -> None:
        """Add the text transformer, and the layers for a CLIP vector if there is one."""
        text = required_condition(self.spec, "token_ids", TokenIds, self.part_name)
        self.text_size, emb_width = text.length, 4 * self.base_channels
        self.token_embedding = nn.Embedding(text.vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(text.length, width))  # [L, w]
        self.padding_embedding = nn.Parameter(torch.empty(text.length, width))  # [L, w]
        self.transformer = Transformer(width, layers, heads)
        self.final_ln = LayerNorm(width)
        self.transformer_proj = nn.Linear(width, emb_width)
        clip = self.spec.get("clip_embed")
        if isinstance(clip, Embedding):
            self.clip_to_time = _mlp(clip.width, emb_width)
            self.clip_to_xf = nn.Linear(clip.width, self.clip_positions * width)

    def _initialize_embeddings(self) -> None:
        """Draw the embeddings of tokens, places and padding.

        The original leaves the last two unset, whatever is in memory; the deviations are those of CLIP's embeddings.
        """
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.padding_embedding, std=0.02)

    @staticmethod
    def check(
        *, base_channels: int, multipliers: Sequence[int], attention: Sequence[int], head_width: int, norm_groups: int,
        text_width: int, text_heads: int) -> list[str]:  # fmt: skip
        """Return what is wrong across the options."""
        problems = level_problems(base_channels, multipliers, attention, head_width, norm_groups)
        if text_width % text_heads:
            problems.append(f"text_heads: {text_heads} heads do not divide text_width {text_width}")
        return problems

    def freeze_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return glide-finetune's parts to freeze; `encoder_kv`, by which a U-Net reads the text, is none of them."""
        modules = (self.token_embedding, self.transformer, self.final_ln, self.transformer_proj)
        text = [self.positional_embedding, self.padding_embedding, *(p for m in modules for p in m.parameters())]
        known = {id(p) for p in text}
        unet = [p for name, p in self.named_parameters() if id(p) not in known and ".encoder_kv." not in name]
        return {"text_transformer": text, "unet": unet}

    def adapt_state_dict(self, state: dict[str, Tensor], spec: ConditionSpec) -> dict[str, Tensor]:
        """Return a base model's weights for an inpainting model or an upsampler, as GLIDE's own was begun."""
        return _widened(state, _places(spec, self.channels), _places(self.spec, self.channels))

    # ------------------------------------------------------------------------------------------------------ text

    def encode_text(self, token_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pooled text, [B, 4 * base_channels], and the sequence, [B, text_width, L].

        Args:
            token_ids: int64 [B, L].
            mask: bool [B, L], false where there is padding. Padding is read like any other position.
        """
        if token_ids.shape[1] != self.text_size:
            raise UserError(
                f"this model reads {self.text_size} tokens, and the conditioner gives {token_ids.shape[1]}; "
                f"conditioner.text_size={self.text_size} goes with it"
            )
        x = self.token_embedding(token_ids) + self.positional_embedding  # [B, L, w]
        x = torch.where(rearrange(mask.bool(), "b l -> b l 1"), x, self.padding_embedding.to(x))  # [B, L, w]
        for block in self.transformer.resblocks:
            x = self.run(block, x)  # [B, L, w]
        x = self.final_ln(x)  # [B, L, w]
        return self.transformer_proj(x[:, -1]), rearrange(x, "b l w -> b w l")  # [B, e], [B, w, L]

    def _with_clip(self, clip_embed: Tensor, emb: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return the time's embedding [B, e] and the text's sequence [B, w, L + P] with a CLIP vector's added."""
        more = rearrange(self.clip_to_xf(clip_embed), "b (p w) -> b w p", p=self.clip_positions)  # [B, w, P]
        return emb + self.clip_to_time(clip_embed), torch.cat([text, more], dim=2)  # [B, e], [B, w, L + P]

    # ----------------------------------------------------------------------------------------------------- image

    def time_embedding(self, timestep: Tensor) -> Tensor:
        """Return the embedding of timesteps [B], 0 .. T - 1, [B, 4 * base_channels]."""
        return self.time_embed(sinusoids(timestep, self.base_channels).to(self.time_embed[0].weight.dtype))

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        token_ids: Tensor,
        token_ids_mask: Tensor,
        low_res: Tensor | None = None,
        inpaint_image: Tensor | None = None,
        inpaint_mask: Tensor | None = None,
        clip_embed: Tensor | None = None,
    ) -> Tensor:
        """Return [B, 2C, h, w]: eps and the learned variance's place; [B, C, h, w] without `learn_variance`.

        Args:
            x: noised images, [B, C, h, w].
            time: the timestep, 0 .. T - 1, [B]; fractions are taken as they are.
            token_ids: int64 [B, L].
            token_ids_mask: bool [B, L], false where there is padding; all false is no condition.
            low_res: of an upsampler: RGB in [-1, 1] of any size, [B, 3, h', w'].
            inpaint_image: of an inpainting model: [B, C, h, w] in [-1, 1]; None is all unknown.
            inpaint_mask: 1 where `inpaint_image` is known, 0 where not, [B, 1, h, w].
            clip_embed: of a model with a CLIP vector: [B, width]; None leaves it out, as in a model without.

        Raises:
            UserError: h or w is not a multiple of `multiple_of`; a condition that this form does not have, or lacks.
        """
        check_size(x, self.multiple_of)
        pooled, text = self.encode_text(token_ids, token_ids_mask)  # [B, e], [B, w, L]
        emb = self.time_embedding(time) + pooled  # [B, e]
        if clip_embed is not None:
            emb, text = self._with_clip(clip_embed, emb, text)  # [B, e], [B, w, L + P]
        h = torch.cat([x, *self._image_conditions(x, low_res, inpaint_image, inpaint_mask)], dim=1)  # [B, C + ., h, w]
        return self.through_levels(h, emb, text)  # [B, C or 2C, h, w]

    def _image_conditions(
        self, x: Tensor, low_res: Tensor | None, known: Tensor | None, known_mask: Tensor | None
    ) -> list[Tensor]:
        """Return what is concatenated to the channels of x, [B, ., h, w] each, in the original's order."""
        if (low_res is not None) != ("low_res" in self.spec):
            raise UserError(
                UPSAMPLER_ALONE
                if low_res is None
                else "this denoiser is a base model: it takes no low-resolution picture, an upsampler does"
            )
        if (known is not None or known_mask is not None) and "inpaint_image" not in self.spec:
            raise UserError("this denoiser was not trained for inpainting: it takes no known part of a picture")
        concatenated = []
        if "inpaint_image" in self.spec:
            if known is None or known_mask is None:
                known, known_mask = torch.zeros_like(x), torch.zeros_like(x[:, :1])  # [B, C, h, w], [B, 1, h, w]
            concatenated += [known * known_mask, known_mask]
        if low_res is not None:
            low_res = F.interpolate(low_res, x.shape[2:], mode="bilinear", align_corners=False)  # [B, 3, h, w]
            concatenated.append(low_res)
        return [value.to(x) for value in concatenated]


def _places(spec: ConditionSpec, channels: int) -> dict[str, slice]:
    """Return whose the input channels of the first convolution are: x's, and in their order those of conditions."""
    places, begin = {"x": slice(0, channels)}, channels
    for name in IMAGES:
        kind = spec.get(name)
        if isinstance(kind, ImageCondition):
            places[name] = slice(begin, begin + kind.channels)
            begin += kind.channels
    return places


def _widened(state: dict[str, Tensor], theirs: dict[str, slice], ours: dict[str, slice]) -> dict[str, Tensor]:
    """Return weights whose first convolution has input channels at other places; new ones are zero.

    Nichol et al. 2022 (arXiv 2112.10741), section 4.3. Weights that do not have channels at `theirs` stay as they are.
    """
    weight = state.get(FIRST)  # [w, C + ., 3, 3]
    known, wanted = (max(place.stop for place in places.values()) for places in (theirs, ours))
    if theirs == ours or weight is None or weight.shape[1:2] != (known,) or not theirs.keys() <= ours.keys():
        return state
    wider = weight.new_zeros(len(weight), wanted, *weight.shape[2:])  # [w, C + ., 3, 3]
    for name, place in theirs.items():
        wider[:, ours[name]] = weight[:, place]
    return {**state, FIRST: wider}


def _mlp(width_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, width), nn.SiLU(), nn.Linear(width, width))


def _taken(conditions: ConditionSpec, channels: int, name: str) -> ConditionSpec:
    """Return those of the given conditions that GLIDE takes. Raises UserError if there are no token ids."""
    taken: dict[str, ConditionKind] = {"token_ids": required_condition(conditions, "token_ids", TokenIds, name)}
    if isinstance(low_res := conditions.get("low_res"), ImageCondition):
        taken["low_res"] = low_res
    inpaint: ConditionSpec = {"inpaint_image": ImageCondition(channels), "inpaint_mask": ImageCondition(1)}
    if all(conditions.get(key) == kind for key, kind in inpaint.items()):
        taken |= inpaint
    if isinstance(clip := conditions.get("clip_embed"), Embedding):
        taken["clip_embed"] = clip
    return taken
