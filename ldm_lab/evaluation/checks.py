"""What would end an evaluation, looked for before what takes hours: the making of pictures.

In order: what is asked, before anything is read; the models; the real images, the models' parts and the folders of
pictures, as soon as they have been looked at. Each check is quick, and comes to the same in all of several processes.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm_lab.data.work_items import file_batches
from ldm_lab.errors import UserError
from ldm_lab.evaluation.asked import Asked
from ldm_lab.evaluation.distances import check_rows
from ldm_lab.evaluation.feature_files import FEATURES, SUMS, VALUES, PictureRows
from ldm_lab.evaluation.metrics import CLIP_SCORE
from ldm_lab.evaluation.model_parts import caption_rows, check_parts
from ldm_lab.evaluation.own_files import is_plot
from ldm_lab.evaluation.settings import Models, Setting, settings_of
from ldm_lab.io.atomic import writable_folder
from ldm_lab.metrics import METRICS, of_kind
from ldm_lab.prompts import Prompt
from ldm_lab.sampling.loading import locate_model


def check_asked(asked: Asked) -> None:
    """Raise UserError for what can be told before anything is read or loaded."""
    compared = [name for name in asked.metrics if METRICS[name].kind != "captions" and METRICS[name].space is not None]
    of_parts = of_kind(asked.metrics, "data")
    if of_parts and asked.data is None:
        raise UserError(f"--metric {of_parts[0]}: --data has to say what images it is measured on")
    if asked.data is None and asked.features is None and (compared or (asked.makes_pictures and not asked.prompts)):
        why = f"--metric {compared[0]}" if compared else "without --prompts"
        raise UserError(f"{why}: --data has to say what the real images are")
    if asked.makes_pictures:
        check_count("pictures", of_kind(asked.metrics, "pictures", "captions"), asked.pictures)
    if asked.limit is not None and asked.data is not None:
        check_count("real images", [*compared, *of_parts], asked.limit)
    check_distinct("--checkpoint", [locate_model(its) for its in asked.checkpoints], "is given twice")
    check_folders(asked)
    _ = asked.names  # refuses what is given twice
    writable_folder(asked.out, "--out")
    check_words("--prompts", asked.metrics, asked.prompts or [])


def check_words(where: str, names: Iterable[str], prompts: Iterable[Prompt]) -> None:
    """Raise UserError for a prompt without a text, where a metric compares pictures with their prompts."""
    name = next(iter(of_kind(names, "captions")), None)
    empty = next((str(prompt) for prompt in prompts if not prompt.text.strip()), None)
    if name is not None and empty is not None:
        raise UserError(f"{where}: {empty!r} has no words that {name} could compare a picture with")


def check_count(what: str, names: Iterable[str], count: int) -> None:
    """Raise UserError if images, said whose they are, are too few for a metric."""
    for name in names:
        if count < METRICS[name].least:
            raise UserError(f"{name}: {what}: at least {METRICS[name].least} images are needed, not {count}")


def check_distinct(flag: str, paths: Sequence[Path], wrong: str) -> None:
    """Raise UserError for a path that is given twice, however it is written."""
    resolved = [path.resolve() for path in paths]
    for number, (path, its) in enumerate(zip(paths, resolved, strict=True)):
        if its in resolved[:number]:
            raise UserError(f"{flag} {path}: {wrong}")


def check_folders(asked: Asked) -> None:
    """Raise UserError for folders that are not there, have no picture, are given twice, or are not looked at."""
    if asked.images and not asked.of_pictures:
        raise UserError(f"--images: pictures are not looked at by --metric {' --metric '.join(asked.metrics)}")
    for folder in asked.images:
        if not Path(folder).resolve().is_dir():
            raise UserError(f"--images {folder}: no such folder")
    check_distinct("--images", [Path(folder) for folder in asked.images], "named twice")
    for folder in asked.images:
        try:
            file_batches(folder, asked.out, is_plot)
        except UserError as error:
            raise UserError(f"--images {folder}: {str(error).removeprefix('data.path: ')}") from None


def checked_models(asked: Asked, models: Models) -> list[Setting]:
    """Return every model with every choice that pictures are made with; none where none are made.

    Raises:
        UserError: a missing or foreign file; a model that cannot be asked so, or lacks the part that is measured.
    """
    of_parts = of_kind(asked.metrics, "data")
    for checkpoint in asked.checkpoints if of_parts else []:
        check_parts(models.pipeline(checkpoint, torch.device("cpu")).model, of_parts, checkpoint)
    if not asked.makes_pictures:
        return []
    if asked.prompts is None:  # captions, which are looked at when they are known
        return settings_of(models, asked.named_models, asked.choices, [Prompt("a picture")], are_asked=False)
    return settings_of(models, asked.named_models, asked.choices, asked.prompts[: asked.pictures], are_asked=True)


def check_real(names: Iterable[str], rows: PictureRows) -> None:
    """Raise UserError if features of real images are too few for the metrics that compare them, or not finite."""
    for name in names:
        if METRICS[name].kind != "captions" and (space := METRICS[name].space) is not None:
            check_rows(f"{name}: real images", rows.features(space), METRICS[name].least)


def check_measured(checkpoint: str, names: Iterable[str], rows: PictureRows) -> list[str]:
    """Return what has to be said of what was measured of a model's parts on real images: numbers that are not finite.

    Raises:
        UserError: no usable image, too few of them, or too few captions.
    """
    found: list[str] = []
    if not len(rows):
        raise UserError("--data: no usable image")
    for name in of_kind(names, "data"):
        check_count("real images", [name], len(rows))
        tensors = [VALUES + name, SUMS + name, f"{FEATURES}{METRICS[name].space}"]
        if not all(rows.tensors[its].isfinite().all() for its in tensors if its in rows.tensors):
            found.append(f"{checkpoint}: {name} is not finite on these images")
        if name == "retrieval":
            caption_rows(rows.texts)
    return found


def check_pictures(folder: str, names: Iterable[str], rows: PictureRows) -> None:
    """Raise UserError if the pictures in a folder cannot be used, are too few, or none has a caption to be scored."""
    if not len(rows):
        raise UserError(f"--images {folder}: no usable image")
    for name in names:
        if METRICS[name].kind == "captions":
            if not len(scored_rows(rows.tensors[CLIP_SCORE])):
                raise UserError(f"--images {folder}: {name} needs captions, in a .txt beside each picture")
        elif space := METRICS[name].space:
            check_rows(f"--images {folder}: {name}", rows.features(space), METRICS[name].least)


def scored_rows(scores: Tensor) -> Tensor:
    """Return the numbers of the pictures that have a score, [n], of scores [N] that are NaN without a caption."""
    return torch.arange(len(scores))[~scores.isnan()]
