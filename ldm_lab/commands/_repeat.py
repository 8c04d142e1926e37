"""`--from PICTURE`: the settings of a picture in the place of flags that are not given."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_lab.config.registry import infos
from ldm_lab.errors import UserError
from ldm_lab.pretrained.catalogue import catalogue
from ldm_lab.pretrained.resolve import REPOSITORY
from ldm_lab.sampling.names import FileRecord
from ldm_lab.sampling.options import IMAGE_FILES, MODEL_FILES, STAGE, UPSAMPLER
from ldm_lab.sampling.recorded import Recorded, RecordedPrompt, read_recorded, stage_prefixes

if TYPE_CHECKING:  # these import torch, which takes seconds
    from ldm_lab.prompts import Prompt
    from ldm_lab.sampling.output import Entry


@dataclass(frozen=True)
class Repeat:
    """A picture that is made again.

    Attributes:
        path: of the picture.
        recorded: its settings.
        batch: its place among so many, which are made again at once to round as they did then; None: other pictures are
            asked for.
        folders: where files that it was made with may lie.
    """

    path: Path
    recorded: Recorded
    batch: tuple[int, int] | None
    folders: list[Path]

    def keeps(self, place: int) -> bool:
        """Return whether the picture at a place among those that are made is wanted."""
        return self.batch is None or place == self.batch[0]

    def prompts(self) -> "list[Prompt]":
        """Return its prompts. Raises UserError for an image prompt whose file is not found."""
        return [self._prompt(prompt) for prompt in self.recorded.prompts]

    def _prompt(self, recorded: RecordedPrompt) -> "Prompt":
        from ldm_lab.io.images import open_image
        from ldm_lab.prompts import Prompt

        if recorded.image is None:
            return Prompt(recorded.text, recorded.weight)
        file = recorded.image.find(self.folders)
        if file is None:
            raise UserError(
                f"{self.path}: its image prompt {recorded.image} is not here; put it beside the picture, or give all "
                "prompts (--images FILE)"
            )
        return Prompt(str(file), recorded.weight, open_image(str(file)))

    def tell_differences(self, settings: "Entry") -> None:
        """Say whether models are others than the picture's, or another kind of device makes it."""
        for key in ("checkpoint", "lora", "upsampler"):
            then = [record.sha256 for record in self.recorded.files.get(key, [])]
            now = settings.get(f"{key}_sha256")
            if self.recorded.is_ours and then != (now if isinstance(now, list) else [now] if now else []):
                named = ", ".join(map(str, self.recorded.files.get(key, []))) or "none"
                note(f"--{key} is another model than the picture's ({named}): the picture will be another, too")
        if self.recorded.device not in (None, settings.get("device")):
            note(f"{self.path}: made on the device {self.recorded.device}; {settings.get('device')} rounds otherwise")


def note(line: str) -> None:
    """Print a line for the user."""
    print(f"note: {line}", file=sys.stderr)


def fill_in(args: argparse.Namespace) -> Repeat | None:
    """Put a picture's settings in the place of flags that are not given; return what is repeated, None without --from.

    Raises:
        UserError: no readable settings, a file that it was made with is not found.
    """
    if args.repeat is None:
        if args.checkpoint is None:
            raise UserError("the following arguments are required: --checkpoint (--help explains)")
        return None
    if args.interpolate:
        raise UserError("--from does not go with --interpolate")
    path = Path(args.repeat).expanduser()
    recorded = read_recorded(path)
    words = dict(args._get_kwargs())
    others = args.n or args.texts or args.images or args.prompts or words.get("batch_size") is not None
    here = Path.cwd()
    folders = [path.parent, here, here / "runs", here / "data", REPOSITORY / "runs"]
    repeat = Repeat(path, recorded, None if others else recorded.batch, folders)
    own_prompts = not (args.texts or args.images or args.prompts)
    _fill_values(args, recorded, own_prompts)
    _fill_files(args, repeat)
    if repeat.batch is not None:
        args.batch_size = repeat.batch[1]
        if args.batch_size > 1:
            note(
                f"{path}: made in a batch of {args.batch_size}, as which it is repeated; --batch-size 1 is quicker "
                "and may round otherwise"
            )
    return repeat


def _fill_values(args: argparse.Namespace, recorded: Recorded, own_prompts: bool) -> None:
    words = dict(args._get_kwargs())
    given = {name for name, value in words.items() if value is not None}
    samplers = {name for info in infos("sampler").values() for name in info.options}
    dropped = set[str]()
    if own_prompts and all(prompt.weight is not None for prompt in recorded.prompts):
        dropped.add("guidance")  # which is the weight of those without one
    for prefix in ("", UPSAMPLER, *stage_prefixes(recorded.values)):
        if words.get(f"{prefix}sampler") not in (None, recorded.values.get(f"{prefix}sampler")):
            of_other = {prefix + name for name in samplers} - given
            dropped |= of_other
            left = ", ".join(f"{name} {value}" for name, value in recorded.values.items() if name in of_other)
            if left:
                flag = f"--{prefix}sampler".replace("_", "-")
                note(f"{flag} is another than the picture's, whose {left} are left out: its own defaults hold")
    for name, value in recorded.values.items():
        if (
            name not in given
            and name not in dropped
            and not (name.startswith((UPSAMPLER, STAGE)) and not _has_upsampler(args, recorded))
        ):
            setattr(args, name, value)
    if recorded.is_ours:
        if recorded.left_out:
            note(f"not known here, and left out: {', '.join(recorded.left_out)[:200]}")
        return
    taken = ", ".join(
        ["prompt", *(f"{name} {value}" if name != "negative" else name for name, value in recorded.values.items())]
    )
    left = f"; not taken: {', '.join(recorded.left_out)[:200]}" if recorded.left_out else ""
    note(f"settings of another program; taken: {taken}{left}")


def _has_upsampler(args: argparse.Namespace, recorded: Recorded) -> bool:
    return bool(args.upsampler or recorded.files.get("upsampler"))


def _fill_files(args: argparse.Namespace, repeat: Repeat) -> None:
    """Look for the files that the picture was made with, and compare those that are given."""
    words, files = dict(args._get_kwargs()), repeat.recorded.files
    for key, records in files.items():
        given = words.get(key)
        if key in ("checkpoint", "upsampler"):
            if not given:
                found = [_found(repeat, key, record) for record in records]
                setattr(args, key, str(found[0]) if key == "checkpoint" else list(map(str, found)))
        elif key == "lora":
            if given is None:
                paired = zip(records, repeat.recorded.lora_weights, strict=True)
                args.lora = [f"{_found(repeat, key, record)}:{weight!r}" for record, weight in paired]
        elif given is None:
            found = [_found(repeat, key, record) for record in records]
            setattr(args, key, tuple(map(str, found)) if key == "noised_clip" else str(found[0]))
        elif key in (*IMAGE_FILES, *MODEL_FILES) and not records[0].is_content_of(given):
            note(f"{_flag(key)} is another file than the picture's ({records[0]}): the picture will be another, too")
    if args.checkpoint is None:
        raise UserError(f"{repeat.path}: names no model of this program's; give one by --checkpoint")


def _found(repeat: Repeat, key: str, record: FileRecord) -> str | Path:
    found = record.find(repeat.folders)
    if found is not None:
        return found
    others = record.namesakes(repeat.folders)
    name = record.name if record.name in catalogue() else others[0] if others else "FILE"
    why = f"is not here ({others[0]} is another one)" if others else "is not here"
    raise UserError(f"{repeat.path}: its {key.replace('_', ' ')} {record} {why}; give one by {_flag(key)} {name}")


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def seeds(repeat: Repeat | None, seed: int) -> Sequence[int] | None:
    """Return the seeds of copies of one picture; None lets them count on."""
    return None if repeat is None or repeat.batch is None or seed < 0 else [seed] * repeat.batch[1]
