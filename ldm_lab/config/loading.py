"""YAML files to plain data: `defaults:` laid under, `key=value` laid over, interpolations resolved."""

import functools
import io
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ldm_lab.config.bounds import Interpolated, Plain
from ldm_lab.config.overrides import apply, overlaid, parse, yaml_error
from ldm_lab.config.registry import add_imports
from ldm_lab.errors import UserError

BARE_MISSING = re.compile(r"(?<=[\s:,\[{])\?\?\?(?=\s*[,\]}])")


def read(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML, apply `key.path=value` overrides, resolve it; make the parts of its `imports:` known.

    `defaults: other.yaml` (relative to the file), or a list of such files, is read first and overlaid.

    Returns:
        Plain dicts, lists and scalars.

    Raises:
        UserError: missing or unreadable file, an override that is none, a value that has to be given.
    """
    files = {its.path: its.config for its in _chain(Path(path), above=()).values()}
    for config in (*files.values(), *(parse(word)[1] for word in overrides if word.startswith("imports="))):
        named = config.get("imports")  # before anything is overlaid: what takes a part's place has to be known
        if named is not None:
            add_imports([named] if isinstance(named, str) else OmegaConf.to_container(named))
    merged, *above = files.values()
    for file, config in zip(list(files)[1:], above):
        merged = overlaid(merged, config, str(file))
    merged = apply(merged, overrides)
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise UserError(f"{path}: has to be given: {', '.join(missing)} (add {missing[0]}=... to the command)")
        config = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {yaml_error(error)}") from None
    for *above, key in _interpolated(merged):
        holder = functools.reduce(operator.getitem, above, config)
        holder[key] = Interpolated(holder[key]) if isinstance(holder[key], str) else holder[key]
    return {str(key): value for key, value in config.items()}


def _interpolated(node: DictConfig | ListConfig, above: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the places of interpolations below a node."""
    entries = node._content.items() if isinstance(node, DictConfig) else enumerate(node._content)
    for key, child in entries:
        if child._is_interpolation():
            yield (*above, key)
        elif isinstance(child, DictConfig | ListConfig) and isinstance(child._content, dict | list):
            yield from _interpolated(child, (*above, key))


class ConfigFile(NamedTuple):
    """A YAML as it was named, and its content without its `defaults:`."""

    path: Path
    config: DictConfig


def origins(path: str | Path) -> dict[str, Path]:
    """Return key path -> file of all that a YAML has from files below it (`defaults:`), the uppermost one's."""
    found: dict[str, Path] = {}
    for file in _chain(Path(path), above=()).values():
        found.update(dict.fromkeys(_key_paths(file.config), file.path))
    return {key: file for key, file in found.items() if file != Path(path)}


def _key_paths(node: DictConfig, above: str = "") -> Iterator[str]:
    """Yield the key paths of a config: of its sections, too."""
    for key in node:
        yield f"{above}{key!s}"
        child = node._get_node(key)
        if isinstance(child, DictConfig) and isinstance(child._content, dict):
            yield from _key_paths(child, f"{above}{key!s}.")


def _chain(path: Path, above: tuple[Path, ...]) -> dict[Path, ConfigFile]:
    """Return what a file names as its `defaults:`, the undermost first, and the file itself; each once."""
    by = f" ('defaults' of {above[-1]})" if above else ""
    if path.resolve() in {file.resolve() for file in above}:
        raise UserError(f"{path}: 'defaults' leads back to this file")
    try:
        config = _load(path)
    except FileNotFoundError:
        near = ", ".join(sorted(str(p) for p in path.parent.glob("*.yaml"))) if path.parent.is_dir() else ""
        raise UserError(f"{path}: no such config{by}." + (f" Here: {near}" if near else "")) from None
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not a readable YAML{by}: {yaml_error(error)}") from None
    if not isinstance(config, DictConfig):
        raise UserError(f"{path}: a config is a mapping of sections, this is a {type(config).__name__}{by}")
    files: dict[Path, ConfigFile] = {}
    for name in _below(path, config):
        files = {**files, **_chain(path.parent / name, (*above, path))}
    return {**files, path.resolve(): ConfigFile(path, config)}


def _below(path: Path, config: DictConfig) -> list[str]:
    """Take `defaults:` out of a config and return the files that it names. Raises UserError for anything else."""
    named = config.pop("defaults", None)
    names = [named] if isinstance(named, str) else [] if named is None else named
    if not isinstance(names, list | ListConfig) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{path}: defaults: a file to lie below this one is needed, or a list of such, not {named!r}")
    return list(names)


def _load(path: Path) -> DictConfig | ListConfig:
    """Return a file's content; ??? may also stand within braces, where PyYAML takes it for the mark of a key."""
    try:
        return OmegaConf.load(path)
    except YAMLError:
        text = path.read_text(encoding="utf-8")
        quoted = BARE_MISSING.sub("'???'", text)
        if quoted == text:
            raise
        return OmegaConf.load(io.StringIO(quoted))


def to_yaml(config: Mapping[str, Plain]) -> str:
    """Return plain data as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(config)))
