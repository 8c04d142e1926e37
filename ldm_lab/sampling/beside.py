"""Weights that lie beside a model's file: known by what they are (their checksum), then by their names."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path

from ldm_lab.checkpoints.folders import ENDINGS
from ldm_lab.checkpoints.importer import Section
from ldm_lab.checkpoints.sharded import weights_checksum
from ldm_lab.errors import UserError
from ldm_lab.pretrained.catalogue import catalogue
from ldm_lab.pretrained.hub_folder import HubFolder
from ldm_lab.pretrained.resolve import cached_path
from ldm_lab.sampling.names import MODELS_OF_RUNS, last_part

MOST = 32  # files beside a model that are looked into
OTHER_PROGRAMS = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".zip")


def beside(model: Path, role: str, config: Section, checksum: str | None) -> Path | None:
    """Return the weights beside a model's file that stand for those that its config names; None for none.

    The place that the config names counts where the right weights are there. Then the file beside the model with the
    checksum counts, whatever it is called, then one that is called as the config says, or as the role.

    Args:
        model: the model's file.
        role: of the part.
        config: its section.
        checksum: of the weights that the model was trained with; None if it does not say.

    Raises:
        UserError: a shared model's config names a place outside of its folder.
    """
    weights = config.get("weights")
    shared = HubFolder.read(model.parent)
    if shared is not None:
        _check_inside(shared, role, config)
    if not isinstance(weights, str) or "://" in weights:
        return None  # none, an address, or nothing of the kind
    named = _named(weights)
    is_bare = weights == last_part(weights) and weights not in catalogue()
    if named is not None and not is_bare and checksum in (None, checksum_of(named)):
        return None
    if checksum is not None:
        found = next((file for file in _files(model, role, weights) if checksum_of(file) == checksum), None)
        if found is not None:
            return found
    if weights in catalogue() or (named is not None and not is_bare):
        return None
    by_name = [model.parent / last_part(weights), model.parent / f"{role}.safetensors"]
    return next((path for path in by_name if path.is_file()), None)


def text_encoder_beside(model: Path, config: Section) -> Path | None:
    """Return the folder of a language model beside a shared model's file, which its config names; None for none."""
    name = config.get("model")
    folder = model.parent / name if isinstance(name, str) and name == last_part(name) else None
    is_there = folder is not None and folder.is_dir() and HubFolder.read(model.parent) is not None
    return folder if is_there else None


def _named(weights: str) -> Path | None:
    """Return the file that a config names, if it is there."""
    path = cached_path(weights) if weights in catalogue() else Path(weights).expanduser()
    return path if path.exists() else None


def _files(model: Path, role: str, weights: str) -> Iterator[Path]:
    """Yield the files of weights beside a model's, those of the likeliest names first; no models of runs."""
    likely = [last_part(weights), f"{role}.safetensors"]
    files = [path for path in sorted(model.parent.iterdir()) if path.suffix in (*ENDINGS, *OTHER_PROGRAMS)]
    files = [path for path in files if not MODELS_OF_RUNS.fullmatch(path.name) and path.name != model.name]
    files.sort(key=lambda path: likely.index(path.name) if path.name in likely else len(likely))
    yield from (path for path in files[:MOST] if path.is_file())


def checksum_of(path: Path) -> str | None:
    """Return the checksum of weights, known from before where the file has not changed; None where it has none."""
    try:
        stat = os.stat(path)
        return _checksum(path, stat.st_size, stat.st_mtime_ns) if path.is_file() else None
    except (OSError, UserError):
        return None


@functools.lru_cache(maxsize=64)
def _checksum(path: Path, size: int, modified: int) -> str:
    return weights_checksum(path)


def _check_inside(shared: HubFolder, role: str, config: Section) -> None:
    """Raise UserError for a shared model that names weights, or a text encoder, anywhere but in its folder."""
    for key in ("weights", "model"):
        text = config.get(key)
        if not isinstance(text, str) or (key == "weights" and text in catalogue()):
            continue
        if text in ("", ".", "..") or "\\" in text or text.startswith(("/", "~", ".")) or (
            key == "weights" and "/" in text
        ):  # fmt: skip
            raise UserError(f"{shared.path}: refused: {role}.{key}: {text[:100]!r} leads out of the folder")
        if (shared.path / text).exists():
            shared.check_inside(shared.path / text)
