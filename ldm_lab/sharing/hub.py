"""One folder that a stranger's machine samples from offline: networks, frozen parts, config.json, a model card."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ldm_lab.checkpoints.files import GAP_PREFIX
from ldm_lab.checkpoints.importer import Section
from ldm_lab.checkpoints.lora import MERGED
from ldm_lab.checkpoints.models import read_model
from ldm_lab.checkpoints.native import BEGUN_WITH, OF_SESSIONS, save_model
from ldm_lab.checkpoints.parts import size_key
from ldm_lab.errors import UserError
from ldm_lab.evaluation.settings import Models
from ldm_lab.interfaces import Part
from ldm_lab.io.atomic import atomic_write, remove_leftovers, replaced_folder, sha256
from ldm_lab.io.images import grid, save_png
from ldm_lab.pretrained.catalogue import catalogue
from ldm_lab.pretrained.hub_folder import CARD, FILE, MODEL, NAME, UPSAMPLER, HubFolder, Origin
from ldm_lab.pretrained.resolve import HUB
from ldm_lab.sampling import Pipeline, SamplingOptions, Stage, Stages
from ldm_lab.sampling.beside import checksum_of
from ldm_lab.sampling.loading import load_frozen
from ldm_lab.sampling.options import ModelOptions
from ldm_lab.sharing.card import LICENSE_ID, Card, Network
from ldm_lab.sharing.checks import SourceModel
from ldm_lab.sharing.evaluation import Evaluation, Measured
from ldm_lab.sharing.facts import Facts, facts_of
from ldm_lab.sharing.parts import SharedPart, handed_on, of_hub, origin_of_file, released, share_part

GRID = "samples.png"
MOST_SAMPLES = 16
SECTIONS = ("task", "autoencoder", "conditioner", "condition_sources", "denoiser", "objective")  # that sampling builds
# Of what a model's file says beside its config: all that its card says, so that it can be shared again.
HANDED_ON = ("step", "image_size", "images", "date", *OF_SESSIONS, BEGUN_WITH, MERGED)
HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Export:
    """What is to be shared.

    Attributes:
        out: the folder.
        name: of the model; None is that of the folder.
        license: of its weights, as an id of the Hub's; None if that is not known.
        prompts: of the samples; None takes those of the run, if they are known; none makes no samples.
        evaluation: what was measured, of this or of other models.
        half: store weights in float16.
        overwrite: replace a folder that an earlier export has written.
        loading: where the base model's parts are.
    """

    out: Path
    name: str | None = None
    license: str | None = None
    prompts: Sequence[str] | None = None
    evaluation: Measured | None = None
    half: bool = False
    overwrite: bool = False
    loading: ModelOptions = field(default_factory=ModelOptions)


@dataclass(frozen=True)
class Prepared:
    """An export of which all that could be wrong before it begins has been checked.

    Attributes:
        asked: what is to be shared.
        models: the base model first.
        facts: how that came about.
        measured: of it.
    """

    asked: Export
    models: Sequence[SourceModel]
    facts: Facts
    measured: Evaluation


def prepare(asked: Export, models: Sequence[SourceModel]) -> Prepared:
    """Check an export, as far as can be without writing anything.

    Raises:
        UserError: nothing that can be shared, a folder that must stay, a license that is none or another one's.
    """
    check_out(asked.out, asked.overwrite)
    check_license(asked.license, models[0])
    base = models[0].path
    measured = Evaluation()
    if asked.evaluation is not None:
        measured = asked.evaluation.of(checksum_of(base) or "", partial(_identity, base, asked.loading))
    return Prepared(asked, models, facts_of(base, read_model(base).extra), measured)


def check_license_id(license: str | None) -> None:
    """Raise UserError for a license that is no id of the Hub's."""
    if license is not None and not LICENSE_ID.fullmatch(license):
        raise UserError(f"--license: an id of the Hub's list is needed, such as mit, not {license!r}")


def check_license(license: str | None, model: SourceModel) -> None:
    """Raise UserError for a license that is no id of the Hub's, or another one than the weights already have."""
    check_license_id(license)
    origin = origin_of_model(model)
    if license is None or origin.license.lower() in ("", license):
        return
    if origin.what in catalogue():
        raise UserError(f"--license: {license}: these weights are {origin.what}, published under {origin.license}")
    raise UserError(
        f"--license: {license}: {model.place.folder} says that these weights are shared under {origin.license}; leave "
        "--license out, or export the run itself if they are yours"
    )


def export(prepared: Prepared) -> HubFolder:
    """Write the folder; it appears whole, with a model that has been loaded from it, or not at all.

    Raises:
        UserError: a part that cannot be shared, a folder that cannot be written.
    """
    asked, facts, measured = prepared.asked, prepared.facts, prepared.measured
    remove_leftovers(asked.out)
    with replaced_folder(asked.out) as folder:
        base, *upsampling = prepared.models
        networks = [_share(folder, MODEL, base, "", asked)]
        for number, one in enumerate(upsampling, start=1):
            networks.append(_share(folder, UPSAMPLER.format(number), one, f"upsampler_{number}_", asked))
        names = dict.fromkeys(
            name for network in networks for name in (network.file, *(f for part in network.parts for f in part.files))
        )
        assert all(FILE.fullmatch(name) for name in names), "names that reading would refuse"
        files = {name: sha256(folder / name) for name in names}
        upsamplers = tuple(network.file for network in networks[1:])
        model = HubFolder(folder, networks[0].file, upsamplers, files, _origins(networks))
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
            evaluation=measured.rows,
            notes=measured.notes,
        )
        with atomic_write(folder / CARD) as readme:
            readme.write(card.text(folder).encode())
    return HubFolder(asked.out, model.model, model.upsamplers, files)


def _identity(model: Path, loading: ModelOptions) -> str:
    """Return what stands for all weights that a model is sampled with."""
    print(f"{model}: is loaded to compare its weights with those of --evaluation", file=sys.stderr)
    return Models(loading).identity(str(model))


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


def _share(folder: Path, name: str, source: SourceModel, prefix: str, asked: Export) -> Network:
    """Write a network and its frozen parts.

    Args:
        folder: they are written to.
        name: of the network's file.
        source: the model.
        prefix: of its parts' names.
        asked: the rest.
    """
    config, state, extra = read_model(source.path)
    kept = Section({key: its for key, its in config.items() if key in SECTIONS and its is not None})
    parts: list[SharedPart] = []
    told = {key: extra[key] for key in HANDED_ON if key in extra}
    loading, place = asked.loading if name == MODEL else ModelOptions(), source.place
    for role, moved in (("autoencoder", loading.autoencoder), ("conditioner", loading.conditioner)):
        section = source.section(role)
        module, found = load_frozen(role, section, moved, place, extra)
        assert isinstance(module, Part)
        part = _once(folder, share_part(folder, f"{prefix}{role}", module, found, section, place))
        kept[role] = part.section
        if part.identity is not None:
            told[role] = part.identity
            if len(part.files) == 1:
                told[size_key(role)] = str((folder / part.files[0]).stat().st_size)
        parts.append(part)
    dtype = torch.float16 if asked.half else None
    save_model(folder / name, {key: _stored(key, its, dtype) for key, its in state.items()}, kept, told)
    kind, objective = (str(section_name(kept, role)) for role in ("denoiser", "objective"))
    origin = origin_of_model(source)
    license = (asked.license if name == MODEL else None) or origin.license
    return Network(name, kind, sum(its.numel() for its in state.values()), objective, license, origin, tuple(parts))


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


def origin_of_model(model: SourceModel) -> Origin:
    """Return where the weights of a model are from."""
    asked = str(model.asked)
    if asked in catalogue():
        return released(asked)
    if asked.startswith(HUB):
        return replace(of_hub(asked), license=handed_on(model.path, model.place).license)
    return origin_of_file(model.path, model.place, "model")


def _origins(networks: Sequence[Network]) -> dict[str, Origin]:
    """Return where the files, or folders of files, in a folder are from, as far as that is known."""
    found = {network.file: replace(network.origin, license=network.license) for network in networks}
    found |= {file.split("/")[0]: part.origin for network in networks for part in network.parts for file in part.files}
    return {name: origin for name, origin in found.items() if origin != Origin()}


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
