"""The optimizer and the learning rate over time."""

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Literal, TypedDict

import torch
from annotated_types import Len
from torch import nn
from torch.optim.optimizer import StateDict

from ldm_lab.config import NonNegativeFloat, NonNegativeInt, PositiveInt, ShareBelowOne, register
from ldm_lab.errors import UserError, install, unknown
from ldm_lab.interfaces import Part

FUSED = ("cpu", "cuda", "xpu")  # devices with AdamW in one kernel that heeds a flag; that of MPS does not


class CourseState(TypedDict):
    """`Began` as plain values, for checkpoints."""

    origin: int
    step: int
    progress: float


@dataclass(frozen=True)
class Began:
    """Where a learning rate's schedule began, and where it was bent to another end.

    Attributes:
        origin: the optimizer step from which `warmup_steps` and `schedule_steps` count.
        step: the step at which it was bent.
        progress: how far it had come there, in [0, 1].
    """

    origin: int = 0
    step: int = 0
    progress: float = 0.0

    @classmethod
    def of(cls, state: CourseState) -> "Began":
        """Return what a checkpoint says. Raises UserError if it is damaged."""
        origin, step, progress = (state.get(name) for name in ("origin", "step", "progress"))
        if not (
            type(origin) is type(step) is int and 0 <= origin <= step and type(progress) is float and 0 <= progress <= 1
        ):
            raise UserError(f"resume.checkpoint: the learning rate's schedule is damaged: {state}")
        return cls(origin, step, progress)

    def state(self) -> CourseState:
        """Return plain values, of which `of` makes the same."""
        return CourseState(origin=self.origin, step=self.step, progress=self.progress)


@register("optim")
class Optim:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with a warm-up and a decay of the learning rate."""

    def __init__(
        self,
        *,
        lr: NonNegativeFloat = 3e-5,
        weight_decay: NonNegativeFloat = 0.01,
        betas: Annotated[list[ShareBelowOne], Len(2, 2)] = (0.9, 0.999),
        eps: NonNegativeFloat = 1e-8,
        decay_on: Literal["all", "matrices"] = "all",
        warmup: Literal["linear", "exponential"] = "linear",
        warmup_steps: NonNegativeInt = 0,
        schedule: Literal["constant", "linear", "cosine"] = "constant",
        schedule_steps: PositiveInt | None = None,
        final_lr: NonNegativeFloat = 0.0,
        state: Literal["32bit", "8bit", "paged_8bit"] = "32bit",
        freeze: list[str] = (),
    ) -> None:
        """Set the learning rate `lr` and what it is multiplied with.

        Args:
            lr: peak learning rate.
            weight_decay: decoupled weight decay.
            betas: AdamW's two averaging factors.
            eps: AdamW's epsilon.
            decay_on: "all" decays biases and norms, too, as the original does; "matrices" only parameters of two and
                more dimensions other than embedding tables.
            warmup: "linear" rises over `warmup_steps`; "exponential" is 1 - (1 - 1/warmup_steps)^step.
            warmup_steps: optimizer steps; 0 starts at the full rate.
            schedule: course from `lr` to `final_lr` over `schedule_steps`; the cosine is cos^2 of a quarter period.
            schedule_steps: optimizer steps; by default the run's `trainer.max_steps`.
            final_lr: learning rate at the end of the schedule.
            state: precision of AdamW's two averages; 8bit (Dettmers et al. 2022, arXiv 2110.02861) takes a quarter of
                the memory, paged_8bit moves them to main memory when the GPU is full. Both need bitsandbytes.
            freeze: parts of the network that stay as they are, by its own names for them, such as image_tower of cloob,
                text_transformer and unet of glide_unet.
        """
        self.state, self.freeze = state, list(freeze)
        self.lr, self.weight_decay, self.betas, self.eps, self.decay_on = lr, weight_decay, tuple(betas), eps, decay_on
        self.warmup, self.warmup_steps = warmup, warmup_steps
        self.schedule, self.schedule_steps, self.final_lr = schedule, schedule_steps, final_lr
        self.peak = lr  # a resumed run may go on with another one
        self.began = Began()

    @staticmethod
    def unused(*, warmup_steps: int, schedule: str) -> dict[str, str]:
        """Return which options have no effect, and why."""
        found = {} if warmup_steps else {"warmup": "optim.warmup_steps is 0"}
        if schedule == "constant":
            found |= dict.fromkeys(("schedule_steps", "final_lr"), "optim.schedule is constant")
        return found

    def factor(self, step: int, max_steps: int) -> float:
        """Return the multiplier of the peak for the optimizer step after `step` completed ones."""
        factor, warm = 1.0, step - self.began.origin + 1
        if self.warmup_steps and self.warmup == "linear":
            factor = min(1.0, warm / self.warmup_steps)
        elif self.warmup_steps:
            factor = 1 - (1 - 1 / self.warmup_steps) ** warm
        return factor * self.decay(step, max_steps)

    def decay(self, step: int, max_steps: int) -> float:
        """Return what the schedule makes of the peak, without the warm-up."""
        if self.schedule == "constant":
            return 1.0
        progress = self.progress(step, max_steps)
        left = 1 - progress if self.schedule == "linear" else math.cos(progress * math.pi / 2) ** 2
        return self.floor + (1 - self.floor) * left

    @property
    def floor(self) -> float:
        """What the schedule ends at, as a share of the peak."""
        return self.final_lr / self.peak if self.peak else 0.0

    def progress(self, step: int, max_steps: int) -> float:
        """Return how far the schedule has come after `step` completed steps, in [0, 1]."""
        end = self.began.origin + self.schedule_steps if self.schedule_steps else max_steps
        if end <= 0:
            return 0.0
        length = end - self.began.step
        done = min(1.0, (step - self.began.step) / length) if length > 0 else 1.0
        return self.began.progress + (1 - self.began.progress) * done

    def progress_at(self, decay: float) -> float:
        """Return how far the schedule has come where `decay` is this, or as near to it as it can be, in [0, 1]."""
        left = (decay - self.floor) / (1 - self.floor) if self.floor != 1 else 1.0
        left = min(max(left, 0.0), 1.0)
        return 1 - left if self.schedule == "linear" else math.acos(math.sqrt(left)) * 2 / math.pi

    def course(self, max_steps: int) -> str:
        """Return how the learning rate goes, in words: all that `factor` depends on but the step."""
        words = [self.schedule]
        if self.schedule != "constant":
            total = self.schedule_steps or max_steps
            words += [f"over {total:,} steps" if total > 0 else "without end", f"to {self.final_lr:g}"]
        if self.warmup_steps:
            words.append(f"after {self.warmup_steps:,} steps of {self.warmup} warm-up")
        return " ".join(words)

    def optimizer(self, model: nn.Module, fused: bool = True) -> torch.optim.Optimizer:
        """Return AdamW over the trained parameters of a model, which lie where they are trained.

        Args:
            model: the network.
            fused: one kernel for all of a step where the device has it; the numbers are the same but for rounding.
        """
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if self.decay_on == "all":
            groups = [{"params": [p for _, p in trained]}]
        else:
            tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
            decayed = [p for _, p in trained if p.ndim >= 2 and id(p) not in tables]
            chosen = {id(p) for p in decayed}
            groups = [
                {"params": decayed},
                {"params": [p for _, p in trained if id(p) not in chosen], "weight_decay": 0.0},
            ]
        if self.state == "32bit":
            fused = fused and all(p.device.type in FUSED and p.is_floating_point() for _, p in trained)
            # Without it torch chooses between a loop and its multi-tensor kernels, which on a CPU only copy more.
            foreach = None if fused or any(p.device.type != "cpu" for _, p in trained) else False
            adamw = torch.optim.AdamW(
                groups, self.lr, self.betas, self.eps, self.weight_decay, fused=fused, foreach=foreach
            )
            adamw.register_load_state_dict_pre_hook(_keep_implementation)
            adamw.register_load_state_dict_post_hook(_lay_out_as_parameters)
            return adamw
        return _bitsandbytes().AdamW8bit(
            groups, self.lr, self.betas, self.eps, self.weight_decay, is_paged=self.state == "paged_8bit"
        )

    def set_options(self, optimizer: torch.optim.Optimizer) -> None:
        """Give an optimizer, whose state a checkpoint has brought, the options that are no part of its state."""
        for number, group in enumerate(optimizer.param_groups):
            decay = 0.0 if number else self.weight_decay  # `decay_on`: the second group is what is not decayed
            group.update(betas=self.betas, eps=self.eps, weight_decay=decay)

    def freeze_parts(self, model: Part) -> None:
        """Take the gradients off what `freeze` names. Raises UserError for a part that the network does not have."""
        if not self.freeze:
            return
        groups = model.freeze_groups()
        for name in self.freeze:
            if name not in groups:
                raise UserError(f"optim.freeze: {unknown('part of this network', name, groups)}")
            for parameter in groups[name]:
                parameter.requires_grad_(False)
        if not any(p.requires_grad for p in model.parameters()):
            raise UserError(f"optim.freeze: {', '.join(self.freeze)} is all there is: nothing would be trained")

    def scheduler(self, optimizer: torch.optim.Optimizer, max_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        """Return the scheduler that applies `factor` at every optimizer step."""
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.factor(step, max_steps))


def _keep_implementation(optimizer: torch.optim.Optimizer, state: StateDict) -> StateDict:
    """Return an optimizer's state to be loaded with the implementation of this one in place of the stored one."""
    kept = ("fused", "foreach")
    groups = [
        {**theirs, **{key: ours[key] for key in kept}}
        for theirs, ours in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {**state, "param_groups": groups}


def _lay_out_as_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Lay averages out in memory as their parameters lie, for fused AdamW goes through both side by side.

    They come in another order where `trainer.channels_last` is changed on resume; torch does not look at it on CPUs,
    and would move each weight by another one's averages.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _bitsandbytes() -> ModuleType:
    """Return the optimizers of bitsandbytes. Raises UserError where it is not installed."""
    try:
        import bitsandbytes
    except ImportError:
        raise UserError(
            f"optim.state: 8 bits need bitsandbytes, which is not installed: {install('bitsandbytes')}"
        ) from None
    return bitsandbytes.optim
