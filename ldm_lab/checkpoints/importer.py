"""What a file of weights is: the one recogniser behind `weights:`, `inspect` and `convert`.

A file is told by its container (safetensors, a zip, a pickle, a folder) and by the names of its tensors. Nothing of it
is executed, and of a safetensors file or a zip no more is read than the names and shapes.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ldm_lab.checkpoints.files import FORMAT, is_safetensors
from ldm_lab.checkpoints.formats import ccld, cloob_pickle, compvis, diffusers_vae, glide, heads, open_clip_weights
from ldm_lab.checkpoints.released_zip import is_release, opened
from ldm_lab.checkpoints.third_party import read_state_dict
from ldm_lab.config import MAPPINGS, USE_KEYS, check_mapping, check_section
from ldm_lab.errors import UserError
from ldm_lab.guidance.noised_clip import IMAGE_ONLY, TEXT_ONLY
from ldm_lab.io.atomic import existing_file
from ldm_lab.pretrained.resolve import resolve_weights

# What `Found.kind` may be -> what it is, in words.
KINDS = {
    "part": "a part of ldm_lab's",
    "model": "a trained model of ldm_lab's",
    "run": "a checkpoint of a run of ldm_lab's",
    "ccld_training": "a training checkpoint of cloob-latent-diffusion",
    "ccld": "a U-Net of cloob-latent-diffusion",
    "compvis": "an autoencoder of CompVis's latent-diffusion",
    "diffusers": "a VAE of diffusers'",
    "glide": "a network of GLIDE's",
    "noised_clip": "a tower of GLIDE's noised CLIP",
    "cloob_pickle": "a CLOOB of cloob-training's",
    "clip": "a CLIP of open_clip's or OpenAI's",
    "linear": "a linear head on embeddings",
    "mlp": "an MLP head on embeddings",
    "unknown": "tensors of an unknown model",
}
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64},
    **{"I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool},
}  # safetensors' names
MODEL_ROLES = ("autoencoder", "conditioner", "denoiser", "objective")
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before its zips: the pickle of a magic number


@dataclass(frozen=True)
class TensorInfo:
    """Shape and type of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Found:
    """What a file is.

    Attributes:
        kind: a key of KINDS.
        path: the file; of a folder the file in it with the weights.
        tensors: of all that it holds.
        metadata: text beside the tensors of a safetensors file.
        rest: what else a pickled checkpoint holds.
    """

    kind: str
    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)


# In this order: a training checkpoint of CCLD has an autoencoder of CompVis's in it.
BY_NAMES: list[tuple[str, Callable[[dict[str, Any]], bool]]] = [
    ("ccld_training", lambda names: f"model_ema.{ccld.FIRST}" in names or f"model.{ccld.FIRST}" in names),
    ("ccld", lambda names: ccld.FIRST in names),
    ("glide", glide.is_one),
    ("noised_clip", lambda names: IMAGE_ONLY in names or TEXT_ONLY in names),
    ("compvis", compvis.is_one),
    ("diffusers", diffusers_vae.is_one),
    ("clip", open_clip_weights.is_one),
    ("linear", heads.is_linear),
    ("mlp", heads.is_mlp),
]


def recognise(path: str | Path) -> Found:
    """Return what a file, a folder of diffusers', or a released file by its name, is.

    Raises:
        UserError: missing or damaged file, one that is no file of weights, one whose loading could run code.
    """
    path = resolve_weights(path, "weights")
    path = existing_file(diffusers_vae.find(path) if path.is_dir() else path, "weights")
    if is_safetensors(path):
        tensors, metadata = _header(path)
        if metadata.get("format") == FORMAT:
            return Found("model" if metadata.get("role") == "model" else "part", path, tensors, metadata)
        return Found(_by_names(tensors), path, tensors, metadata)
    if is_release(path):
        with opened(path) as weights:
            try:
                found = recognise(weights)
            except UserError as error:
                raise UserError(str(error).replace(str(weights), str(path))) from None
        return Found(found.kind, path, found.tensors, found.metadata, found.rest)
    if open_clip_weights.is_torchscript(path):
        tensors = _infos(open_clip_weights.read_torchscript(path))
        return Found(_by_names(tensors), path, tensors)
    if _is_plain_pickle(path):
        return Found("cloob_pickle", path, _infos(cloob_pickle.read(path)[0]))
    tensors, rest = read_state_dict(path, "weights")
    kind = "run" if FORMAT in rest else _by_names(tensors)
    return Found(kind, path, _infos(tensors), rest=rest)


def kind_of(path: Path) -> str:
    """Return `recognise(path).kind`, without reading a pickle that can be of one kind only."""
    if path.is_file() and not is_release(path) and _is_plain_pickle(path):
        return "cloob_pickle"
    return recognise(path).kind


def part_config(path: Path, metadata: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """Return `(role, config)` from the metadata of a safetensors file of ours. Raises UserError if they make no sense.

    The role of a whole model is "model".
    """
    try:
        config = json.loads(metadata.get("config", ""))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path}: its config is not readable")
    role = metadata.get("role")
    if role not in ("model", *USE_KEYS):
        raise UserError(f"{path}: holds a part of an unknown role, {str(role)[:100]!r}")
    return role, config


def config_problems(config: Any) -> list[str]:
    """Return what is wrong with the sections of a model's config that sampling builds, each with its key path."""
    if not isinstance(config, dict):
        return [f"config: a mapping of sections is needed, not {str(config)[:100]!r}"]
    task = config.get("task", "diffusion")
    if not isinstance(task, str):
        return [f"config.task: text is needed, not {str(task)[:100]!r}"]
    problems = [
        problem
        for role in MODEL_ROLES
        if role in config
        for problem in check_section(role, config[role], f"config.{role}")
    ]
    for key, role in MAPPINGS.items():
        if config.get(key) is not None:
            problems += check_mapping(role, config[key], f"config.{key}")
    return problems


def _by_names(tensors: dict[str, Any]) -> str:
    return next((kind for kind, is_one in BY_NAMES if is_one(tensors)), "unknown")


def _infos(tensors: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(tuple(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in tensors.items()
    }


def _header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return what a safetensors file's header says, which the library compares with the file's size."""
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                entry = file.get_slice(name)
                dtype = DTYPES.get(entry.get_dtype())
                kind = str(dtype).removeprefix("torch.") if dtype else entry.get_dtype()
                tensors[name] = TensorInfo(tuple(entry.get_shape()), kind)
            return tensors, file.metadata() or {}
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file, truncated or damaged ({error})") from None


def _is_plain_pickle(path: Path) -> bool:
    """Return whether a file begins as a pickle does that is not torch's: the opcode of a protocol from 2 on."""
    with open(path, "rb") as file:
        head = file.read(len(LEGACY))
    return head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5") and head != LEGACY
