"""Importer of the released CLOOB models (crowsonkb/cloob-training): pickles of JAX parameter trees.

A pickle is a program. This reader lets it build dicts, lists, numbers, strings and arrays, and nothing else: every name
that it may ask for is answered with a function of this file, and any other name ends the reading. Nothing that the
pickle names is imported or called, not even numpy's own functions.
"""

import math
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_lab.errors import UserError, first_line
from ldm_lab.io.atomic import existing_file

# ------------------------------------------------------------------------------------------- what a pickle may build


class _DType:
    """Stands for a numpy.dtype: `dtype(code, align, copy)`, then its state, of which the byte order matters."""

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[fiub]\d{1,2}", code):
            raise pickle.UnpicklingError(f"an array of {code!r}, which is no plain number type")
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"a byte order {state[1]!r}")
        self.order = state[1]

    def numpy(self) -> np.dtype:
        return np.dtype(self.order + self.code)


class _Array:
    """Stands for a numpy.ndarray: made empty, then given its state (version, shape, dtype, is_fortran, bytes)."""

    def __init__(self) -> None:
        self.values: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, data = state
        self.values = _from_bytes(data, dtype, shape, "F" if is_fortran else "C")


class _Named:
    """A name that a pickle may ask for: it can be called and has no state to be set, so that it stays what it is."""

    __slots__ = ("make",)

    def __init__(self, make: Callable) -> None:
        self.make = make

    def __call__(self, *args: Any) -> Any:
        return self.make(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("state for a function")


def _from_bytes(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if not isinstance(data, bytes | bytearray) or not isinstance(dtype, _DType) or not isinstance(shape, tuple):
        raise pickle.UnpicklingError("an array that is not made of bytes")
    if order not in ("C", "F"):
        raise pickle.UnpicklingError(f"an array order {order!r}")
    return np.frombuffer(data, dtype.numpy()).reshape(shape, order=order)


def _reconstruct(*_: Any) -> _Array:
    return _Array()  # its arguments are the class and an empty shape


def _refuse_call(*_: Any) -> None:
    raise pickle.UnpicklingError("numpy.ndarray called, which only stands as an argument")


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> np.ndarray:
    if order == "K" and axes is not None:  # numpy 2.3 and later, for arrays whose axes are in another order in memory
        return _from_bytes(data, dtype, shape, "C").transpose(axes)
    return _from_bytes(data, dtype, shape, order)


def _scalar(dtype: Any, data: Any) -> Any:
    return _from_bytes(data, dtype, (), "C").item()


def _encode(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("bytes in an unknown encoding")
    return text.encode("latin1")


def _flat_mapping(mapping: Any) -> dict:
    if not isinstance(mapping, dict):
        raise pickle.UnpicklingError("a FlatMapping that is not made of a dict")
    return mapping


def _jax_array(_: Any, __: Any, state: Any, *___: Any) -> _Array:
    array = _Array()
    array.__setstate__(state)
    return array


# (module, name) -> what answers. Who writes what: numpy 1 and 2 differ in the module; `_codecs.encode` is protocol 2 or
# lower, `_frombuffer` protocol 5; FlatMapping is haiku before 0.0.6, the last two are jax from May 2022 on.
ALLOWED = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Named(_reconstruct) for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Named(_scalar) for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Named(_frombuffer) for core in ("core", "_core")},
    ("numpy", "ndarray"): _Named(_refuse_call),
    ("numpy", "dtype"): _Named(_DType),
    ("_codecs", "encode"): _Named(_encode),
    ("haiku._src.data_structures", "FlatMapping"): _Named(_flat_mapping),
    ("jax._src.device_array", "reconstruct_device_array"): _Named(_jax_array),
    ("jax._src.array", "_reconstruct_array"): _Named(_jax_array),
}


# What the unpickler, and the functions above, raise on malformed bytes.
DAMAGE = (
    *(pickle.UnpicklingError, struct.error, EOFError, AssertionError),
    *(ValueError, TypeError, KeyError, IndexError, AttributeError),
)


class _Refused(Exception):
    """The pickle asks for a name that is not in `ALLOWED`."""


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler, the one written in Python: the one in C allocates whatever memo size a file names."""

    def find_class(self, module: str, name: str) -> _Named:
        if (module, name) not in ALLOWED:
            raise _Refused(f"{module}.{name}")
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> None:
        raise _Refused("a persistent id")


def load(path: str | Path) -> Any:
    """Return what a pickle holds: dicts, lists, tuples, numbers, strings and numpy arrays.

    Raises:
        UserError: missing, truncated or damaged file, or one that asks for anything else.
    """
    path = existing_file(path, "CLOOB pickle")
    try:
        with open(path, "rb") as file:
            return _unwrap(_Unpickler(file).load())
    except _Refused as error:
        raise UserError(f"{path}: refused: it asks for {error}, and a file of parameters needs only arrays") from None
    except (RecursionError, MemoryError, OverflowError):
        raise UserError(f"{path}: not a readable pickle: its sizes are absurd") from None
    except DAMAGE as error:
        raise UserError(f"{path}: not a readable pickle, truncated or damaged ({first_line(error)})") from None


def _unwrap(value: Any) -> Any:
    """Return nested containers with arrays in place of their stand-ins."""
    if isinstance(value, _Array):
        if value.values is None:
            raise pickle.UnpicklingError("an array without values")
        return value.values
    if isinstance(value, dict):
        return {key: _unwrap(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_unwrap(item) for item in value)
    return value


# ------------------------------------------------------------------------------------------ from JAX to PyTorch names

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


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Return `(state_dict, config, extra)` of a released CLOOB model.

    Args:
        path: a pickled dict with `params`, the trees of the image and the text tower, and `epoch`.

    Returns:
        The tensors, float32, that `CLOOB` loads strictly. Its keyword arguments, read off the shapes; the numbers of
        heads are not in a file: unless they are given, CLOOB takes one per 64 of the width, as all that was released.
        Extra: `epoch`, or None.

    Raises:
        UserError: missing or damaged file, one that asks for more than arrays, or not such a model.
    """
    content = load(path)
    trees = content.get("params") if isinstance(content, dict) else None
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
    try:
        config = infer_config(state)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{path}: not a complete CLOOB model ({error} is missing or misshapen)") from None
    epoch = content.get("epoch")
    if isinstance(epoch, np.ndarray) and epoch.size == 1:
        epoch = epoch.item()
    return state, config, {"epoch": epoch if isinstance(epoch, int) else None}


def _rule(name: str) -> tuple[str, tuple[int, ...] | None] | None:
    """Return the torch name and the order of axes for the haiku name of a parameter below its tower, if it is known."""
    for pattern, torch_name, axes in RULES:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(torch_name), axes
    return None


def infer_config(state: dict[str, Tensor]) -> dict[str, Any]:
    """Return the keyword arguments of `CLOOB` that follow from the shapes: all but the numbers of heads."""
    width, _, patch_size, _ = state["image_encoder.embed.weight"].shape
    patches = state["image_encoder.pos_embed.weight"].shape[0] - 1
    vocab_size, text_width = state["text_encoder.embed.weight"].shape
    return {
        "embed_dim": state["image_encoder.proj.weight"].shape[0],
        "image_size": math.isqrt(patches) * patch_size,
        "patch_size": patch_size,
        "image_width": width,
        "image_layers": _layers(state, "image_encoder"),
        "text_size": state["text_encoder.pos_embed.weight"].shape[0],
        "vocab_size": vocab_size,
        "text_width": text_width,
        "text_layers": _layers(state, "text_encoder"),
    }


def _layers(state: dict[str, Tensor], tower: str) -> int:
    return len({name.split(".")[2] for name in state if name.startswith(f"{tower}.layers.")})
