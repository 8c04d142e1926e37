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
from ldm_lab.pretrained.hub_folder import HubFolder, check_inside, fetched_folder
from ldm_lab.pretrained.resolve import HUB, REPOSITORY, cached_path
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
    home = model.parent if shared is not None else fetched_folder(model.parent)
    found = _beside(model, role, weights, checksum, is_strange=home is not None)
    if home is not None and found is not None:
        check_inside(home, found)
    elif home is not None and _leads_out(weights):
        raise UserError(
            f"{model}: refused: {role}.weights: {weights[:100]!r} leads out of the folder, which was fetched from the "
            "Hub, and no file beside it takes its place"
        )
    return found


def _beside(model: Path, role: str, weights: str, checksum: str | None, is_strange: bool) -> Path | None:
    """Return the file that stands for the weights that a config names.

    Args:
        model, role, checksum: as for `beside`.
        weights: the name.
        is_strange: the model is a stranger's, whose config reads no files of this machine.
    """
    named = None if is_strange and _leads_out(weights) else _named(weights)
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


def _leads_out(weights: str) -> bool:
    """Return whether a name is that of a file which is neither in the model's folder nor the program's own."""
    if weights in catalogue() or weights == last_part(weights) not in ("", ".", "..", "~"):
        return False
    own = (REPOSITORY / weights).resolve()
    return not (weights.startswith("assets/") and own.is_relative_to(REPOSITORY / "assets") and own.is_file())


def text_encoder_beside(model: Path, config: Section) -> Path | None:
    """Return the folder of a language model beside a shared model's file, which its config names; None for none.

    Raises:
        UserError: it, or a file in it, is a link to somewhere else.
    """
    name = config.get("model")
    folder = model.parent / name if isinstance(name, str) and name == last_part(name) else None
    shared = HubFolder.read(model.parent)
    if folder is None or shared is None or not folder.is_dir():
        return None
    for path in (folder, *sorted(folder.iterdir())):
        shared.check_inside(path)
    return folder


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
    """Raise UserError for a shared model that names weights, or a text encoder, anywhere but in its folder.

    What is of the Hub (OWNER/NAME of a model, an address of weights) is judged where it would be fetched.
    """
    for key in ("weights", "model"):
        text = config.get(key)
        if not isinstance(text, str) or (key == "weights" and (text in catalogue() or text.startswith(HUB))):
            continue
        if text in ("", ".", "..") or "\\" in text or text.startswith(("/", "~", ".")) or (
            "/" in text and (key == "weights" or Path(text).is_dir())
        ):  # fmt: skip
            raise UserError(f"{shared.path}: refused: {role}.{key}: {text[:100]!r} leads out of the folder")
        if (shared.path / text).exists():
            shared.check_inside(shared.path / text)
