"""Files of weights, opened once: of any container the names and shapes in it, and its tensors when they are asked for.

Nothing of a file is executed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm_lab.checkpoints.files import damaged_safetensors, is_safetensors
from ldm_lab.checkpoints.released_zip import is_release, unpacked
from ldm_lab.checkpoints.safe_pickle import load_arrays
from ldm_lab.checkpoints.third_party import read_state_dict
from ldm_lab.checkpoints.torchscript import is_torchscript, read_torchscript
from ldm_lab.errors import UserError
from ldm_lab.io.atomic import existing_file

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64},
    **{"I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool},
}  # safetensors' names
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before its zips: the pickle of a magic number
LARGEST_TEXT = 1 << 20  # bytes of a YAML beside weights


class Shaped(Protocol):
    """A tensor, or what is known of one that has not been read."""

    @property
    def shape(self) -> Sequence[int]: ...


Shapes = Mapping[str, Shaped]  # the tensors of a file, or of a network, by name


@dataclass(frozen=True)
class TensorInfo:
    """Shape and type of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class OpenedFile:
    """A file of weights.

    Attributes:
        path: what the user sees; of a folder the file in it with the weights, of a released zip the zip.
        tensors: of all that it holds.
        metadata: text beside the tensors of a safetensors file.
        extra: what else a pickled checkpoint holds, by name.
        pickled: what a pickle holds that is no checkpoint: containers, numbers, strings and arrays; None otherwise.
        yaml: the first mebibyte of the YAML beside it under the same name, or with it in a zip; None without.
        loaded: its tensors, if opening it has read them.
        handle: reads them otherwise.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, object] = field(default_factory=dict)
    pickled: object = None
    yaml: bytes | None = None
    loaded: Mapping[str, Tensor] | None = None
    handle: safe_open | None = None

    def read(self) -> dict[str, Tensor]:
        """Return all tensors, on the CPU. Raises UserError for a damaged file."""
        if self.handle is None:
            return dict(self.loaded or {})
        try:
            return {name: self.handle.get_tensor(name) for name in self.tensors}
        except (SafetensorError, ValueError, OSError) as error:
            raise damaged_safetensors(self.path, error) from None


def open_weights(path: Path) -> OpenedFile:
    """Open a file of weights. Of a safetensors file only the header is read.

    Raises:
        UserError: missing or damaged file, one that is no file of weights, one whose loading could run code.
    """
    path = existing_file(path, "weights")
    if is_release(path):
        with unpacked(path) as weights:
            try:
                inside = _open(weights)
                # The file goes away. What is mapped from one stays readable; a handle is used up here.
                tensors = inside.read()
            except UserError as error:
                raise UserError(str(error).replace(str(weights), str(path))) from None
        return replace(inside, path=path, loaded=tensors, handle=None)
    return _open(path)


def _open(path: Path) -> OpenedFile:
    """Open a file that is no released zip."""
    yaml = _yaml_beside(path)
    if is_safetensors(path):
        return _open_safetensors(path, yaml)
    if is_torchscript(path):
        tensors = read_torchscript(path)
        return OpenedFile(path, infos(tensors), yaml=yaml, loaded=tensors)
    if _is_plain_pickle(path):
        pickled = load_arrays(path)
        return OpenedFile(path, {}, pickled=pickled)
    tensors, extra = read_state_dict(path, "weights")
    return OpenedFile(path, infos(tensors), extra=extra, yaml=yaml, loaded=tensors)


def _open_safetensors(path: Path, yaml: bytes | None) -> OpenedFile:
    """Read the header, which the library compares with the file's size."""
    tensors = {}
    try:
        handle = safe_open(path, framework="pt")
        for name in handle.keys():  # noqa: SIM118
            entry = handle.get_slice(name)
            dtype = DTYPES.get(entry.get_dtype())
            kind = str(dtype).removeprefix("torch.") if dtype else entry.get_dtype()
            tensors[name] = TensorInfo(tuple(entry.get_shape()), kind)
        return OpenedFile(path, tensors, handle.metadata() or {}, yaml=yaml, handle=handle)
    except (SafetensorError, ValueError, OSError) as error:
        raise damaged_safetensors(path, error) from None


def infos(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """Return shapes and types of tensors."""
    return {
        name: TensorInfo(tuple(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in tensors.items()
    }


def _yaml_beside(path: Path) -> bytes | None:
    try:
        with open(path.with_suffix(".yaml"), "rb") as file:
            return file.read(LARGEST_TEXT + 1)
    except OSError:
        return None


def _is_plain_pickle(path: Path) -> bool:
    """Return whether a file begins as a pickle does that is not torch's: the opcode of a protocol from 2 on."""
    with open(path, "rb") as file:
        head = file.read(len(LEGACY))
    return head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5") and head != LEGACY
