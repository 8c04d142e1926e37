"""What can be told of an export before it begins: its models, the folders that it writes, the license."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm_lab.checkpoints.importer import Section, config_problems, detect_format
from ldm_lab.checkpoints.parts import size_key
from ldm_lab.condition_sources import build_sources
from ldm_lab.conditions import is_upsampler
from ldm_lab.errors import UserError
from ldm_lab.io.json_files import Fields
from ldm_lab.pretrained.resolve import resolve_weights
from ldm_lab.sampling.beside import ModelPlace
from ldm_lab.sampling.loading import locate_model
from ldm_lab.sampling.options import ModelOptions

ROLES = ("autoencoder", "conditioner")  # frozen parts


@dataclass(frozen=True)
class SourceModel:
    """A model that is to be shared, of which the header alone has been read.

    Attributes:
        asked: as it was asked for.
        path: of its file.
        place: where that lies.
        config: its sections.
        facts: the checksums and sizes of its parts.
        enlarges: whether it is an upsampler.
    """

    asked: str | Path
    path: Path
    place: ModelPlace
    config: Section
    facts: dict[str, str]
    enlarges: bool

    @classmethod
    def read(cls, asked: str | Path) -> "SourceModel":
        """Return what a file says. Raises UserError for one of no diffusion model."""
        path = locate_model(asked)
        found = detect_format(path, "checkpoint")
        config = found.importer.config(found.file)
        if not isinstance(config, dict):
            raise UserError(f"{path}: its config is not readable")
        if problems := config_problems(config):
            raise UserError(f"{path}: {problems[0]}")
        for role in (*ROLES, "denoiser", "objective"):
            if not isinstance(config.get(role), dict):
                raise UserError(f"{path}: not a diffusion model; its config has no section {role!r}")
        frozen = Fields(found.importer.facts(found.file)).inside("frozen") or Fields({})
        facts = {role: checksum for role in ROLES if (checksum := frozen.text(role))}
        facts |= {key: text for role in ROLES if (text := found.file.metadata.get(key := size_key(role)))}
        sections = config.get("condition_sources")
        sources = build_sources(sections if isinstance(sections, dict) else None)
        spec = {name: kind for source in sources.values() for name, kind in source.spec.items()}
        return cls(asked, path, ModelPlace.of(path), Section(config), facts, is_upsampler(spec))

    def section(self, role: str) -> Section:
        """Return the section of a role; an empty one if there is none."""
        its = self.config.get(role)
        return Section(its) if isinstance(its, dict) else Section()

    def check_parts(self, loading: ModelOptions) -> None:
        """Raise UserError for a part that is not where the model, or `loading`, says."""
        for role, moved in zip(ROLES, (loading.autoencoder, loading.conditioner)):
            if moved is not None:
                resolve_weights(moved, f"--{role}")
                continue
            section = self.section(role)
            if self.place.find(role, section, self.facts) is None and role == "conditioner":
                self.place.find_text_encoder(section)


def read_models(base: str | Path, upsamplers: Sequence[str | Path], loading: ModelOptions) -> list[SourceModel]:
    """Return the models of an export, the base first.

    Args:
        base, upsamplers: as they are asked for.
        loading: where the base model's parts are.

    Raises:
        UserError: one that is none, or not at its place in the row; parts that are not there.
    """
    models = [SourceModel.read(asked) for asked in (base, *upsamplers)]
    if models[0].enlarges and upsamplers:
        raise UserError(f"{base}: is an upsampler, which enlarges pictures of a base model's; --upsampler takes it")
    for model in models[1:]:
        if not model.enlarges:
            raise UserError(f"--upsampler {model.asked}: is a base model, which takes no picture to be enlarged")
    for model in models:
        model.check_parts(loading if model is models[0] else ModelOptions())
    return models


def check_folders(outs: Sequence[Path], models: Sequence[SourceModel]) -> None:
    """Raise UserError for folders of an export that lie in one another, or in a model's, or cannot be written."""
    real = [out.resolve() for out in outs]
    for i, (one, shown) in enumerate(zip(real, outs)):
        for other, other_shown in zip(real[:i], outs):
            if one.is_relative_to(other) or other.is_relative_to(one):
                raise UserError(f"{shown}: is {other_shown}, or in it, or it is in that one; each needs its own folder")
        for model in models:
            if model.path.resolve().is_relative_to(one):
                raise UserError(f"{shown}: {model.path} lies in it, which is to be shared; name a new folder")
        parent = next(parent for parent in one.parents if parent.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(f"{shown}: cannot be written: {parent} is {'read-only' if parent.is_dir() else 'a file'}")
