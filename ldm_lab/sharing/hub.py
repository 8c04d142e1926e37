"""One folder that a stranger's machine samples from offline: networks, frozen parts, config.json, a model card."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ldm_lab.checkpoints.files import GAP_PREFIX
from ldm_lab.checkpoints.importer import Section, config_problems
from ldm_lab.checkpoints.lora import MERGED
from ldm_lab.checkpoints.models import read_model
from ldm_lab.checkpoints.native import save_model
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Part
from ldm_lab.io.atomic import atomic_write, remove_leftovers, replaced_folder, sha256
from ldm_lab.io.images import grid, save_png
from ldm_lab.pretrained.catalogue import catalogue
from ldm_lab.pretrained.hub_folder import CARD, FILE, MODEL, NAME, UPSAMPLER, HubFolder
from ldm_lab.pretrained.resolve import HUB
from ldm_lab.sampling import Pipeline, SamplingOptions, Stage, Stages
from ldm_lab.sampling.loading import load_frozen, locate_model
from ldm_lab.sampling.options import ModelOptions
from ldm_lab.sharing.card import LICENSE_ID, Card, Network
from ldm_lab.sharing.facts import facts_of
from ldm_lab.sharing.parts import SharedPart, share_part

GRID = "samples.png"
MOST_SAMPLES = 16
SECTIONS = ("task", "autoencoder", "conditioner", "condition_sources", "denoiser", "objective")  # that sampling builds
HANDED_ON = ("step", "image_size", MERGED)  # of what a model's file says beside its config
HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Export:
    """What is to be shared.

    Attributes:
        checkpoint: the (base) model.
        out: the folder.
        upsamplers: what enlarges its pictures, in order.
        name: of the model; None is that of the folder.
        license: of its weights, as an id of the Hub's; None if that is not known.
        prompts: of the samples; None takes those of the run, if they are known; none makes no samples.
        evaluation: metric -> value, for people.
        notes: what is to be said of the evaluation.
        half: store weights in float16.
        overwrite: replace a folder that an earlier export has written.
        loading: where the base model's parts are.
    """

    checkpoint: str | Path
    out: Path
    upsamplers: Sequence[str | Path] = ()
    name: str | None = None
    license: str | None = None
    prompts: Sequence[str] | None = None
    evaluation: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    half: bool = False
    overwrite: bool = False
    loading: ModelOptions = field(default_factory=ModelOptions)


def export(asked: Export) -> HubFolder:
    """Write the folder; it appears whole, with a model that has been loaded from it, or not at all.

    Raises:
        UserError: nothing that can be shared, or a folder that must stay.
    """
    check_out(asked.out, asked.overwrite)
    if asked.license is not None and not LICENSE_ID.fullmatch(asked.license):
        raise UserError(f"--license: an id of the Hub's list is needed, such as mit, not {asked.license!r}")
    base = locate_model(asked.checkpoint)
    _, _, extra = read_model(base)
    facts = facts_of(base, extra)
    remove_leftovers(asked.out)
    with replaced_folder(asked.out) as folder:
        networks = [_share(folder, MODEL, asked.checkpoint, "", asked)]
        for number, file in enumerate(asked.upsamplers, start=1):
            networks.append(_share(folder, UPSAMPLER.format(number), file, f"upsampler_{number}_", asked))
        names = dict.fromkeys(
            name for network in networks for name in (network.file, *(f for part in network.parts for f in part.files))
        )
        assert all(FILE.fullmatch(name) for name in names), "names that reading would refuse"
        files = {name: sha256(folder / name) for name in names}
        model = HubFolder(folder, networks[0].file, tuple(network.file for network in networks[1:]), files)
        model.write()
        prompts = list((facts.prompts if asked.prompts is None else asked.prompts)[:MOST_SAMPLES])
        shown = _samples(model, prompts)
        if shown is not None:
            save_png(folder / GRID, shown)
        card = Card(
            name=asked.name or asked.out.resolve().name,
            model=model,
            networks=tuple(networks),
            facts=facts,
            license=asked.license or _hub_license(networks[0].license),
            prompts=prompts,
            grid=GRID if shown is not None else None,
            evaluation=asked.evaluation,
            notes=asked.notes,
        )
        with atomic_write(folder / CARD) as readme:
            readme.write(card.text(folder).encode())
    return HubFolder(asked.out, model.model, model.upsamplers, files)


def check_out(out: Path, overwrite: bool) -> None:
    """Raise UserError if a folder cannot be written, or holds what must stay."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out}: a folder is written, and this is a file or a link")
    if not out.is_dir() or not any(out.iterdir()):
        return
    shared = HubFolder.read(out)
    known = {NAME, CARD, GRID} | {name.split("/")[0] for name in (shared.files if shared else ())}
    strange = sorted(path.name for path in out.iterdir() if path.name not in known)
    if shared is None or strange:
        raise UserError(f"{out}: is there, with other things in it ({(strange or [NAME])[0]}); name a new folder")
    if not overwrite:
        raise UserError(f"{out}: is there already; --overwrite replaces it")


def _share(folder: Path, name: str, file: str | Path, prefix: str, asked: Export) -> Network:
    """Write a network and its frozen parts.

    Args:
        folder: they are written to.
        name: of the network's file.
        file: the model.
        prefix: of its parts' names.
        asked: the rest.
    """
    path = locate_model(file)
    config, state, extra = read_model(path)
    problems = config_problems(config)
    if problems:
        raise UserError(f"{path}: {problems[0]}")
    kept = Section({key: its for key, its in config.items() if key in SECTIONS and its is not None})
    parts: list[SharedPart] = []
    told = {key: extra[key] for key in HANDED_ON if key in extra}
    loading = asked.loading if name == MODEL else ModelOptions()
    for role, moved in (("autoencoder", loading.autoencoder), ("conditioner", loading.conditioner)):
        section = config.get(role)
        if not isinstance(section, dict):
            raise UserError(f"{path}: not a diffusion model; its config has no section {role!r}")
        module, found = load_frozen(role, Section(section), moved, path, extra)
        assert isinstance(module, Part)
        part = _once(folder, share_part(folder, f"{prefix}{role}", module, found, Section(section)))
        kept[role] = part.section
        if part.identity is not None:
            told[role] = part.identity
        parts.append(part)
    dtype = torch.float16 if asked.half else None
    save_model(folder / name, {key: _stored(key, its, dtype) for key, its in state.items()}, kept, told)
    license, origin = _released(file)
    kind, objective = (str(section_name(kept, role)) for role in ("denoiser", "objective"))
    own = license or (asked.license or "" if name == MODEL else "")
    return Network(name, kind, sum(its.numel() for its in state.values()), objective, own, origin, tuple(parts))


def section_name(config: Section, role: str) -> str:
    """Return the name of a part, by its section."""
    section = config.get(role)
    return str(section.get("name")) if isinstance(section, dict) else ""


def _once(folder: Path, part: SharedPart) -> SharedPart:
    """Return a part with the file of an equal one that is there, in place of its own."""
    if len(part.files) != 1 or part.identity is None or not HEX.fullmatch(part.identity):
        return part
    (own,) = part.files
    twin = next(
        (f.name for f in sorted(folder.glob("*.safetensors")) if f.name != own and sha256(f) == part.identity), None
    )
    if twin is None:
        return part
    (folder / own).unlink()
    section = Section({**part.section, "weights": twin})
    return SharedPart(part.role, part.name, section, (twin,), part.identity, part.origin, part.needs)


def _stored(name: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a weight as it is stored: in another type if one is asked for, but no statistics."""
    is_weight = value.ndim > 0 and value.is_floating_point() and not name.startswith(GAP_PREFIX)
    return value.to(dtype) if dtype is not None and is_weight else value


def _released(file: str | Path) -> tuple[str, str]:
    """Return the license and the name of a model that was released; "" for what is not known."""
    text = str(file)
    if text in catalogue():
        return catalogue()[text].license, text
    return "", text.removeprefix(HUB) if text.startswith(HUB) else ""


def _hub_license(license: str) -> str | None:
    """Return a license as an id of the Hub's; None for one that is none."""
    return license.lower() if LICENSE_ID.fullmatch(license.lower()) else None


def _samples(model: HubFolder, prompts: Sequence[str]) -> Image.Image | None:
    """Return a grid of samples, made from the folder as it was written; None without prompts, or of an upsampler.

    Raises:
        UserError: the folder cannot be sampled from.
    """
    pipelines: list[Pipeline] = []
    for name in (model.model, *model.upsamplers):
        pipelines.append(Pipeline.from_checkpoint(model.path / name, others=pipelines))
    stages = Stages([Stage(pipeline, SamplingOptions()) for pipeline in pipelines])
    if pipelines[0].model.upscale_factor is not None or not prompts:
        why = "the model is an upsampler" if prompts else "no prompts are known (--prompts FILE names some)"
        print(f"the card shows no samples: {why}", file=sys.stderr)
        return None
    rows = stages(list(prompts))
    return grid([row[-1] for row in rows], captions=list(prompts))
