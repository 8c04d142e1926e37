"""A trained model out of its checkpoint, with the frozen parts that it was trained with."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm_lab.checkpoints.formats import noised_clip
from ldm_lab.checkpoints.gap_files import gap_of, split_gap
from ldm_lab.checkpoints.importer import Section
from ldm_lab.checkpoints.initialization import no_initial_weights
from ldm_lab.checkpoints.lora import FILE as LORA_FILE
from ldm_lab.checkpoints.models import read_model
from ldm_lab.checkpoints.named import check_named
from ldm_lab.checkpoints.parts import (
    as_part_config,
    build_for,
    has_weights,
    load_part,
    load_strictly,
    weights_path,
    weights_sha256,
)
from ldm_lab.condition_sources import build_sources, given_conditions
from ldm_lab.conditioners.gap import NOISE
from ldm_lab.conditions import ConditionSpec
from ldm_lab.config import build
from ldm_lab.devices import pick_device
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Conditioner, Denoiser, Objective, check_conditions
from ldm_lab.pretrained.hub_folder import HubFolder
from ldm_lab.pretrained.resolve import resolve_weights
from ldm_lab.sampling.beside import ModelPlace, checksum_of
from ldm_lab.sampling.loras import add_loras, read_loras
from ldm_lab.sampling.model import Model
from ldm_lab.sampling.options import ModelOptions

MODEL_FILE = "ema.safetensors"  # in the folder of a run
DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}

log = logging.getLogger(__name__)


def load_model(path: str | Path, options: ModelOptions, others: Sequence[Model] = ()) -> Model:
    """Return a trained model with its averaged weights.

    Args:
        path: `ema.safetensors` or the folder that it is in, a `.ckpt` of a run, or whatever else
            `ldm_lab.pretrained.resolve.resolve_weights` takes.
        options: where it runs, where its frozen parts are, ...
        others: loaded ones, such as the stages before it: of those whose conditioner is the same one it is theirs, and
            in memory once.

    Raises:
        UserError: missing, damaged or foreign file; weights of another architecture; no such device.
    """
    device = pick_device(options.device)
    path = locate_model(path)
    config, state, extra = read_model(path)
    _check_is_diffusion(config, path)
    place = ModelPlace.of(path)
    autoencoder, its_config = load_frozen("autoencoder", config["autoencoder"], options.autoencoder, place, extra)
    conditioner, conditioner_config = load_frozen(
        "conditioner", config["conditioner"], options.conditioner, place, extra, others
    )
    if not isinstance(sections := config.get("condition_sources") or {}, dict):
        raise UserError(f"{path}: its config has no readable section 'condition_sources'")
    sources = build_sources(sections)
    given = given_conditions(conditioner, sources)
    state, gap_state = split_gap(state)
    gap = gap_of(gap_state, config["conditioner"], given, path)
    denoiser = _load_denoiser(config, state, path, autoencoder.channels, given)
    objective: Objective = build("objective", config["objective"])
    add_loras(denoiser, objective, read_loras(options.lora))
    guide_model = None
    if options.guide_model is not None:
        guide_model = _load_guide_model(options.guide_model, path, config, autoencoder.channels, given, gap_state)
    towers = options.noised_clip
    clip = None if towers is None else noised_clip.load(*towers, options.noised_clip_head_width)
    if options.compile:
        denoiser.compile()
    waiting = _waiting_device(options.offload, device)
    for part in (denoiser, autoencoder, conditioner, guide_model, clip, *sources.values()):
        if part is not None:
            part.to(waiting)
    side = extra.get("image_size", "")
    return Model(
        denoiser=denoiser,
        objective=objective,
        autoencoder=autoencoder,
        conditioner=conditioner,
        condition_sources=sources,
        dropout=config["conditioner"].get("dropout") or 0.0,
        image_size=(int(side), int(side)) if side.isdecimal() else None,
        guide_model=guide_model,
        noised_clip=clip,
        run_device=device,
        dtype=DTYPES[options.precision],
        offload=options.offload,
        conditioner_config=conditioner_config,
        autoencoder_config=its_config,
        gap=gap,
    )


def _check_is_diffusion(config: Section, path: Path) -> None:
    for role in ("autoencoder", "conditioner", "denoiser", "objective"):
        if not isinstance(config.get(role), dict):
            raise UserError(f"{path}: not a diffusion model; its config has no section {role!r}")


def frozen_sha256(model: Model) -> dict[str, str]:
    """Return the checksums of the weights of a model's frozen parts by role, as far as they have some."""
    found: dict[str, str] = {}
    for role, config in (("autoencoder", model.autoencoder_config), ("conditioner", model.conditioner_config)):
        if config is not None:
            path = weights_path(role, config)
            if checksum := weights_sha256(role, config) if path is None else checksum_of(path):
                found[role] = checksum
    return found


def locate_model(path: str | Path) -> Path:
    """Return the file of a trained model, of a run's folder its `ema.safetensors`, of a shared model's its base model.

    Raises:
        UserError: there is none, or it is not whole.
    """
    folder = Path(path).expanduser()
    is_local = folder.is_dir()
    if not is_local:
        folder = resolve_weights(path, "checkpoint")
    if folder.is_dir() and (shared := HubFolder.read(folder)) is not None:
        shared.check_content(shared.model)
        return folder / shared.model
    if not is_local:
        if (shared := HubFolder.read(folder.parent)) is not None and folder.name in shared.files:
            shared.check_content(folder.name)
        return folder
    if not (folder / MODEL_FILE).is_file() and (folder / LORA_FILE).is_file():
        raise UserError(f"{path}: a run of LoRA, which is added to its base model: --checkpoint BASE --lora {path}")
    if not (folder / MODEL_FILE).is_file():
        raise UserError(f"{path}: a folder without {MODEL_FILE}, which a run writes when it saves")
    return folder / MODEL_FILE


def _waiting_device(offload: bool, device: torch.device) -> torch.device:
    """Return where parts are until they work."""
    if offload and device.type == "cpu":
        log.warning("offload: without effect on the device cpu: main memory is where the parts are anyway")
    return torch.device("cpu") if offload else device


def _load_denoiser(
    config: Section, state: dict[str, Tensor], path: str | Path, channels: int, given: ConditionSpec
) -> Denoiser:
    """Return the denoiser of a model file, frozen, on the CPU."""
    with no_initial_weights():
        denoiser: Denoiser = build_for(state, path, "denoiser", config["denoiser"], channels, given)
    check_conditions(denoiser, given)
    load_strictly(denoiser, state, path)
    return denoiser.eval().requires_grad_(False)


def _load_guide_model(
    name: str, path: Path, config: Section, channels: int, given: ConditionSpec, gap_state: dict[str, Tensor]
) -> Denoiser:
    """Return the denoiser of another model, to guide away from; arguments are those of the model at `path`."""
    if (guide_path := locate_model(name)).samefile(path):
        log.warning("guide_model: without effect: it is the model itself")
    guide_config, state, _ = read_model(guide_path)
    if guide_config.get("objective") != config["objective"]:
        raise UserError(f"{name}: its objective is another than that of {path}")
    state, its = split_gap(state)
    means = [{key: value for key, value in gap.items() if key != NOISE} for gap in (its, gap_state)]
    if means[0].keys() != means[1].keys() or any(not torch.equal(means[0][key], means[1][key]) for key in means[0]):
        log.warning("guide_model: %s: its conditioner.gap differs from the model's, whose embeddings it is told", name)
    return _load_denoiser(guide_config, state, name, channels, given)


def load_frozen(
    role: str,
    config: Section,
    moved: str | Path | None,
    place: ModelPlace,
    extra: dict[str, str],
    others: Sequence[Model] = (),
) -> tuple[nn.Module, Section]:
    """Return a frozen part of a checkpoint, and its config; warn if its weights are not those of training.

    Args:
        role: "autoencoder" or "conditioner".
        config: its section in the checkpoint.
        moved: its weights file, if not where the section says; of a language model its folder.
        place: where the checkpoint lies; its parts may lie beside it.
        extra: of the checkpoint, with the checksum of the weights under the role.
        others: models whose conditioner it may be.
    """
    if moved is not None and config.get("name") == "t5" and Path(moved).expanduser().is_dir():
        config = Section({**config, "model": str(moved)})
    elif (moved := moved or place.find(role, config, extra)) is not None:
        config = Section({**config, "weights": str(moved)})
    elif role == "conditioner" and (folder := place.find_text_encoder(config)) is not None:
        config = Section({**config, "model": str(folder)})
    try:
        named = {key: its for key, its in config.items() if moved is None or key != "weights"}
        check_named(role, Section(named), role)
        part = _loaded_conditioner(config, others) or load_part(role, config, draws=False)
        part.look_in(place.folder)
        if any(True for _ in part.parameters()) and not has_weights(role, config):
            raise UserError("the file does not say where its weights are")
        checksum = weights_sha256(role, config) if extra.get(role) else None
    except UserError as error:
        hint = "" if moved else f"; --{role} FILE says where it is"
        raise UserError(f"{role} of the checkpoint: {error}{hint}") from None
    if extra.get(role) and checksum != extra[role]:
        name = config.get("weights") or config.get("pretrained") or config.get("model")
        log.warning("%s: not the %s file that the model was trained with", name, role)
    return part, config


def _loaded_conditioner(config: Section, others: Sequence[Model]) -> Conditioner | None:
    """Return the conditioner of another model that is built and filled as this section says; None without."""
    wanted = as_part_config("conditioner", config)
    for other in others:
        if other.conditioner_config is not None:
            its = as_part_config("conditioner", other.conditioner_config)
            if (its.architecture(), its.use.weights) == (wanted.architecture(), wanted.use.weights):
                return other.conditioner
    return None
