"""The restricted unpickler: what a pickle may build beside plain values is answered by functions of ours, by name.

A pickle is a program. Nothing that one names is imported or called, not even numpy's own functions: a name that is not
in the format's list ends the reading.
"""

import contextlib
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import BinaryIO, TypeVar

import numpy as np
from torch import Tensor

from ldm_lab.errors import UserError, first_line
from ldm_lab.io.atomic import existing_file

T = TypeVar("T")
Kind = type | UnionType
# What the unpickler, and what stands for the names, raise on malformed bytes.
DAMAGE = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, AssertionError, OSError, RuntimeError),
    *(ValueError, TypeError, LookupError, AttributeError),
)


class Refused(Exception):
    """A pickle asks for a name that its format does not need."""


def demand(values: Iterable, kinds: Sequence[Kind], what: str) -> None:
    """Raise UnpicklingError unless the first values, as many as there are kinds, are of these."""
    if len(values := tuple(values)) < len(kinds) or not all(map(isinstance, values, kinds)):
        raise pickle.UnpicklingError(f"{what} of other things than {', '.join(map(str, kinds))}")


class Named:
    """What answers a name: it is called with what the pickle has; without a function it only stands as an argument."""

    __slots__ = ("kinds", "make")

    def __init__(self, make: Callable | None, *kinds: Kind) -> None:
        """Answer by a function, whose first arguments have to be of these kinds."""
        self.make, self.kinds = make, kinds

    def __call__(self, *args: object) -> object:
        if self.make is None:
            raise pickle.UnpicklingError("a type called, which only stands as an argument")
        demand(args, self.kinds, "a call")
        return self.make(*args)


class StandIn:
    """What a pickle builds in place of an object, and may set the state of; a subclass says what it keeps."""

    def __setstate__(self, state: tuple) -> None:
        raise NotImplementedError


Allowed = Mapping[tuple[str, str], Named]  # (module, name) -> what answers


class SafeUnpickler(pickle._Unpickler):
    """Python's own unpickler, the one written in Python: the one in C allocates whatever memo size a file names."""

    def __init__(self, file: BinaryIO, allowed: Allowed) -> None:
        super().__init__(file)
        self.allowed = allowed

    def find_class(self, module: str, name: str) -> Callable:
        if (module, name) not in self.allowed:
            raise Refused(f"{module}.{name}")
        return self.allowed[module, name]

    def persistent_load(self, pid: tuple) -> Tensor:
        raise Refused("a persistent id")

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], StandIn):  # a tensor would take one, too
            raise pickle.UnpicklingError("state for something that has none")
        super().load_build()

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}


@contextlib.contextmanager
def one_line_errors(path: Path, what: str, needs: str) -> Iterator[None]:
    """Turn whatever is raised while a pickle is read into a UserError.

    Args:
        path: the file.
        what: what it should be, such as "pickle".
        needs: what such a file has in it, such as "a file of parameters needs only arrays".
    """
    try:
        yield
    except Refused as error:
        raise UserError(f"{path}: refused: it asks for {error}, and {needs}") from None
    except (RecursionError, MemoryError, OverflowError):
        raise UserError(f"{path}: not a readable {what}: its sizes are absurd") from None
    except DAMAGE as error:
        raise UserError(f"{path}: not a readable {what}, truncated or damaged ({first_line(error)})") from None


# ------------------------------------------------------------------------------------------------ pickles of arrays


class _DType(StandIn):
    """A numpy.dtype: `dtype(code, align, copy)`, then its state, of which the byte order matters."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if not re.fullmatch(r"[fiub]\d{1,2}", code):
            raise pickle.UnpicklingError(f"an array of {code!r}, which is no plain number type")
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"a byte order {state[1]!r}")
        self.order = state[1]

    def numpy(self) -> np.dtype:
        return np.dtype(self.order + self.code)


BYTES = bytes | bytearray


class _Array(StandIn):
    """A numpy.ndarray: made empty, then given its state (version, shape, dtype, is_fortran, bytes)."""

    def __init__(self) -> None:
        self.values: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, data = state
        demand((shape, dtype, data), (tuple, _DType, BYTES), "an array")
        self.values = _from_bytes(data, dtype, shape, "F" if is_fortran else "C")


def _from_bytes(data: bytes, dtype: _DType, shape: tuple[int, ...], order: str) -> np.ndarray:
    if order not in ("C", "F"):
        raise pickle.UnpicklingError(f"an array order {order!r}")
    return np.frombuffer(data, dtype.numpy()).reshape(shape, order=order)


def _frombuffer(
    data: bytes, dtype: _DType, shape: tuple[int, ...], order: str, axes: tuple[int, ...] | None = None
) -> np.ndarray:
    if order == "K" and axes is not None:  # numpy 2.3 and later, for arrays whose axes are in another order in memory
        return _from_bytes(data, dtype, shape, "C").transpose(axes)
    return _from_bytes(data, dtype, shape, order)


def _reconstruct(kind: Named, shape: tuple, code: bytes) -> _Array:
    return _Array()  # numpy makes an empty one, too


def _scalar(dtype: _DType, data: bytes) -> float:
    return _from_bytes(data, dtype, (), "C").item()


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError("bytes in an unknown encoding")
    return text.encode("latin1")


def _same(mapping: T) -> T:
    return mapping


def _jax_array(make: Named, args: tuple, state: tuple, *weak_type: bool) -> _Array:
    array = _Array()
    array.__setstate__(state)
    return array


# Who writes what: numpy 1 and 2 differ in the module; `_codecs.encode` is protocol 2 or lower, `_frombuffer` protocol
# 5; FlatMapping is haiku before 0.0.6, the last two are jax from May 2022 on.
ARRAYS: Allowed = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): Named(_reconstruct) for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): Named(_scalar, _DType, BYTES) for core in ("core", "_core")},
    **{
        (f"numpy.{core}.numeric", "_frombuffer"): Named(_frombuffer, BYTES, _DType, tuple, str)
        for core in ("core", "_core")
    },
    ("numpy", "ndarray"): Named(None),
    ("numpy", "dtype"): Named(_DType, str),
    ("_codecs", "encode"): Named(_encode, str, str),
    ("haiku._src.data_structures", "FlatMapping"): Named(_same, dict),
    ("jax._src.device_array", "reconstruct_device_array"): Named(_jax_array, Named, tuple, tuple),
    ("jax._src.array", "_reconstruct_array"): Named(_jax_array, Named, tuple, tuple),
}


def load_arrays(path: str | Path) -> object:
    """Return what a pickle holds: dicts, lists, tuples, numbers, strings and numpy arrays.

    Raises:
        UserError: missing, truncated or damaged file, or one that asks for anything else.
    """
    path = existing_file(path, "pickle")
    with one_line_errors(path, "pickle", "a file of parameters needs only arrays"), open(path, "rb") as file:
        return _unwrap(SafeUnpickler(file, ARRAYS).load())


def _unwrap(value: object) -> object:
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
