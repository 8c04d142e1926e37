"""The part of a task that looks at the gradient of a step: its norm, clipping, whether it is learned from."""

from collections.abc import Iterable

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.amp import GradScaler

from ldm_lab.training.divergence import Detector, total_norm
from ldm_lab.training.gradients import Gate, Parameters, RunningStatistics, clip_gradients, gradient_norm


class JudgedSteps(LightningModule):
    """A LightningModule whose optimizer steps are left out where loss or gradient are not as they should be.

    Attributes:
        detector: looks at loss and gradient; the guard sets what it looks for.
        gate: leaves the optimizer's step out.
        running_statistics: of batch norms, put back where a step is left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.detector = Detector()
        self.gate: Gate | None = None
        self.running_statistics: RunningStatistics | None = None

    def keep_statistics(self, modules: Iterable[nn.Module]) -> None:
        """Keep the running statistics of all that is trained as they are before a step."""
        if self.running_statistics is None:
            self.running_statistics = RunningStatistics(modules)
        self.running_statistics.keep()

    def on_before_backward(self, loss: Tensor) -> None:
        scaler = self.scaler
        self.detector.add(loss if scaler is None else loss / scaler.scale(loss.new_ones(())))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Judge the step by its loss and its gradient, whose norm is logged; clip. Lightning calls it in every step."""
        if self.gate is None or self.gate.optimizer is not optimizer:
            self.gate = Gate(optimizer, self.scaler)
        self.gate.unscale()
        norm = self.clip(self.clipped_apart(optimizer), gradient_clip_val)
        left_out = self.detector.judge(norm, scaled=self.scaler is not None)
        self.gate.leave_out(left_out)
        if self.running_statistics is not None:
            self.running_statistics.put_back(left_out)
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self.log("train/grad_norm", norm)

    def clipped_apart(self, optimizer: torch.optim.Optimizer) -> list[Parameters]:
        """Return the parameters of each network whose gradient is clipped by its own norm."""
        return [[p for group in optimizer.param_groups for p in group["params"]]]

    @staticmethod
    def clip(networks: list[Parameters], limit: float | None) -> Tensor:
        """Clip each network's gradient to a norm of at most `limit`, if there is one.

        Returns:
            The norm of all of them together before they were clipped, [].
        """
        networks = [parameters for parameters in networks if any(p.grad is not None for p in parameters)]
        norms = [gradient_norm(parameters) for parameters in networks]  # [] each
        for parameters, norm in zip(networks, norms) if limit else ():
            clip_gradients(parameters, limit, norm)
        return total_norm(norms)

    @property
    def scaler(self) -> GradScaler | None:
        """The gradient scaler of fp16; None in other precisions."""
        precision = self.trainer.precision_plugin
        return precision.scaler if isinstance(precision, MixedPrecision) else None
