"""YAML files to plain data: `defaults:` laid under, `key=value` laid over, interpolations resolved."""

import functools
import io
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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

    `defaults: other.yaml` (relative to the file) is read first and overlaid.

    Returns:
        Plain dicts, lists and scalars.

    Raises:
        UserError: missing or unreadable file, an override that is none, a value that has to be given.
    """
    files = _chain(Path(path), seen=())
    for config in (*files.values(), *(parse(word)[1] for word in overrides if word.startswith("imports="))):
        named = config.get(
            "imports"
        )  # before anything is laid over anything: what takes a part's place has to be known
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


def _chain(path: Path, seen: tuple[Path, ...]) -> dict[Path, DictConfig]:
    """Return path -> content of the files that a file names as its `defaults:`, the undermost first, and its own."""
    if path.resolve() in seen:
        raise UserError(f"{path}: 'defaults' leads back to this file")
    try:
        config = _load(path)
    except FileNotFoundError:
        near = ", ".join(sorted(str(p) for p in path.parent.glob("*.yaml"))) if path.parent.is_dir() else ""
        raise UserError(f"{path}: no such config." + (f" Here: {near}" if near else "")) from None
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not a readable YAML: {yaml_error(error)}") from None
    if not isinstance(config, DictConfig):
        raise UserError(f"{path}: a config is a mapping of sections, this is a {type(config).__name__}")
    base = config.pop("defaults", None)
    under = {} if base is None else _chain(path.parent / str(base), (*seen, path.resolve()))
    return {**under, path: config}


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
