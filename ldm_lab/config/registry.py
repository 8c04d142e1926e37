"""The registry: role and name -> part, known by its text; its class is imported when it is needed.

A *part* is a class registered under a role and a name. Its keyword-only constructor arguments are the keys that its
section may have, their annotations the types and bounds; positional arguments are run-time objects that the caller of
`build` hands over. So every option is written once, where it is used:

    @register("denoiser", "ccld_unet")
    class CCLDUNet(Denoiser):
        def __init__(self, channels: int, conditions: ConditionSpec, *, base_channels: PositiveInt, ...) -> None:

A class without a constructor has the options of its base class, and `**common: Any` in a constructor stands for those
of its base class. A section with one possible class (`optim`, `ema`, ...) is a part whose name equals its role; its
YAML has no `name:`. Role and name are written as literals, on a class at the top of its module; annotations and
defaults have to be such as `ldm_lab.config.reading` understands.

Parts outside the package are in modules that the user names (`imports:` in a YAML, `--imports`), or in installed ones
that announce themselves by an entry point of the group `ldm_lab.parts`.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from ldm_lab.config.bounds import TypeForm
from ldm_lab.config.contracts import missing_of_contract
from ldm_lab.config.reading import ClassSource, Evaluated, Option, Unreadable, file_source, find_module
from ldm_lab.config.uses import AutoencoderUse, ConditionerUse, PartUse, keys_of
from ldm_lab.errors import UserError, first_line, unknown

PartClass = TypeVar("PartClass", bound=type)
ENTRY_POINTS = "ldm_lab.parts"
REGISTERED = re.compile(
    r"""^@(?:\w+\.)*register\(\s*["'](\w+)["']\s*(?:,\s*["']([^"'\n]+)["'])?[\s,]*\)""", re.MULTILINE
)
MODULE_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass(frozen=True)
class Role:
    """A kind of part.

    Attributes:
        place: the package whose modules register the parts of the role, or the one module that does.
        contract: the class of `ldm_lab.interfaces` that its parts are derived from; None if there is none.
        use: how a run uses such a part when it is frozen; None if none ever is.
        listed: whether `train.py --parts` lists it; a command's own parts need its extra installed.
    """

    place: str
    contract: str | None = None
    use: type[PartUse] | None = None
    listed: bool = True


ROLES = {
    "task": Role("ldm_lab.training"),
    "data": Role("ldm_lab.data"),
    "captions": Role("ldm_lab.data.captions"),
    "autoencoder": Role("ldm_lab.autoencoders", "Autoencoder", AutoencoderUse),
    "conditioner": Role("ldm_lab.conditioners", "Conditioner", ConditionerUse),
    "condition_source": Role("ldm_lab.condition_sources", "ConditionSource"),
    "denoiser": Role("ldm_lab.denoisers", "Denoiser"),
    "objective": Role("ldm_lab.objectives", "Objective"),
    "sampler": Role("ldm_lab.samplers", "Sampler"),
    "gap": Role("ldm_lab.training.gap"),
    "cache": Role("ldm_lab.training.caching"),
    "optim": Role("ldm_lab.training.optim"),
    "ema": Role("ldm_lab.ema"),
    "ema_snapshots": Role("ldm_lab.training.ema_snapshots"),
    "lora": Role("ldm_lab.training.lora"),
    "held_out": Role("ldm_lab.training.held_out"),
    "evaluate": Role("ldm_lab.training.evaluate"),
    "checkpoint": Role("ldm_lab.training.checkpointing"),
    "demo": Role("ldm_lab.training.demo"),
    "sampling": Role("ldm_lab.sampling.options"),
    "model_options": Role("ldm_lab.sampling.options", listed=False),
    "logging": Role("ldm_lab.training.logs"),
    "trainer": Role("ldm_lab.training.trainer"),
    "ddp": Role("ldm_lab.training.ddp"),
    "resume": Role("ldm_lab.training.resume"),
    "guard": Role("ldm_lab.training.guard"),
    "rule": Role("ldm_lab.rules"),
    "selection": Role("ldm_lab.curation.metadata", listed=False),
    "engine": Role("ldm_lab.curation.metadata", listed=False),
    "loss": Role("ldm_lab.training"),
    "perceptual": Role("ldm_lab.evaluation.perceptual"),
    "discriminator": Role("ldm_lab.training.discriminator"),
    "reconstructions": Role("ldm_lab.training.reconstructions"),
    "enlargements": Role("ldm_lab.training.enlargements"),
    "inpaintings": Role("ldm_lab.training.inpaintings"),
    "head": Role("ldm_lab.curation.heads", use=PartUse),
}
FROZEN = tuple(name for name, role in ROLES.items() if role.use is not None)  # roles of parts with weights of their own
MAPPINGS = {"condition_sources": "condition_source"}  # sections {part name: its options} -> the role of those parts


@dataclass
class PartInfo:
    """What is known of a part.

    Attributes:
        module: dotted name of the module that registers it.
        path: of that module's file; None for a class made at run time, without a file.
        cls: the class itself, once it has been imported.
    """

    role: str
    name: str
    module: str
    path: Path | None
    cls: type | None = None

    @cached_property
    def source(self) -> ClassSource | None:
        """The text of its class, None without a file. Raises UserError for a file that cannot be read."""
        if self.path is None:
            return None
        try:
            text = file_source(self.module, self.path)
            classes = (ClassSource(text, node) for node in text.classes.values())
            return next(its for its in classes if its.registered() == (self.role, self.name))
        except SyntaxError as error:
            broken[str(self.path)] = f"{error.msg} (line {error.lineno})"
        except (Unreadable, UnicodeDecodeError, OSError, StopIteration) as error:
            broken[str(self.path)] = first_line(error)
        raise UserError(f"{self.label}: {self.path} is not readable: {broken[str(self.path)]}")

    @cached_property
    def options(self) -> dict[str, Option]:
        """Its options by name. Raises UserError for a signature that cannot be read."""
        try:
            return self.source.options() if self.source else signature_options(self.load())
        except Unreadable as error:
            raise UserError(f"{self.label}: its options cannot be read from its text: {error}") from None

    @property
    def label(self) -> str:
        """Such as "denoiser.name=ccld_unet"; the role alone where there is one part of it."""
        return self.role if self.name == self.role else f"{self.role}.name={self.name}"

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return self.source.summary() if self.source else (inspect.getdoc(self.load()) or "").partition("\n")[0]

    def load(self) -> type:
        """Return the class, importing its module if need be. Raises UserError if that fails."""
        if self.cls is None and self.path is not None:
            _import(self.module, self.path)
        if self.cls is None:
            raise UserError(f"{self.path}: importing it registers no {self.role} {self.name!r}")
        return self.cls

    def constant(self, name: str) -> Evaluated:
        """Return the value of a class attribute, from the text. Raises UserError if it cannot be read."""
        try:
            return self.source.constant(name) if self.source else dict(inspect.getmembers(self.load()))[name]
        except Unreadable as error:
            raise UserError(f"{self.label}: {name} cannot be read from its text: {error}") from None


_registry: dict[tuple[str, str], PartInfo] = {}
_imports: list[str] = []  # modules and packages outside ldm_lab, in the user's order
_read: set[str] = set()  # places and outside modules that have been read
broken: dict[str, str] = {}  # file -> why it could not be read or imported, in a line


def register(role: str, name: str | None = None) -> Callable[[PartClass], PartClass]:
    """Class decorator: make the class known as `name` (default: the role itself) of `role`.

    The class keeps the names as `part_role` and `part_name`. Raises UserError for a class that lacks something of its
    role's contract, an unknown role, or a name that is taken.
    """

    def add(cls: PartClass) -> PartClass:
        if role not in ROLES:
            raise UserError(f"{cls.__module__}.{cls.__name__}: {unknown('role', role, ROLES)}")
        cls.part_role, cls.part_name = role, name or role
        if missing := missing_of_contract(cls, ROLES[role].contract):
            raise UserError(f"{cls.__module__}.{cls.__name__}: {missing}")
        _add(PartInfo(role, name or role, cls.__module__, _file_of(cls), cls))
        return cls

    return add


def _add(info: PartInfo) -> None:
    """Make a part known, or its class if its text is known already. Raises UserError for a name that is taken."""
    known = _registry.setdefault((info.role, info.name), info)
    if known is info:
        return
    if known.path is None or info.path is None or known.path.resolve() != info.path.resolve():
        raise UserError(
            f"{info.label} is registered twice: in {known.path or known.module}, {info.path or info.module}"
        )
    known.cls = known.cls or info.cls


def _file_of(cls: type) -> Path | None:
    """Return the file with the text of an imported class; None for a class inside a function, or without a file."""
    try:
        path = Path(inspect.getfile(cls))
        classes = file_source(cls.__module__, path).classes
    except (TypeError, OSError, SyntaxError, UnicodeDecodeError):
        return None
    return path if cls.__qualname__ in classes else None


def signature_options(cls: type) -> dict[str, Option]:
    """Return the options of an imported class by its signature, after the same rules as `ClassSource.options`."""
    found: dict[str, Option] = {}
    for owner, following in zip(cls.__mro__, (*cls.__mro__[1:], object)):
        if owner.__init__ is following.__init__ and owner is not object:
            continue
        parameters = inspect.signature(owner.__init__, eval_str=True).parameters.values()
        for p in parameters:
            if p.kind is p.KEYWORD_ONLY and p.name not in found:
                required = p.default is p.empty
                found[p.name] = Option(p.annotation, None if required else p.default, required, "")
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return found


def add_imports(modules: Iterable[str]) -> None:
    """Make the parts of the user's own modules known. Raises UserError for one that is not there or not readable."""
    for name in modules:
        if not isinstance(name, str) or not MODULE_NAME.fullmatch(name):
            raise UserError(f"imports: {name!r} is not the name of a module, such as my_parts or my_package.parts")
        if name in _imports:
            continue
        if find_module(name) is None and str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))  # where the user stands; a program's own folder is in the path already
            importlib.invalidate_caches()
        if find_module(name) is None:
            raise UserError(f"imports: no module {name!r} here or among the installed ones")
        _imports.append(name)
        _read_place(name)


def imports() -> tuple[str, ...]:
    """Return the names that `add_imports` was given."""
    return tuple(_imports)


def _read_place(place: str) -> None:
    """Read the parts of a module, or of all modules of a package."""
    if place in _read:
        return
    _read.add(place)
    path = find_module(place)
    if path is None:
        return
    _read_file(place, path)
    if path.name == "__init__.py":
        for file in sorted(path.parent.glob("*.py")):
            if file != path:
                _read_file(f"{place}.{file.stem}", file)
        for file in sorted(path.parent.glob("*/__init__.py")):
            _read_file(f"{place}.{file.parent.name}", file)


def _read_file(name: str, path: Path) -> None:
    """Make the parts of a file known by their names; what is wrong with it is noted in `broken`."""
    try:
        for role, its in REGISTERED.findall(path.read_text(encoding="utf-8")):
            if role not in ROLES:
                raise UserError(unknown("role", role, ROLES))
            _add(PartInfo(role, its or role, name, path))
    except (UserError, UnicodeDecodeError, OSError) as error:
        broken[str(path)] = first_line(error)


def _import(name: str, path: Path) -> None:
    """Import a module. Raises UserError that names it in a line if that fails."""
    try:
        importlib.import_module(name)
    except UserError:
        raise
    except Exception as error:  # whatever a user's module may raise
        broken[str(path)] = f"{type(error).__name__}: {first_line(error)}"
        for info in _registry.values():  # it may have registered some before it failed
            info.cls = None if info.path == path else info.cls
        raise UserError(f"{path}: importing it failed: {broken[str(path)]}") from error


def _read_installed() -> None:
    """Read the parts that installed packages announce; looking for them takes a while, so only when it is needed."""
    if ENTRY_POINTS in _read:
        return
    _read.add(ENTRY_POINTS)
    from importlib.metadata import entry_points

    for point in entry_points(group=ENTRY_POINTS):
        _read_place(point.value.partition(":")[0])


def _known(role: str) -> dict[str, PartInfo]:
    return {name: info for (its, name), info in sorted(_registry.items()) if its == role}


def infos(role: str) -> dict[str, PartInfo]:
    """Return name -> what is known of each part of a role, without importing any."""
    _read_place(ROLES[role].place)
    _read_installed()
    return _known(role)


def parts(role: str) -> dict[str, type]:
    """Return name -> class of all parts of a role that can be imported; the others are named on stderr."""
    classes = {}
    for name, info in infos(role).items():
        try:
            classes[name] = info.load()
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
    return classes


def part_info(role: str, name: str | None, where: str | None = None) -> PartInfo:
    """Return what is known of a part.

    Args:
        role: of the part.
        name: what its section says; None where it says nothing.
        where: key path of the section, for the message; by default the role.

    Raises:
        UserError: no such part.
    """
    where = where or role
    _read_place(ROLES[role].place)
    for sought in (role, name):
        if isinstance(sought, str) and (role, sought) in _registry:
            return _registry[role, sought]
    known = infos(role)
    if name is None:
        raise UserError(f"{where}.name: has to be given. Known: {', '.join(known)}.")
    if not isinstance(name, str) or name not in known:
        raise UserError(f"{where}.name: {_with_hint(unknown(role.replace('_', ' '), name, known))}")
    return known[name]


def _with_hint(message: str) -> str:
    """Return a message on an unknown part with what may hold it: a file that could not be read, a module not named."""
    if broken:
        return f"{message} Not readable: " + "; ".join(f"{file}: {why}" for file, why in broken.items())
    if "Did you mean" in message:
        return message
    return f"{message} Parts of your own: imports: [my_parts] in the YAML, or --imports my_parts."


def part_class(role: str, section: Any) -> type:
    """Return the class that a section (or a name) means, imported. Raises UserError for an unknown name."""
    name = section.get("name") if isinstance(section, Mapping) else section
    return part_info(role, name).load()


def use_keys(role: str) -> dict[str, TypeForm]:
    """Return key -> type and bounds of the keys that say how a run uses a frozen part; none for other roles."""
    return keys_of(ROLES[role].use)


def known_elsewhere(info: PartInfo, key: str) -> list[str]:
    """Return the labels of the other parts of a role that have a key."""
    others = [other for other in infos(info.role).values() if other.name != info.name]
    return [other.label for other in others if key in _options_of(other)]


def _options_of(info: PartInfo) -> Iterator[str]:
    try:
        yield from info.options
    except UserError:
        return
