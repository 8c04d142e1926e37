"""What a picture says of how it was made: its own settings, or those that another program has written into it.

The file may be a stranger's: nothing in it is executed, imported, opened or downloaded, numbers are within bounds, and
of a file that it names the name alone is taken, to be looked for by its checksum.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ldm_lab.config.registry import infos, part_info
from ldm_lab.errors import UserError
from ldm_lab.io.json_files import JsonObject
from ldm_lab.io.metadata import texts_of
from ldm_lab.io.text import is_text
from ldm_lab.sampling.aliases import our_sampler
from ldm_lab.sampling.names import FileRecord
from ldm_lab.sampling.options import (
    BASE_ONLY,
    DEFAULT_GUIDANCE,
    IMAGE_FILES,
    MODEL_FILES,
    OF_LOADING,
    STAGE,
    UPSAMPLER,
    OptionValues,
)
from ldm_lab.sampling.parameters import Parameters, read_prompt, unescaped

SETTINGS = "ldm_lab"  # keyword of the settings in a picture
LARGEST_FILE = 2**28  # bytes
LARGEST_SIDE, MOST_STEPS, MOST_PROMPTS, LARGEST_BATCH = 16_384, 10_000, 100, 4096
LONGEST_PROMPT = 5000  # characters; a text encoder reads some hundred
FILE_LISTS = (*IMAGE_FILES, *MODEL_FILES, "noised_clip", "checkpoint", "lora", "upsampler")
# What an entry tells that is no setting: results, and what is taken otherwise.
TOLD = (
    "file",
    "prompts",
    "similarity",
    "rerank",
    "width",
    "height",
    "base",
    "stages",
    "batch",
    "device",
    "lora_weight",
)
ONE_STAGE = re.compile(rf"{re.escape(STAGE)}[1-9]\d{{0,2}}\.")
SIZE = re.compile(r"(\d{1,5})\s*x\s*(\d{1,5})")


class Entry(JsonObject):
    """What a picture, and samples.json, tell of it: its file, prompts, seed, size, and how it was made."""


class Taken(OptionValues):
    """Options out of a picture, by the names of their flags."""


TakenValue = int | float | str | tuple[float, float]


@dataclass(frozen=True)
class RecordedPrompt:
    """A prompt: a text, or an image.

    Attributes:
        text: of a text.
        weight: None is the guidance.
        image: of an image prompt, its file.
    """

    text: str
    weight: float | None = None
    image: FileRecord | None = None

    def __post_init__(self) -> None:
        if len(self.text) > LONGEST_PROMPT:
            raise UserError(f"prompts: {LONGEST_PROMPT} characters at most are repeated, not {len(self.text)}")
        if not is_text(self.text):
            raise UserError(f"prompts: {self.text[:60]!r} is no text")


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """The settings that a picture was made with.

    Attributes:
        prompts: that were mixed.
        values: options by the names of their flags.
        files: of those options that name files, and of the models.
        lora_weights: how strongly each of the files under "lora" was added.
        batch: the picture's place in its batch, and how many were in it.
        device: the kind of device that has made it; None if that is not told.
        left_out: what is told and not taken.
        is_ours: whether this program has written them.
    """

    prompts: list[RecordedPrompt]
    values: Taken
    files: dict[str, list[FileRecord]] = field(default_factory=dict)
    lora_weights: list[float] = field(default_factory=list)
    batch: tuple[int, int] = (0, 1)
    device: str | None = None
    left_out: list[str] = field(default_factory=list)
    is_ours: bool = True


def read_texts(path: str | Path) -> dict[str, str]:
    """Return keyword -> text of an image file's metadata. Raises UserError for one that cannot be read."""
    path = Path(path).expanduser()
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise UserError(f"{path}: larger than {LARGEST_FILE >> 20} MiB; no picture of this program's is")
        return texts_of(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such picture") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def read_recorded(path: str | Path) -> Recorded:
    """Return the settings in a picture.

    Raises:
        UserError: none in it, a grid or a frame of a film, or settings that make no sense.
    """
    texts = read_texts(path)
    try:
        if SETTINGS in texts:
            return _own(_entry(texts[SETTINGS]))
        if "parameters" in texts:
            return _foreign(Parameters.parse(texts["parameters"]))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if "workflow" in texts or "prompt" in texts:
        raise UserError(f"{path}: holds a workflow of ComfyUI's, which is not read here; give the prompt and options")
    raise UserError(f"{path}: no settings in this file; pictures of sample.py and of A1111's web UI have some")


def _entry(text: str) -> Entry:
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict):
        raise UserError("its settings are damaged")
    return Entry(entry)


def _own(entry: Entry) -> Recorded:
    """Return the settings that this program has written."""
    if isinstance(files := entry.get("files"), list):
        first = f", such as {files[0]}" if files and isinstance(files[0], str) and len(files[0]) < LARGEST_BATCH else ""
        raise UserError(f"this is a page of {len(files)} pictures; each of them has its own settings{first}")
    if "frame" in entry:
        raise UserError("this is a picture on the way between prompts: --interpolate makes all of them again")
    values = Taken(seed=_whole(entry, "seed", 2**63), size=_size(entry))
    left_out = []
    known = dict.fromkeys(_flags(entry))
    for key, value in entry.items():
        if key in known and isinstance(value, str | int | float | list):
            values[key] = _value(entry, key)
        elif value is not None and key not in (*TOLD, "seed", *FILE_LISTS, *(f"{name}_sha256" for name in FILE_LISTS)):
            left_out.append(key)
    return Recorded(
        prompts=_prompts(entry),
        values=values,
        files={key: _files(entry, key) for key in FILE_LISTS if key in entry},
        lora_weights=_lora_weights(entry),
        batch=_batch(entry),
        device=device[:20] if isinstance(device := entry.get("device"), str) else None,
        left_out=left_out,
    )


def _flags(entry: Entry) -> Iterator[str]:
    """Yield the names of the flags that an entry may have a value of."""
    sampling = part_info("sampling", None).options
    of_samplers = {name: list(info.options) for name, info in infos("sampler").items()}
    kept = [name for name in sampling if name not in ("seed", "size", "batch_size", "rerank", *FILE_LISTS)]
    yield from (*kept, *OF_LOADING)
    stages = stage_prefixes(entry)
    for prefix in ("", UPSAMPLER, *stages):
        name = entry.get(f"{prefix}sampler")
        if name is not None and not (isinstance(name, str) and name in of_samplers):
            raise UserError(f"no sampler {str(name)[:60]!r} here; if it is of your own, --imports its module")
        yield from (prefix + option for option in (of_samplers[name] if isinstance(name, str) else []))
    for prefix in (UPSAMPLER, *stages):
        yield from (prefix + name for name in sampling if name not in BASE_ONLY)
        if entry.get(f"{prefix}sampler") is None:
            yield from (prefix + option for options in of_samplers.values() for option in options)


def stage_prefixes(values: Iterable[str]) -> list[str]:
    """Return the prefixes, such as "upsampler.2.", of single upsamplers that options are said of."""
    return sorted({match[0] for name in values if (match := ONE_STAGE.match(name))})


def _value(entry: Entry, key: str) -> TakenValue:
    """Return an option's value; whether it fits the option is checked as if it stood on the command line."""
    value = entry[key]
    if isinstance(value, list):
        ends = Entry(zip(("first", "last"), value))
        return _finite(ends, "first"), _finite(ends, "last")
    if key.endswith("steps"):
        counts = re.findall(r"\d+", str(value))
        if any(len(count) > 9 for count in counts) or sum(map(int, counts)) > MOST_STEPS:
            raise UserError(f"{key}: {MOST_STEPS} at most are repeated, not {str(value)[:60]}")
    assert isinstance(value, str | int | float), "the caller knows"
    if key == "negative":
        RecordedPrompt(str(value))  # not too long
    return value


def _prompts(entry: Entry) -> list[RecordedPrompt]:
    listed = entry.get("prompts")
    if not isinstance(listed, list) or not 0 < len(listed) <= MOST_PROMPTS:
        raise UserError(f"prompts: a list of 1 to {MOST_PROMPTS} is needed")
    prompts, guidance = [], entry.get("guidance")
    for item in listed:
        if not isinstance(item, dict):
            raise UserError("prompts: each is a text or an image, and a weight")
        weight = None if item.get("weight") in (None, guidance) else _finite(Entry(item), "weight")
        if isinstance(text := item.get("text"), str):
            prompts.append(RecordedPrompt(text, weight))
        else:
            (image,) = _files(Entry(item), "image")
            prompts.append(RecordedPrompt("", weight, image))
    return prompts


def _files(entry: Entry, key: str) -> list[FileRecord]:
    """Return the files that an entry names under a key."""
    names, sums = entry.get(key), entry.get(f"{key}_sha256")
    names, sums = names if isinstance(names, list) else [names], sums if isinstance(sums, list) else [sums]
    if len(sums) != len(names):
        sums = [None] * len(names)
    records = []
    for name, checksum in zip(names, sums, strict=True):
        if not isinstance(name, str) or not name or len(name) > LARGEST_BATCH:
            raise UserError(f"{key}: the name of a file is needed")
        records.append(FileRecord(name, checksum if isinstance(checksum, str) else None))
    return records


def _lora_weights(entry: Entry) -> list[float]:
    """Return how strongly each LoRA was added."""
    weights, files = entry.get("lora_weight", []), entry.get("lora", [])
    count = len(files) if isinstance(files, list) else 1
    if not isinstance(weights, list) or len(weights) != count:
        raise UserError(f"lora_weight: {count} numbers are needed, one for each LoRA")
    return [_finite(Entry(weight=weight), "weight") for weight in weights]


def _size(entry: Entry) -> str:
    """Return the size of the base model's picture, as --size takes it."""
    sized = entry.get("base", entry)
    if not isinstance(sized, dict):
        raise UserError("base: its width and height are needed")
    return "x".join(str(_whole(Entry(sized), side, LARGEST_SIDE, least=1)) for side in ("width", "height"))


def _batch(entry: Entry) -> tuple[int, int]:
    batch = entry.get("batch", [0, 1])
    place, count = batch if isinstance(batch, list) and len(batch) == 2 else (0, 0)
    if not (isinstance(place, int) and isinstance(count, int) and 0 <= place < count <= LARGEST_BATCH):
        raise UserError(f"batch: a place and a number up to {LARGEST_BATCH} are needed")
    return place, count


def _whole(entry: Entry, key: str, most: int, least: int = 0) -> int:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise UserError(f"{key}: a whole number from {least} to {most} is needed, not {str(value)[:60]}")
    return value


def _finite(entry: Entry, key: str) -> float:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{key}: a finite number is needed, not {str(value)[:60]}")
    return float(value)


# -------------------------------------------------------------------------------------------------- other programs


def _foreign(parameters: Parameters) -> Recorded:
    """Return what can be taken of the settings that another program has written in A1111's way."""
    if not parameters.prompt and not parameters.fields:
        raise UserError("its settings are empty")
    values, left_out = Taken(), []
    if parameters.negative:
        RecordedPrompt(parameters.negative)  # not too long
        values["negative"] = unescaped(parameters.negative)
    for name, text in parameters.fields.items():
        taken = _foreign_value(name, text)
        values |= taken
        if not taken and name != "Version":
            left_out.append(name)
    if "spacing" in values and "sampler" not in values:
        del values["spacing"]
    guidance = values.get("guidance")
    scale = guidance if isinstance(guidance, float) else DEFAULT_GUIDANCE
    texts = read_prompt(parameters.prompt, scale)
    if len(texts) > MOST_PROMPTS:
        raise UserError(f"prompts: {MOST_PROMPTS} at most are repeated, not {len(texts)}")
    prompts = [RecordedPrompt(text, weight if len(texts) > 1 else None) for text, weight in texts]
    return Recorded(prompts=prompts, values=values, left_out=left_out, is_ours=False)


def _foreign_value(name: str, text: str) -> Taken:
    """Return the options that a field of A1111's stands for; none where it stands for none of ours."""
    if name == "Steps" and text.isascii() and text.isdigit() and len(text) <= 9 and 0 < int(text) <= MOST_STEPS:
        return Taken(steps=int(text))
    if name == "Seed" and text.isascii() and text.isdigit() and len(text) < 19:
        return Taken(seed=int(text))
    if name == "CFG scale":
        try:
            guidance = float(text)
        except ValueError:
            guidance = math.nan
        return Taken(guidance=guidance) if math.isfinite(guidance) else Taken()
    if name == "Size" and (match := SIZE.fullmatch(text)):
        sides = [int(side) for side in match.groups()]
        return Taken(size="x".join(map(str, sides))) if min(sides) > 0 and max(sides) <= LARGEST_SIDE else Taken()
    if name == "Sampler":
        return _foreign_sampler(text)
    return Taken()


def _foreign_sampler(text: str) -> Taken:
    """Return our sampler for another program's name, where there is the same one."""
    if text in infos("sampler"):
        return Taken(sampler=text)
    words = (our_sampler(text) or "").partition(": here it is ")[2].split()
    options = dict(zip(words[::2], words[1::2], strict=False))
    if options.keys() - {"--sampler", "--spacing"} or len(words) % 2 or "--sampler" not in options:
        return Taken()
    return Taken({flag.removeprefix("--"): value for flag, value in options.items()})
