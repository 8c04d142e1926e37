"""What a denoiser is told beside x and the time: the kinds of conditions, and how they are named.

The conditions of a batch are a dict of tensors whose first axis is the batch. What they are is described by a
`ConditionSpec`, name -> kind. The names that the package's own parts give: "embed", "token_ids" with "token_ids_mask",
"token_states" with "token_states_mask", "low_res", of some with "low_res_level", "inpaint_image" with "inpaint_mask",
and the optional "clip_embed".
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from torch import Tensor

from ldm_lab.errors import UserError

Conditions = dict[str, Tensor]  # name -> [B, ...]
Stored = Literal["float16", "bfloat16", "float32"]  # how a cache keeps numbers


@dataclass(frozen=True)
class Embedding:
    """One vector for each row, float [B, width]; zeros mean no condition.

    Attributes:
        optional: the conditions may lack it; a denoiser then leaves its layers for it out.
        stored: how a cache keeps it.
    """

    width: int
    optional: bool = False
    stored: Stored = field(default="float16", compare=False)

    def __str__(self) -> str:
        return f"embedding of {self.width}" + (", which may be missing" if self.optional else "")


@dataclass(frozen=True)
class TokenIds:
    """Ids that the denoiser reads itself, int64 [B, length]; beside NAME travels NAME_mask, bool [B, length]."""

    length: int
    vocabulary: int

    def __str__(self) -> str:
        return f"{self.length} token ids of a vocabulary of {self.vocabulary}"


@dataclass(frozen=True)
class TokenStates:
    """States of a language model, float [B, length, width]; beside NAME travels NAME_mask, bool [B, length].

    What lies behind the last place that the mask has means nothing, and a cache gives zeros for it.

    Attributes:
        stored: how a cache keeps them.
    """

    width: int
    length: int
    stored: Stored = field(default="float16", compare=False)

    def __str__(self) -> str:
        return f"token states, up to {self.length} of {self.width}"


@dataclass(frozen=True)
class ImageCondition:
    """An image beside the noised one, float [B, channels, h / scale_factor, w / scale_factor].

    Attributes:
        enlarged: it is given at the noised one's size, [B, channels, h, w], and shows no more than the smaller one.
        stored: how a cache keeps it, if a conditioner gives one.
    """

    channels: int
    scale_factor: int = 1
    enlarged: bool = False
    stored: Stored = field(default="float16", compare=False)

    def __str__(self) -> str:
        size = "" if self.scale_factor == 1 else f", 1/{self.scale_factor} of the size"
        size += ", enlarged" if self.enlarged else ""
        return f"image of {self.channels} channels{size}"


@dataclass(frozen=True)
class Level:
    """One number for each row, float [B], in [0, 1]: how noised another condition is, as a time of a schedule.

    Attributes:
        schedule: which one (`ldm_lab.schedules.LogSNRCurve`).
    """

    schedule: str = "linear"

    def __str__(self) -> str:
        return "noise level" if self.schedule == "linear" else f"noise level on the {self.schedule} schedule"


ConditionKind = Embedding | TokenIds | TokenStates | ImageCondition | Level
ConditionSpec = Mapping[str, ConditionKind]
Kind = TypeVar("Kind", Embedding, TokenIds, TokenStates, ImageCondition, Level)
MASK = "_mask"  # beside the name of token ids or states: where a text goes on


def condition_tensors(spec: ConditionSpec) -> list[str]:
    """Return the names of the tensors that conditions of a spec consist of: its own, and masks of token sequences."""
    names = []
    for name, kind in spec.items():
        names += [name, name + MASK] if isinstance(kind, TokenIds | TokenStates) else [name]
    return names


def blank_conditions(spec: ConditionSpec, count: int, height: int = 0, width: int = 0) -> Conditions:
    """Return conditions of a spec that say nothing, for `count` rows of x, whose size images depend on."""
    given: Conditions = {}
    for name, kind in spec.items():
        match kind:
            case Embedding():
                given[name] = torch.zeros(count, kind.width)  # [B, D]
            case TokenIds():
                given[name] = torch.zeros(count, kind.length, dtype=torch.int64)  # [B, L]
            case TokenStates():
                given[name] = torch.zeros(count, kind.length, kind.width)  # [B, L, D]
            case ImageCondition():
                factor = 1 if kind.enlarged else kind.scale_factor
                size = height // factor, width // factor
                given[name] = torch.zeros(count, kind.channels, *size)  # [B, c, h', w']
            case Level():
                given[name] = torch.zeros(count)  # [B]
        if isinstance(kind, TokenIds | TokenStates):
            given[name + MASK] = torch.ones(count, kind.length, dtype=torch.bool)  # [B, L]
    return given


def describe_conditions(spec: ConditionSpec) -> str:
    """Return a spec in words: "embed (embedding of 512) and low_res (image of 3 channels)"."""
    return " and ".join(f"{name} ({kind})" for name, kind in spec.items()) or "nothing"


def required_condition(spec: ConditionSpec, name: str, kind: type[Kind], denoiser: str) -> Kind:
    """Return the condition that a denoiser cannot do without, of all that it is given.

    Args:
        spec: what conditioner and condition sources give.
        name: of the condition.
        kind: what it has to be.
        denoiser: registered name, for the message.

    Raises:
        UserError: there is none of that name, it is of another kind, or it may be missing.
    """
    given = spec.get(name)
    if not isinstance(given, kind) or (isinstance(given, Embedding) and given.optional):
        raise UserError(
            f"denoiser.name: {denoiser} takes {name} ({kind.__name__}), and the conditioner and condition sources give "
            f"{describe_conditions(spec)}"
        )
    return given


UPSAMPLER_ALONE = (
    "this model is an upsampler: it enlarges the pictures of a base model "
    "(sample.py --checkpoint BASE --upsampler THIS)"
)


def is_upsampler(spec: ConditionSpec) -> bool:
    """Return whether a denoiser that takes these conditions enlarges an image."""
    return any(isinstance(kind, ImageCondition) and kind.scale_factor > 1 for kind in spec.values())


@dataclass(frozen=True)
class ConditionRequest:
    """What sampling knows of the images to be made, beside the prompts.

    Attributes:
        x: where sampling starts, [B, C, h, w].
        low_res: what is to be enlarged, [B, 3, h', w'] in [-1, 1]; None without.
        known: latents of an image of which a part is kept, [1 or B, C, h, w]; where the mask is true they mean nothing.
            None without.
        mask: where it is to be painted anew, bool [1 or B, 1, h, w]; None without.
        low_res_level: how noised it is to be, in [0, 1], where the model is told; None: the condition source's own.
        noise: makes standard normal noise of a tensor's shape [B, ...], each row's of its picture's own seed.
    """

    x: Tensor
    low_res: Tensor | None = None
    known: Tensor | None = None
    mask: Tensor | None = None
    low_res_level: float | None = None
    noise: Callable[[Tensor], Tensor] = torch.randn_like
