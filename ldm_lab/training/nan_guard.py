"""A guard against numbers that are not finite: the run stops with the first bad step named, and none are written."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from pytorch_lightning import Callback, Trainer
from torch import Tensor

from ldm_lab.errors import NotFiniteError
from ldm_lab.interfaces import Batch
from ldm_lab.sharded import local
from ldm_lab.training.task import Task, gather

KEYS_SHOWN = 3
ADVICE = "a lower optim.lr, trainer.gradient_clip_val=1.0 or trainer.precision=bf16-mixed may help"


class Seen(NamedTuple):
    """A batch whose loss is not yet known to be finite.

    Attributes:
        step: the optimizer step that it is part of, counted from 1.
        keys: of its samples.
        finite: whether its loss is, bool [], on the device.
    """

    step: int
    keys: list[str]
    finite: Tensor


class FiniteGuard(Callback):
    """Checks every loss for NaN and infinity, on the device; the host asks once for every `every` optimizer steps.

    All ranks ask at the same steps and stop together. Before a checkpoint is saved `check_before_saving` asks once
    more, and looks at the weights, their average and the optimizer's state besides.
    """

    def __init__(self, folder: Path, every: int) -> None:
        """Set when to ask.

        Args:
            folder: the run's folder, for the message.
            every: optimizer steps between questions: those that are logged, where the host waits for the device anyway.
        """
        self.folder, self.every = folder, every
        self.window: list[Seen] = []
        self.asked_at = -1

    def on_train_batch_end(
        self, trainer: Trainer, task: Task, outputs: dict[str, Tensor], batch: Batch, index: int
    ) -> None:
        finite = torch.isfinite(outputs["loss"].detach()).all()  # []
        within_step = (index + 1) % trainer.accumulate_grad_batches != 0
        self.window.append(Seen(trainer.global_step + within_step, batch.key[:KEYS_SHOWN], finite))
        if trainer.global_step % self.every == 0 and trainer.global_step != self.asked_at:
            self.check(task)

    def check(self, task: Task) -> None:
        """Raise NotFiniteError, on all ranks, if a loss since the last question was not finite on one of them."""
        self.asked_at = task.trainer.global_step
        window, self.window = self.window, []
        flags = [seen.finite for seen in window] or [torch.ones((), dtype=torch.bool, device=task.device)]
        finite = torch.stack(flags).all().to(torch.int32)  # []
        if task.trainer.world_size > 1:
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        if not finite:
            first = [(seen.step, seen.keys) for seen in window if not seen.finite][:1]
            step, keys = min(found for share in gather(first) for found in share)
            raise NotFiniteError(
                f"the loss is not finite at step {step} (samples {', '.join(keys)}, ...); {self.cure()}"
            )

    def check_before_saving(self, task: Task) -> None:
        """Raise NotFiniteError, on all ranks, if anything that a checkpoint would hold is not finite on one of them."""
        self.check(task)
        named = [(name, value) for name, value in checkpointed_tensors(task) if value.is_floating_point()]
        flags = torch.stack([torch.isfinite(local(value)).all() for _, value in named])  # [n]
        finite = flags.all().to(torch.int32)  # []
        if task.trainer.world_size > 1:
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        if not finite:
            bad = next((name for (name, _), fine in zip(named, flags.tolist()) if not fine), "another rank's weights")
            raise NotFiniteError(f"{bad} is not finite after step {task.trainer.global_step}; {self.cure()}")

    def cure(self) -> str:
        """Return what is left of the run, and what may help, in words."""
        saved = sorted(self.folder.glob("*.ckpt"))
        if not saved:
            return f"nothing was saved; {ADVICE}"
        return f"{self.folder / 'last.ckpt'} is from before, and resume.checkpoint=last goes on with it; {ADVICE}"


def checkpointed_tensors(task: Task) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the trained network, its average and the optimizer's state."""
    for prefix, module in (("model", task.model), ("model_ema", task.model_ema)):
        if module is not None:
            yield from ((f"{prefix}.{name}", value.detach()) for name, value in module.state_dict().items())
    for optimizer in task.trainer.optimizers:
        for i, state in enumerate(optimizer.state.values()):
            yield from ((f"optimizer state {i}.{key}", v) for key, v in state.items() if isinstance(v, Tensor))
