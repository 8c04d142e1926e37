"""The importers: one for each format in which weights are stored, registered in the format's own file.

    @register_importer
    class CompVisAutoencoder(Importer):
        kind, title, parts = "compvis", "an autoencoder of CompVis's latent-diffusion", {"autoencoder": "kl_f8"}

        def matches(self, file: OpenedFile) -> bool: ...
        def infer_config(self, tensors: Shapes) -> Section: ...
        def read(self, file: OpenedFile, role: str) -> LoadedPart: ...

That is all that `weights:`, `init_from`, `--checkpoint`, `inspect` and `convert` need: `detect_format` opens a file
once, asks the importers whose it is, and hands on what it has opened. Those of this package are in `formats` and
`native`; a module of the user's own (`imports:`) may register others.
"""

import functools
import importlib
import pkgutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeVar

from torch import Tensor

from ldm_lab.checkpoints.folders import weights_in
from ldm_lab.checkpoints.opened import OpenedFile, Shapes, TensorInfo, below_attribute, open_weights
from ldm_lab.conditions import ConditionSpec
from ldm_lab.config import MAPPINGS, check_mapping, check_section
from ldm_lab.config.registry import imports
from ldm_lab.errors import UserError, first_line
from ldm_lab.io.json_files import Json, JsonObject
from ldm_lab.pretrained.resolve import resolve_weights

MODEL_ROLES = ("autoencoder", "conditioner", "denoiser", "objective")  # sections of a config that sampling builds


class Section(JsonObject):
    """A section of a config, or a whole one, as plain data: a part's name and its options."""


class LoadedPart(NamedTuple):
    """A part out of a file.

    Attributes:
        state: its weights, on the CPU.
        config: the part's name, and those of its options that the file tells.
    """

    state: dict[str, Tensor]
    config: Section

    @property
    def options(self) -> Section:
        """The options alone: keyword arguments of the part's constructor."""
        return Section({key: value for key, value in self.config.items() if key != "name"})


class LoadedModel(NamedTuple):
    """A trained model out of a file.

    Attributes:
        config: sections that rebuild it.
        state: the denoiser's weights under its own names, on the CPU.
        extra: text such as the step, the size of the images and the checksums of the frozen parts.
    """

    config: Section
    state: dict[str, Tensor]
    extra: dict[str, str]


class DenoiserShape(NamedTuple):
    """What a denoiser is constructed with, beside its options.

    Attributes:
        channels: C of the latents.
        conditions: what it is told beside x and the time.
    """

    channels: int
    conditions: ConditionSpec


class LoadedDenoiser(NamedTuple):
    """A denoiser out of another program's file.

    Attributes:
        state: its weights, on the CPU.
        options: those that the shapes tell.
        shape: what it was constructed with beside them.
    """

    state: dict[str, Tensor]
    options: Section
    shape: DenoiserShape


class Importer:
    """How one format is recognized and read. Nothing of a file is executed.

    Attributes:
        kind: the format's name.
        title: what such a file is, for people: "a VAE of diffusers'".
        parts: the frozen parts in it, role -> name; several in a training checkpoint.
        folder_files: names of the file with the weights in a folder of this format, in order of preference.
        precedence: of several that match, the highest counts: a whole model has parts of other formats in it.
        holds_model: whether `read_model` gives a trained denoiser.
        has_average: whether there are averaged weights beside those as trained.
        takes_overrides: whether `read_model` can be told what no shape tells.
        unsaid: what the user has to say of such a file's part, and how.
        used_by: who reads such a file in place of `weights:` and `--checkpoint`.
    """

    kind: ClassVar[str]
    title: ClassVar[str]
    parts: ClassVar[Mapping[str, str]] = {}
    folder_files: ClassVar[tuple[str, ...]] = ()
    precedence: ClassVar[int] = 0
    holds_model: ClassVar[bool] = False
    has_average: ClassVar[bool] = False
    takes_overrides: ClassVar[bool] = False
    unsaid: ClassVar[str] = ""
    used_by: ClassVar[str] = ""

    def matches(self, file: OpenedFile) -> bool:
        """Return whether a file is of this format, by the names and shapes of its tensors."""
        raise NotImplementedError

    def network(self, file: OpenedFile) -> Mapping[str, TensorInfo]:
        """Return the tensors of the network that the file is about, without what is stored beside it."""
        return file.tensors

    def infer_config(self, tensors: Shapes) -> Section:
        """Return the options of the part that follow from the shapes.

        Raises:
            KeyError, IndexError, ValueError, ZeroDivisionError: tensors that are missing or misshapen.
        """
        return Section()

    def config(self, file: OpenedFile) -> Section:
        """Return what the file tells of its networks, by role; of a model the config that rebuilds it.

        Raises:
            UserError: an incomplete file.
        """
        if self.holds_model:
            return self.read_model(file, True, Section()).config
        try:
            options = self.infer_config(self.network(file))
        except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
            raise UserError(f"{file.path}: not complete ({error} is missing or misshapen)") from None
        return Section({role: {"name": name, **options} for role, name in self.parts.items() if options})

    def problems(self, config: Section) -> list[str]:
        """Return what is wrong with a model's config, each with its key path."""
        return config_problems(config) if self.holds_model else []

    def facts(self, file: OpenedFile) -> Section:
        """Return what else is known: "step" of the training, "frozen" (checksums of the parts it was trained with)."""
        return Section(step=file.extra.get("global_step"))

    def read(self, file: OpenedFile, role: str) -> LoadedPart:
        """Return the part of a role. Raises UserError if there is none, or not a whole one."""
        raise UserError(f"{file.path}: is {self.title}: no {role} can be read from it")

    def read_model(self, file: OpenedFile, ema: bool, overrides: Section) -> LoadedModel:
        """Return the trained model.

        Args:
            file: the opened file.
            ema: of a training checkpoint, take the averaged weights; else those as trained.
            overrides: what the file does not say of its architecture.

        Raises:
            UserError: not a trained model, or not a whole one.
        """
        raise UserError(f"{file.path}: not a trained model: it is {self.title}")

    def denoiser_shape(self, file: OpenedFile, ema: bool) -> DenoiserShape | None:
        """Return what another program's denoiser was constructed with; None where the file's config tells it."""
        return None


class Unknown(Importer):
    """Tensors of nobody's."""

    kind = "unknown"
    title = "tensors of an unknown model"

    def matches(self, file: OpenedFile) -> bool:
        """Return true: what no other format is."""
        return True


# ----------------------------------------------------------------------------------------------------- the registry

ImporterClass = TypeVar("ImporterClass", bound=type[Importer])
_registry: dict[str, Importer] = {}


def register_importer(cls: ImporterClass) -> ImporterClass:
    """Class decorator: make a format known."""
    before = _registry.get(cls.kind)
    assert before is None or type(before).__qualname__ == cls.__qualname__, f"{cls.kind} is registered twice"
    _registry[cls.kind] = cls()
    return cls


def importers() -> list[Importer]:
    """Return all importers, those of whole models first."""
    package = importlib.import_module("ldm_lab.checkpoints.formats")
    for name in imports():
        _import_of_user(name)
    for name in (
        "ldm_lab.checkpoints.native",
        *(f"{package.__name__}.{m.name}" for m in pkgutil.iter_modules(package.__path__)),
    ):
        importlib.import_module(name)
    return sorted(_registry.values(), key=lambda importer: -importer.precedence)


@functools.cache
def _import_of_user(name: str) -> None:
    """Import a module of the user's own for the importers in it; one that fails is named once and left out."""
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever a user's module may raise
        print(f"left out: {name}: importing it failed: {type(error).__name__}: {first_line(error)}", file=sys.stderr)


def importers_of(role: str, name: str) -> list[Importer]:
    """Return those that read a part of a role and name."""
    return [importer for importer in importers() if importer.parts.get(role) == name]


# ---------------------------------------------------------------------------------------------------- what a file is


@dataclass(frozen=True)
class DetectedFile:
    """A file of weights, opened, and the importer that reads it."""

    file: OpenedFile
    importer: Importer

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def kind(self) -> str:
        return self.importer.kind

    @property
    def title(self) -> str:
        return f"{self.importer.title} ({self.file.container})" if self.file.container else self.importer.title


def detect_format(path: str | Path, what: str = "weights") -> DetectedFile:
    """Return what a file, a folder with one in it, or a released file by its name, is; it is opened once.

    Raises:
        UserError: missing or damaged file, one that is no file of weights, one whose loading could run code.
    """
    file = open_weights(find_weights(path, what))
    importer = next((i for i in importers() if i.matches(file)), None)
    if importer is None and (inner := below_attribute(file)) is not None:  # perhaps of a module of somebody's own
        importer = next((i for i in importers() if i.matches(inner)), None)
        file = file if importer is None else inner
    for note in file.notes:
        say_once(f"{file.path}: {note}")
    return DetectedFile(file, importer or Unknown())


@functools.cache
def say_once(line: str) -> None:
    """Print a line for people, the first time it is said: standard output is for what a program was asked for."""
    print(line, file=sys.stderr)


def find_weights(name: str | Path, what: str = "weights") -> Path:
    """Return the path of weights: a file, a released name, or an hf:// address (`resolve_weights`).

    A folder stands for the file with the weights in it.
    """
    path = resolve_weights(name, what)
    return _file_in(path) if path.is_dir() else path


def _file_in(folder: Path) -> Path:
    """Return the file with the weights in a folder. Raises UserError if there is none."""
    path, note = weights_in(folder, [name for importer in importers() for name in importer.folder_files])
    if note:
        say_once(note)
    return path


def config_problems(config: Json) -> list[str]:
    """Return what is wrong with the sections of a model's config that sampling builds, each with its key path."""
    if not isinstance(config, dict):
        return [f"config: a mapping of sections is needed, not {str(config)[:100]!r}"]
    task = config.get("task", "diffusion")
    if not isinstance(task, str):
        return [f"config.task: text is needed, not {str(task)[:100]!r}"]
    problems = [
        problem
        for role in MODEL_ROLES
        if role in config
        for problem in check_section(role, config[role], f"config.{role}")
    ]
    for key, role in MAPPINGS.items():
        if config.get(key) is not None:
            problems += check_mapping(role, config[key], f"config.{key}")
    return problems
