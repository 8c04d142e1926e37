"""How Imagen's U-Net reads what it is told: noise levels, and the states of a text."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_lab.denoisers.imagen_attention import POSITIONS, AttentionPool, BiasedLayerNorm, Heads
from ldm_lab.denoisers.imagen_layers import FREQUENCIES, TIME_TOKENS, Fourier
from ldm_lab.denoisers.unet import UNet
from ldm_lab.errors import UserError
from ldm_lab.interfaces import ConditionKind, ConditionSpec, ImageCondition, Level, TokenStates
from ldm_lab.schedules.log_snr import LOG_SNR


class ConditionReader(UNet):
    """The part of the network that makes a vector and tokens of the time, of a noise level and of a text.

    Attributes:
        vector_width: T of the vector that scales and shifts the residual blocks.
        tokens_width: w of the tokens that pixels attend to.
        text_size: token states per text; 0 without a text.
    """

    text_modules = ("text_to_cond", "null_text", "attn_pool", "to_text_non_attn_cond")
    vector_width: int
    tokens_width: int
    text_size: int

    def add_times(self) -> None:
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

    def add_text(self, latents: int, heads: Heads) -> None:
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


def taken_conditions(conditions: ConditionSpec) -> ConditionSpec:
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
        if level.schedule not in LOG_SNR:
            raise UserError(
                f"denoiser.name: imagen_unet knows noise levels of the schedules {', '.join(LOG_SNR)}, as "
                f"condition_sources.noised_low_res gives them; it is given a {level}"
            )
        taken |= {"low_res": image, "low_res_level": level}
    return taken
