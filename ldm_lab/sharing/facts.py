"""What is known of how a model came about, from its file; what nobody wrote down is None."""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from ldm_lab.checkpoints.importer import Section
from ldm_lab.checkpoints.lora import MERGED
from ldm_lab.checkpoints.native import BEGUN_WITH
from ldm_lab.errors import UserError
from ldm_lab.io.json_files import Fields
from ldm_lab.pretrained.own_runs import is_own
from ldm_lab.prompts import read_prompts
from ldm_lab.sampling.names import RUN_CONFIG

LARGEST = 1 << 20  # bytes of a run's YAML
SOURCES = {
    "shapes": "shapes that ldm_lab draws itself",
    "folder": "a folder of images",
    "list": "a list of images",
    "webdataset": "webdataset shards",
}
KNOWN = re.compile(rf"\b(?:{'|'.join(SOURCES)})\b")
LONGEST_NUMBER = 20  # digits


@dataclass(frozen=True)
class Facts:
    """How a model came about. Texts are for people; None is not recorded.

    Attributes:
        step: optimizer steps.
        batch: images in a step.
        images: that it was trained on, repeats counted.
        data: what kind of data.
        count: how much of it, with its unit.
        image_size: side of the training images, pixels.
        hardware: that it was trained on.
        precision: of the training's arithmetic.
        finished: the day.
        begun_with: the weights that training began with.
        merged: LoRAs that were merged into it.
        prompts: of the run's demo pictures.
    """

    step: str | None = None
    batch: str | None = None
    images: str | None = None
    data: str | None = None
    count: str | None = None
    image_size: str | None = None
    hardware: str | None = None
    precision: str | None = None
    finished: str | None = None
    begun_with: str | None = None
    merged: str | None = None
    prompts: tuple[str, ...] = ()


def facts_of(model: Path, extra: dict[str, str]) -> Facts:
    """Return what a model's file says, and of a run of this user's the prompts that its YAML names.

    Args:
        model: the file.
        extra: text in it.
    """
    images, data = extra.get("images", ""), extra.get("data")
    return Facts(
        step=extra.get("step"),
        batch=extra.get("batch"),
        images=f"{int(images):,}" if images.isdecimal() and len(images) < LONGEST_NUMBER else None,
        data=None if data is None else KNOWN.sub(lambda found: SOURCES[found[0]], data),
        count=extra.get("data_count"),
        image_size=extra.get("image_size"),
        hardware=extra.get("hardware"),
        precision=extra.get("precision"),
        finished=extra.get("date"),
        begun_with=extra.get(BEGUN_WITH),
        merged=extra.get(MERGED),
        # A stranger's YAML would choose which file's lines stand in the card.
        prompts=_prompts(run_config(model.parent / RUN_CONFIG)) if is_own(model) else (),
    )


def run_config(path: Path) -> Fields:
    """Return the YAML of a run, without making anything of it; nothing where there is none that can be read."""
    try:
        if path.stat().st_size > LARGEST:
            return Fields({})
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return Fields({})
    return Fields(Section(content) if isinstance(content, dict) else {})


def _prompts(config: Fields) -> tuple[str, ...]:
    """Return the prompts of a run's demo pictures, if their file is still there."""
    demo = config.inside("demo")
    path = demo.text("prompts") if demo is not None else None
    try:
        return tuple(read_prompts(path)) if path else ()
    except UserError:
        return ()
