"""Weights to begin with (`init_from`): whether they are of this network's kind, and what the run has otherwise."""

import json
from collections.abc import Iterable

import torch
from torch import Tensor

from ldm_lab.checkpoints.importer import Section
from ldm_lab.checkpoints.native import listed
from ldm_lab.condition_sources import ConditionSources
from ldm_lab.config import RunConfig, part_class, signature_options, use_keys
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Autoencoder, ConditionSpec, Denoiser, ImageCondition, is_upsampler
from ldm_lab.io.json_files import Json

NEARLY = 0.01  # relative difference of two latent stds that is not worth a line
# Options that say how a part is trained, or computed, or what its weights say in any case: not what they were made for.
QUIET = {
    "denoiser": ("dropout", "gradient_checkpointing"),
    "objective": ("bound", "weighting", "gamma", "timestep_sampler", "logit_mean", "logit_std", "error"),
    "autoencoder": ("resolution", "attn_resolutions"),
    "condition_source": (
        *("rectangle", "strokes", "whole", "outside"),
        *("smallest", "largest", "thinnest", "thickest", "most_strokes"),
    ),
}


def section_of(config: Section, role: str) -> Section:
    """Return a section of a config that came out of a file; nothing where it is no section."""
    section = config.get(role)
    return Section(section) if isinstance(section, dict) else Section()


def source_conditions(sources: ConditionSources) -> ConditionSpec:
    """Return what condition sources give."""
    return {name: kind for source in sources.values() for name, kind in source.spec.items()}


def check_forms(path: str, theirs: ConditionSpec, ours: ConditionSpec) -> None:
    """Raise UserError if a checkpoint takes conditions that a run's network does not.

    More conditions than the checkpoint's are welcome: a base model is what inpainting models and upsamplers begin with.

    Args:
        path: of the checkpoint.
        theirs: what the checkpoint's condition sources give.
        ours: what the run's denoiser takes.
    """
    if is_upsampler(theirs) and not is_upsampler(ours):
        raise UserError(f"init_from: {path} is an upsampler, and condition_sources of this config make a base model")
    if missing := [name for name in theirs if name not in ours]:
        raise UserError(
            f"init_from: {path} takes {' and '.join(missing)}, which no entry of condition_sources gives here"
        )


def fitted(
    path: str, model: Denoiser, state: dict[str, Tensor], theirs: ConditionSpec
) -> tuple[dict[str, Tensor], str]:
    """Return a checkpoint's weights with places for the images that it is not told, and a line that says so, or "".

    Args:
        path: of the checkpoint.
        model: the run's network.
        state: the checkpoint's weights.
        theirs: what its condition sources give.
    """
    new = [name for name, kind in model.spec.items() if isinstance(kind, ImageCondition) and name not in theirs]
    adapted = model.adapt_state_dict(state, theirs) if new else state
    if adapted is state:
        return state, ""
    return adapted, f"{path} is not told {', '.join(new)}: its first convolution is kept, their channels begin at zero"


def differing_architecture(denoiser: type[Denoiser], theirs: Section, ours: Section) -> list[str]:
    """Return the `architecture_keys` of a denoiser in which two of its config sections differ, each in words."""
    return differing_options("denoiser", denoiser, denoiser.architecture_keys, theirs, ours)


def differing_options(where: str, part: type, keys: Iterable[str], theirs: Section, ours: Section) -> list[str]:
    """Return in which of some options two sections of a part differ, each in words.

    Args:
        where: the run's section is.
        part: the class, whose defaults hold where a section says nothing.
        keys: of the options; those that the part does not have are passed over.
        theirs, ours: the checkpoint's section, and the run's.
    """
    known, differing = signature_options(part), []
    unordered = part.unordered_keys if issubclass(part, Denoiser) else ()
    for key in keys:
        if key not in known or known[key].required:
            continue
        its, own = (section.get(key, known[key].default) for section in (theirs, ours))
        its, own = (list(size) if isinstance(size, tuple) else size for size in (its, own))
        if key in unordered and isinstance(its, list) and isinstance(own, list):
            its, own = sorted(its, key=repr), sorted(own, key=repr)
        if its != own and not (key == "vocab_size" and None in (its, own)):
            differing.append(f"its {key} is {_shown(its)}, {where}.{key} is {_shown(own)}")
    return differing


def differences(path: str, loaded: Section, config: RunConfig, autoencoder: Autoencoder) -> list[str]:
    """Return in what a trained model was made for other things than a run is, though its weights may fit: a line each.

    Compared are heads, norm groups and the like, the noise schedule, pixels and latents, vocabulary and condition
    sources: all that no shape of a weight gives away.

    Args:
        path: of the checkpoint.
        loaded: its config.
        config: the run's.
        autoencoder: the run's, with its latent statistics.
    """
    found: list[str] = []
    for role in ("denoiser", "objective", "autoencoder", "conditioner"):
        theirs, ours = section_of(loaded, role), Section(config[role].to_dict())
        found += differing_part(role, theirs, ours)
    sources = section_of(loaded, "condition_sources")
    for name, part in config.condition_sources.items():
        theirs = Section({**section_of(sources, name), "name": name}) if name in sources else Section()
        found += differing_part("condition_source", theirs, Section(part.to_dict()), f"condition_sources.{name}")
    return [f"{path}: {line}" for line in [*found, *_differing_latents(section_of(loaded, "autoencoder"), autoencoder)]]


def differing_part(role: str, theirs: Section, ours: Section, where: str | None = None) -> list[str]:
    """Return in what two sections of a role differ, each in words; nothing if the checkpoint has no such section."""
    where = where or role
    if not theirs:
        return []
    if theirs.get("name") != ours.get("name"):
        return [f"its {role} is {_shown(theirs.get('name'))}, {where}.name is {_shown(ours.get('name'))}"]
    part = part_class(role, ours)
    architecture = part.architecture_keys if issubclass(part, Denoiser) else ()
    quiet = (*QUIET.get(role, ()), *architecture, *use_keys(role))
    if theirs.get("weights") or ours.get("weights"):
        return []  # its file says what it is
    keys = [key for key in signature_options(part) if key not in quiet]
    lines = differing_options(where, part, keys, theirs, ours)
    ranges = {True: "[0, 1]", False: "[-1, 1]"}
    its, own = (bool(section.get("zero_to_one")) for section in (theirs, ours))
    if role == "autoencoder" and its != own:
        lines.append(f"its pixels are in {ranges[its]}, this run's in {ranges[own]}")
    return lines


def _differing_latents(theirs: Section, autoencoder: Autoencoder) -> list[str]:
    """Return in what the latents differ that a checkpoint was trained on and that an autoencoder gives."""
    lines = []
    for key, own in autoencoder.latent_statistics().items():
        its = theirs.get(key)
        given = its if isinstance(its, list) else [its]
        numbers = [float(n) for n in given if isinstance(n, int | float) and not isinstance(n, bool)]
        if (
            len(numbers) < len(given)
            or len(numbers) not in (1, autoencoder.channels)
            or (key == "latent_std" and min(numbers) <= 0)
        ):
            continue
        before = torch.tensor(numbers, dtype=torch.float32, device=own.device)  # [1] or [C]
        unit = before if key == "latent_std" else autoencoder.latent_std  # [.]
        if bool(((own - before) / unit).abs().gt(NEARLY).any()):
            what = {"latent_std": "divided by", "latent_mean": "from which was taken"}[key]
            lines.append(
                f"these weights were trained on latents {what} {listed(before)}, this run "
                f"{'divides by' if key == 'latent_std' else 'takes'} {listed(own)} "
                f"(autoencoder.{key}={listed(before)} would be theirs)"
            )
    return lines


def _shown(value: Json) -> str:
    """Return a value out of a file, or a config, as a few letters that a terminal may show."""
    text = value if isinstance(value, str) and value.isidentifier() else json.dumps(value, default=str)
    return text if len(text) <= 100 else f"{text[:99]}..."
