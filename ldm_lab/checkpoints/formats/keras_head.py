"""Importer of heads that Keras saved: LAION's NSFW detectors, `clip_autokeras_*.zip`, and MLPs like them.

The file says all of the function: AutoKeras's tables, the standardization, layers, activations. Whose embeddings it
takes it does not say; for the released ones the catalogue does.
"""

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ldm_lab.checkpoints.formats.heads import known, released_by_widths
from ldm_lab.checkpoints.importer import Importer, LoadedPart, Section, register_importer
from ldm_lab.checkpoints.opened import OpenedFile
from ldm_lab.checkpoints.saved_model import Layer, SavedModel
from ldm_lab.checkpoints.wire import Malformed
from ldm_lab.errors import UserError

ENCODING = "MultiCategoryEncoding"  # AutoKeras's tables
KINDS = ("InputLayer", "CastToFloat32", ENCODING, "Normalization", "Dense", "ReLU", "Activation", "Dropout")
SIMPLE_RELU = {"max_value": None, "negative_slope": 0.0, "threshold": 0.0}
DAMAGE = (Malformed, LookupError, StopIteration, ValueError, TypeError, AttributeError)


@register_importer
class KerasHead(Importer):
    """A Keras model of dense layers with one output."""

    kind = "keras_head"
    title = "an MLP head of Keras's"
    parts = {"head": "standardized_mlp"}
    folder_files = ("saved_model.pb",)

    def matches(self, file: OpenedFile) -> bool:
        """Return whether it is a Keras model whose layers are all such as a head has."""
        return file.keras is not None and all(kind_of(layer) in KINDS for layer in file.keras.layers)

    def config(self, file: OpenedFile) -> Section:
        """Return the options that the layers tell."""
        return Section({"head": self.read(file, "head").config})

    def read(self, file: OpenedFile, role: str) -> LoadedPart:
        """Return the head's weights and options, and what the catalogue knows of the file."""
        state, options = head(file.keras, file.path)
        whose = known(file.path) or released_by_widths(options["widths"], file.path)
        return LoadedPart(state, Section({"name": self.parts["head"], **options, **whose}))


def kind_of(layer: Layer) -> str:
    """Return a layer's class without the package that registered it: "Custom>MultiCategoryEncoding"."""
    return layer.kind.rpartition(">")[2]


def head(model: SavedModel, path: Path) -> tuple[dict[str, Tensor], Section]:
    """Return the tensors and the options of `StandardizedMLP`.

    Raises:
        UserError: other layers, in another order, or damaged ones.
    """
    layers = [layer for layer in model.layers if kind_of(layer) not in ("InputLayer", "CastToFloat32")]
    for before, layer in pairwise(model.layers):
        if layer.inputs and layer.inputs != (before.name,):
            raise UserError(f"{path}: not supported: its layers are no chain: {layer.name} takes others' outputs")
    try:
        tables = _tables(model, layers[0]) if kind_of(layers[0]) == ENCODING else {}
        layers = layers[1:] if kind_of(layers[0]) == ENCODING else layers
        standardized = kind_of(layers[0]) == "Normalization"
        state, options = _dense(model, layers[1:] if standardized else layers, path)
        width = options["widths"][0]
        statistics = _statistics(model, layers[0], path) if standardized else (torch.zeros(width), torch.ones(width))
    except DAMAGE as error:
        if isinstance(error, UserError):
            raise
        reason = f"{type(error).__name__}: {error}"[:200]
        raise UserError(f"{path}: not a head that can be read, damaged or of another program ({reason})") from None
    if tables:
        options.update(table_columns=list(tables), table_sizes=[len(keys) for keys, _ in tables.values()])
    keys = [key for keys, _ in tables.values() for key in keys]
    values = [value for _, values in tables.values() for value in values]
    mean, variance = (statistic.float().reshape(-1) for statistic in statistics)  # [D] each
    state |= {"mean": mean, "variance": variance}
    state |= {"table_keys": torch.tensor(keys, dtype=torch.int64), "table_values": torch.tensor(values).float()}  # [K]
    return state, options


def _tables(model: SavedModel, layer: Layer) -> dict[int, tuple[list[int], list[int]]]:
    """Return the tables of AutoKeras's encoding: column -> (keys, values)."""
    found = {}
    encodings = layer.config.get("encoding")
    for column, encoding in enumerate(encodings if isinstance(encodings, list) else []):
        if encoding == "none":
            continue
        if encoding != "int":
            raise Malformed(f"a column that is encoded as {encoding!r}")
        keys, values = model.table(*layer.place.split("/"), "encoding_layers", str(column), "lookup_table")
        if len(keys) != len(values):
            raise Malformed(f"a table of {len(keys)} keys and {len(values)} values")
        found[column] = ([text_key(key.decode()) for key in keys], values)
    return found


def _statistics(model: SavedModel, layer: Layer, path: Path) -> tuple[Tensor, Tensor]:
    """Return mean and variance of Keras's Normalization."""
    axis = layer.config.get("axis")
    axis = axis.get("items") if isinstance(axis, dict) else axis  # so JSON has a tuple
    if layer.config.get("invert") or axis not in (-1, 1, [-1], [1]):
        raise UserError(f"{path}: not supported: {layer.name} standardizes in another way than column by column")
    return model.variable(layer, "mean"), model.variable(layer, "variance")


def _dense(model: SavedModel, layers: list[Layer], path: Path) -> tuple[dict[str, Tensor], Section]:
    """Return the tensors and options that dense layers, activations and dropout are of an `MLP`."""
    weights: list[Tensor] = []
    state, acts, shares, output = {}, [], [], "number"
    for layer in layers:
        kind = kind_of(layer)
        if kind == "Dense":
            if acts and output == "probability":
                raise UserError(f"{path}: not supported: a sigmoid before the layer {layer.name}")
            kernel = model.variable(layer, "kernel").float()  # [in, out]
            bias = model.variable(layer, "bias").float() if layer.config.get("use_bias", True) else None
            state[f"layers.{len(weights)}.weight"] = kernel.T.contiguous()  # [out, in]
            state[f"layers.{len(weights)}.bias"] = torch.zeros(kernel.shape[1]) if bias is None else bias  # [out]
            weights.append(kernel)
            acts.append(False)
            shares.append(0.0)
        elif not weights:
            raise UserError(f"{path}: not supported: {layer.name} ({kind}) before the first dense layer")
        act = _activation(layer, kind, path)
        if act == "relu":
            acts[-1] = True
        if act == "sigmoid":
            output = "probability"
        if kind == "Dropout":
            shares[-1] = float(layer.config["rate"])
    widths = [weights[0].shape[0], *(kernel.shape[1] for kernel in weights)]
    if widths[-1] != 1 or acts[-1]:
        what = "ends in a ReLU" if acts[-1] else f"puts out {widths[-1]} numbers"
        raise UserError(f"{path}: not a head with one score: it {what}")
    bare = [i for i, act in enumerate(acts[:-1]) if not act]
    options = Section(widths=widths, activation="relu" if any(acts) else "none", output=output)
    if any(acts) and bare:
        options["bare"] = bare
    while shares and not shares[-1]:
        shares.pop()
    if shares:
        options["dropout"] = shares
    return state, options


def _activation(layer: Layer, kind: str, path: Path) -> str:
    """Return "relu", "sigmoid" or "linear", what a layer does to its numbers. Raises UserError for others."""
    if kind == "Dropout":
        return "linear"
    if kind == "ReLU":
        simple = all(layer.config.get(key, value) == value for key, value in SIMPLE_RELU.items())
        return "relu" if simple else _refuse(layer, "a ReLU with a bound or a slope", path)
    name = layer.config.get("activation", "linear")
    return name if name in ("relu", "sigmoid", "linear") else _refuse(layer, f"the activation {name!r}", path)


def _refuse(layer: Layer, what: str, path: Path) -> str:
    raise UserError(f"{path}: not supported: {what} in {layer.name}")


def text_key(text: str) -> int:
    """Return the key in `StandardizedMLP`'s tables of a text that "%f" gave. Raises ValueError for another one.

    Twice the number of millionths, and one more for a minus.
    """
    whole, point, rest = text.removeprefix("-").partition(".")
    if not point or len(rest) != 6 or not (whole + rest).isdecimal() or not text.isascii():
        raise ValueError(f"{text[:40]!r} is no number with six digits behind the point")
    return 2 * int(whole + rest) + text.startswith("-")
