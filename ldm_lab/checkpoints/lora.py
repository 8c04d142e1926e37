"""LoRA files: what is added to the weights of a base model, as products of two small matrices for each layer.

Hu et al. 2021 (arXiv 2106.09685), section 4.1: W + weight * alpha / rank * B A. Of a convolution A has the kernel and B
is one pixel wide. A file may be a stranger's: it is safetensors alone, it builds nothing, and everything in it is
compared with the network that it is added to.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ldm_lab.checkpoints.files import FORMAT, write_safetensors
from ldm_lab.checkpoints.importer import DetectedFile, Section, config_problems, detect_format
from ldm_lab.checkpoints.native import without_run_sections
from ldm_lab.checkpoints.opened import Shapes
from ldm_lab.config import RunConfig, check_section
from ldm_lab.errors import UserError
from ldm_lab.io.atomic import digest

ROLE = "lora"  # in the metadata, and of the section in the config
FILE = "lora.safetensors"  # in the folder of a run
DOWN, UP = ".lora_A.weight", ".lora_B.weight"  # what the names of A and B end with
# What the metadata say of the base model.
BASE, BASE_SHA256, BASE_WEIGHTS = "base", "base_sha256", "base_weights"
MERGED = "merged_loras"  # in the metadata of a model: those that were merged into it


class BaseModel(NamedTuple):
    """The model that a LoRA was trained on.

    Attributes:
        name: what others may call it.
        sha256: of its file.
        weights: its `fingerprint`.
    """

    name: str
    sha256: str
    weights: str

    def facts(self) -> dict[str, str]:
        """Return it as metadata."""
        return {BASE: self.name, BASE_SHA256: self.sha256, BASE_WEIGHTS: self.weights}


class LowRank(NamedTuple):
    """What is added to the weight of a layer, as two factors.

    Attributes:
        down: A, [rank, in] or [rank, in, kernel, ...].
        up: B, [out, rank] or [out, rank, 1, ...].
    """

    down: Tensor
    up: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the layer's weight."""
        return len(self.up), *self.down.shape[1:]

    def product(self, device: torch.device) -> Tensor:
        """Return B A in the weight's shape, float32."""
        up, down = (factor.to(device, torch.float32).flatten(1) for factor in (self.up, self.down))
        return (up @ down).view(self.shape)


@dataclass(frozen=True)
class Lora:
    """A LoRA out of its file.

    Attributes:
        path: of the file.
        scale: alpha / rank.
        layers: by the names of the network's layers.
        config: of the run that trained it.
        base: what it was trained on; empty texts where the file does not tell.
    """

    path: Path
    scale: float
    layers: dict[str, LowRank]
    config: Section
    base: BaseModel

    def check(self, own: Shapes, names: Mapping[str, str]) -> None:
        """Raise UserError unless it fits the weights of a network, and the model that has it.

        Args:
            own: of the network, by name.
            names: of the model's denoiser and objective, by role.
        """
        trained_on = f"it was trained on {self.base.name}" if self.base.name else "it was trained on another model"
        for role, name in names.items():
            its = self.config.get(role, {}).get("name")
            if its != name:
                raise UserError(f"{self.path}: is for the {role} {its!r}, and this model has {name!r}; {trained_on}")
        for layer, factors in self.layers.items():
            there = own.get(f"{layer}.weight")
            if there is None or tuple(there.shape) != factors.shape:
                size = "is missing" if there is None else f"is {list(there.shape)}"
                raise UserError(
                    f"{self.path}: does not fit this model: {layer} {size} here and is {list(factors.shape)} there; "
                    f"{trained_on}"
                )

    def add_to(self, weights: Mapping[str, Tensor], weight: float) -> None:
        """Add it to weights in place, `weight` times. Raises UserError if they do not stay finite."""
        for layer, factors in self.layers.items():
            own = weights[f"{layer}.weight"]
            own.add_((factors.product(own.device) * (self.scale * weight)).to(own.dtype))
            if not torch.isfinite(own).all():
                raise UserError(f"{self.path}: with the weight {weight:g} {layer} would not be finite; a smaller one")


# ---------------------------------------------------------------------------------------------------------- files


def save_lora(
    path: Path, factors: Mapping[str, Tensor], config: RunConfig, base: BaseModel, facts: Mapping[str, str]
) -> None:
    """Write a LoRA.

    Args:
        path: a `.safetensors` file.
        factors: A and B of the layers, by the layer's name and `DOWN` or `UP`.
        config: of the run, with its section `lora`.
        base: what it was trained on.
        facts: further text metadata.
    """
    kept = json.dumps(without_run_sections(config.to_dict()))
    write_safetensors(path, dict(factors), {"format": FORMAT, "role": ROLE, "config": kept, **base.facts(), **facts})


def read_lora(path: str | Path) -> Lora:
    """Return the LoRA in a file, or in the folder of the run that trained it.

    Raises:
        UserError: missing or damaged file, one that holds something else, factors that do not go together.
    """
    found = detect_format(path, "lora")
    if found.kind == "run":
        raise UserError(f"{found.path}: a checkpoint to go on with; a run of LoRA writes {FILE} beside it for sampling")
    if found.kind == "adapter":
        raise UserError(
            f"{found.path}: a LoRA or another adapter of another program's (kohya's, diffusers', peft's), which are "
            f"for other networks than those of ldm_lab; it takes the {FILE} that its own runs write"
        )
    if found.kind != ROLE:
        raise UserError(f"{found.path}: no LoRA: it holds {found.title}")
    config = found.importer.config(found.file)
    if problems := lora_problems(config):
        raise UserError(f"{found.path}: {problems[0]}")
    section = config[ROLE]
    rank, alpha = section["rank"], section.get("alpha") or section["rank"]
    told = found.file.metadata
    base = BaseModel(told.get(BASE, ""), told.get(BASE_SHA256, ""), told.get(BASE_WEIGHTS, ""))
    return Lora(found.path, alpha / rank, _layers(found, rank), config, base)


def lora_problems(config: Section) -> list[str]:
    """Return what is wrong with the config of a LoRA, each with its key path."""
    section = config.get(ROLE) if isinstance(config, dict) else None
    if not isinstance(section, dict):
        return ["its config has no section 'lora'"]
    return [*check_section(ROLE, section, f"config.{ROLE}"), *config_problems(config)]


def _layers(found: DetectedFile, rank: int) -> dict[str, LowRank]:
    """Return the factors in a file by layer. Raises UserError for those that do not go together, or are not finite."""
    tensors = found.file.read()
    layers = {}
    for name, down in tensors.items():
        if not name.endswith((DOWN, UP)):
            raise UserError(f"{found.path}: {name[:100]} is no factor of a LoRA ({DOWN[1:]}, {UP[1:]})")
        layer = name.removesuffix(DOWN).removesuffix(UP)
        up = tensors.get(f"{layer}{UP}")
        if up is None or f"{layer}{DOWN}" not in tensors:
            raise UserError(f"{found.path}: {layer[:100]} has one of its two factors only")
        if not name.endswith(DOWN):
            continue
        sizes = f"{list(down.shape)} and {list(up.shape)}"
        if not (2 <= down.ndim == up.ndim <= 5) or any(size != 1 for size in up.shape[2:]) or not down.numel():
            raise UserError(f"{found.path}: {layer[:100]} has factors of {sizes}, which are no layer's")
        if not down.shape[0] == up.shape[1] == rank:
            raise UserError(f"{found.path}: {layer[:100]} has factors of {sizes}; its config says rank {rank}")
        for factor in (down, up):
            if not factor.is_floating_point() or not torch.isfinite(factor.float()).all():
                raise UserError(f"{found.path}: {layer[:100]} holds numbers that are not finite, or no numbers")
        layers[layer] = LowRank(down, up)
    if not layers:
        raise UserError(f"{found.path}: a LoRA without any layer")
    return layers


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Return what tells a network's weights from others, in float32 or float16: the SHA-256 of them in float16."""

    def pieces() -> Iterator[bytes]:
        for name in sorted(weights):
            yield name.encode()
            yield weights[name].detach().cpu().to(torch.float16).contiguous().numpy().tobytes()

    return digest(pieces())


# -------------------------------------------------------------------------------------------------------- weights


class WeightedLora(NamedTuple):
    """A LoRA and how strongly it is added: 1 as it was trained, 0 not at all."""

    lora: Lora
    weight: float


def add_all(network: Mapping[str, Tensor], loras: Iterable[WeightedLora], names: Mapping[str, str]) -> list[str]:
    """Add LoRAs to the weights of a network in place; return a line for each that was trained on other weights.

    Args:
        network: its weights by name, in float32 or more.
        loras: one after another; those with the weight 0 are compared alone.
        names: of the model's denoiser and objective, by role.

    Raises:
        UserError: one that does not fit; then none was added.
    """
    loras = list(loras)
    for lora, _ in loras:
        lora.check(network, names)
    own = fingerprint(network) if loras else ""
    for lora, weight in loras:
        if weight:
            lora.add_to(network, weight)
    return [
        f"{lora.path}: was trained on {lora.base.name or 'another model'} (sha256 {lora.base.sha256[:12] or 'unknown'}"
        "...), and these are other weights: what it does may be another"
        for lora, _ in loras
        if lora.base.weights != own
    ]
