"""Our own files: a part (`*.safetensors` with its config), a trained model (`ema.safetensors`), a run's `.ckpt`."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm_lab.checkpoints.files import FORMAT, GAP_PREFIX, write_safetensors
from ldm_lab.checkpoints.importer import (
    Importer,
    LoadedModel,
    LoadedPart,
    Section,
    register_importer,
)
from ldm_lab.checkpoints.opened import OpenedFile, TensorInfo
from ldm_lab.checkpoints.third_party import strip_prefix
from ldm_lab.config import FROZEN, Plain, check_section, use_keys
from ldm_lab.errors import UserError

# What a config inside a model file must not bring along: a data section may hold shell commands (`pipe:`), and the
# rest concerns the run alone.
RUN_SECTIONS = (
    *("data", "resume", "init_from", "logging", "trainer", "checkpoint", "guard", "imports"),
    *("demo", "enlargements", "inpaintings", "ema_snapshots", "held_out", "evaluate"),
)
AVERAGED, RAW = "model_ema.", "model."  # prefixes of the trained network's tensors in a run's checkpoint
LATENT_STD = "latent_std"
LATENT_STATISTICS = ("latent_mean", LATENT_STD)  # an autoencoder's buffers, [] or [C]
NOT_FACTS = ("format", "role", "config")
OF_SESSIONS = ("data", "data_count", "batch", "precision", "hardware")  # facts that may be others in each of a run's
BEGUN_WITH = "begun_with"  # the weights that the first one began with


# --------------------------------------------------------------------------------------------------------- writing


def save_part(
    path: str | Path,
    module: nn.Module,
    section: Mapping[str, Plain],
    extra: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a part's weights with the config that rebuilds it.

    Args:
        path: a `.safetensors` file.
        module: the part; its class is registered.
        section: its config section, of which the keys of its architecture are stored.
        extra: further text metadata, such as what was measured.
        dtype: of the stored weights; float16 halves the file. Single numbers, statistics and tables stay exact.
        state: the weights, by default the module's own.
    """
    role, name = module.part_role, module.part_name
    architecture = {key: value for key, value in section.items() if key not in ("name", *use_keys(role))}
    config = json.dumps({"name": name, **architecture})
    weights = {name for name, value in module.named_parameters() if value.ndim}
    state = module.state_dict() if state is None else state
    state = {name: value.to(dtype) if name in weights else value for name, value in state.items()}
    write_safetensors(path, state, {"format": FORMAT, "role": role, "config": config, **(extra or {})})


def save_model(path: str | Path, state: dict[str, Tensor], config: Mapping[str, Plain], extra: dict[str, str]) -> None:
    """Write a model's weights with the part of the config that rebuilds it."""
    kept = json.dumps(without_run_sections(config))
    write_safetensors(path, state, {"format": FORMAT, "role": "model", "config": kept, **extra})


def listed(statistic: Tensor) -> str:
    """Return a latent mean or std, [] or [C], for people."""
    return ", ".join(f"{value:g}" for value in statistic.flatten().tolist())


def without_run_sections(config: Mapping[str, Plain]) -> Section:
    """Return a config without the sections that concern the run alone."""
    return Section({key: value for key, value in config.items() if key not in RUN_SECTIONS})


# --------------------------------------------------------------------------------------------------------- reading


def part_config(path: Path, metadata: Mapping[str, str]) -> tuple[str, Section]:
    """Return `(role, config)` from the metadata of a safetensors file of ours. Raises UserError if they make no sense.

    The role of a whole model is "model".
    """
    try:
        config = json.loads(metadata.get("config", ""))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path}: its config is not readable")
    role = metadata.get("role")
    if role not in ("model", *FROZEN):
        raise UserError(f"{path}: holds a part of an unknown role, {str(role)[:100]!r}")
    return role, Section(config)


class _Native(Importer):
    """A safetensors file of ours: weights, and a config in the metadata."""

    precedence = 2

    def facts(self, file: OpenedFile) -> Section:
        """Return the step, the checksums of the frozen parts, what an autoencoder's latents are divided by."""
        frozen = {role: file.metadata[role] for role in ("autoencoder", "conditioner") if role in file.metadata}
        facts = Section(step=file.metadata.get("step"), frozen=frozen if self.holds_model else {})
        if LATENT_STD in file.tensors:
            facts[LATENT_STD] = ", ".join(f"{value:.5g}" for value in file.read()[LATENT_STD].flatten().tolist())
        return facts


@register_importer
class NativePart(_Native):
    """A part of ours, of any role and name."""

    kind = "part"
    title = "a part of ldm_lab's"

    def matches(self, file: OpenedFile) -> bool:
        """Return whether the metadata is of a part of ours."""
        return file.metadata.get("format") == FORMAT and file.metadata.get("role") != "model"

    def config(self, file: OpenedFile) -> Section:
        """Return the part's config, by its role."""
        role, config = part_config(file.path, file.metadata)
        return Section({role: config})

    def problems(self, config: Section) -> list[str]:
        """Return what is wrong with the part's config."""
        return [problem for role, section in config.items() for problem in check_section(role, section, "config")]

    def read(self, file: OpenedFile, role: str) -> LoadedPart:
        """Return the part, if it is of this role and its config makes sense."""
        stored_role, config = part_config(file.path, file.metadata)
        if stored_role != role:
            raise UserError(f"{file.path}: holds the weights of the role {stored_role}, not {role}")
        problems = check_section(role, config, f"{file.path}: config")
        if problems:
            raise UserError(problems[0])
        return LoadedPart(file.read(), config)


@register_importer
class NativeModel(_Native):
    """A trained model of ours: `ema.safetensors`."""

    kind = "model"
    title = "a trained model of ldm_lab's"
    folder_files = ("ema.safetensors",)
    holds_model = True

    def matches(self, file: OpenedFile) -> bool:
        """Return whether the metadata is of a model of ours."""
        return file.metadata.get("format") == FORMAT and file.metadata.get("role") == "model"

    def network(self, file: OpenedFile) -> Mapping[str, TensorInfo]:
        """Return the network's tensors, without the means beside them."""
        return {name: info for name, info in file.tensors.items() if not name.startswith(GAP_PREFIX)}

    def config(self, file: OpenedFile) -> Section:
        """Return the config that rebuilds the model, whatever it is."""
        try:
            return json.loads(file.metadata["config"])
        except (KeyError, ValueError, RecursionError):
            raise UserError(f"{file.path}: its config is not readable") from None

    def read_model(self, file: OpenedFile, ema: bool, overrides: Section) -> LoadedModel:
        """Return the model."""
        config = self.config(file)
        if not isinstance(config, dict):
            raise UserError(f"{file.path}: its config is not readable")
        extra = {key: text for key, text in file.metadata.items() if key not in NOT_FACTS}
        return LoadedModel(Section(config), file.read(), extra)


@register_importer
class RunCheckpoint(Importer):
    """A checkpoint of a run of ours: `last.ckpt`, `step=....ckpt`."""

    kind = "run"
    title = "a checkpoint of a run of ldm_lab's"
    precedence = 4  # of LoRA, its tensors are named as those of other programs
    holds_model = True
    has_average = True

    def matches(self, file: OpenedFile) -> bool:
        """Return whether our own entry is in it."""
        return FORMAT in file.extra

    def network(self, file: OpenedFile) -> Mapping[str, TensorInfo]:
        """Return the tensors of the averaged network, or of the trained one if there is no average."""
        return strip_prefix(file.tensors, AVERAGED) or strip_prefix(file.tensors, RAW) or file.tensors

    def config(self, file: OpenedFile) -> Section:
        """Return the config that rebuilds the model."""
        return without_run_sections(self._whole_config(file))

    def facts(self, file: OpenedFile) -> Section:
        """Return the step and the checksums of the frozen parts."""
        return Section(step=file.extra.get("global_step"), frozen=self._frozen(file))

    def read_model(self, file: OpenedFile, ema: bool, overrides: Section) -> LoadedModel:
        """Return the trained network with its config; of a task that trains a part, that part's weights."""
        whole, tensors = self._whole_config(file), file.read()
        if whole.get("lora"):
            raise UserError(
                f"{file.path}: a checkpoint of a run of LoRA, without its base model; lora.safetensors beside it is "
                "what sample.py --checkpoint BASE --lora takes"
            )
        averaged = ema and any(name.startswith(AVERAGED) for name in tensors)
        extra = {"step": str(file.extra.get("global_step")), **self._frozen(file)}
        run, data = file.extra[FORMAT], whole.get("data")
        size = run.get("image_size", data.get("image_size") if isinstance(data, dict) else None)
        if size:
            extra["image_size"] = str(size)
        state = strip_prefix(tensors, AVERAGED if averaged else RAW)
        state |= {name: value for name, value in tensors.items() if name.startswith(GAP_PREFIX)}
        return LoadedModel(without_run_sections(whole), state, extra)

    def _whole_config(self, file: OpenedFile) -> Section:
        run = file.extra[FORMAT]
        stored = run.get("model", run.get("config")) if isinstance(run, dict) else None
        if not isinstance(stored, dict):
            raise UserError(f"{file.path}: not a checkpoint of ldm_lab's (it holds no config)")
        try:
            return Section(json.loads(json.dumps(stored)))
        except (TypeError, ValueError, RecursionError):
            raise UserError(f"{file.path}: its config is more than plain data") from None

    def _frozen(self, file: OpenedFile) -> dict[str, str]:
        run = file.extra[FORMAT]
        frozen = run.get("frozen") if isinstance(run, dict) else None
        if not isinstance(frozen, dict):
            return {}
        return {str(role): checksum for role, checksum in frozen.items() if isinstance(checksum, str)}
