"""Ctrl-C and SIGTERM: finish the batch, save, leave."""

import signal
from types import FrameType
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

AGREE_EVERY = 8  # batches between asking the other ranks whether one of them was told to stop


class Interrupt(Callback):
    """Stop at the end of a batch after SIGINT or SIGTERM, on all ranks at the same one; a second signal kills.

    Attributes:
        received: the signal's number, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):  # after Lightning's own handlers, which do not save
            self.before[number] = signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the signal; the next one meets the handlers that were there before."""
        self.received = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def on_train_batch_end(self, trainer: Trainer, task: LightningModule, outputs: Any, batch: Any, index: int) -> None:
        if trainer.world_size > 1 and index % AGREE_EVERY == 0:
            heard = torch.tensor(self.received or 0, device=task.device)  # []
            torch.distributed.all_reduce(heard, torch.distributed.ReduceOp.MAX)
            self.received = int(heard) or None
        if self.received and (trainer.world_size == 1 or index % AGREE_EVERY == 0):
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, task: LightningModule) -> None:
        self.restore()

    def on_exception(self, trainer: Trainer, task: LightningModule, exception: BaseException) -> None:
        self.restore()

    def restore(self) -> None:
        """Put back the handlers that were there before training."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
