"""Whether runs and caches of a name are of these images: what was made of others is not taken for theirs."""

import hashlib
import os
from pathlib import Path

import yaml

from ldm_lab.config import RunConfig
from ldm_lab.data.file_facts import differences, facts_of, read_facts
from ldm_lab.data.shard_urls import expand
from ldm_lab.data.source import Source
from ldm_lab.errors import UserError
from ldm_lab.io.atomic import atomic_write
from ldm_lab.own_images.choosing import Names
from ldm_lab.own_images.looking import FolderFacts

REMEDY = "--out NAME.yaml takes another name; or delete it"


def checksum(facts: FolderFacts) -> str:
    """Return the checksum (BLAKE2b) of the list of images, or of shards: paths, sizes, times of the last change."""
    paths = [facts.path / name for name in facts.names] or [Path(address) for address in expand(list(facts.shards))]
    listed = hashlib.blake2b(digest_size=32)
    for name, its in facts_of((str(path), path) for path in paths).items():
        listed.update(os.fsencode(f"{name}\0{its.size}\0{its.time}\n"))
    return listed.hexdigest()


def check_autoencoder_run(facts: FolderFacts, names: Names) -> None:
    """Raise UserError if the run that trains the autoencoder is there and was not begun on these images."""
    folder, own = names.autoencoder_list.parent, names.autoencoder_checksum
    if not _has_begun(folder, beside=(names.autoencoder_list.name, names.demo_list.name, own.name)):
        return
    if not own.is_file() or own.read_text(errors="replace").strip() != checksum(facts):
        raise UserError(f"{folder}: trained on other images than those now in {facts.path}; {REMEDY}")


def write_checksum(facts: FolderFacts, names: Names) -> None:
    """Note which images the run that trains the autoencoder is of."""
    with atomic_write(names.autoencoder_checksum) as file:
        file.write(f"{checksum(facts)}\n".encode())


def check_run(facts: FolderFacts, names: Names) -> None:
    """Raise UserError if a run of this name is there and is of another folder."""
    folder = Path("runs") / names.run
    if not _has_begun(folder):
        return
    own, found = sorted(map(str, facts.shards or [facts.path])), _trained_on(folder / "config.yaml")
    if found != own:
        raise UserError(f"{folder}: is a run on {', '.join(found) or 'something else'}, not {own[0]}; {REMEDY}")


def check_cache(config: RunConfig) -> None:
    """Raise UserError if the cache that a config names is there and was made of other files."""
    if "cache" not in config:
        return
    folder = Path(str(config["cache"]["folder"]))
    before = read_facts(folder)
    if before is None:
        return
    source: Source = config["data"].build()
    source.prepare()
    source.open()
    if found := differences(before, facts_of(source.files())):
        raise UserError(f"{folder}: this cache was made of other files: {found}; {REMEDY}")


def _has_begun(folder: Path, beside: tuple[str, ...] = ()) -> bool:
    """Return whether a run's folder holds more than what `start` writes there."""
    return folder.is_dir() and any(its.name not in beside and its.name[0] != "." for its in folder.iterdir())


def _trained_on(config: Path) -> list[str]:
    """Return the folder or shards that the config of a run names, absolute and sorted; none where it has none."""
    try:
        data = {**yaml.safe_load(config.read_text(encoding="utf-8"))["data"]}
        named = data.get("shards") or data.get("path") or []
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return []
    named = [named] if isinstance(named, str) else named
    return sorted(os.path.abspath(os.path.expanduser(str(each))) for each in named)
