"""Lightning's Trainer as the config's section `trainer` describes it."""

from pathlib import Path
from typing import Annotated, Literal

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import ClusterEnvironment, SLURMEnvironment

from ldm_lab.config import NonNegativeFloat, PartSection, Plain, PositiveInt, build, register
from ldm_lab.errors import UserError
from ldm_lab.processes import trainer_options
from ldm_lab.training.checkpointing import SafeCheckpointIO
from ldm_lab.training.compiling import Compile
from ldm_lab.training.ddp import DDPOptions
from ldm_lab.training.interrupt import seconds
from ldm_lab.training.logs import print_rank_zero
from ldm_lab.training.sharding import FSDP2, Sharded

# None whose weights, and so whose average, are halved.
Precision = Literal["32-true", "16-mixed", "bf16-mixed", "64-true", "32", "16", "64", "bf16", 32, 16, 64]


@register("trainer")
class TrainerOptions:
    """Lightning's Trainer: devices, precision, length of the run."""

    def __init__(
        self,
        *,
        max_steps: PositiveInt | Literal[-1] = -1,
        max_time: str | int | None = None,
        accelerator: str = "auto",
        devices: int | str = 1,
        num_nodes: PositiveInt = 1,
        strategy: str = "auto",
        precision: Precision = "32-true",
        accumulate_grad_batches: PositiveInt = 1,
        gradient_clip_val: NonNegativeFloat | None = None,
        threads: PositiveInt | None = None,
        matmul_precision: Literal["highest", "high", "medium"] = "high",
        channels_last: bool = False,
        compile: Compile = "none",
        ddp: Annotated[dict[str, Plain] | None, PartSection("ddp")] = None,
    ) -> None:
        """Set what Lightning's Trainer is given under the same names.

        Args:
            max_steps: optimizer steps after which the run ends; -1 goes on for ever.
            max_time: how long this job trains before it saves and leaves: 90m, 11h, 2d, HH:MM:SS, DD:HH:MM:SS.
            accelerator: "auto", "gpu", "cpu", "mps".
            devices: number of devices per node, or "auto".
            num_nodes: nodes.
            strategy: "auto" is DDP on several devices: each holds the whole network; with "fsdp2" all devices share it.
            precision: 32-true, 16-mixed or bf16-mixed; also changed on resume.
            accumulate_grad_batches: batches per optimizer step.
            gradient_clip_val: largest L2 norm of the gradient; null does not clip.
            threads: CPU threads per process; null leaves torch's choice.
            matmul_precision: precision of fp32 matrix products on GPUs ("highest", "high": TF32).
            channels_last: keep feature maps in the memory order that convolutions in half precision like best.
            compile: of a denoiser "blocks", each by itself, or the whole "model", by torch.compile: faster on a GPU
                after a wait of minutes before the first step, and the same numbers but for rounding.
            ddp: how several devices add up their gradients, if the strategy is DDP (`ddp`).
        """
        self.threads, self.matmul_precision, self.channels_last = threads, matmul_precision, channels_last
        self.compile, self.ddp = compile, ddp
        self.max_seconds = None if max_time is None else seconds(str(max_time))
        self.options = {
            "max_steps": max_steps, "accelerator": accelerator, "devices": devices,
            "num_nodes": num_nodes, "strategy": strategy, "precision": precision,
            "accumulate_grad_batches": accumulate_grad_batches, "gradient_clip_val": gradient_clip_val,
        }  # fmt: skip

    @property
    def tf32(self) -> bool:
        """Whether matrix products in single precision may be rounded to TF32."""
        return self.matmul_precision != "highest"

    @staticmethod
    def check(*, max_time: str | int | None, strategy: str, precision: Precision, channels_last: bool) -> list[str]:
        """Return what is wrong across the options."""
        return [*_wrong_duration(max_time), *_wrong_strategy(strategy, str(precision), channels_last)]

    @staticmethod
    def unused(*, devices: int | str, num_nodes: int, strategy: str) -> dict[str, str]:
        """Return which options have no effect, and why."""
        if strategy == FSDP2:
            return {"ddp": f"trainer.strategy is {FSDP2}"}
        return {"ddp": "there is one device"} if str(devices) == "1" and num_nodes == 1 else {}

    def trainer(self, callbacks: list[Callback], loggers: list[Logger], log_every: int, folder: Path) -> Trainer:
        """Return the Trainer."""
        if self.threads:
            torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision(self.matmul_precision)
        options, shared = dict(self.options), self.options["strategy"] == FSDP2
        if shared:
            options["strategy"] = Sharded()
        plugins: list[SafeCheckpointIO | ClusterEnvironment] = [SafeCheckpointIO(lazily=shared)]
        if SLURMEnvironment.detect():  # Lightning would save in its signal handler, and requeue the job
            plugins.append(SLURMEnvironment(auto_requeue=False))
        with trainer_options("trainer"):
            trainer = Trainer(
                **options, max_epochs=-1, callbacks=callbacks, logger=loggers, plugins=plugins,
                log_every_n_steps=log_every, enable_checkpointing=False, enable_model_summary=False,
                default_root_dir=folder, use_distributed_sampler=False, num_sanity_val_steps=0, limit_val_batches=0,
            )  # fmt: skip
        ddp: DDPOptions = build("ddp", self.ddp)
        ddp.apply(trainer)
        asked = str(self.options["precision"])
        if asked.startswith("16") and not trainer.precision.startswith("16"):
            print_rank_zero(
                f"trainer.precision: {asked} needs a GPU, Lightning makes {trainer.precision} of it on a CPU"
            )
        # Several processes would ask one another before every batch whether one was told to stop, and wait for the
        # device to say so; `Interrupt` asks, every few steps.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        return trainer


def _wrong_duration(max_time: str | int | None) -> list[str]:
    """Return what is wrong with a duration; YAML itself makes a number of some that are written with colons."""
    if isinstance(max_time, int):
        return [f"max_time: a duration such as 90m, 11h, 2d or '11:30:00' in quotes is needed, not {max_time}"]
    try:
        _ = max_time is None or seconds(max_time)
    except UserError as error:
        return [f"max_time: {error}"]
    return []


def _wrong_strategy(strategy: str, precision: str, channels_last: bool) -> list[str]:
    """Return what is wrong with a strategy, and what does not go with it."""
    if strategy != FSDP2:
        known = strategy == "auto" or strategy.startswith("ddp")
        return [] if known else [f"strategy: auto, ddp or {FSDP2} is needed, not {strategy!r}"]
    wrong = []
    if precision.startswith(("16", "64")):
        wrong.append(f"precision: {precision} does not go with strategy={FSDP2}: 32-true and bf16-mixed do")
    if channels_last:
        wrong.append(f"channels_last: does not go with strategy={FSDP2}, which splits weights in their usual order")
    return wrong
