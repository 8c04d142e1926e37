"""What sampling needs beside a model: files that the options name, weights that have to be downloaded."""

import sys
from collections.abc import Sequence
from pathlib import Path

from ldm_lab.checkpoints.formats.noised_clip import RELEASED
from ldm_lab.checkpoints.importer import Section, detect_format
from ldm_lab.checkpoints.named import check_named
from ldm_lab.checkpoints.parts import part_downloads, size_key
from ldm_lab.downloads import Download, raise_refusals, refusals
from ldm_lab.errors import UserError
from ldm_lab.io.json_files import Fields
from ldm_lab.pretrained.catalogue import catalogue
from ldm_lab.pretrained.hub_folder import HubFolder
from ldm_lab.pretrained.resolve import announce, offline, to_download
from ldm_lab.sampling.beside import ModelPlace
from ldm_lab.sampling.loading import locate_model
from ldm_lab.sampling.loras import split_weight
from ldm_lab.sampling.options import ModelOptions, SamplingOptions

ROLES = ("autoencoder", "conditioner")  # frozen parts


def option_downloads(options: SamplingOptions, where: str, noised_clip: bool = False) -> list[Download]:
    """Return what the options of sampling ask to be downloaded.

    Args:
        options: as they were given.
        where: their key path, "" for none.
        noised_clip: whether the model brings its own for CLIP guidance.

    Raises:
        UserError: an image that is not there.
    """
    where = f"{where}." if where else ""
    found: list[Download | None] = []
    if options.clip_guidance is not None and not noised_clip:
        found += [to_download(name, f"{where}clip_guidance") for name in RELEASED]
    if options.aesthetic is not None and f"{options.aesthetic_embeddings}/rating0" in catalogue():
        name = f"{options.aesthetic_embeddings}/rating{options.aesthetic}"
        found.append(to_download(name, f"{where}aesthetic") if name in catalogue() else None)
    for key, image in (("init_image", options.init_image), ("mask", options.mask)):
        if isinstance(image, str | Path) and "://" not in str(image) and not Path(image).expanduser().is_file():
            raise UserError(f"{where and f'{where}{key}: '}{image}: no such image file")
    return [download for download in found if download is not None]


def announce_models(
    checkpoint: str | Path, upsamplers: Sequence[str | Path], loading: ModelOptions, options: SamplingOptions
) -> list[Download]:
    """Say and return what will be downloaded for one or more models in a row, parts of a checkpoint that is here too.

    Args:
        checkpoint: the (base) model.
        upsamplers: that enlarge its pictures.
        loading: how it is loaded.
        options: how pictures are made.

    Raises:
        UserError: paths with nothing there, and weights that cannot be downloaded, all of them at once.
    """
    named: list[tuple[str, str | Path | None]] = [
        ("checkpoint", checkpoint),
        *(("upsampler", file) for file in upsamplers),
    ]
    named += [("autoencoder", loading.autoencoder), ("conditioner", loading.conditioner)]
    named += [("lora", split_weight(written)[0]) for written in loading.lora]
    named += [("guide_model", loading.guide_model), *(("noised_clip", file) for file in loading.noised_clip or ())]
    problems: list[str] = []
    found: list[Download] = []
    for key, file in named:
        try:
            found += [] if file is None else _file_downloads(file, key, loading)
        except UserError as error:
            problems.append(str(error))
    found += option_downloads(options, "", loading.noised_clip is not None)
    raise_refusals(problems + refusals(found, offline()) if problems else ())
    announce(found)
    _tell_upsamplers(checkpoint, upsamplers)
    return found


def _tell_upsamplers(checkpoint: str | Path, upsamplers: Sequence[str | Path]) -> None:
    """Say what lies in a shared model's folder and is not asked for."""
    folder = Path(checkpoint).expanduser()
    shared = HubFolder.read(folder) if folder.is_dir() and not upsamplers else None
    if shared is not None and shared.upsamplers:
        flags = " ".join(f"--upsampler {folder / name}" for name in shared.upsamplers)
        print(f"{checkpoint}: holds more than its base model: {flags} enlarges the pictures", file=sys.stderr)


def _file_downloads(file: str | Path, key: str, loading: ModelOptions) -> list[Download]:
    """Return what has to be downloaded for a file, and if it is a model for its parts, as far as that is known."""
    is_run = Path(file).expanduser().is_dir() and key in ("checkpoint", "upsampler", "guide_model", "lora")
    if not is_run and (missing := to_download(file, key)):
        return [missing]
    if key not in ("checkpoint", "upsampler"):
        return []
    return _frozen_downloads(locate_model(file), loading if key == "checkpoint" else ModelOptions())


def _frozen_downloads(path: Path, options: ModelOptions) -> list[Download]:
    """Return what has to be downloaded for the parts that a checkpoint names and does not hold."""
    detected = detect_format(path)
    config = detected.importer.config(detected.file)
    frozen = Fields(detected.importer.facts(detected.file)).inside("frozen") or Fields({})
    told = {role: checksum for role in ROLES if (checksum := frozen.text(role))}
    told |= {key: text for role in ROLES if (text := detected.file.metadata.get(key := size_key(role)))}
    place = ModelPlace.of(path)
    found: list[Download] = []
    for role, moved in zip(ROLES, (options.autoencoder, options.conditioner)):
        its = config.get(role) if isinstance(config, dict) else None
        section = Section(its) if isinstance(its, dict) else Section()
        if moved or not section or place.find(role, section, told):
            continue
        try:
            check_named(role, section, role)
            found += part_downloads(role, section, f"{role} of {path.name}")
        except UserError:
            continue  # loading it says so, and how to mend it
    return found
