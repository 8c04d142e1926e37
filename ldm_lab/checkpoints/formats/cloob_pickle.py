"""Importer of the released CLOOB models (crowsonkb/cloob-training): pickles of JAX parameter trees."""

import math
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm_lab.checkpoints.importer import Importer, LoadedPart, Section, register_importer
from ldm_lab.checkpoints.opened import OpenedFile, Shapes, TensorInfo, infos
from ldm_lab.errors import UserError

TOWERS = {"image_encoder": "vi_t_image_encoder", "text_encoder": "text_encoder"}  # torch prefix -> haiku's, in order
# haiku module below the tower and parameter -> torch name below the tower, and the axes' order in PyTorch.
SAME, TRANSPOSED, KERNEL = None, (1, 0), (3, 2, 0, 1)
RULES: list[tuple[str, str, tuple[int, ...] | None]] = [
    (r"class_embed", r"class_embed", SAME),
    (r"embed/w", r"embed.weight", KERNEL),
    (r"embed/embeddings", r"embed.weight", SAME),
    (r"pos_embed/w", r"pos_embed.weight", SAME),
    (r"layer_(\d+)/self_attention/layer_norm/scale", r"layers.\1.attn.norm.weight", SAME),
    (r"layer_(\d+)/self_attention/layer_norm/offset", r"layers.\1.attn.norm.bias", SAME),
    (r"layer_(\d+)/self_attention/multi_head_attention/(query|key|value)/w", r"layers.\1.attn.\2.weight", TRANSPOSED),
    (r"layer_(\d+)/self_attention/multi_head_attention/(query|key|value)/b", r"layers.\1.attn.\2.bias", SAME),
    (r"layer_(\d+)/self_attention/multi_head_attention/linear/w", r"layers.\1.attn.out.weight", TRANSPOSED),
    (r"layer_(\d+)/self_attention/multi_head_attention/linear/b", r"layers.\1.attn.out.bias", SAME),
    (r"layer_(\d+)/feed_forward/layer_norm/scale", r"layers.\1.ff.norm.weight", SAME),
    (r"layer_(\d+)/feed_forward/layer_norm/offset", r"layers.\1.ff.norm.bias", SAME),
    (r"layer_(\d+)/feed_forward/(linear_[01])/w", r"layers.\1.ff.\2.weight", TRANSPOSED),
    (r"layer_(\d+)/feed_forward/(linear_[01])/b", r"layers.\1.ff.\2.bias", SAME),
    (r"proj/w", r"proj.weight", TRANSPOSED),
    (r"proj/b", r"proj.bias", SAME),
]


@register_importer
class CLOOBPickle(Importer):
    """A pickled dict with `params`, the trees of the image and the text tower, and `epoch`."""

    kind = "cloob_pickle"
    title = "a CLOOB of cloob-training's"
    parts = {"conditioner": "cloob"}

    def matches(self, file: OpenedFile) -> bool:
        """Return whether it is a pickle that is no checkpoint; what else there may be in it is said on reading."""
        flat = isinstance(file.pickled, dict) and all(isinstance(value, np.ndarray) for value in file.pickled.values())
        return file.pickled is not None and not flat

    def network(self, file: OpenedFile) -> dict[str, TensorInfo]:
        """Return the towers' tensors."""
        return infos(towers(file.pickled, file.path))

    def infer_config(self, tensors: Shapes) -> Section:
        """Return the keyword arguments of `CLOOB`."""
        return infer_config(tensors)

    def facts(self, file: OpenedFile) -> Section:
        """Return how many epochs it was trained, where the file says it."""
        epoch = file.pickled.get("epoch") if isinstance(file.pickled, dict) else None
        if isinstance(epoch, np.ndarray) and epoch.size == 1:
            epoch = epoch.item()
        return Section(epoch=epoch if isinstance(epoch, int) else None)

    def read(self, file: OpenedFile, role: str) -> LoadedPart:
        """Return the towers, float32, with the options that follow from the shapes.

        The numbers of heads are not in a file: unless they are given, CLOOB takes one per 64 of the width, as all that
        was released.
        """
        state = towers(file.pickled, file.path)
        try:
            return LoadedPart(state, Section(name="cloob", **infer_config(state)))
        except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
            raise UserError(f"{file.path}: not a complete CLOOB model ({error} is missing or misshapen)") from None


def towers(pickled: object, path: Path) -> dict[str, Tensor]:
    """Return the tensors, float32, that `CLOOB` loads strictly.

    Args:
        pickled: what the pickle holds.
        path: where it is from, for messages.

    Raises:
        UserError: not such a model.
    """
    trees = pickled.get("params") if isinstance(pickled, dict) else None
    if not isinstance(trees, list | tuple) or len(trees) != 2 or not all(isinstance(tree, dict) for tree in trees):
        raise UserError(f"{path}: not a CLOOB model: 'params' with the trees of two towers is not in it")
    state: dict[str, Tensor] = {}
    for (tower, prefix), tree in zip(TOWERS.items(), trees):
        for module, parameters in tree.items():
            for name, values in parameters.items() if isinstance(parameters, dict) else [("", parameters)]:
                full_name = f"{module}/{name}"
                rule = _rule(full_name.removeprefix(f"{prefix}/")) if full_name.startswith(f"{prefix}/") else None
                if rule is None:
                    raise UserError(f"{path}: not a CLOOB model of the released kind: it has a parameter {full_name}")
                torch_name, axes = rule
                if not isinstance(values, np.ndarray) or (axes is not None and values.ndim != len(axes)):
                    raise UserError(f"{path}: not a CLOOB model: {full_name} is not an array of the right kind")
                array = values if axes is None else values.transpose(axes)
                tensor = torch.from_numpy(np.array(array, dtype=np.float32, order="C"))  # the parameter's shape
                state[f"{tower}.{torch_name}"] = tensor
    return state


def _rule(name: str) -> tuple[str, tuple[int, ...] | None] | None:
    """Return the torch name and the order of axes for the haiku name of a parameter below its tower, if it is known."""
    for pattern, torch_name, axes in RULES:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(torch_name), axes
    return None


def infer_config(state: Shapes) -> Section:
    """Return the keyword arguments of `CLOOB` that follow from the shapes: all but the numbers of heads."""
    width, _, patch_size, _ = state["image_encoder.embed.weight"].shape
    patches = state["image_encoder.pos_embed.weight"].shape[0] - 1
    vocab_size, text_width = state["text_encoder.embed.weight"].shape
    return Section(
        embed_dim=state["image_encoder.proj.weight"].shape[0],
        image_size=math.isqrt(patches) * patch_size,
        patch_size=patch_size,
        image_width=width,
        image_layers=_layers(state, "image_encoder"),
        text_size=state["text_encoder.pos_embed.weight"].shape[0],
        vocab_size=vocab_size,
        text_width=text_width,
        text_layers=_layers(state, "text_encoder"),
    )


def _layers(state: Shapes, tower: str) -> int:
    return len({name.split(".")[2] for name in state if name.startswith(f"{tower}.layers.")})
