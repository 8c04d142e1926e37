"""The base class of the tasks "autoencoder" and "cloob", which train a part that diffusion then uses frozen."""

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from ldm_lab.batch import Batch
from ldm_lab.checkpoints.importer import Section, detect_format
from ldm_lab.checkpoints.native import save_part
from ldm_lab.checkpoints.parts import read_part
from ldm_lab.config import PartConfig, RunConfig, use_keys
from ldm_lab.errors import UserError
from ldm_lab.pretrained.own_runs import note_weights
from ldm_lab.training.initial import differing_part, section_of
from ldm_lab.training.logs import print_rank_zero
from ldm_lab.training.task import Task


class PartTask(Task):
    """A task whose trained network is the part of one role, exported with the config that rebuilds it.

    A subclass names the role in PART, the exported file in FILE, and the class of its loss in LOSS; the loss is built
    as `self.loss`, and its trained parameters (a temperature, a variance) go into the optimizer.
    """

    PART: ClassVar[str]
    FILE: ClassVar[str]
    LOSS: ClassVar[type[nn.Module]]

    def __init__(self, config: RunConfig, read_weights: bool = True, weights_follow: bool = False) -> None:
        """Build the network and the loss. Raises UserError for keys that only make sense for a frozen part."""
        part = config[self.PART]
        frozen_only = [key for key in part if key in use_keys(self.PART)]
        if frozen_only:
            raise UserError(
                f"{self.PART}.{frozen_only[0]}: is for a frozen network, and this task trains it: "
                "say its architecture, and init_from=FILE to begin with trained weights"
            )
        if not part.load().trainable:
            raise UserError(f"{self.PART}.name: {part.name!r} is used as published, it is not trained here")
        super().__init__(config, read_weights)
        loss = config.get("loss", PartConfig("loss", self.LOSS.part_name))
        if loss.load() is not self.LOSS:
            raise UserError(f"loss.name: {loss.name!r} is not this task's: {self.LOSS.part_name!r}")
        self.loss = loss.build()
        self.set_model(part.build())

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        batch.require_image("train this network")
        return batch

    def trained_modules(self) -> list[nn.Module]:
        return [self.model, self.loss]

    def initial_weights(self, path: str) -> tuple[dict[str, Tensor], str]:
        """Return the weights that `init_from` names, as a state dict, and what they are, for the user.

        Args:
            path: a part's file (our own or a released one), or the `.ckpt` of a run of this task, of which the averaged
                weights are taken if there are any.
        """
        found = detect_format(path)
        if found.kind != "run":
            part = read_part(found, self.PART, self.model.part_name)
            self._say_differences(part.config)
            return part.state, f"weights of {path}"
        run = found.importer.read_model(found.file, ema=True, overrides=Section())
        self._say_differences(section_of(run.config, self.PART))
        return run.state, f"weights of {path} (step {run.extra['step']})"

    def _say_differences(self, theirs: Section) -> None:
        """Say in what a checkpoint's section of this part differs from the run's, though its weights may fit."""
        for line in differing_part(self.PART, theirs, Section(self.run_config[self.PART].to_dict())):
            print_rank_zero(f"init_from: {line}")

    def export(self, folder: Path, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Write the averaged network (the trained one if there is no average) as a part's file."""
        save_part(folder / self.FILE, self.best_model, self.run_config[self.PART], self.facts(), dtype, weights)
        note_weights(folder / self.FILE)

    def facts(self) -> dict[str, str]:
        """Return what is written beside the exported weights."""
        return {"step": str(self.trainer.global_step)}
