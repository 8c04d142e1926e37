"""Keras models in TensorFlow's SavedModel format, a folder or a zip of it: layers and weights, without TensorFlow.

Keras's description of the layers is JSON in `keras_metadata.pb`, their weights are a tensor bundle in `variables/`. The
program of the model, `saved_model.pb`, is not executed: of it only the constants are read that tables are filled with.
"""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from ldm_lab.checkpoints.released_zip import DAMAGE
from ldm_lab.checkpoints.tensor_bundle import TEXT, VALUES_ENDING, Bundle, Entry, values_name
from ldm_lab.checkpoints.wire import Malformed, message, varint
from ldm_lab.errors import UserError, first_line
from ldm_lab.io.json_files import JsonObject, parse_json

PROGRAM, LAYERS, INDEX = "saved_model.pb", "keras_metadata.pb", "variables/variables.index"
MODEL = ("_tf_keras_model", "_tf_keras_network", "_tf_keras_sequential")  # what Keras calls the whole
LARGEST = 64 << 20  # bytes of a file in it; LAION's largest has 4 MB
MOST_SHARDS = 100
WHOLE = 9  # TensorFlow's number of its type int64


class Options(JsonObject):
    """Keras's options of a layer, or the layer itself in its description."""


@dataclass(frozen=True)
class Layer:
    """A layer of a Keras model.

    Attributes:
        kind: Keras's name of its class, such as "Dense".
        name: its own.
        config: Keras's options of it.
        inputs: names of the layers whose outputs it takes; empty in a Sequential model.
        place: the beginning of its variables' names; "" if it has none.
    """

    kind: str
    name: str
    config: Options
    inputs: tuple[str, ...] = ()
    place: str = ""


@dataclass(frozen=True)
class SavedModel:
    """A Keras model. Its methods raise Malformed for damaged bytes, KeyError for what is not there.

    Attributes:
        layers: in Keras's order.
        bundle: its variables.
        program: the bytes of `saved_model.pb`.
    """

    layers: tuple[Layer, ...]
    bundle: Bundle
    program: bytes

    def variable(self, layer: Layer, name: str) -> Tensor:
        """Return a variable of a layer, of the shape that it has there."""
        return self.bundle.tensor(f"{layer.place}/{name}{VALUES_ENDING}")

    def variables(self) -> dict[str, Entry]:
        """Return what is known of the layers' variables, by the names of layer and variable: "dense.kernel"."""
        places = {layer.place: layer.name for layer in self.layers if layer.place}
        inner = [name.removesuffix(VALUES_ENDING) for name in self.bundle.entries if name.endswith(VALUES_ENDING)]
        return {
            f"{places[place]}.{variable}": self.bundle.entries[f"{place}/{variable}{VALUES_ENDING}"]
            for place, _, variable in (name.rpartition("/") for name in inner)
            if place in places
        }

    def table(self, *path: str) -> tuple[list[bytes], list[int]]:
        """Return keys and values of a table that is filled when the model is loaded.

        Args:
            path: names of attributes from the model to the table.
        """
        node = 0  # the model's place
        for name in (*path, "_initialize"):
            node = dict(_children(self._objects[node]))[name]
        (function,) = _texts(_only(self._objects[node], 6), 1)  # SavedObject.function, its concrete functions
        captured = [self._objects[number] for number in self._captured[function]]
        names = [name for node in captured for piece in _pieces(node, 9) for name in _texts(piece, 1)]  # .constant
        constants = [self._constants[name] for name in names]
        keys = next(tensor for kind, tensor in constants if kind == TEXT)
        values = next(tensor for kind, tensor in constants if kind == WHOLE)
        return [key for number, key in message(keys) if number == 8 and isinstance(key, bytes)], _whole_numbers(values)

    @cached_property
    def _graph(self) -> bytes:
        """The first MetaGraphDef."""
        return _only(self.program, 2)

    @cached_property
    def _objects(self) -> list[bytes]:
        """The SavedObjects, which name one another by their places."""
        return _pieces(_only(self._graph, 7), 1)

    @cached_property
    def _captured(self) -> dict[str, list[int]]:
        """Of each function the objects that it takes along."""
        found = {}
        for pair in _pieces(_only(self._graph, 7), 2):
            (name,) = _texts(pair, 1)
            found[name] = _packed(_only(pair, 2), 2)
        return found

    @cached_property
    def _constants(self) -> dict[str, tuple[int, bytes]]:
        """Type and TensorProto of the program's constants, by name."""
        found = {}
        for node in _pieces(_only(self._graph, 2), 1):
            if _texts(node, 2) == ["Const"]:
                attributes = {tuple(_texts(pair, 1)): _only(pair, 2) for pair in _pieces(node, 5)}
                tensor = _only(attributes[("value",)], 8)
                kinds = [value for number, value in message(tensor) if number == 1 and isinstance(value, int)]
                found[_texts(node, 1)[0]] = (kinds[0], tensor)
        return found


# --------------------------------------------------------------------------------------------------- opening


def is_saved_model(path: Path) -> bool:
    """Return whether a file is a SavedModel's program, or a zip with one in it."""
    if path.name == PROGRAM:
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return any(PurePosixPath(name).name == PROGRAM for name in archive.namelist())
    except (*DAMAGE, OSError):
        return False


def files_of(path: Path) -> list[Path]:
    """Return the files of the SavedModel that a program belongs to: what its weights and layers are in."""
    return [path.parent / LAYERS, *sorted(path.parent.glob("variables/variables.*"))]


def read_saved_model(path: Path) -> SavedModel:
    """Return the Keras model of a SavedModel: its program's path, or a zip's.

    Raises:
        UserError: damaged, larger than a head is, or saved without Keras's description of its layers.
    """
    try:
        if path.name == PROGRAM:
            return _read(path, _Folder(path.parent))
        with zipfile.ZipFile(path) as archive:
            return _read(path, _Zip(archive))
    except (Malformed, *DAMAGE) as error:
        if isinstance(error, UserError):
            raise
        reason = first_line(error)
        raise UserError(f"{path}: not a readable SavedModel of TensorFlow's, truncated or damaged ({reason})") from None


class _Folder:
    """A SavedModel's files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str) -> bytes | None:
        """Return a file's bytes; None if it is not there. Raises Malformed if it is too large."""
        path = self.folder / name
        if not path.is_file():
            return None
        if path.stat().st_size > LARGEST:
            raise Malformed(f"{name} is larger than {LARGEST:,} bytes, which no head is")
        return path.read_bytes()


class _Zip:
    """A SavedModel's files in a zip, all of them below one folder of it."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        programs = [name for name in archive.namelist() if PurePosixPath(name).name == PROGRAM]
        if len(programs) != 1:
            raise Malformed(f"{len(programs)} models in one zip")
        self.folder = programs[0].removesuffix(PROGRAM)

    def read(self, name: str) -> bytes | None:
        """Return a file's bytes; None if it is not there. zipfile compares its checksum. Raises Malformed."""
        try:
            info = self.archive.getinfo(self.folder + name)
        except KeyError:
            return None
        if info.file_size > LARGEST:
            raise Malformed(f"{name} is larger than {LARGEST:,} bytes, which no head is")
        return self.archive.read(info)


def _read(path: Path, files: "_Folder | _Zip") -> SavedModel:
    described, index = files.read(LAYERS), files.read(INDEX)
    if described is None:
        raise UserError(
            f"{path}: a SavedModel without {LAYERS}, so nobody knows its layers: it is an export for serving; "
            "save the model itself with Keras 2 (model.save of a folder)"
        )
    if index is None:
        raise UserError(f"{path}: a SavedModel without {INDEX}; the whole folder is needed")
    count = next(n for n in range(1, MOST_SHARDS + 1) if n == MOST_SHARDS or files.read(values_name(0, n)) is not None)
    values = [files.read(values_name(i, count)) for i in range(count)]
    if any(data is None for data in values):
        raise UserError(f"{path}: a SavedModel without {values_name(0, 1)}; the whole folder is needed")
    bundle = Bundle(index, [data for data in values if data is not None])
    return SavedModel(tuple(_layers(described)), bundle, files.read(PROGRAM) or b"")


def _layers(described: bytes) -> Iterator[Layer]:
    """Yield the layers of Keras's description: a SavedMetadata, whose first object is the model itself."""
    places, model = {}, None
    for node in _pieces(described, 1):
        path, kind, text = (_texts(node, number) for number in (3, 4, 5))
        content = parse_json("".join(text).encode())
        if kind[0] in MODEL and model is None:
            model = content
        elif isinstance(name := content.get("name"), str):
            places.setdefault(name, path[0].removeprefix("root.").replace(".", "/"))
    config = model.get("config") if model else None
    listed = config.get("layers") if isinstance(config, dict) else None
    if not isinstance(listed, list):
        raise Malformed("its description has no layers")
    for entry in listed:
        inner = entry.get("config") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not isinstance(inner, dict):
            raise Malformed("a layer without options")
        name = str(inner.get("name"))
        place = places.get(name, "")
        yield Layer(
            str(entry.get("class_name")),
            name,
            Options(inner),
            _inputs(Options(entry)),
            place if place.startswith("layer_with_weights") else "",
        )


def _inputs(entry: Options) -> tuple[str, ...]:
    """Return the names of the layers whose outputs a layer takes: [[[name, node, tensor, options], ...]]."""
    nodes = entry.get("inbound_nodes")
    if not isinstance(nodes, list):
        return ()
    calls = [call for node in nodes if isinstance(node, list) for call in node]
    return tuple(str(call[0]) for call in calls if isinstance(call, list) and call)


# ------------------------------------------------------------------------------------------------------- messages


def _pieces(data: bytes, field: int) -> list[bytes]:
    """Return all texts or messages of one field."""
    return [value for number, value in message(data) if number == field and isinstance(value, bytes)]


def _only(data: bytes, field: int) -> bytes:
    """Return the first of them. Raises Malformed if there is none."""
    found = _pieces(data, field)
    if not found:
        raise Malformed(f"a message without its field {field}")
    return found[0]


def _texts(data: bytes, field: int) -> list[str]:
    return [value.decode("utf-8", "replace") for value in _pieces(data, field)]


def _children(data: bytes) -> Iterator[tuple[str, int]]:
    """Yield the names and places of what an object refers to."""
    for child in _pieces(data, 1):
        numbers = [value for number, value in message(child) if number == 1 and isinstance(value, int)]
        yield _texts(child, 2)[0], numbers[0] if numbers else 0


def _packed(data: bytes, field: int) -> list[int]:
    """Return the whole numbers of a field, which are stored in a row or one by one."""
    found: list[int] = []
    for number, value in message(data):
        if number != field:
            continue
        if isinstance(value, int):
            found.append(value)
            continue
        place = 0
        while place < len(value):
            whole, place = varint(value, place)
            found.append(whole)
    return found


def _whole_numbers(tensor: bytes) -> list[int]:
    """Return the values of a TensorProto of int64: as bytes, or as numbers."""
    content = b"".join(_pieces(tensor, 4))
    return torch.frombuffer(bytearray(content), dtype=torch.int64).tolist() if content else _packed(tensor, 10)
