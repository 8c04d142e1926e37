"""A run's description, checked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Interval

from ldm_lab.config.bounds import converted, problem
from ldm_lab.config.checks import check_keys, check_mapping, check_section, section_roles
from ldm_lab.config.loading import read
from ldm_lab.config.registry import MAPPINGS, part_info
from ldm_lab.errors import UserError, unknown

LARGEST_SEED = 2**62 - 1  # leaves room to count on in 64 bits
Seed = Annotated[int, Interval(ge=0, le=LARGEST_SEED)]
TOP = {"task": str, "run": str, "seed": Seed, "init_from": str | None, "imports": list[str] | str | None}


def load(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    config = read(path, overrides)
    config.setdefault("run", Path(path).stem)
    check(config)
    return config


def check(config: dict[str, Any]) -> None:
    """Check a whole config without building or importing anything. Raises UserError with all problems at once."""
    try:
        task = part_info("task", config.get("task", "diffusion"))
    except UserError as error:
        raise UserError(str(error).replace("task.name:", "task:", 1)) from None
    roles, required = section_roles(task), task.constant("REQUIRED")
    problems = []
    for key, value in config.items():
        if key in TOP:
            found = problem(value, TOP[key])
            problems += [f"{key}: {found}"] if found else []
        elif key in roles and value is None and key not in required:
            continue  # as if it were left out: how a config takes back a section of its `defaults`
        elif key in MAPPINGS and key in roles:
            problems += check_mapping(roles[key], value, key)
        elif key in roles:
            problems += check_keys(roles[key], value, key)
        else:
            problems.append(f"{key}: {unknown('key', key, [*TOP, *roles])}")
    problems += [f"{key}: this section has to be given" for key in required if key not in config]
    raise_all(problems)


def build(role: str, section: dict[str, Any] | None, *runtime: Any) -> Any:
    """Build the part that a section describes; `runtime` are its positional constructor arguments.

    Raises:
        UserError: unknown name or key, wrong type, missing key; all of them in one message.
    """
    section = dict(section or {})
    raise_all(check_section(role, section, role))
    info = part_info(role, section.get("name"))
    values = {k: converted(v, info.options[k].annotation) for k, v in section.items() if k in info.options}
    return info.load()(*runtime, **values)


def raise_all(problems: list[str]) -> None:
    """Raise UserError with all problems, if there are any."""
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError(f"{len(problems)} problems in the config:\n  " + "\n  ".join(problems))
