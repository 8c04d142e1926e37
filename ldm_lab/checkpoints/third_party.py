"""State dicts out of other programs' `.ckpt`, `.pt` and `.safetensors` files, without running anything from them."""

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from ldm_lab.checkpoints.files import read_pickled
from ldm_lab.checkpoints.wrappers import Unwrapped, unwrap
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


class Ignored:
    """An object that is not needed: takes any arguments and any state, keeps nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_state_dict(path: str | Path, what: str) -> Unwrapped:
    """Return the tensors of another program's pickled checkpoint, on the CPU, and whatever else it holds.

    Args:
        path: a Lightning checkpoint (`state_dict` in a dict), another program's (see `wrappers`), or a flat dict of
            tensors.
        what: what the file should be, for the message if it is missing.

    Raises:
        UserError: missing, truncated or damaged file; one that holds more than tensors and Lightning's bookkeeping.
    """
    path = existing_file(path, what)
    is_zip = zipfile.is_zipfile(path)
    names = _unsafe_globals(path) if is_zip else []
    stand_ins = [(Ignored, name) for name in names if name.partition(".")[0] in BOOKKEEPING or name in PLAIN_TYPES]
    with torch.serialization.safe_globals(stand_ins):
        content = read_pickled(path, mmap=is_zip)  # mapped: of a training checkpoint only a part is ever needed
    if "state_dict" in content and not isinstance(content["state_dict"], dict):
        raise UserError(f"{path}: its 'state_dict' is no dict of tensors but a {type(content['state_dict']).__name__}")
    found = unwrap(content)
    if not found.tensors:
        raise UserError(f"{path}: no tensors of a network in it{_holds(content)}")
    return found


def _holds(keys: Iterable[str]) -> str:
    """Return what a checkpoint without a network has, in words, by the keys of its dict."""
    names = [str(key)[:40] for key in keys]
    if {"state", "param_groups"} <= set(names):
        return ": it is the state of an optimizer; the weights are in another file"
    return f": it holds {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}" if names else ": it is empty"


def _unsafe_globals(path: Path) -> list[str]:
    """Return the names that a checkpoint's pickle asks for and torch does not know; none if it is unreadable."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (RuntimeError, ValueError, KeyError, IndexError, EOFError, OSError, pickle.UnpicklingError):
        return []  # `read_pickled` says what is wrong with the file


def strip_prefix(tensors: Mapping[str, T], prefix: str) -> dict[str, T]:
    """Return the tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
