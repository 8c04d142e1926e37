"""Importer of CLIP's weights: open_clip's and OpenAI's files, the latter TorchScript archives, without running them.

A TorchScript archive is a zip with a program and its tensors. Only the pickle of its attributes and the tensors' bytes
are read here, by an unpickler that answers every name with a function of this file; the program stays unread.
"""

import pickle
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from ldm_lab.checkpoints.third_party import read_state_dict
from ldm_lab.errors import UserError, first_line
from ldm_lab.io.atomic import existing_file

PREFIXES = ("module.", "model.")  # of DistributedDataParallel, of wrappers around CLIP
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")  # constants in OpenAI's archives


def is_one(names: Iterable[str]) -> bool:
    """Return whether a file's tensors are named as open_clip or OpenAI name those of a CLIP."""
    prefixes = [prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in names)]
    inner = [name.removeprefix(prefixes[0]) for name in names] if prefixes else list(names)
    return any(name.startswith("visual.") for name in inner)


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Return `(state_dict, config, extra)` of a CLIP.

    Args:
        path: a safetensors file, a state dict, a checkpoint of open_clip's training, or one of OpenAI's TorchScript
            archives.

    Returns:
        The tensors under open_clip's names; nothing of the architecture, which the file does not say; nothing else.

    Raises:
        UserError: missing or damaged file, one that holds more than tensors, or not such a model.
    """
    path = existing_file(path, "CLIP")
    state = read_torchscript(path) if is_torchscript(path) else read_state_dict(path, "CLIP")[0]
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    state = {name: value for name, value in state.items() if name not in NOT_WEIGHTS}
    if not any(name.startswith("visual.") for name in state):
        raise UserError(f"{path}: not a CLIP of open_clip's or OpenAI's: no tensor 'visual.*' is in it")
    return state, {}, {}


# ------------------------------------------------------------------------------------------------------- TorchScript


def is_torchscript(path: Path) -> bool:
    """Return whether a file is a zip with a TorchScript program in it."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            parts = [PurePosixPath(name).parts for name in archive.namelist()]
    except (zipfile.BadZipFile, ValueError, OSError):
        return False
    return any(len(names) > 2 and names[1] == "code" for names in parts)


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a TorchScript archive's module and its submodules, by their dotted names.

    Raises:
        UserError: a damaged archive, or one whose attributes are more than modules, tensors and plain values.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (pickled,) = [name for name in archive.namelist() if PurePosixPath(name).parts[1:] == ("data.pkl",)]
            folder = pickled.removesuffix("data.pkl")
            with archive.open(_stored(archive, pickled)) as file:
                root = _Unpickler(file, archive, f"{folder}data/").load()
            tensors: dict[str, Tensor] = {}
            _collect(root, "", tensors, seen=set())
    except _Refused as error:
        raise UserError(f"{path}: refused: it asks for {error}, and a file of weights needs only tensors") from None
    except (RecursionError, MemoryError, OverflowError):
        raise UserError(f"{path}: not a readable TorchScript archive: its sizes are absurd") from None
    except DAMAGE as error:
        raise UserError(
            f"{path}: not a readable TorchScript archive, truncated or damaged ({first_line(error)})"
        ) from None
    return tensors


DAMAGE = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, AssertionError, OSError, RuntimeError),
    *(ValueError, TypeError, LookupError, AttributeError),
)
DTYPES = {
    **{"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16},
    **{"DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32},
    **{"ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool},
}


class _Refused(Exception):
    """The pickle asks for a name that no archive of weights needs."""


class _Module:
    """Stands for a module of the archive's program: attributes, nothing else."""

    def __init__(self) -> None:
        self.attributes: Any = None

    def __setstate__(self, state: Any) -> None:
        self.attributes = state


class _Named:
    """A name that the pickle may ask for; it can be called, unless it only stands for a type."""

    __slots__ = ("make",)

    def __init__(self, make: Any) -> None:
        self.make = make

    def __call__(self, *args: Any) -> Any:
        if self.make is None:
            raise pickle.UnpicklingError("a type called, which only stands as an argument")
        return self.make(*args)


def _same(value: Any, *_: Any) -> Any:
    return value


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    if not isinstance(storage, Tensor):
        raise pickle.UnpicklingError("a tensor that is not made of stored values")
    return torch.as_strided(storage, size, stride, offset)  # the stored shape; RuntimeError beyond the storage


ALLOWED = {
    ("torch._utils", "_rebuild_tensor_v2"): _Named(_tensor),
    ("torch.jit._pickle", "restore_type_tag"): _Named(_same),
    **{("torch.jit._pickle", f"build_{kind}list"): _Named(_same) for kind in ("int", "tensor", "double", "bool")},
    ("collections", "OrderedDict"): _Named(dict),
    **{("torch", name): _Named(None) for name in DTYPES},
}


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler, the one written in Python: the one in C allocates whatever memo size a file names."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self.archive, self.folder = archive, folder
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if (module, name) not in ALLOWED:
            raise _Refused(f"{module}.{name}")
        return ALLOWED[module, name]

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], _Module):  # a tensor would take one, too
            raise pickle.UnpicklingError("state for something that is no module")
        super().load_build()

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}

    def persistent_load(self, pid: Any) -> Tensor:
        """Return the values of ("storage", type, key, device, count), flat."""
        kind, storage, key, _, count = pid
        names = [name for name in DTYPES if ALLOWED["torch", name] is storage]
        if kind != "storage" or not names or not isinstance(key, str) or not isinstance(count, int):
            raise pickle.UnpicklingError("a storage of an unknown kind")
        if key not in self.storages:
            data = bytearray(self.archive.read(_stored(self.archive, self.folder + key)))
            dtype = DTYPES[names[0]]
            values = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)  # [count]
            if len(values) != count:
                raise pickle.UnpicklingError(f"a storage of {len(values)} values that should be {count}")
            self.storages[key] = values
        return self.storages[key]


def _stored(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """Return an archive's entry, which torch never compresses: a compressed one could be of any size."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        raise pickle.UnpicklingError(f"{name} is compressed")
    return info


def _collect(module: Any, prefix: str, tensors: dict[str, Tensor], seen: set[int]) -> None:
    if not isinstance(module, _Module) or not isinstance(module.attributes, dict) or id(module) in seen:
        raise pickle.UnpicklingError("no tree of modules")
    seen.add(id(module))
    for name, value in module.attributes.items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}{name}"] = value
        elif isinstance(value, _Module):
            _collect(value, f"{prefix}{name}.", tensors, seen)
