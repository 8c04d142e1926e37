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

from ldm_lab.checkpoints.files import FORMAT, damaged_safetensors, is_safetensors
from ldm_lab.checkpoints.folders import check_whole
from ldm_lab.checkpoints.lookalikes import check_is_weights
from ldm_lab.checkpoints.released_zip import is_release, unpacked
from ldm_lab.checkpoints.safe_pickle import load_arrays
from ldm_lab.checkpoints.saved_model import SavedModel, is_saved_model, read_saved_model
from ldm_lab.checkpoints.sharded import is_index, shards
from ldm_lab.checkpoints.tensor_bundle import kind_of
from ldm_lab.checkpoints.third_party import read_state_dict
from ldm_lab.checkpoints.torchscript import is_torchscript, read_torchscript
from ldm_lab.checkpoints.wrappers import Unwrapped, plain_names
from ldm_lab.errors import UserError
from ldm_lab.io.arrays import is_npy, native, open_npy
from ldm_lab.io.atomic import existing_file

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{"I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool},
}  # safetensors' names
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before its zips: the pickle of a magic number
ARRAY = ".npy"  # the name of the one tensor in a `.npy`, which no state dict has
LARGEST_ARRAY = 64 << 20  # bytes: a larger one is no head
MOST_REPEATED = 64 << 20  # bytes: a view that is so much larger than what it looks at is a trap
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
    keras: of a SavedModel the Keras model in it; None otherwise.
        yaml: the first mebibyte of the YAML beside it under the same name, or with it in a zip; None without.
        loaded: its tensors, if opening it has read them.
        handle: reads them otherwise.
        stored: of a safetensors file, the tensor's name -> the one in the file, where they differ.
        notes: what was chosen or assumed as it was opened, for people.
        shards: of an index, the files that it names.
    container: what it is apart from its tensors, where that is worth saying; "" otherwise.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, object] = field(default_factory=dict)
    pickled: object = None
    keras: SavedModel | None = None
    yaml: bytes | None = None
    loaded: Mapping[str, Tensor] | None = None
    handle: safe_open | None = None
    stored: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    shards: tuple["OpenedFile", ...] = ()
    container: str = ""

    def read(self) -> dict[str, Tensor]:
        """Return all tensors, on the CPU. Raises UserError for a damaged file."""
        if self.shards:
            return {name: value for shard in self.shards for name, value in shard.read().items()}
        if self.handle is None:
            return dict(self.loaded or {})
        try:
            return {name: self.handle.get_tensor(self.stored.get(name, name)) for name in self.tensors}
        except (SafetensorError, ValueError, OSError) as error:
            raise damaged_safetensors(self.path, error) from None


def open_weights(path: Path) -> OpenedFile:
    """Open a file of weights. Of a safetensors file only the header is read.

    Raises:
        UserError: missing or damaged file, one that is no file of weights, one whose loading could run code.
    """
    path = existing_file(path, "weights")
    if is_index(path):
        return _open_shards(path)
    if is_saved_model(path):
        model = read_saved_model(path)
        variables = {name: TensorInfo(entry.shape, kind_of(entry)) for name, entry in model.variables().items()}
        return OpenedFile(path, variables, keras=model)
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
    check_is_weights(path)
    check_whole(path)
    yaml = _yaml_beside(path)
    if is_safetensors(path):
        return _open_safetensors(path, yaml)
    if is_torchscript(path):
        file = _of_tensors(path, Unwrapped(read_torchscript(path), {}), yaml)
        return replace(file, container="in a TorchScript archive, whose program is not run")
    if is_npy(path):
        return _of_tensors(path, Unwrapped({ARRAY: _read_array(path)}, {}), None)
    if _is_plain_pickle(path):
        pickled = load_arrays(path)
        return OpenedFile(path, {}, pickled=pickled)
    return _of_tensors(path, read_state_dict(path, "weights"), yaml)


def _of_tensors(path: Path, found: Unwrapped, yaml: bytes | None) -> OpenedFile:
    """Return a file whose tensors have been read, under their plain names."""
    names, notes = ({name: name for name in found.tensors}, ()) if FORMAT in found.rest else plain_names(found.tensors)
    tensors = {name: found.tensors[stored] for name, stored in names.items()}
    for name, value in tensors.items():
        if value.is_meta or value.is_quantized or value.layout != torch.strided or value.is_complex():
            kind = "without its values" if value.is_meta else "quantized, sparse or complex, which no network here has"
            raise UserError(f"{path}: not supported: {name} is {kind}")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes() + MOST_REPEATED:
            size = "x".join(map(str, value.shape))
            raise UserError(f"{path}: damaged: {name} is said to be {size}, and the file has fewer numbers than that")
    notes = (*found.notes, *notes, *_rounded(infos(tensors)))
    return OpenedFile(path, infos(tensors), extra=found.rest, yaml=yaml, loaded=tensors, notes=notes)


def _read_array(path: Path) -> Tensor:
    """Return the array in a `.npy`. Raises UserError for one of other things than numbers, or one that is too large."""
    array = open_npy(path)
    if array.nbytes > LARGEST_ARRAY:
        raise UserError(f"{path}: no weights: an array of {' x '.join(map(str, array.shape))}, such as embeddings")
    if array.dtype.kind not in "fiub":
        raise UserError(f"{path}: no weights: an array of {array.dtype}, which are no numbers")
    return torch.from_numpy(native(array))  # the array's shape


def _open_shards(path: Path) -> OpenedFile:
    """Open all files of an index. Raises UserError for a tensor that is not where the index says."""
    opened, tensors = [], {}
    for file, names in shards(path).items():
        shard = _open(file)
        lost = sorted({*names} - {*shard.stored.values(), *shard.tensors})
        if lost:
            raise UserError(f"{path}: {lost[0]} is not in {file.name}, where it should be")
        opened.append(shard)
        tensors |= shard.tensors
    notes = tuple(dict.fromkeys(note for shard in opened for note in shard.notes))
    return OpenedFile(path, tensors, notes=notes, shards=tuple(opened))


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
        metadata = handle.metadata() or {}
        if metadata.get("format") == FORMAT:  # ours has the names that it is to have
            return OpenedFile(path, tensors, metadata, yaml=yaml, handle=handle)
        names, notes = plain_names(tensors)
        plain = {name: tensors[stored] for name, stored in names.items()}
        notes = (*notes, *_rounded(plain))
        return OpenedFile(path, plain, metadata, yaml=yaml, handle=handle, stored=names, notes=notes)
    except (SafetensorError, ValueError, OSError) as error:
        raise damaged_safetensors(path, error) from None


def below_attribute(file: OpenedFile) -> OpenedFile | None:
    """Return a file with the names of its tensors as below the one attribute that they all have first, such as "net".

    None if there is no such attribute, or the tensors are in several files.
    """
    tops = {name.partition(".")[0] for name in file.tensors}
    if len(tops) != 1 or file.shards or not all("." in name for name in file.tensors):
        return None
    prefix = f"{tops.pop()}."
    names = {name.removeprefix(prefix): name for name in file.tensors}
    return replace(
        file,
        tensors={short: file.tensors[name] for short, name in names.items()},
        loaded=file.loaded and {short: file.loaded[name] for short, name in names.items()},
        stored={short: file.stored.get(name, name) for short, name in names.items()},
        notes=(*file.notes, f"{prefix!r}, which all names in it begin with, is left out"),
    )


def infos(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """Return shapes and types of tensors."""
    return {
        name: TensorInfo(tuple(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in tensors.items()
    }


def _rounded(tensors: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Return what to say of weights in 8 bits: nothing brings back what was rounded off."""
    kinds = sorted({info.dtype for info in tensors.values() if info.dtype.startswith("float8")})
    return (f"weights in {kinds[0]}: they were rounded to 8 bits, and are read as they are",) if kinds else ()


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
