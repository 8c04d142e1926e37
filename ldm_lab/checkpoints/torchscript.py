"""TorchScript archives: their tensors, without running the program that they are.

An archive is a zip with a program and its tensors. Only the pickle of its attributes and the tensors' bytes are read
(`safe_pickle`); the program stays unread.
"""

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeVar

import torch
from torch import Tensor

from ldm_lab.checkpoints.safe_pickle import Named, SafeUnpickler, StandIn, demand, one_line_errors

T = TypeVar("T")

DTYPES = {
    **{"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16},
    **{"DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32},
    **{"ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool},
}


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
    """Return the tensors of an archive's module and its submodules, by their dotted names.

    Raises:
        UserError: a damaged archive, or one whose attributes are more than modules, tensors and plain values.
    """
    tensors: dict[str, Tensor] = {}
    needs = "a file of weights needs only tensors"
    with one_line_errors(path, "TorchScript archive", needs), zipfile.ZipFile(path) as archive:
        (pickled,) = [name for name in archive.namelist() if PurePosixPath(name).parts[1:] == ("data.pkl",)]
        folder = pickled.removesuffix("data.pkl")
        with archive.open(_stored(archive, pickled)) as file:
            root = _Unpickler(file, archive, f"{folder}data/").load()
        _collect(root, "", tensors, seen=set())
    return tensors


class _Module(StandIn):
    """A module of the archive's program: attributes, nothing else."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.modules: dict[str, _Module] = {}

    def __setstate__(self, state: dict) -> None:
        demand((state,), (dict,), "a module")
        self.tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
        self.modules = {str(name): value for name, value in state.items() if isinstance(value, _Module)}


def _first(value: T, tag: str | None = None) -> T:
    return value


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: bool) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)  # the stored shape; RuntimeError beyond the storage


ALLOWED = {
    ("torch._utils", "_rebuild_tensor_v2"): Named(_tensor, Tensor, int, tuple, tuple),
    ("torch.jit._pickle", "restore_type_tag"): Named(_first),
    **{("torch.jit._pickle", f"build_{kind}list"): Named(_first) for kind in ("int", "tensor", "double", "bool")},
    ("collections", "OrderedDict"): Named(dict),
    **{("torch", name): Named(None) for name in DTYPES},
}


class _Unpickler(SafeUnpickler):
    """The attributes of an archive, with the storages that they name."""

    def __init__(self, file: BinaryIO, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file, ALLOWED)
        self.archive, self.folder = archive, folder
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Callable:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        return super().find_class(module, name)

    def persistent_load(self, pid: tuple) -> Tensor:
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


def _collect(module: _Module, prefix: str, tensors: dict[str, Tensor], seen: set[int]) -> None:
    demand((module,), (_Module,), "a tree")
    if id(module) in seen:
        raise pickle.UnpicklingError("no tree of modules")
    seen.add(id(module))
    tensors.update({f"{prefix}{name}": value for name, value in module.tensors.items()})
    for name, inner in module.modules.items():
        _collect(inner, f"{prefix}{name}.", tensors, seen)
