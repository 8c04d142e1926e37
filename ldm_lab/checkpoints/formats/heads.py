"""Importers of heads on CLIP embeddings: LAION's aesthetic predictors, linear and improved (an MLP), its NSFW heads.

Their files are state dicts of 3 kB (linear: `weight` [1, D], `bias` [1]) and 3.7 MB (`layers.N.weight`, `layers.N.bias`
of an nn.Sequential; others have another name before the number, or none). What lies between two linear layers is not in
a file, but how much of it is: nothing where the numbers follow on one another, an activation, dropout or both where one
or two numbers are left out. They do not say whose embeddings they take; for the released ones the catalogue does, by
the checksum of the file, or by its name.

LAION's port of its NSFW detectors to PyTorch has attributes for layers (`norm.mean`, `norm.variance`,
`linear_1.weight`, ...), of what Keras saved (`formats/keras_head.py`); its violence detectors are the embeddings of two
prompts, [2, D], in a `.npy`.
"""

import re
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ldm_lab.checkpoints.importer import Importer, LoadedPart, Section, register_importer, say_once
from ldm_lab.checkpoints.opened import ARRAY, OpenedFile, Shapes
from ldm_lab.errors import UserError
from ldm_lab.io.atomic import sha256
from ldm_lab.pretrained.catalogue import catalogue

LAYER = re.compile(r"(?:(\w+)\.)?(\d{1,4})\.(weight|bias)")
LARGEST_GAP = 3  # from one linear layer's place to the next one's: an activation and dropout are between them
# The indices of the linear layers in the two published variants of the improved predictor: dropout alone between
# them (linearMSE), or ReLU and dropout (reluMSE).
ACTIVATIONS = {(0, 2, 4, 6, 7): "none", (0, 3, 6, 9, 11): "relu"}
ATTRIBUTE = re.compile(r"([a-z]+_?)(\d{1,3})\.(weight|bias)")
MEAN, VARIANCE = "norm.mean", "norm.variance"
BY_WIDTHS = {(768, 64, 512, 256, 1): "nsfw/vit_l_14", (512, 32, 32, 1): "nsfw/vit_b_32"}
DROPOUT = (0.2, 0.2, 0.1)  # of the improved predictor, behind its first three layers; idle when it predicts


class _Head(Importer):
    """A released head."""

    def config(self, file: OpenedFile) -> Section:
        """Return what the file tells; nothing of layers that are no head."""
        try:
            return Section(head=self.read(file, "head").config)
        except UserError:
            return Section()

    def read(self, file: OpenedFile, role: str) -> LoadedPart:
        """Return the head with the options that follow from its shapes, and what the catalogue knows of the file."""
        state, options = head(file.read(), file.path)
        return LoadedPart(state, Section({"name": self.kind, **options, **known(file.path)}))


@register_importer
class LinearHead(_Head):
    """One row of weights and a bias."""

    kind = "linear"
    title = "a linear head on embeddings"
    parts = {"head": "linear"}

    def matches(self, file: OpenedFile) -> bool:
        """Return whether the tensors are those of a linear head."""
        return is_linear(file.tensors)


@register_importer
class MLPHead(_Head):
    """Several layers."""

    kind = "mlp"
    title = "an MLP head on embeddings"
    parts = {"head": "mlp"}

    def matches(self, file: OpenedFile) -> bool:
        """Return whether the tensors are those of an MLP head."""
        return is_mlp(file.tensors)


@register_importer
class StandardizedHead(_Head):
    """LAION's port of its NSFW detectors: a standardization, and dense layers in attributes with numbers."""

    kind = "standardized_mlp"
    title = "an MLP head on standardized embeddings"
    parts = {"head": "standardized_mlp"}

    def matches(self, file: OpenedFile) -> bool:
        """Return whether the tensors are a mean, a variance, and layers."""
        rest = [name for name in file.tensors if name not in (MEAN, VARIANCE)]
        matches = [ATTRIBUTE.fullmatch(name) for name in rest]
        named = {match[1] for match in matches if match}
        return {MEAN, VARIANCE} <= set(file.tensors) and bool(rest) and all(matches) and len(named) == 1

    def read(self, file: OpenedFile, role: str) -> LoadedPart:
        """Return the head. In the released ones a ReLU is between the layers, and a sigmoid at the end."""
        tensors = file.read()
        dense = {name: value for name, value in tensors.items() if name not in (MEAN, VARIANCE)}
        numbers = sorted({int(ATTRIBUTE.fullmatch(name)[2]) for name in dense})
        prefix = ATTRIBUTE.fullmatch(next(iter(dense)))[1]
        layers = {
            f"layers.{i}.{kind}": tensors[f"{prefix}{number}.{kind}"]
            for i, number in enumerate(numbers)
            for kind in ("weight", "bias")
            if f"{prefix}{number}.{kind}" in tensors
        }
        state, options = head(layers, file.path)
        options.pop("bare", None)  # the numbers are those of attributes, and say nothing of what is between them
        whose = released_by_widths(options["widths"], file.path)
        if whose:
            options.update(activation="relu", output="probability")
        state |= {"mean": tensors[MEAN].reshape(-1), "variance": tensors[VARIANCE].reshape(-1)}  # [D] each
        state |= {"table_keys": torch.zeros(0, dtype=torch.int64), "table_values": torch.zeros(0)}  # [0] each
        return LoadedPart(state, Section({"name": self.kind, **options, **(known(file.path) or whose)}))


@register_importer
class PromptPair(_Head):
    """Embeddings of two prompts, [2, D], in a `.npy`: an image is of the kind of the second if that is nearer to it.

    clip-retrieval, which LAION's violence detectors were made for, takes the larger one of the two products. So the
    difference is a linear head, above 0 for violence.
    """

    kind = "prompt_pair"
    title = "the embeddings of two prompts, as LAION's violence detectors"
    parts = {"head": "linear"}

    def matches(self, file: OpenedFile) -> bool:
        """Return whether it is an array of two rows."""
        array = file.tensors.get(ARRAY)
        return array is not None and len(array.shape) == 2 and array.shape[0] == 2 and "float" in array.dtype

    def read(self, file: OpenedFile, role: str) -> LoadedPart:
        """Return the linear head."""
        first, second = file.read()[ARRAY].double()  # [D] each
        state = {"weight": (second - first)[None].float(), "bias": first.new_zeros(1).float()}  # [1, D], [1]
        return LoadedPart(state, Section(name="linear", embed_dim=len(first), **known(file.path)))


@register_importer
class WatermarkDetector(Importer):
    """LAION's watermark detector (LAION-5B-WatermarkDetection): an EfficientNet-B3 of pixels with three layers."""

    kind = "watermark_detector"
    title = "LAION's watermark detector, which looks at pixels"
    used_by = "no program here: its results are in the column pwatermark of LAION's tables, and nothing"

    def matches(self, file: OpenedFile) -> bool:
        """Return whether the tensors are those of EfficientNet-B3 with the detector's layers behind it."""
        last = file.tensors.get("classifier.5.weight")
        return last is not None and last.shape[0] == 2 and "conv_stem.weight" in file.tensors


def is_linear(tensors: Shapes) -> bool:
    """Return whether tensors are those of a linear head: one row of weights and a bias."""
    return set(tensors) == {"weight", "bias"} and len(tensors["weight"].shape) == 2 and tensors["weight"].shape[0] == 1


def is_mlp(tensors: Shapes) -> bool:
    """Return whether tensors are those of linear layers in an nn.Sequential, under its name or bare."""
    matches = [LAYER.fullmatch(name) for name in tensors]
    names = {match[1] for match in matches if match}
    if not tensors or not all(matches) or len(names) != 1:
        return False
    flat = all(len(value.shape) == (2 if name.endswith("weight") else 1) for name, value in tensors.items())
    return names == {"layers"} or flat


def head(state: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], Section]:
    """Return a head's tensors, an MLP's layers numbered without gaps, and the options that follow from the shapes.

    Raises:
        UserError: not a whole head with one score.
    """
    if is_linear(state):
        return state, Section(embed_dim=state["weight"].shape[1])
    layers = {f"layers.{match[2]}.{match[3]}": state[name] for name in state if (match := LAYER.fullmatch(name))}
    state = layers if len(layers) == len(state) else state
    indices = tuple(sorted({int(name.split(".")[1]) for name in layers}))
    missing = [
        f"layers.{i}.{kind}" for i in indices for kind in ("weight", "bias") if f"layers.{i}.{kind}" not in state
    ]
    if missing:
        raise UserError(f"{path}: not a whole MLP head: {missing[0]} is missing")
    weights = [state[f"layers.{i}.weight"] for i in indices]
    if any(w.ndim != 2 for w in weights) or any(a.shape[0] != b.shape[1] for a, b in pairwise(weights)):
        raise UserError(f"{path}: not an MLP head: its layers do not follow on one another")
    if weights[-1].shape[0] != 1:
        raise UserError(f"{path}: not a head with one score: it puts out {weights[-1].shape[0]} numbers")
    options = Section(widths=[weights[0].shape[1], *(w.shape[0] for w in weights)])
    options |= between(indices, path)
    kinds = ("weight", "bias")
    return {f"layers.{n}.{kind}": state[f"layers.{i}.{kind}"] for n, i in enumerate(indices) for kind in kinds}, options


def between(indices: tuple[int, ...], path: Path) -> Section:
    """Return the options of `MLP` that follow from the places of the linear layers.

    Raises:
        UserError: places between which more must be than an `MLP` has.
    """
    if indices in ACTIVATIONS:
        return Section(activation=ACTIVATIONS[indices], dropout=list(DROPOUT))
    gaps = [b - a for a, b in pairwise(indices)]
    if indices[0] or any(gap > LARGEST_GAP for gap in gaps):
        where = f"{'before the first of' if indices[0] else 'between'} its layers {indices}"
        raise UserError(f"{path}: not supported: what is {where} is more than activation and dropout")
    bare = [i for i, gap in enumerate(gaps) if gap == 1]
    return Section(bare=bare) if bare else Section()


def known(path: Path) -> Section:
    """Return what is known of a released head beside its file: `embedder` and `column`; nothing of another file."""
    checksum = sha256(path)
    heads = [entry for entry in catalogue().values() if entry.role == "head"]
    return Section(next((e.config for e in heads if checksum == e.sha256 or path.name == e.file), {}))


def released_by_widths(widths: list[int], path: Path) -> Section:
    """Return what is known of a released NSFW detector that came in another file, by its sizes; that is said."""
    name = BY_WIDTHS.get(tuple(widths))
    if name is None:
        return Section()
    say_once(f"{path}: has the sizes of LAION's {name}, and is taken for it")
    return Section(catalogue()[name].config)
