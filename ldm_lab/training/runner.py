"""From a config to a run: the task, the data, Lightning's Trainer with its callbacks, the run's folder."""

from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from ldm_lab.checkpoints.files import read_pickled
from ldm_lab.checkpoints.parts import FORMAT, load_fitting
from ldm_lab.config import build, part_class, register, to_yaml
from ldm_lab.data.datamodule import DataModule
from ldm_lab.io.atomic import atomic_write
from ldm_lab.processes import fail_together, quiet_lightning, trainer_options
from ldm_lab.training.caching import training_data
from ldm_lab.training.checkpointing import LAST, SafeCheckpointIO
from ldm_lab.training.interrupt import Interrupt
from ldm_lab.training.logs import StepProgress, say
from ldm_lab.training.task import Task, gather

RUNS = Path("runs")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "64-true")  # none whose weights, and so whose average, are halved


@register("trainer")
class TrainerOptions:
    """Lightning's Trainer: devices, precision, length of the run."""

    def __init__(
        self,
        *,
        max_steps: int = -1,
        max_time: str | None = None,
        accelerator: str = "auto",
        devices: int | str = 1,
        num_nodes: int = 1,
        strategy: str = "auto",
        precision: str | int = "32-true",
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        threads: int | None = None,
        matmul: Literal["highest", "high", "medium"] = "high",
        channels_last: bool = False,
    ) -> None:
        """Set what Lightning's Trainer is given under the same names.

        Args:
            max_steps: optimizer steps after which the run ends; -1 goes on for ever.
            max_time: "DD:HH:MM:SS" after which the run ends.
            accelerator: "auto", "gpu", "cpu", "mps".
            devices: number of devices per node, or "auto".
            num_nodes: nodes.
            strategy: "auto" is DDP on several devices.
            precision: 32-true, 16-mixed or bf16-mixed; also changed on resume.
            accumulate_grad_batches: batches per optimizer step.
            gradient_clip_val: largest L2 norm of the gradient; null does not clip.
            threads: CPU threads per process; null leaves torch's choice.
            matmul: precision of fp32 matrix products on GPUs ("highest", "high": TF32).
            channels_last: keep feature maps in the memory order that convolutions in half precision like best.
        """
        self.threads, self.matmul, self.channels_last = threads, matmul, channels_last
        self.options = {
            "max_steps": max_steps, "max_time": max_time, "accelerator": accelerator, "devices": devices,
            "num_nodes": num_nodes, "strategy": strategy, "precision": precision,
            "accumulate_grad_batches": accumulate_grad_batches, "gradient_clip_val": gradient_clip_val,
        }  # fmt: skip

    @staticmethod
    def check(section: dict) -> list[str]:
        """Return what is wrong across keys."""
        precision = str(section.get("precision", "32-true"))
        known = [*PRECISIONS, "32", "16", "64", "bf16"]
        problems = [] if precision in known else [f"precision: {precision!r} is not one of {', '.join(PRECISIONS)}"]
        for key, least in (("accumulate_grad_batches", 1), ("threads", 1), ("gradient_clip_val", 0)):
            if section.get(key) is not None and section[key] < least:
                problems.append(f"{key}: at least {least} is needed, not {section[key]}")
        steps = section.get("max_steps", -1)
        if steps < 1 and steps != -1:
            problems.append(f"max_steps: a number from 1 on is needed, or -1 for a run without end, not {steps}")
        return problems

    def trainer(self, callbacks: list[Callback], loggers: list[Any], log_every: int, folder: Path) -> Trainer:
        """Return the Trainer."""
        if self.threads:
            torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision(self.matmul)
        with trainer_options("trainer"):
            return Trainer(
                **self.options, max_epochs=-1, callbacks=callbacks, logger=loggers, plugins=[SafeCheckpointIO()],
                log_every_n_steps=log_every, enable_checkpointing=False, enable_model_summary=False,
                default_root_dir=folder, use_distributed_sampler=False, num_sanity_val_steps=0, limit_val_batches=0,
            )  # fmt: skip


class Bookkeeping(Callback):
    """Writes the config into the run's folder, counts batches and tells the data which of them were consumed; first of
    the callbacks, so that what a checkpoint saves after a batch includes that batch.

    Attributes:
        data_states: at the end of training, where each rank stands in the data and what it skipped.
    """

    data_states: list[dict[str, Any]] | None = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_start(self, trainer: Trainer, task: Task) -> None:
        if trainer.is_global_zero:  # not before all is known to be right: a mistake leaves no folder
            with atomic_write(self.folder / "config.yaml") as file:
                file.write(to_yaml(task.run_config).encode())

    def on_train_end(self, trainer: Trainer, task: Task) -> None:
        self.data_states = gather(trainer.datamodule.rank_state())

    def on_train_batch_end(self, trainer: Trainer, task: Task, outputs: Any, batch: Any, index: int) -> None:
        task.batches_seen += 1
        trainer.datamodule.consumed(batch)


def build_task(config: dict[str, Any]) -> Task:
    """Return the task that a checked config describes, with the weights of `init_from` if it names any."""
    torch.manual_seed(config.get("seed", 0))  # the initial weights
    task = part_class("task", {"name": config.get("task", "diffusion")})(config)
    if config.get("init_from"):
        state, what = task.initial_weights(config["init_from"])
        left = load_fitting(task.model, state, config["init_from"])
        if task.model_ema is not None:
            task.model_ema.load_state_dict(task.model.state_dict())
        say(f"init_from: {what}, fresh optimizer")
        for line in left:
            say(f"init_from: {line}")
    return task


def run(config: dict[str, Any]) -> int:
    """Train as a checked config says. Returns the exit code: 0, or 128 + the signal that stopped the run early."""
    quiet_lightning()
    folder = RUNS / config["run"]
    resume = build("resume", config.get("resume"), folder)
    logging = build("logging", config.get("logging"))
    data = DataModule(build("data", training_data(config)), seed=config.get("seed", 0))
    interrupt = Interrupt()
    bookkeeping = Bookkeeping(folder)
    callbacks: list[Callback] = [bookkeeping, resume]
    kind = part_class("task", {"name": config.get("task", "diffusion")})
    changes = resume.differences(config, kind.NETWORK) if resume.path else []
    task = build_task(config)
    callbacks += task.callbacks(folder)
    callbacks += [build("checkpoint", config.get("checkpoint"), folder), interrupt, StepProgress()]

    before = read_pickled(resume.path, mmap=True) if resume.path else {}
    loggers = logging.loggers(folder, config["run"], before.get("global_step"), before.get(FORMAT, {}).get("wandb_id"))
    options = build("trainer", config.get("trainer"))
    trainer = options.trainer(callbacks, loggers, logging.every, folder)
    if options.channels_last:
        task.to(memory_format=torch.channels_last)
    announce(config, folder, resume.path, changes, task)
    with fail_together(trainer):
        trainer.fit(task, datamodule=data, ckpt_path=resume.path, weights_only=True)
    report(trainer, folder, data.summary(bookkeeping.data_states), interrupt)
    # Only the first rank tells: Lightning kills it, perhaps while it saves, when another one leaves with a code.
    return 128 + interrupt.received if interrupt.received and trainer.is_global_zero else 0


@rank_zero_only
def announce(config: dict[str, Any], folder: Path, resumed: Path | None, changes: list[str], task: Task) -> None:
    """Print the config and what was overridden on resume."""
    print(to_yaml(config))
    trained = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
    print(f"{trained:,} trained parameters; everything this run writes goes under {folder}/")
    if resumed:
        print(f"resuming from {resumed}" + (", with these changes:" if changes else ", nothing changed"))
        for change in changes:
            print(f"  {change}")


@rank_zero_only
def report(trainer: Trainer, folder: Path, data: str, interrupt: Interrupt) -> None:
    """Say where the run ended, what was read and skipped, and where the results are."""
    print(data)
    if interrupt.received:
        print(f"stopped at step {trainer.global_step} and saved: resume.checkpoint=last goes on")
    files = f"{folder / LAST}, logs in {folder / 'metrics.csv'}"
    print(f"step {trainer.global_step}: {files if (folder / LAST).exists() else 'nothing was left to do'}")
