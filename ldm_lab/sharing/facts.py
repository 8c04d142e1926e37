"""What is known of how a model came about, from its file and the folder of its run; what nobody wrote down is None."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from ldm_lab.checkpoints.importer import Section
from ldm_lab.errors import UserError
from ldm_lab.io.json_files import Fields
from ldm_lab.prompts import read_prompts
from ldm_lab.sampling.names import RUN_CONFIG, public_name

LARGEST = 1 << 20  # bytes of a run's YAML
SOURCES = {
    "shapes": "shapes that ldm_lab draws itself",
    "folder": "a folder of images",
    "list": "a list of images",
    "webdataset": "webdataset shards",
}


@dataclass(frozen=True)
class Facts:
    """How a model came about. Texts are for people; None is not recorded.

    Attributes:
        step: optimizer steps.
        batch: images in a step.
        data: what kind of data.
        count: how much of it, with its unit.
        image_size: side of the training images, pixels.
        hardware: that it was trained on.
        precision: of the training's arithmetic.
        finished: the day.
        begun_with: the weights that training began with.
        prompts: of the run's demo pictures.
    """

    step: str | None = None
    batch: str | None = None
    data: str | None = None
    count: str | None = None
    image_size: str | None = None
    hardware: str | None = None
    precision: str | None = None
    finished: str | None = None
    begun_with: str | None = None
    prompts: tuple[str, ...] = ()

    @property
    def images(self) -> str | None:
        """How many images training has seen, repeats counted."""
        known = (self.step or "").isdecimal() and (self.batch or "").isdecimal()
        return f"{int(self.step or 0) * int(self.batch or 0):,}" if known else None


def facts_of(model: Path, extra: dict[str, str]) -> Facts:
    """Return what a model's file, and the YAML of the run that it lies in, say.

    Args:
        model: the file.
        extra: text in it.
    """
    config = run_config(model.parent / RUN_CONFIG)
    data, trainer = (config.inside(key) or Fields({}) for key in ("data", "trainer"))
    source, drawn = extra.get("data") or data.text("name"), data.count("count")
    begun = config.text("init_from") or ("nothing" if config.has("denoiser") else None)
    return Facts(
        step=extra.get("step"),
        batch=extra.get("batch"),
        data=SOURCES.get(source or "", source),
        count=extra.get("data_count") or (None if drawn is None else f"{drawn:,} images"),
        image_size=extra.get("image_size") or _text(data.count("image_size")),
        hardware=extra.get("hardware"),
        precision=extra.get("precision") or trainer.text("precision"),
        finished=extra.get("date"),
        begun_with=None if begun is None else public_name(begun),
        prompts=_prompts(config),
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


def _text(number: int | None) -> str | None:
    return None if number is None else str(number)


def _prompts(config: Fields) -> tuple[str, ...]:
    """Return the prompts of a run's demo pictures, if their file is still there."""
    demo = config.inside("demo")
    path = demo.text("prompts") if demo is not None else None
    try:
        return tuple(read_prompts(path)) if path else ()
    except UserError:
        return ()
