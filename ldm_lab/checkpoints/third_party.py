"""State dicts out of other programs' `.ckpt`, `.pt` and `.safetensors` files, without running anything from them."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ldm_lab.checkpoints.files import is_safetensors, read_pickled, read_safetensors
from ldm_lab.errors import UserError
from ldm_lab.io.atomic import existing_file

# Lightning saves objects of these packages beside the weights (callbacks, hyperparameters, best scores). They are not
# needed, so a file may name them: what it names is never imported, a stand-in takes its place.
BOOKKEEPING = ("pytorch_lightning", "lightning", "lightning_fabric", "omegaconf", "typing", "argparse", "numpy")
PLAIN_TYPES = (
    *(f"builtins.{name}" for name in ("dict", "list", "tuple", "str", "int", "float", "bool", "object")),
    *("collections.defaultdict", "pathlib.Path", "pathlib.PosixPath"),
)


T = TypeVar("T")
WRAPPERS = ("state_dict", "model", "weights")  # under which training programs keep a state dict beside other things


class Ignored:
    """An object that is not needed: takes any arguments and any state, keeps nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_state_dict(path: str | Path, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return `(tensors by name, whatever else the file holds)` of another program's checkpoint, on the CPU.

    Args:
        path: a `.safetensors` file, a Lightning checkpoint (`state_dict` in a dict), another program's (`model` or
            `weights` in a dict), or a flat dict of tensors.
        what: what the file should be, for the message if it is missing.

    Raises:
        UserError: missing, truncated or damaged file; one that holds more than tensors and Lightning's bookkeeping.
    """
    path = existing_file(path, what)
    if is_safetensors(path):
        return read_safetensors(path)
    is_zip = zipfile.is_zipfile(path)
    names = _unsafe_globals(path) if is_zip else []
    stand_ins = [(Ignored, name) for name in names if name.partition(".")[0] in BOOKKEEPING or name in PLAIN_TYPES]
    with torch.serialization.safe_globals(stand_ins):
        content = read_pickled(path, mmap=is_zip)  # mapped: of a training checkpoint only a part is ever needed
    key = next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)
    state = content if key is None else content[key]
    if key is None and "state_dict" in content:
        raise UserError(f"{path}: its 'state_dict' is no dict of tensors but a {type(content['state_dict']).__name__}")
    tensors = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path}: no tensors in it")
    rest = {} if state is content else {name: value for name, value in content.items() if name != key}
    return tensors, rest


def _unsafe_globals(path: Path) -> list[str]:
    """Return the names that a checkpoint's pickle asks for and torch does not know; none if it is unreadable."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (RuntimeError, ValueError, KeyError, IndexError, EOFError, OSError, pickle.UnpicklingError):
        return []  # `read_pickled` says what is wrong with the file


def strip_prefix(tensors: Mapping[str, T], prefix: str) -> dict[str, T]:
    """Return the tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
