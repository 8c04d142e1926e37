"""LoRA files of ours, which `sample.py --lora` and `convert --lora` add to the model that they were trained on."""

import json

from ldm_lab.checkpoints.files import FORMAT
from ldm_lab.checkpoints.importer import Importer, LoadedModel, Section, register_importer
from ldm_lab.checkpoints.lora import BASE, FILE, ROLE, lora_problems
from ldm_lab.checkpoints.opened import OpenedFile
from ldm_lab.errors import UserError


@register_importer
class NativeLora(Importer):
    """What a run with a section `lora` exports."""

    kind = ROLE
    title = "a LoRA of ldm_lab's"
    used_by = "sample.py --checkpoint BASE --lora FILE"
    folder_files = (FILE,)
    precedence = 4  # its tensors are named as other programs' are

    def matches(self, file: OpenedFile) -> bool:
        """Return whether the metadata is of a LoRA of ours."""
        return file.metadata.get("format") == FORMAT and file.metadata.get("role") == ROLE

    def config(self, file: OpenedFile) -> Section:
        """Return the config of the run that trained it."""
        try:
            config = json.loads(file.metadata["config"])
        except (KeyError, ValueError, RecursionError):
            config = None
        if not isinstance(config, dict):
            raise UserError(f"{file.path}: its config is not readable")
        return Section(config)

    def problems(self, config: Section) -> list[str]:
        """Return what is wrong with the config."""
        return lora_problems(config)

    def facts(self, file: OpenedFile) -> Section:
        """Return the step."""
        return Section(step=file.metadata.get("step"))

    def read_model(self, file: OpenedFile, ema: bool, overrides: Section) -> LoadedModel:
        """Raise UserError: it is no model by itself."""
        base = file.metadata.get(BASE, "")
        base = base if base.isprintable() and 0 < len(base) < 100 else "BASE"
        raise UserError(
            f"{file.path}: a LoRA, not a model; it is added to its base: --checkpoint {base} --lora {file.path}"
        )
