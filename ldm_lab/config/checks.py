"""Checks of sections: keys, types, bounds and names from the parts' text; rules across keys by their classes.

A part may have a static method `check(*, this, that) -> list[str]` for rules across keys. It gets the options that it
names, those that were left out with their defaults, and is not asked about a section with `weights`, as a weights file
brings its own architecture: then it is asked when that file is read.

A part may likewise have a static method `unused(*, this, that) -> dict[str, str]`: options that have no effect as the
others are, each with the reason. They are said, as whoever gives them expects something of them.
"""

import contextlib
import inspect
from collections.abc import Mapping
from typing import Annotated, Any

from ldm_lab.config.bounds import (
    Interpolated,
    PartMapping,
    PartSection,
    Plain,
    TypeForm,
    converted,
    describe,
    entries_form,
    marker,
    problem,
)
from ldm_lab.config.registry import MAPPINGS, PartInfo, infos, known_elsewhere, part_info, use_keys
from ldm_lab.errors import UserError, unknown

EPOCHS = "a run's length is in optimizer steps, trainer.max_steps (an epoch has images / data.batch_size), or max_time"
ELSEWHERE = {  # (role, key of other programs) -> what stands for it here
    **{("trainer", key): EPOCHS for key in ("max_epochs", "min_epochs", "num_epochs", "epochs")},
    **{("trainer", key): "the number of devices is trainer.devices" for key in ("gpus", "num_gpus", "num_processes")},
    ("optim", "learning_rate"): "the learning rate is optim.lr",
}


def settled(value: Any, annotation: TypeForm) -> Any:
    """Return what a config has in a place, with the texts of interpolations in it read as the place takes them.

    Args:
        value: a section, a mapping of parts, a list, a single value.
        annotation: of the place: an option's, or that of a whole section (`section_form`).
    """
    if isinstance(value, Interpolated):
        return value.read_as(annotation)
    if isinstance(value, list):
        return [settled(entry, entries_form(annotation)) for entry in value]
    if not isinstance(value, Mapping):
        return value
    mark, types = marker(annotation), {}
    if isinstance(mark, PartMapping):
        types = {name: section_form(mark.role, name) for name in value}
    elif mark is not None:
        with contextlib.suppress(UserError):  # the check says what is wrong
            known = part_info(mark.role, settled(value.get("name", mark.name), str)).options
            types = {**use_keys(mark.role), **{key: option.annotation for key, option in known.items()}, "name": str}
    return {key: settled(its, types.get(key, Plain)) for key, its in value.items()}


def section_form(role: str, name: str | None = None) -> TypeForm:
    """Return the annotation of a section of a role, or of the mapping of its parts that a config calls by this key."""
    form: TypeForm = Annotated[dict, PartMapping(MAPPINGS[role]) if role in MAPPINGS else PartSection(role, name)]
    return form


def check_keys(role: str, section: Any, path: str) -> list[str]:
    """Return what is wrong with one section, each with its key path; nothing is imported.

    Args:
        role: of the part that the section describes.
        section: a mapping; None is an empty one.
        path: key path of the section.
    """
    if section is None:
        section = {}
    if not isinstance(section, Mapping):
        return [f"{path}: a section of key: value lines is needed, not {section!r}"]
    try:
        info = part_info(role, section.get("name"), path)
        known = info.options
    except UserError as error:
        return [str(error)]
    used = use_keys(role)
    problems = []
    for key, value in section.items():
        where = f"{path}.{key}"
        if key == "name" and info.name != role:
            continue
        if key in known or key in used:
            annotation = known[key].annotation if key in known else used[key]
            found = problem(value, annotation)
            problems += [f"{where}: {found}"] if found else _nested(annotation, value, where)
        else:
            problems.append(f"{where}: {_unknown_key(info, key, [*known, *used])}")
    if not section.get("weights"):  # a weights file brings its own architecture
        for key, option in known.items():
            if option.required and key not in section:
                problems.append(f"{path}.{key}: has to be given ({describe(option.annotation)})")
    return problems


def check_section(role: str, section: Any, path: str) -> list[str]:
    """Return what is wrong with one section: `check_keys`, and if that finds nothing, the rules across keys."""
    return check_keys(role, section, path) or check_rules_of(role, section, path)


def check_mapping(role: str, sections: Any, path: str, across_keys: bool = False) -> list[str]:
    """Return what is wrong with a mapping {part name: options}, each with its key path.

    Args:
        role: of the parts.
        sections: the mapping; a name with null stands for no part.
        path: key path of the mapping.
        across_keys: check the rules across keys, too.
    """
    if not isinstance(sections, Mapping):
        return [f"{path}: a mapping of {role} names to their options is needed, not {sections!r}"]
    problems = []
    for name, options in sections.items():
        if options is None and name in infos(role):
            continue
        if not isinstance(options, Mapping) and name in infos(role):
            problems.append(f"{path}.{name}: options are needed, such as {path}.{name}={{}}, not {options!r}")
            continue
        options = options if isinstance(options, Mapping) else {}
        if options.get("name", name) != name:
            problems.append(f"{path}.{name}.name: the key says which part this is, {name!r}, not {options['name']!r}")
            continue
        check = check_section if across_keys else check_keys
        problems += [found.replace(f"{path}.{name}.name:", f"{path}.{name}:", 1) for found in check(
            role, {"name": name, **options}, f"{path}.{name}"
        )]  # fmt: skip
    return problems


def check_rules_of(role: str, section: Any, path: str) -> list[str]:
    """Return the violated rules across the keys of a section that `check_keys` has passed, and of those inside it."""
    section = section or {}
    info = part_info(role, section.get("name"), path)
    problems = []
    for key, option in info.options.items():
        if key in section:
            problems += _nested(option.annotation, section[key], f"{path}.{key}", across_keys=True)
    if section.get("weights") and "weights" in use_keys(role):
        return problems
    return problems + [f"{path}.{found}" for found in list(answers_of("check", info.load(), info, section))]


def check_options(cls: type, **given: Plain) -> None:
    """Check the options that a registered class is constructed with; for constructors that are also called directly.

    Raises:
        UserError: out of bounds, or options that contradict each other.
    """
    info = part_info(cls.part_role, cls.part_name)
    for key, value in given.items():
        if found := problem(list(value) if isinstance(value, tuple) else value, info.options[key].annotation):
            raise UserError(f"{info.role}.{key}: {found}")
    for found in answers_of("check", cls, info, given):
        raise UserError(f"{info.role}.{found}")


def answers_of(method: str, cls: type, info: PartInfo, section: Mapping[str, Plain]) -> dict[str, str]:
    """Return what a static method of a class says of a section, with the defaults of what that leaves out.

    Args:
        method: "check", which returns a list, or "unused".
        cls: the class of the part.
        info: what is known of the part.
        section: its options.

    Returns:
        Text -> "" of a list; nothing if the class has no such method.

    Raises:
        UserError: it asks for what is no option of the part, and has no default of its own.
    """
    rule = dict(inspect.getmembers(cls, inspect.isfunction)).get(method)
    if rule is None:
        return {}
    asked = {}
    for parameter in inspect.signature(rule).parameters.values():
        option = info.options.get(parameter.name)
        if option is not None and (parameter.name in section or not option.required):
            given = parameter.name in section
            asked[parameter.name] = converted(section[parameter.name], option.annotation) if given else option.default
        elif parameter.default is parameter.empty:
            raise UserError(f"{info.label}: its {method} asks for {parameter.name!r}, which is not among its options")
    found: list[str] | dict[str, str] = rule(**asked)
    return found if isinstance(found, dict) else dict.fromkeys(found, "")


def _nested(annotation: Any, value: Any, where: str, across_keys: bool = False) -> list[str]:
    """Return what is wrong with a value that describes other parts; nothing for any other value."""
    mark = marker(annotation)
    if mark is None or value is None:
        return []
    if isinstance(mark, PartSection):
        value = {"name": value} if isinstance(value, str) else value
        check = check_rules_of if across_keys else check_keys
        return check(mark.role, {**({"name": mark.name} if mark.name else {}), **value}, where)
    return check_mapping(mark.role, value, where, across_keys)


def _unknown_key(info: PartInfo, key: str, known: list[str]) -> str:
    """Return that a part does not know a key, with the part that does, or the nearest match."""
    if hint := ELSEWHERE.get((info.role, key)):
        return f"no such key: {hint}"
    message = unknown("key", key, known, info.label)
    others = known_elsewhere(info, key)
    return f"{message} {', '.join(others)} {'has' if len(others) == 1 else 'have'} it." if others else message


def section_roles(task: PartInfo) -> dict[str, str]:
    """Return section -> role of a task: its own parts and the sections that every task has."""
    return {key: MAPPINGS.get(key, key) for key in (*task.constant("ROLES"), *task.constant("SECTIONS"))}
