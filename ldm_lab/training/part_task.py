"""What the tasks "autoencoder" and "cloob" share: they train a part that diffusion then uses frozen."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ldm_lab.checkpoints.files import is_safetensors, read_pickled
from ldm_lab.checkpoints.parts import FORMAT, find_weights, read_part, save_part
from ldm_lab.config import USE_KEYS, build, part_class
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Batch
from ldm_lab.training.task import Task


class PartTask(Task):
    """A task whose trained network is the part of one role, exported with the config that rebuilds it.

    A subclass names the role in PART, the exported file in FILE, and the class of its loss in LOSS; the loss is built
    as `self.loss`, and its trained parameters (a temperature, a variance) go into the optimizer.
    """

    PART: ClassVar[str]
    FILE: ClassVar[str]
    LOSS: ClassVar[type[nn.Module]]

    def __init__(self, config: dict[str, Any], read_weights: bool = True) -> None:
        """Build the network and the loss. Raises UserError for keys that only make sense for a frozen part."""
        frozen_only = [key for key in USE_KEYS[self.PART] if config[self.PART].get(key) is not None]
        if frozen_only:
            raise UserError(
                f"{self.PART}.{frozen_only[0]}: is for a frozen network, and this task trains it: "
                "say its architecture, and init_from=FILE to begin with trained weights"
            )
        if not part_class(self.PART, config[self.PART]).trainable:
            raise UserError(
                f"{self.PART}.name: {config[self.PART]['name']!r} is used as published, it is not trained here"
            )
        super().__init__(config, read_weights)
        section = config.get("loss") or {"name": self.LOSS.part_name}
        if section.get("name") != self.LOSS.part_name:
            raise UserError(f"loss.name: {section.get('name')!r} is not this task's: {self.LOSS.part_name!r}")
        self.loss = build("loss", section)
        self.adopt(build(self.PART, config[self.PART]))

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        batch.require_image("train this network")
        return batch

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.optim.optimizer(nn.ModuleList(self.trained_modules()))
        scheduler = self.optim.scheduler(optimizer, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def trained_modules(self) -> list[nn.Module]:
        """Return all that the optimizer trains."""
        return [self.model, self.loss]

    def initial_weights(self, path: str) -> tuple[dict[str, Tensor], str]:
        """Return the weights that `init_from` names, as a state dict, and what they are, for the user.

        Args:
            path: a part's file (our own or a released one), or the `.ckpt` of a run of this task, of which the averaged
                weights are taken if there are any.
        """
        file = find_weights(path)
        content = {} if is_safetensors(file) else _ckpt(file)
        if FORMAT not in content:
            return read_part(file, self.PART, self.model.part_name)[0], f"weights of {path}"
        prefix = "model_ema." if any(n.startswith("model_ema.") for n in content["state_dict"]) else "model."
        state = {n.removeprefix(prefix): t for n, t in content["state_dict"].items() if n.startswith(prefix)}
        return state, f"weights of {path} (step {content['global_step']})"

    def export(self, folder: Path, dtype: torch.dtype) -> None:
        """Write the averaged network (the trained one if there is no average) as a part's file."""
        save_part(folder / self.FILE, self.best_model, self.run_config[self.PART], self.facts(), dtype)

    def facts(self) -> dict[str, str]:
        """Return what is written beside the exported weights."""
        return {"step": str(self.trainer.global_step)}


def _ckpt(file: Path) -> dict[str, Any]:
    """Return the content of a `.ckpt`, lazily; nothing for a file that only an importer can read."""
    try:
        return read_pickled(file, mmap=True)
    except UserError:
        return {}
