"""The two layouts of DeepFloyd IF's U-Nets: its own, which is ours, and diffusers'; what their shapes tell."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ldm_lab.checkpoints.importer import DenoiserShape, Section
from ldm_lab.checkpoints.opened import Shapes
from ldm_lab.conditions import ConditionKind, ImageCondition, Level, TokenStates

FIRST, LAST, POOLED = "input_blocks.0.0.weight", "out.2.weight", "encoder_pooling.1.positional_embedding"
DIFFUSERS = ("conv_in.weight", "add_embedding.pool.positional_embedding", "mid_block.attentions.0.add_k_proj.weight")
# Beginnings of names and names of layers, diffusers' -> ours.
OUTSIDE = {
    **{"conv_in.": "input_blocks.0.0.", "conv_norm_out.": "out.0.", "conv_out.": "out.2."},
    **{"time_embedding.linear_1.": "time_embed.0.", "time_embedding.linear_2.": "time_embed.2."},
    **{"class_embedding.linear_1.": "aug_proj.0.", "class_embedding.linear_2.": "aug_proj.2."},
    **{"encoder_hid_proj.": "encoder_proj.", "add_embedding.norm1.": "encoder_pooling.0."},
    **{"add_embedding.pool.": "encoder_pooling.1.", "add_embedding.proj.": "encoder_pooling.2."},
    **{"add_embedding.norm2.": "encoder_pooling.3."},
}
RES = {
    **{"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"},
    **{"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"},
}
ATTENTION = {"group_norm": "norm", "norm_cross": "norm_encoder", "to_out.0": "proj_out"}
JOINED = {"qkv": ("to_q", "to_k", "to_v"), "encoder_kv": ("add_k_proj", "add_v_proj")}  # ours of diffusers'


class Levels(NamedTuple):
    """The levels of a U-Net, the finest first.

    Attributes:
        blocks: residual blocks of each on the way down; on the way up one more.
        attention: whether each has attention.
    """

    blocks: list[int]
    attention: list[bool]


# ------------------------------------------------------------------------------------------------- what shapes tell


def is_if(tensors: Shapes) -> bool:
    """Return whether tensors are named as IF's own loader names them."""
    return {FIRST, LAST, POOLED} <= set(tensors)


def levels_of(state: Shapes) -> Levels:
    """Return the levels of a network under our names, read off its way up, where each but the finest ends in larger."""
    blocks, attention, count = [], [], 0
    total = _count(state, "output_blocks.{}.0.in_layers.0.weight")
    for i in range(total):
        count += 1
        attended = f"output_blocks.{i}.1.qkv.weight" in state
        if f"output_blocks.{i}.{1 + attended}.in_layers.0.weight" in state or i == total - 1:
            blocks.append(count - 1)
            attention.append(attended)
            count = 0
    return Levels(blocks[::-1], attention[::-1])


def infer_config(state: Shapes) -> Section:
    """Return the keyword arguments of `IFUNet` that follow from the shapes.

    Raises:
        KeyError, IndexError, ValueError, ZeroDivisionError: tensors that are missing or misshapen.
    """
    base, levels = state["time_embed.0.weight"].shape[1], levels_of(state)
    ends = [sum(blocks + 1 for blocks in levels.blocks[i:]) - 1 for i in range(len(levels.blocks))]
    widths = [state[f"output_blocks.{end}.0.in_layers.2.weight"].shape[0] for end in ends]
    if any(width % base for width in widths):
        raise ValueError(f"levels {widths} wide, which are no multiples of {base}")
    middle = state["middle_block.1.qkv.weight"].shape
    return Section(
        base_channels=base,
        multipliers=[width // base for width in widths],
        blocks_per_level=levels.blocks[:1] if len(set(levels.blocks)) == 1 else levels.blocks,
        attention=[2**i for i, attended in enumerate(levels.attention) if attended],
        text_width=state["middle_block.1.encoder_kv.weight"].shape[1],
        cross_only=middle[0] == middle[1],
    )


def infer_shape(state: Shapes, scale_factor: int, text_size: int) -> DenoiserShape:
    """Return channels and conditions; no shape tells how much a stage enlarges and how long a text is.

    Raises:
        KeyError, IndexError: tensors that are missing or misshapen.
    """
    channels = state[LAST].shape[0] // 2  # eps, and as many for the variance
    conditions: dict[str, ConditionKind] = {"token_states": TokenStates(state[POOLED].shape[1], text_size)}
    extra = state[FIRST].shape[1] - channels
    if extra not in (0, channels) or bool(extra) != ("aug_proj.0.weight" in state):
        raise KeyError(f"{FIRST}: {extra} channels beside {channels}, which no stage of IF has")
    if extra:
        conditions["low_res"] = ImageCondition(channels, scale_factor, enlarged=True)
        conditions["low_res_level"] = Level("squaredcos_cap_v2")
    return DenoiserShape(channels, conditions)


def _count(state: Shapes, name: str) -> int:
    count = 0
    while name.format(count) in state:
        count += 1
    return count


# ------------------------------------------------------------------------------------------------ diffusers' layout


def is_diffusers_if(tensors: Shapes) -> bool:
    """Return whether tensors are named as diffusers names those of an IF's U-Net."""
    return set(DIFFUSERS) <= set(tensors)


def diffusers_levels(state: Shapes) -> Levels:
    """Return the levels of a network under diffusers' names."""
    depth = _count(state, "down_blocks.{}.resnets.0.conv1.weight")
    blocks = [_count(state, f"down_blocks.{i}.resnets.{{}}.conv1.weight") for i in range(depth)]
    return Levels(blocks, [f"down_blocks.{i}.attentions.0.to_q.weight" in state for i in range(depth)])


def modules(levels: Levels) -> Iterator[tuple[str, str]]:
    """Yield the names of blocks' modules, diffusers' and ours, in the order of ours."""
    depth, n = len(levels.blocks), 1
    for i, (blocks, attended) in enumerate(zip(*levels)):
        for j in range(blocks):
            yield f"down_blocks.{i}.resnets.{j}", f"input_blocks.{n}.0"
            if attended:
                yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{n}.1"
            n += 1
        if i < depth - 1:
            yield f"down_blocks.{i}.downsamplers.0", f"input_blocks.{n}.0"
            n += 1
    middle = ("resnets.0", "attentions.0", "resnets.1")
    yield from ((f"mid_block.{theirs}", f"middle_block.{i}") for i, theirs in enumerate(middle))
    n = 0
    for i in reversed(range(depth)):
        up, attended = f"up_blocks.{depth - 1 - i}", levels.attention[i]
        for j in range(levels.blocks[i] + 1):
            yield f"{up}.resnets.{j}", f"output_blocks.{n}.0"
            if attended:
                yield f"{up}.attentions.{j}", f"output_blocks.{n}.1"
            if i and j == levels.blocks[i]:
                yield f"{up}.upsamplers.0", f"output_blocks.{n}.{1 + attended}"
            n += 1


def our_names(state: Shapes) -> dict[str, tuple[str, ...]]:
    """Return of which of diffusers' tensors each of ours is made. What it does not know keeps its name."""
    places = dict(modules(diffusers_levels(state)))
    found: dict[str, list[str]] = {}
    for name in state:
        outer = next((begin for begin in OUTSIDE if name.startswith(begin)), None)
        match = re.fullmatch(r"((?:down_blocks|up_blocks|mid_block)\.[\d.]*(?:\w+)\.\d+)\.(.+)\.(weight|bias)", name)
        ours = name
        if outer is not None:
            ours = OUTSIDE[outer] + name.removeprefix(outer)
        elif match is not None and match[1] in places:
            layer = {**RES, **ATTENTION, **{its: join for join, parts in JOINED.items() for its in parts}}.get(match[2])
            ours = f"{places[match[1]]}.{layer}.{match[3]}" if layer else name
        found.setdefault(ours, []).append(name)
    order = [part for parts in JOINED.values() for part in parts]
    return {
        ours: tuple(sorted(names, key=lambda name: next((i for i, part in enumerate(order) if f".{part}." in name), 0)))
        for ours, names in found.items()
    }


def our_tensors(state: dict[str, Tensor], head_width: int) -> dict[str, Tensor]:
    """Return the tensors of diffusers' layout under our names.

    Raises:
        ValueError: tensors that do not fit together.
    """
    made = {}
    for ours, names in our_names(state).items():
        parts = [state[name] for name in names]
        value = parts[0]
        if len(parts) > 1:
            if len({part.shape for part in parts}) > 1 or value.ndim == 0 or value.shape[0] % head_width:
                raise ValueError(f"{names[0]}: {list(value.shape)}, in heads of {head_width}")
            stacked = torch.stack(parts)  # [parts, heads * d, ...]
            value = rearrange(stacked, "p (n d) ... -> (n p d) ...", d=head_width)  # [heads * parts * d, ...]
        is_matrix = ours.endswith((".qkv.weight", ".encoder_kv.weight", ".proj_out.weight"))
        made[ours] = value[..., None] if is_matrix and value.ndim == 2 else value  # [c, c, 1]
    return made


def our_shapes(state: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the same, without reading a tensor."""
    made = {}
    for ours, names in our_names(state).items():
        first = tuple(state[names[0]].shape)
        is_matrix = ours.endswith((".qkv.weight", ".encoder_kv.weight", ".proj_out.weight"))
        joined = (first[0] * len(names), *first[1:]) if first else ()
        made[ours] = (*joined, *((1,) if is_matrix and len(first) == 2 else ()))
    return made
