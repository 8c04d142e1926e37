"""A run's description as typed values: `load` reads and checks a YAML, and everything behind it sees a `RunConfig`.

Plain dicts of it lie in checkpoints alone (`to_dict`, `from_checkpoint`). A config that arrives inside a checkpoint
names registered parts and nothing else: its imports are ignored, and it never builds data.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from annotated_types import Interval

from ldm_lab.config.bounds import PartSection, Plain, TypeForm, converted, marker, problem
from ldm_lab.config.checks import (
    answers_of,
    check_keys,
    check_mapping,
    check_rules_of,
    check_section,
    section_form,
    section_roles,
    settled,
)
from ldm_lab.config.loading import origins, read
from ldm_lab.config.overrides import parse
from ldm_lab.config.registry import MAPPINGS, ROLES, PartInfo, part_info, use_keys
from ldm_lab.config.uses import PartUse
from ldm_lab.errors import UserError, unknown

LARGEST_SEED = 2**62 - 1  # leaves room to count on in 64 bits
DEFAULT_TASK = "diffusion"
TOP: dict[str, TypeForm] = {
    "task": str,
    "run": str,
    "seed": Annotated[int, Interval(ge=0, le=LARGEST_SEED)],
    "init_from": str | None,
    "imports": list[str] | str | None,
}
Use = TypeVar("Use", bound=PartUse)


@dataclass(frozen=True, eq=False)  # it is equal to every mapping with the same content
class PartConfig(Mapping[str, Any]):
    """A section: which part, with which options, and how the run uses it. As a mapping it is what a YAML has.

    Attributes:
        role, name: of the part; they are the same where a role has one part.
        options: the constructor's, as far as they were given.
        use: of a frozen part.
        stored: it came inside a checkpoint.
    """

    role: str
    name: str
    options: dict[str, Plain] = field(default_factory=dict)
    use: PartUse = field(default_factory=PartUse)
    stored: bool = False

    def __post_init__(self) -> None:
        kind = ROLES[self.role].use if self.role in ROLES else None
        if kind is not None and not isinstance(self.use, kind):
            object.__setattr__(self, "use", kind(weights=self.use.weights))  # the dataclass is frozen

    @classmethod
    def from_dict(cls, role: str, section: Mapping[str, Any] | None, stored: bool = False) -> "PartConfig":
        """Return the section that a mapping describes. Raises UserError for wrong values of the keys of its use."""
        section = dict(section or {})
        if role not in ROLES:
            raise UserError(f"{unknown('role', role, ROLES)}")
        name = section.pop("name", role)
        if not isinstance(name, str):
            raise UserError(f"{role}.name: text is needed, not {name!r}")
        used = {key: section.pop(key) for key in use_keys(role) if key in section}
        raise_all([f"{role}.{k}: {found}" for k, v in used.items() if (found := problem(v, use_keys(role)[k]))])
        use = (ROLES[role].use or PartUse)(**{k: converted(v, use_keys(role)[k]) for k, v in used.items()})
        return cls(role, name, section, use, stored)

    def to_dict(self) -> dict[str, Plain]:
        """Return the section as plain data, as a YAML has it."""
        used = {key: value for key, value in asdict(self.use).items() if value is not None}
        return {**self.architecture(), **used}

    def architecture(self) -> dict[str, Plain]:
        """Return what the part is, without how it is used: its name, unless its role has one part, and its options."""
        return {**({} if self.name == self.role else {"name": self.name}), **self.options}

    def __getitem__(self, key: str) -> Any:
        return self.to_dict()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_dict())

    def __len__(self) -> int:
        return len(self.to_dict())

    def use_as(self, kind: type[Use]) -> Use:
        """Return how the run uses the part, which is of a role with this kind of use."""
        assert isinstance(self.use, kind), f"a {self.role} is not used as {kind.__name__}"
        return self.use

    def with_use(self, **changes: Plain) -> "PartConfig":
        """Return the section with another use."""
        return replace(self, use=replace(self.use, **changes))

    def option(self, key: str) -> Any:
        """Return the value of an option: what was given, or its default; None if the part has no such option."""
        if key in self.options:
            return self.options[key]
        known = part_info(self.role, self.name).options.get(key)
        return None if known is None or known.required else known.default

    def said(self, key: str) -> "PartConfig":
        """Return the section with the value of an option written out, unless that is null or the part has none."""
        value = self.option(key)
        return self if value is None else replace(self, options={**self.options, key: value})

    def load(self) -> type:
        """Return the class of the part, imported. Raises UserError for an unknown name."""
        return part_info(self.role, self.name).load()

    def build(self, *runtime: Any) -> Any:
        """Build the part; `runtime` are its positional constructor arguments. Raises UserError."""
        if self.stored and self.role == "data":
            raise UserError("data: is read as the user's own config says, never as one inside a checkpoint does")
        return build(self.role, self.architecture(), *runtime)

    def check(self, path: str | None = None) -> list[str]:
        """Return what is wrong with the section, each with its key path below `path` (by default the role)."""
        return check_section(self.role, self.to_dict(), path or self.role)

    def unused_options(self, path: str) -> list[str]:
        """Return which options are given and have no effect beside the others, a line for each reason.

        What is given as its default does what is expected of it, and is passed over.

        Args:
            path: key path of the section, which `check` has passed.
        """
        info = part_info(self.role, self.name, path)
        by_reason: dict[str, list[str]] = {}
        reasons = {} if self.use.weights else answers_of("unused", info.load(), info, self.options)
        for key, why in reasons.items():
            option = info.options[key]
            if key in self.options and converted(self.options[key], option.annotation) != option.default:
                by_reason.setdefault(why, []).append(f"{path}.{key}")
        for key, why in self.use.unused().items():
            by_reason.setdefault(why, []).append(f"{path}.{key}")
        lines = [f"{', '.join(keys)}: without effect: {why}" for why, keys in by_reason.items()]
        forms = {key: info.options[key].annotation for key in self.options} | use_keys(self.role)
        for key, form in forms.items():
            mark, value = marker(form), self.get(key)
            if isinstance(mark, PartSection) and isinstance(value, dict):
                lines += PartConfig.from_dict(mark.role, {"name": mark.name or mark.role, **value}).unused_options(
                    f"{path}.{key}"
                )
        return lines


@dataclass(frozen=True)
class RunConfig(Mapping[str, PartConfig]):
    """A whole run. As a mapping it has the sections that were given.

    Attributes:
        run: its name; all that it writes goes below `runs/` and this.
        task: registered name.
        seed: of all random numbers.
        init_from: weights to begin with: a file, a released name, an hf:// address.
        imports: modules with parts of the user's own; empty for a config that came inside a checkpoint.
        sections: the parts by section.
        condition_sources: the parts of that role by name.
    """

    run: str = ""
    task: str = DEFAULT_TASK
    seed: int = 0
    init_from: str | None = None
    imports: tuple[str, ...] = ()
    sections: dict[str, PartConfig] = field(default_factory=dict)
    condition_sources: dict[str, PartConfig] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], stored: bool = False) -> "RunConfig":
        """Return the run that plain data describe. Raises UserError for what is no section or has no such type."""
        top = {key: config[key] for key in TOP if config.get(key) is not None}
        problems = [f"{key}: {found}" for key, value in top.items() if (found := problem(value, TOP[key]))]
        known = [*TOP, *ROLES, *MAPPINGS]
        problems += [f"{key}: {unknown('key', key, known)}" for key in config if key not in known]
        problems += [
            f"{key}: a section of key: value lines is needed, not {str(value)[:100]!r}"
            for key, value in config.items()
            if key not in TOP and value is not None and not isinstance(value, dict)
        ]
        raise_all(problems)
        sections = {
            key: value for key, value in config.items() if key in ROLES and key not in TOP and value is not None
        }
        sources = {name: its for name, its in (config.get("condition_sources") or {}).items() if its is not None}
        named = top.get("imports", ())
        return cls(
            run=top.get("run", ""),
            task=top.get("task", DEFAULT_TASK),
            seed=top.get("seed", 0),
            init_from=None if stored else top.get("init_from"),
            imports=() if stored else (named,) if isinstance(named, str) else tuple(named),
            sections={key: PartConfig.from_dict(key, value, stored) for key, value in sections.items()},
            condition_sources={
                name: PartConfig.from_dict("condition_source", {**its, "name": name}, stored)
                for name, its in sources.items()
            },
        )

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any]) -> "RunConfig":
        """Return the run that a config inside a checkpoint describes; it imports nothing and builds no data."""
        return cls.from_dict(config, stored=True)

    def to_dict(self) -> dict[str, Any]:
        """Return the run as plain data, as a YAML has it."""
        config = {"task": self.task, "run": self.run, "seed": self.seed}
        if self.init_from is not None:
            config["init_from"] = self.init_from
        if self.imports:
            config["imports"] = list(self.imports)
        config |= {key: part.to_dict() for key, part in self.sections.items()}
        if self.condition_sources:
            config["condition_sources"] = {name: part.options for name, part in self.condition_sources.items()}
        return config

    def part(self, key: str) -> PartConfig:
        """Return a section; an empty one that was left out, if its role has one part. Raises UserError without one."""
        if key in self.sections:
            return self.sections[key]
        try:
            info = part_info(key, None)
        except UserError:
            raise UserError(f"{key}: this section has to be given") from None
        return PartConfig(key, info.name)

    def __getitem__(self, key: str) -> PartConfig:
        return self.sections[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sections)

    def __len__(self) -> int:
        return len(self.sections)

    def with_part(self, key: str, part: PartConfig) -> "RunConfig":
        """Return the run with another section in the place of one."""
        return replace(self, sections={**self.sections, key: part})

    def task_class(self) -> type:
        """Return the class of the task, imported. Raises UserError for an unknown one."""
        return _task(self.task).load()

    def check_across_keys(self) -> None:
        """Ask the parts' classes for violated rules across keys. Raises UserError with all of them at once."""
        problems = []
        for key, part in self.sections.items():
            problems += check_rules_of(part.role, part.to_dict(), key)
        for name, part in self.condition_sources.items():
            problems += check_rules_of(part.role, part.to_dict(), f"condition_sources.{name}")
        raise_all(problems)

    def unused_options(self) -> list[str]:
        """Return which options are given and have no effect beside the others, a line for each reason."""
        lines = [line for key, part in self.sections.items() for line in part.unused_options(key)]
        for name, part in self.condition_sources.items():
            lines += part.unused_options(f"condition_sources.{name}")
        return lines


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML, apply `key.path=value` overrides, resolve it, check it against the text of the parts it names.

    `defaults: other.yaml` (relative to the file), or a list of files, is read first and overlaid. `run` defaults to the
    file's name.

    Raises:
        UserError: missing or unreadable file, or any number of wrong entries, each with its key path, and the file that
            it stands in if that is one below, in one message.
    """
    config = {key: settled(value, _form(key)) for key, value in read(path, overrides).items()}
    if config.get("run") is None:
        config["run"] = Path(path).stem
    given = {parse(word)[0] for word in overrides}
    check(config, lambda: {key: file for key, file in origins(path).items() if key not in given})
    return RunConfig.from_dict(config)


def _form(key: str) -> TypeForm:
    """Return the annotation of a key at the top of a config."""
    return section_form(key) if key in MAPPINGS or (key in ROLES and key not in TOP) else TOP.get(key, Plain)


def _task(name: str | None) -> PartInfo:
    try:
        return part_info("task", name)
    except UserError as error:
        raise UserError(str(error).replace("task.name:", "task:", 1)) from None


def check(config: dict[str, Any], below: Callable[[], Mapping[str, Path]] = dict) -> None:
    """Check a whole config without building or importing anything. Raises UserError with all problems at once.

    Args:
        config: plain data.
        below: gives key path -> file of what stands in another file than the one that the user named.
    """
    task = _task(config.get("task") or DEFAULT_TASK)
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
    files = below() if problems else {}
    raise_all([f"{found} (in {files[k]})" if (k := found.partition(":")[0]) in files else found for found in problems])


def build(role: str, section: Mapping[str, Any] | None, *runtime: Any) -> Any:
    """Build the part that a section describes; `runtime` are its positional constructor arguments.

    Raises:
        UserError: unknown name or key, wrong type, missing key; all of them in one message.
    """
    section = settled(dict(section or {}), section_form(role))
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
