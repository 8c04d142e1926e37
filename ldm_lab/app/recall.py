"""The settings in a picture, as the controls of a form take them. The picture may be a stranger's."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ldm_lab.app.shelf import Kind, Shelf
from ldm_lab.errors import UserError
from ldm_lab.prompts import Prompt, write_prompt
from ldm_lab.sampling.names import FileRecord
from ldm_lab.sampling.options import IMAGE_FILES, OptionValues
from ldm_lab.sampling.recorded import Recorded, read_recorded

OTHER_PLACE = ("checkpoint", "upsampler", "lora", "noised_clip", *IMAGE_FILES)


@dataclass(frozen=True)
class Recalled:
    """The settings of a picture, as far as they can be taken here.

    Attributes:
        model: its name here; None if it is not offered.
        upsamplers: their names here; none if one of them is not offered.
        loras: with their strengths, "name:0.8".
        prompts: texts, as they are written with their weights.
        values: options under flat names.
        remarks: what is not taken, a line each.
    """

    model: str | None
    upsamplers: list[str]
    loras: list[str]
    prompts: list[str]
    values: OptionValues
    remarks: list[str] = field(default_factory=list)


def recall(path: Path, shelf: Shelf, known: Sequence[str]) -> Recalled:
    """Return the settings in a picture.

    Args:
        path: of the picture, uploaded.
        shelf: what is offered here.
        known: names of the options that can be taken.

    Raises:
        UserError: no settings in it, or none that make sense.
    """
    try:
        recorded = read_recorded(path)
    except UserError as error:
        raise UserError(str(error).replace(str(path), path.name)) from None
    remarks: list[str] = []
    values = OptionValues({name: value for name, value in recorded.values.items() if name in known})
    left = [name for name in (*recorded.values, *recorded.left_out) if name not in values]
    if left:
        remarks.append(f"not taken: {', '.join(left)[:200]}")
    for key, records in recorded.files.items():
        if key not in OTHER_PLACE:
            values |= _ratings(shelf, key, records[0], known, remarks)
    models = [_found(shelf, Kind.MODEL, "model", its, remarks) for its in recorded.files.get("checkpoint", [])]
    upsamplers = [
        _found(shelf, Kind.UPSAMPLER, "upsampler", its, remarks) for its in recorded.files.get("upsampler", [])
    ]
    named = [name for name in upsamplers if name is not None]
    return Recalled(
        models[0] if models else None,
        named if len(named) == len(upsamplers) else [],
        _loras(recorded, shelf, remarks),
        _prompts(recorded, remarks),
        values,
        remarks,
    )


def _found(shelf: Shelf, kind: Kind, what: str, record: FileRecord, remarks: list[str]) -> str | None:
    """Return the name of a file of the picture's; None, with a remark, if it is not offered."""
    name = shelf.find(kind, record)
    if name is None:
        remarks.append(f"its {what.replace('_', ' ')} {record} is not offered here")
    return name


def _ratings(shelf: Shelf, key: str, record: FileRecord, known: Sequence[str], remarks: list[str]) -> dict[str, str]:
    """Return an option that names a file that is offered; nothing for what is given when the program starts."""
    if key not in known:
        remarks.append(f"its {key.replace('_', ' ')} {record} is given when the app starts (--{key.replace('_', '-')})")
        return {}
    name = _found(shelf, Kind.RATINGS, key, record, remarks)
    return {} if name is None else {key: name}


def _loras(recorded: Recorded, shelf: Shelf, remarks: list[str]) -> list[str]:
    pairs = zip(recorded.files.get("lora", []), recorded.lora_weights)
    found = [(_found(shelf, Kind.LORA, "LoRA", record, remarks), weight) for record, weight in pairs]
    return [f"{name}:{weight:g}" for name, weight in found if name is not None]


def _prompts(recorded: Recorded, remarks: list[str]) -> list[str]:
    images = [str(prompt.image) for prompt in recorded.prompts if prompt.image is not None]
    images += [f"{key.replace('_', ' ')} {record}" for key in IMAGE_FILES for record in recorded.files.get(key, [])]
    if images:
        remarks.append(f"not in the picture itself, to be chosen again: {', '.join(images)[:400]}")
    texts = [prompt for prompt in recorded.prompts if prompt.image is None]
    return [write_prompt(Prompt(prompt.text, prompt.weight)) for prompt in texts]
