"""Weights in several files with an index of them, as diffusers and transformers write large models."""

import hashlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from ldm_lab.checkpoints.lookalikes import check_is_weights
from ldm_lab.checkpoints.saved_model import PROGRAM, files_of
from ldm_lab.errors import UserError
from ldm_lab.io.atomic import sha256
from ldm_lab.io.json_files import parse_json

INDEX = ".index.json"  # the end of an index's name; `.index.fp16.json` is another form of it
LARGEST = 1 << 24  # bytes of an index


def is_index(path: Path) -> bool:
    """Return whether a file is an index, by its name."""
    return path.suffix == ".json" and ".index." in f"{path.name.removesuffix('.json')}."


def shards(path: Path) -> dict[Path, list[str]]:
    """Return the files that an index names, which lie beside it, and the tensors in each.

    Raises:
        UserError: not a readable index, one that leads out of its folder, or a file of it that is not there.
    """
    if path.stat().st_size > LARGEST:
        raise UserError(f"{path}: not a readable index of weights: it is larger than {LARGEST:,} bytes")
    try:
        weight_map = parse_json(path.read_bytes()).get("weight_map")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable index of weights: {error}") from None
    if not isinstance(weight_map, Mapping) or not weight_map:
        check_is_weights(path)  # a pointer or a page in its place
        raise UserError(f"{path}: not an index of weights: it has no weight_map")
    found: dict[Path, list[str]] = {}
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and name not in ("", ".", "..") and name == PurePosixPath(name).name
        if not plain or "\\" in name or "\0" in name or is_index(Path(name)):
            raise UserError(f"{path}: refused: {str(name)[:100]!r} is no file beside it")
        found.setdefault(path.parent / name, []).append(str(tensor))
    missing = [shard.name for shard in found if not shard.is_file()]
    if missing:
        raise UserError(f"{path}: {missing[0]} of {len(found)} files that it names is missing")
    return found


def weights_files(path: Path) -> list[Path]:
    """Return the files with the weights that a path stands for: itself, an index and what it names, or a SavedModel."""
    if path.name == PROGRAM:
        return files_of(path)
    return [path, *shards(path)] if is_index(path) else [path]


def weights_checksum(path: Path) -> str:
    """Return the SHA-256 of a file of weights; of an index that of the checksums of all its files in a row."""
    sums = [sha256(file) for file in weights_files(path)]
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()
