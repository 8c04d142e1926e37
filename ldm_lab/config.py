"""From YAML and `key=value` to parts: the registry of names, the checks, the building. The only importer of OmegaConf.

A *part* is a class registered under a role and a name. Its keyword-only constructor arguments are the keys that its
section may have, their annotations the types; positional arguments are run-time objects that the caller of `build`
hands over. So every option is written once, where it is used:

    @register("denoiser", "ccld_unet")
    class CCLDUNet(nn.Module):
        def __init__(self, channels: int, conditions: ConditionSpec, *, base_channels: int):

A section with one possible class (`optim`, `ema`, ...) is a part whose name equals its role; its YAML has no `name:`.
A part may have a `check(section) -> list[str]` static method for rules across keys.
"""

import copy
import importlib
import inspect
import math
import pkgutil
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ldm_lab.errors import UserError, first_line, unknown

# role -> the package whose modules register the parts of that role; every module in it is imported once.
PACKAGES = {
    "task": "ldm_lab.training",
    "data": "ldm_lab.data",
    "autoencoder": "ldm_lab.autoencoders",
    "conditioner": "ldm_lab.conditioners",
    "condition_source": "ldm_lab.condition_sources",
    "denoiser": "ldm_lab.denoisers",
    "objective": "ldm_lab.objectives",
    "sampler": "ldm_lab.samplers",
    "cache": "ldm_lab.training",
    "optim": "ldm_lab.training",
    "ema": "ldm_lab.training",
    "checkpoint": "ldm_lab.training",
    "demo": "ldm_lab.training",
    "logging": "ldm_lab.training",
    "trainer": "ldm_lab.training",
    "resume": "ldm_lab.training",
    "rule": "ldm_lab.rules",
    "selection": "ldm_lab.curation.metadata",
    "engine": "ldm_lab.curation.metadata",
    "loss": "ldm_lab.training",
    "perceptual": "ldm_lab.training",
    "discriminator": "ldm_lab.training",
    "reconstructions": "ldm_lab.training",
    "enlargements": "ldm_lab.training",
    "head": "ldm_lab.curation.heads",
}
TOOLS = ("selection", "engine")  # roles of commands, not of runs; they need their extra installed
Statistic = float | list[float] | None  # of latents: one number, or one for each channel
# Keys in the section of a frozen part that say how it is used, beside its constructor's keys, which say what it is.
USE_KEYS: dict[str, dict[str, Any]] = {
    "autoencoder": {"weights": str | None, "latent_mean": Statistic, "latent_std": Statistic},
    "conditioner": {"weights": str | None, "dropout": float},
    "head": {"weights": str | None},
}
# What their values have to be, and how that is said.
USE_LIMITS: dict[tuple[str, str], tuple[Callable[[float], bool], str]] = {
    ("autoencoder", "latent_std"): (
        lambda std: min(std if isinstance(std, list) else [std], default=0) > 0,
        "a positive number",
    ),
    ("conditioner", "dropout"): (lambda share: 0 <= share <= 1, "a share from 0 to 1"),
}
MAPPINGS = {"condition_sources": "condition_source"}  # sections that hold several parts of a role, by name
PART_NAME = re.compile(r"\w+\.name=")  # an override that puts another part in the place of one
LARGEST_SEED = 2**62  # leaves room to count on in 64 bits
_registry: dict[tuple[str, str], type] = {}
_discovered: set[str] = set()


# ------------------------------------------------------------------------------------------------------ registry


def register(role: str, name: str | None = None) -> Callable[[type], type]:
    """Class decorator: make the class known as `name` (default: the role itself) of `role`.

    The class keeps the names as `part_role` and `part_name`.
    """

    def add(cls: type) -> type:
        key = (role, name or role)
        assert role in PACKAGES, f"unknown role {role}"
        assert _registry.setdefault(key, cls) is cls, f"{key} is registered twice"
        cls.part_role, cls.part_name = key
        return cls

    return add


def parts(role: str) -> dict[str, type]:
    """Return `{name: class}` of all parts of a role, importing the role's package on first use."""
    package = PACKAGES[role]
    if package not in _discovered:
        _discovered.add(package)
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            importlib.import_module(f"{package}.{module.name}")
    return {name: cls for (r, name), cls in _registry.items() if r == role}


def part_class(role: str, section: dict[str, Any] | str | None) -> type:
    """Return the class that a section names. Raises UserError for an unknown name."""
    known = parts(role)
    name = role if role in known else section if isinstance(section, str) else (section or {}).get("name")
    if name is None:
        raise UserError(f"{role}.name: has to be given. Known: {', '.join(sorted(known))}.")
    if name not in known:
        raise UserError(f"{role}.name: {unknown(role, name, known)}")
    return known[name]


def options(cls: type) -> dict[str, inspect.Parameter]:
    """Return the keyword-only constructor arguments of a part: its allowed keys."""
    keywords = inspect.signature(cls, eval_str=True).parameters.values()
    return {p.name: p for p in keywords if p.kind is inspect.Parameter.KEYWORD_ONLY}


def build(role: str, section: dict[str, Any] | None, *runtime: Any) -> Any:
    """Build the part that a section describes; `runtime` are its positional constructor arguments.

    Raises:
        UserError: unknown name or key, wrong type, missing key; all of them in one message.
    """
    section = dict(section or {})
    problems = check_section(role, section, role)
    if problems:
        raise UserError(_join(problems))
    cls = part_class(role, section)
    known = options(cls)
    values = {k: v for k, v in section.items() if k in known}
    return cls(*runtime, **{k: _convert(v, known[k].annotation) for k, v in values.items()})


# ---------------------------------------------------------------------------------------------------- load, check


def load(path: str | Path, overrides: list[str] = ()) -> dict[str, Any]:
    """Read a YAML, apply `key.path=value` overrides, resolve it, check it against the parts it names.

    `defaults: other.yaml` (relative to the file) is read first and overlaid. Another part's name in an override takes
    out what the file says to the part before and the new one does not have. Numbers may be written `3e-5` or `50_000`.

    Returns:
        Plain dicts, lists and scalars; `config["run"]` defaults to the file's name.

    Raises:
        UserError: missing or unreadable file, or any number of wrong entries, each with its key path, in one message.
    """
    config = read(path, overrides)
    config.setdefault("run", Path(path).stem)
    check(config)
    return config


def read(path: str | Path, overrides: list[str] = ()) -> dict[str, Any]:
    """Do the same without the check: for configs that describe something else than a run. Raises UserError."""
    merged = _read(Path(path), seen=())
    for override in sorted(overrides, key=lambda override: PART_NAME.match(override) is None):  # names first
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"{override!r}: an override is written key.path=value, e.g. optim.lr=3e-6")
        if PART_NAME.match(override):
            _leave_behind(merged, key.partition(".")[0], value)
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
            raise UserError(f"{override!r}: {_first_line(error)}") from None
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise UserError(f"{path}: has to be given: {', '.join(missing)} (add {missing[0]}=... to the command)")
        config = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_first_line(error)}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: a config is a mapping of sections, this is a {type(config).__name__}")
    return config


def _leave_behind(config: Any, role: str, name: str) -> None:
    """Take out of a role's section the keys of its part that another part, which takes its place, does not have."""
    section, known = config.get(role), parts(role) if role in PACKAGES else {}
    before = known.get(section.get("name")) if isinstance(section, DictConfig) else None
    if before is None or name not in known:
        return  # `check` says what is wrong
    for key in options(before).keys() - options(known[name]).keys():
        section.pop(key, None)


def _read(path: Path, seen: tuple[Path, ...]) -> Any:
    if path.resolve() in seen:
        raise UserError(f"{path}: 'defaults' leads back to this file")
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError:
        near = ", ".join(sorted(str(p) for p in path.parent.glob("*.yaml"))) if path.parent.is_dir() else ""
        raise UserError(f"{path}: no such config." + (f" Here: {near}" if near else "")) from None
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not a readable YAML: {_first_line(error)}") from None
    if not OmegaConf.is_dict(config):
        raise UserError(f"{path}: a config is a mapping of sections")
    base = config.pop("defaults", None)
    if base is None:
        return config
    return OmegaConf.merge(_read(path.parent / str(base), (*seen, path.resolve())), config)


def check(config: dict[str, Any]) -> None:
    """Check a whole config without building anything. Raises UserError with all problems at once."""
    problems = []
    task = config.get("task", "diffusion")
    known_tasks = parts("task")
    if task not in known_tasks:
        raise UserError(f"task: {unknown('task', task, known_tasks)}")
    cls = known_tasks[task]
    roles = section_roles(cls)
    top = {"task": str, "run": str, "seed": int, "init_from": str | None}
    for key, value in config.items():
        if key in top:
            problems += _mismatch(value, top[key], key)
        elif key in roles and value is None and key not in cls.REQUIRED:
            continue  # as if it were left out: how a config takes back a section of its `defaults`
        elif key in MAPPINGS and key in roles:
            problems += check_mapping(MAPPINGS[key], value, key)
        elif key in roles:
            problems += check_section(roles[key], value, key)
        else:
            problems.append(f"{key}: {unknown('key', key, [*top, *roles])}")
    seed = config.get("seed", 0)
    if isinstance(seed, int) and not 0 <= seed < LARGEST_SEED:
        problems.append(f"seed: a whole number from 0 to 2**62 is needed, not {seed}")
    for key in cls.REQUIRED:
        if key not in config:
            problems.append(f"{key}: this section has to be given")
    if problems:
        raise UserError(_join(problems))


def section_roles(task: type) -> dict[str, str]:
    """Return `{top-level key: role}` of a task: its own parts and the sections that every task has."""
    return {**{role: role for role in task.ROLES}, **{role: role for role in task.SECTIONS}}


def check_section(role: str, section: Any, path: str) -> list[str]:
    """Return the problems of one section, each with its key path."""
    if section is None:
        section = {}
    if not isinstance(section, dict):
        return [f"{path}: a section of key: value lines is needed, not {section!r}"]
    try:
        cls = part_class(role, section)
    except UserError as error:
        return [str(error).replace(f"{role}.name", f"{path}.name", 1)]
    known = options(cls)
    problems = []
    for key, value in section.items():
        where = f"{path}.{key}"
        if key == "name" and cls.part_name != role:
            continue
        if key in known:
            annotation = known[key].annotation
            nested = getattr(annotation, "part_role", None)
            problems += check_section(nested, value, where) if nested else _mismatch(value, annotation, where)
        elif key in USE_KEYS.get(role, {}):
            problems += _mismatch(value, USE_KEYS[role][key], where) or _beyond(role, key, value, where)
        else:
            problems.append(f"{where}: {unknown('key', key, [*known, *USE_KEYS.get(role, {})])}")
    if not section.get("weights"):  # a weights file brings its own architecture
        for key, parameter in known.items():
            if parameter.default is parameter.empty and key not in section:
                problems.append(f"{path}.{key}: has to be given ({describe(parameter.annotation)})")
    if not problems and hasattr(cls, "check"):
        problems += [f"{path}.{problem}" for problem in cls.check(section)]
    return problems


def check_mapping(role: str, section: Any, path: str) -> list[str]:
    """Return the problems of a section that holds parts of a role, part name -> options, each with its key path."""
    if not isinstance(section, dict):
        return [f"{path}: a mapping of names to options is needed, not {section!r}"]
    problems = []
    for name, given in section.items():
        where = f"{path}.{name}"
        if name not in parts(role):
            problems.append(f"{where}: {unknown(role.replace('_', ' '), str(name), parts(role))}")
        elif given is not None and not isinstance(given, dict):
            problems.append(f"{where}: a section of key: value lines is needed, not {given!r}")
        elif given and "name" in given:
            problems.append(f"{where}.name: the key {name!r} is the name already")
        else:
            problems += check_section(role, {**(given or {}), "name": name}, where)
    return problems


def describe(annotation: Any) -> str:
    """Return an annotation as words for people: "whole number", "one of 'a', 'b'", ..."""
    words = {int: "whole number", float: "number", str: "text", bool: "true or false", dict: "section", list: "list"}
    if annotation in words:
        return words[annotation]
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin in (list, dict):
        return f"list of {describe(args[0])}s" if origin is list else "section"
    return getattr(annotation, "__name__", str(annotation))


def _fits(value: Any, annotation: Any) -> bool:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any or annotation is inspect.Parameter.empty:
        return True
    if annotation is type(None) or annotation is None:
        return value is None
    if origin is Literal:
        return value in args
    if origin in (Union, types.UnionType):
        return any(_fits(value, a) for a in args)
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(_fits(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items())
    if isinstance(value, bool):  # a bool is an int to Python, not to us
        return annotation is bool
    if annotation is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, annotation)


def _mismatch(value: Any, annotation: Any, where: str) -> list[str]:
    return [] if _fits(value, annotation) else [f"{where}: {describe(annotation)} is needed, not {value!r}"]


def _beyond(role: str, key: str, value: Any, where: str) -> list[str]:
    fits, wanted = USE_LIMITS.get((role, key), (None, ""))
    return [] if fits is None or value is None or fits(value) else [f"{where}: {wanted} is needed, not {value}"]


def _convert(value: Any, annotation: Any) -> Any:
    """Return the value in the annotation's own type where YAML has only a cousin (3 for a float)."""
    if annotation is float and isinstance(value, int):
        return float(value)
    return copy.deepcopy(value)


def _join(problems: list[str]) -> str:
    return problems[0] if len(problems) == 1 else f"{len(problems)} problems in the config:\n  " + "\n  ".join(problems)


def _first_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f" (line {mark.line + 1})" if mark else ""
    return (getattr(error, "problem", None) or first_line(error)) + where


# ---------------------------------------------------------------------------------------------------- for people


def to_yaml(config: dict[str, Any]) -> str:
    """Return a config as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.create(config))


def describe_parts() -> str:
    """Return a listing of all parts with their options, types and defaults: what `train.py --parts` prints."""
    lines = []
    for role in PACKAGES:
        if role in TOOLS:
            continue
        known = parts(role)
        for name, cls in sorted(known.items()):
            summary = (inspect.getdoc(cls) or "").splitlines()[0] if cls.__doc__ else ""
            lines.append(f"{role if name == role else f'{role}: {name}'}  -- {summary}")
            for key, p in options(cls).items():
                default = "has to be given" if p.default is p.empty else f"default {_plain(p.default)!r}"
                lines.append(f"    {key}: {describe(p.annotation)}; {default}")
    return "\n".join(lines)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
