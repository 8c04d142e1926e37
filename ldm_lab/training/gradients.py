"""Gradients: their norm, computed once for clipping, guard and log; clipping; steps that are left out on the device."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ldm_lab.sharded import local

Parameters = Sequence[nn.Parameter]


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the L2 norm over the gradients of parameters, [], on their device; at least one has to have a gradient.

    Under DDP the gradients are equal on all ranks, and so is this; of shared ones it is the norm of the whole.
    """
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(parameters: Parameters, limit: float, norm: Tensor) -> None:
    """Scale gradients in place so that their norm is at most `limit`, bit for bit as torch's `clip_grad_norm_`.

    Args:
        parameters: those that `norm` was computed over.
        limit: largest L2 norm.
        norm: `gradient_norm`, [].
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if any(isinstance(gradient, DTensor) for gradient in gradients):
        torch._foreach_mul_([local(gradient) for gradient in gradients], (limit / (norm + 1e-6)).clamp(max=1.0))
    else:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)


class Gate:
    """Leaves an optimizer's step out where a flag on the device says so: no weight and no average of AdamW's changes.

    A fused optimizer reads the flag in its own kernels, as it does under a gradient scaler. For any other one the host
    reads the flag, which waits for the device, and takes the gradients away: optimizers pass over parameters without.
    """

    def __init__(self, optimizer: Optimizer, scaler: GradScaler | None) -> None:
        """Set what is gated.

        Args:
            optimizer: of torch or bitsandbytes.
            scaler: of fp16; its own flag counts as well.
        """
        self.optimizer, self.scaler = optimizer, scaler
        self.fused = all(group.get("fused") for group in optimizer.param_groups)
        self.flag: Tensor | None = None
        if self.fused and scaler is not None:  # it sets a flag of its own just before the step
            optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: self._add_flag(optimizer))

    def unscale(self) -> None:
        """Divide the gradients by the scaler's factor, where Lightning has left that to a fused optimizer."""
        if self.fused and self.scaler is not None:
            self.scaler.unscale_(self.optimizer)

    def leave_out(self, flag: Tensor) -> None:
        """Leave out the step that comes if the flag, float [], is 1 and not 0."""
        self.flag = flag
        if self.fused:
            self.optimizer.found_inf = flag
        elif bool(flag):
            self.optimizer.zero_grad(set_to_none=True)

    def _add_flag(self, optimizer: Optimizer) -> None:
        if self.flag is not None:
            optimizer.found_inf = torch.maximum(optimizer.found_inf, self.flag)


class RunningStatistics:
    """The buffers that a forward pass changes (of batch norms), put back where a step is left out."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        batch_norms = [
            m for module in modules for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase)
        ]
        self.buffers = [buffer for module in batch_norms for buffer in module.buffers()]
        self.before: list[Tensor] = []

    @torch.no_grad()
    def keep(self) -> None:
        """Keep a copy of them as they are before a step."""
        self.before = [buffer.clone() for buffer in self.buffers]

    @torch.no_grad()
    def put_back(self, flag: Tensor) -> None:
        """Put the copies back if the flag, float [], is 1."""
        for buffer, before in zip(self.buffers, self.before):
            buffer.copy_(torch.where(flag > 0, before, buffer))
