"""Snapshots of power-function averages during training, of which `python -m ldm_lab ema` makes one of any width."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypedDict

import torch
from annotated_types import Gt, Interval, Len
from pytorch_lightning import Callback, Trainer
from torch import Tensor, nn

from ldm_lab.batch import Batch
from ldm_lab.checkpoints.snapshots import FOLDER, UPDATES, WIDTH
from ldm_lab.config import PositiveInt, register
from ldm_lab.ema import WIDEST, PowerAverage
from ldm_lab.sharded import is_sharded, local, shared_like, whole_tensors
from ldm_lab.training.diffusion import DiffusionTask


class SnapshotState(TypedDict):
    """What a checkpoint keeps of the averages: updates so far; width -> name -> average, float32."""

    updates: int
    averages: dict[float, dict[str, Tensor]]


@register("ema_snapshots")
class EMASnapshots(Callback):
    """Keep power-function averages of the trained weights, and write them every N optimizer steps (in float16).

    Karras et al. 2024 (arXiv 2312.02696, section 3). Each average takes the memory of one more copy of the weights on
    the first device (where the devices share the network, of one more share on each), and each snapshot two bytes a
    weight on the disk; none is deleted.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every: PositiveInt = 1000,
        widths: Annotated[list[Annotated[float, Gt(0), Interval(le=WIDEST)]], Len(1)] = (0.05, 0.1),
    ) -> None:
        """Set what is kept.

        Args:
            folder: the run's folder.
            every: optimizer steps between snapshots, counted from where the averages began.
            widths: of the averages: the standard deviation of the profile as a share of the training so far, 0 to 0.28.
        """
        self.folder, self.every, self.widths = folder / FOLDER, every, tuple(widths)
        self.updates = 0
        self.averages: dict[float, dict[str, Tensor]] = {}
        self.step = -1
        self.keeps = False  # on this rank

    @staticmethod
    def check(*, widths: Sequence[float]) -> list[str]:
        """Return what is wrong across the options."""
        return [f"widths: each has to be another one, not {list(widths)}"] if len({*widths}) < len(widths) else []

    def on_train_start(self, trainer: Trainer, task: DiffusionTask) -> None:
        self.step = trainer.global_step
        self.keeps = trainer.is_global_zero or is_sharded(task.model)
        if not self.keeps:
            return
        own = trained(task.model)
        if self.averages.keys() != {*self.widths}:  # there are none yet, or other ones are wanted from here on
            self.averages, self.updates = {width: {} for width in self.widths}, 0
        for average in self.averages.values():
            kept = {name: shared_like(average.get(name, weight), weight) for name, weight in own.items()}
            average.update({n: value.to(own[n].device, torch.float32, copy=True) for n, value in kept.items()})
        task.followers = [value for average in self.averages.values() for value in average.values()]
        if trainer.is_global_zero:
            self.remove_later()

    def remove_later(self) -> None:
        """Delete the snapshots of a course that this run does not go on with."""
        later = [path for path in self.folder.glob("*.safetensors") if int(path.name.partition("-")[0]) > self.updates]
        for path in later:
            path.unlink()
        if later:
            print(
                f"{self.folder}: {len(later)} snapshots after step {self.updates} removed, they are not of this course"
            )

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, task: DiffusionTask, outputs: Tensor, batch: Batch, index: int
    ) -> None:
        if not self.keeps or trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        self.updates += 1
        weights = [local(weight).float() for weight in trained(task.model).values()]
        left_out = task.detector.last.left_out  # [], on the device
        for width, average in self.averages.items():
            averages = [local(value) for value in average.values()]
            share = (1 - left_out) * (1 - PowerAverage(width, self.updates).decay())  # []
            torch._foreach_lerp_(averages, weights, [share] * len(weights))
        if self.updates % self.every == 0:
            self.write(trainer, task)

    def write(self, trainer: Trainer, task: DiffusionTask) -> None:
        """Write a snapshot of each average, on rank 0; all ranks that keep averages take part."""
        for width, average in self.averages.items():
            weights = whole_tensors({**task.model.state_dict(), **average})
            if trainer.is_global_zero:
                facts = {WIDTH: str(width), UPDATES: str(self.updates)}
                path = self.folder / f"{self.updates:08d}-{width:g}.safetensors"
                task.write_model(path, weights, torch.float16, facts)

    def state_dict(self) -> SnapshotState:
        return {"updates": self.updates, "averages": {w: whole_tensors(of) for w, of in self.averages.items()}}

    def load_state_dict(self, state: SnapshotState) -> None:
        self.updates, self.averages = state["updates"], state["averages"]


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights that are trained, by name."""
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
