"""The base class of tasks: optimizer, EMA, random numbers that a resumed run repeats, checkpoint contents."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from pytorch_lightning import Callback
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities.types import STEP_OUTPUT, OptimizerLRSchedulerConfig
from torch import Tensor, nn

from ldm_lab import ema
from ldm_lab.batch import Batch
from ldm_lab.checkpoints.files import FORMAT
from ldm_lab.checkpoints.importer import find_weights
from ldm_lab.checkpoints.lora import BaseModel, fingerprint
from ldm_lab.checkpoints.parts import frozen_facts, load_strictly
from ldm_lab.checkpoints.sharded import weights_checksum
from ldm_lab.config import FROZEN, RunConfig
from ldm_lab.data.rank_state import RankState
from ldm_lab.errors import UserError, told_in_one_line
from ldm_lab.sampling.names import model_name
from ldm_lab.training.compiling import Compile
from ldm_lab.training.judged import JudgedSteps
from ldm_lab.training.laps import Laps
from ldm_lab.training.logs import print_rank_zero
from ldm_lab.training.lora import LoraOptions, additions, check_base, frozen_weights, leave_out_base
from ldm_lab.training.optim import Began, Optim
from ldm_lab.training.provenance import History
from ldm_lab.training.run_state import Checkpoint, RunState, align, checked, take_back

T = TypeVar("T")
LESS_FROZEN = "a smaller one, or what it makes stored beforehand (section cache, conditioner.store) needs less"


class AtStep(NamedTuple):
    """Where a rank stood at the end of an optimizer step.

    Attributes:
        batches_seen: since the run's very first batch.
        samples_seen: on all ranks together, since then.
        data: its place in the data.
    """

    batches_seen: int
    samples_seen: int
    data: RankState


Names = tuple[str, ...]


class Task(JudgedSteps):
    """A LightningModule around one trained network, `self.model`, and its average, `self.model_ema`.

    A subclass is registered as `@register("task", name)` and
    - lists in ROLES the config sections that are its own (each a role of `ldm_lab.config`), in REQUIRED those that
      have to be there, in NETWORK those that make the trained network what it is, and says in PART the role of the
      part that it trains, if it is one;
    - builds its parts in `__init__(config)` and hands the trained network to `set_model(model)`;
    - puts frozen networks into `self.frozen[role]`: they are moved to the device, but are neither trained, nor
      wrapped by DDP, nor saved;
    - writes `training_step(batch, batch_idx) -> loss`, and `export(folder, weights, dtype)`, which is called on rank 0
      whenever a checkpoint has been written.

    Random numbers: before every batch torch's global generators are seeded from (seed, rank, batches seen), so that
    whatever `training_step` draws is repeated by a resumed run and differs between ranks. Batches are counted on over
    all resumes, so that no noise comes twice, however many ranks there are then.

    Steps: `trainer.global_step` counts optimizer steps; every task has one optimizer. Before each one its loss and
    gradient are looked at (`detector`), on the device: a step that must not be learned from changes neither weights nor
    averages. It counts all the same, as its batches do.
    """

    ROLES: ClassVar[tuple[str, ...]] = ()
    REQUIRED: ClassVar[tuple[str, ...]] = ("data",)
    NETWORK: ClassVar[tuple[str, ...]] = ()
    PART: ClassVar[str | None] = None
    SECTIONS: ClassVar[Names] = ("data", "optim", "ema", "trainer", "checkpoint", "logging", "resume", "guard")
    drawn: Callable[[], dict[str, Tensor]] | None = None  # of a network that was not drawn, the weights it would have
    rehearsing = False  # whether steps are made by `rehearse`

    def __init__(self, config: RunConfig, read_weights: bool = True, weights_follow: bool = False) -> None:
        """Build what all tasks have.

        Args:
            config: a checked config.
            read_weights: False builds the architecture alone (say, on the meta device), without any weights file.
            weights_follow: those of the trained network are read behind this, and need not be drawn.
        """
        super().__init__()
        self.run_config, self.seed = config, config.seed
        self.optim: Optim = config.part("optim").build()
        self.ema_schedule: ema.EMASchedule | None = config["ema"].build() if "ema" in config else None
        self.lora: LoraOptions | None = config["lora"].build() if "lora" in config else None
        if self.lora is not None and self.optim.freeze:
            raise UserError("optim.freeze: with a section lora the whole network stays as it is; lora.targets chooses")
        self.ema_pairs: ema.Pairs | None = None  # listed at the first update, when all is where it stays
        self.frozen: dict[str, nn.Module] = {}
        sections = {role: config[role] for role in FROZEN if role in config} if read_weights else {}
        self.frozen_facts = frozen_facts(sections)
        self.frozen_sha256 = {role: its for role, its in self.frozen_facts.items() if role in sections}
        self.laps = Laps()  # of a training step, which `Speed` logs
        self.batches_seen = 0  # on this rank, since the run's very first batch
        self.samples_seen = 0  # on all ranks together, since then
        self.history = History()
        self.base: BaseModel | None = None  # of LoRA
        self.at_step: AtStep | None = None  # while the batches of a step are incomplete, where the one before ended
        self.followers: list[Tensor] = []  # averages of the weights outside of this module, which rollbacks bring back

    def set_model(self, model: nn.Module) -> None:
        """Take a network as the one to be trained, and start its average if the config has a section `ema`."""
        self.optim.freeze_parts(model)
        self.model = model
        self.model_ema = ema.averaged_copy(model) if self.ema_schedule and self.lora is None else None
        self.ema_pairs = None

    def trained_modules(self) -> list[nn.Module]:
        """Return all that the optimizer trains."""
        return [self.model]

    def compile_network(self, what: Compile) -> str:
        """Have the trained network compiled when it first runs (`ldm_lab.training.compiling`); return what is."""
        raise UserError(f"trainer.compile: {what} is for a denoiser, which is called as a whole; set none")

    @property
    def best_model(self) -> nn.Module:
        """The averaged network, or the trained one if no average is kept: what is sampled and exported."""
        return self.model if self.model_ema is None else self.model_ema

    def initial_weights(self, path: str) -> tuple[dict[str, Tensor], str]:
        """Return the weights that `init_from` names, as the trained network's state dict, and what they are in words.

        Raises:
            UserError: missing, damaged or foreign file.
        """
        raise NotImplementedError

    def add_lora(self, path: str) -> None:
        """Begin with additions to the network, which is as `init_from` has it from here on, if the config asks for any.

        Args:
            path: what `init_from` says.

        Raises:
            UserError: LoRA is not for this network.
        """
        if self.lora is None:
            return
        file = find_weights(path, "init_from")
        self.base = BaseModel(model_name(path), weights_checksum(file), fingerprint(self.model.state_dict()))
        for line in self.insert_lora():
            print_rank_zero(line)

    def insert_lora(self) -> list[str]:
        """Put additions into the network if the config asks for any, and start their average; return what to say."""
        if self.lora is None:
            return []
        lines = self.lora.insert(self.model)
        self.model_ema = ema.averaged_copy(self.model, share_frozen=True) if self.ema_schedule else None
        self.register_state_dict_post_hook(leave_out_base)
        self.strict_loading = False  # for Lightning; `on_load_checkpoint` compares all names and shapes
        return lines

    def exported_weights(self) -> dict[str, Tensor]:
        """Return the weights that users of the trained network need: of LoRA the additions alone."""
        return self.best_model.state_dict() if self.lora is None else additions(self.best_model.state_dict())

    def export(self, folder: Path, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Write what users of the trained network need. Called on rank 0 after each checkpoint.

        Args:
            folder: the run's.
            weights: state dict of `best_model`, of which the ranks may each hold a share: it is gathered from them all.
            dtype: of the written weights.
        """
        raise NotImplementedError

    def callbacks(self, folder: Path) -> list[Callback]:
        """Return the callbacks that only this task has; what they write goes below the run's folder."""
        return []

    def summary(self) -> list[str]:
        """Return what is to be said when a run ends, a line each."""
        return []

    # ------------------------------------------------------------------------------------------------ Lightning

    def on_fit_start(self) -> None:
        self.ema_pairs = None
        for role, module in self.frozen.items():
            with told_in_one_line(partial(f"bringing the frozen {role} to {{}}".format, self.device), LESS_FROZEN):
                module.to(self.device)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        torch.manual_seed(batch_seed(self.seed, self.global_rank, self.batches_seen))
        if self.at_step is None:
            self.keep_statistics(self.trained_modules())

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.optim.optimizer(nn.ModuleList(self.trained_modules()))
        scheduler = self.optim.scheduler(optimizer, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Tensor | None] | None = None,
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.after_optimizer_step(self.trainer.global_step + 1)  # Lightning counts the step when this returns

    def after_optimizer_step(self, steps_done: int) -> None:
        """Update the average. Unlike the original, which was one step late, it includes the step just taken."""
        if self.model_ema is not None:
            if self.ema_pairs is None:
                self.ema_pairs = ema.Pairs(self.model_ema, self.model)
            left_out = None if self.detector.last is None else self.detector.last.left_out
            self.ema_pairs.update(self.ema_schedule.at(steps_done), left_out)

    def count_batch(self, batch: Batch, completes_step: bool) -> None:
        """Note that a batch was trained on, and whether an optimizer step ended with it."""
        data = self.trainer.datamodule
        if self.at_step is None and not completes_step:
            self.at_step = AtStep(self.batches_seen, self.samples_seen, data.rank_state())
        self.batches_seen += 1
        self.samples_seen += len(batch) * self.trainer.world_size
        data.consumed(batch)
        if completes_step:
            self.at_step = None

    def on_train_batch_end(self, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int) -> None:
        if self.trainer.should_stop and self.trainer.global_step % self.trainer.log_every_n_steps:
            self.trainer._results.reset()  # Lightning would log the last logging step's values as this one's

    def on_save_checkpoint(self, checkpoint: Checkpoint) -> None:
        data = self.trainer.datamodule
        now = self.at_step or AtStep(self.batches_seen, self.samples_seen, data.rank_state())
        if now.batches_seen != self.batches_seen:
            take_back(checkpoint, self.batches_seen - now.batches_seen)
        checkpoint[FORMAT] = RunState(
            config=self.run_config.to_dict(),
            frozen=self.frozen_sha256,
            batches_seen=now.batches_seen,
            samples_seen=now.samples_seen,
            course=self.optim.began.state(),
            data=gather(now.data),
            sessions=self.history.sessions(self.trainer, self.run_config),
            wandb_id=next((log.version for log in self.trainer.loggers if isinstance(log, WandbLogger)), None),
        )
        if self.base is not None:
            checkpoint[FORMAT]["base"] = self.base.weights

    def on_load_checkpoint(self, checkpoint: Checkpoint) -> None:
        trained = {n.removeprefix("model."): t for n, t in checkpoint["state_dict"].items() if n.startswith("model.")}
        if self.base is not None:
            check_base(checkpoint[FORMAT].get("base"), self.base)
            trained = {**frozen_weights(self.model), **trained}
        load_strictly(self.model, trained, "resume.checkpoint")  # in one clear line what Lightning says in hundreds
        self.load_average(checkpoint["state_dict"])
        align(checkpoint, self.trainer.accumulate_grad_batches)
        run = checked(checkpoint[FORMAT])
        say_other_weights(run.get("frozen"), self.frozen_sha256)
        self.batches_seen, self.samples_seen = run["batches_seen"], run["samples_seen"]
        self.optim.began = Began.of(run["course"])
        self.history.load(run.get("sessions"), checkpoint["global_step"])
        self.trainer.datamodule.load_rank_states(run["data"], self.global_rank)

    def load_average(self, state: dict[str, Tensor]) -> None:
        """Bring a checkpoint's weights to the config's section `ema`, which may have come or gone since."""
        averaged = [name for name in state if name.startswith("model_ema.")]
        if averaged and self.model_ema is None:
            for name in averaged:
                del state[name]
            print_rank_zero("ema: null: the checkpoint's average of the weights is not kept")
        elif not averaged and self.model_ema is not None:
            trained = [name for name in self.model.state_dict() if f"model.{name}" in state]  # of LoRA the additions
            state.update({f"model_ema.{name}": state[f"model.{name}"].clone() for name in trained})
            print_rank_zero("ema: the checkpoint has no average of the weights; it begins with them")

    # ------------------------------------------------------------------------------------------------ for subclasses

    def rehearse(self, batch: Batch) -> Tensor:
        """Return the loss of a batch as in the midst of a run, but without a Trainer or a log: to count its cost."""
        self.rehearsing = True
        loss: Tensor = self.training_step(batch, 0)
        return loss

    @property
    def is_logged(self) -> bool:
        """Whether the optimizer step that is being made is one that is logged."""
        return not self.rehearsing and (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0

    def log_means(self, values: dict[str, Tensor], batch_size: int) -> None:
        """Log scalars under `train/`, the mean over ranks, and the learning rate; at logging steps alone."""
        if not self.is_logged:
            return
        named = {f"train/{name}": value.detach() for name, value in values.items()}
        named["train/lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log_dict(named, on_step=True, sync_dist=True, batch_size=batch_size)


def say_other_weights(before: dict[str, str] | None, now: dict[str, str]) -> None:
    """Say which frozen parts have other weights than a checkpoint's, role -> sha256 each."""
    for role, checksum in now.items() if isinstance(before, dict) else ():
        if before.get(role, checksum) != checksum:
            print_rank_zero(f"{role}.weights: other weights than those that this run was trained with so far")


def batch_seed(seed: int, rank: int, batch: int) -> int:
    """Return the seed of one batch of one rank: well mixed, so that neighbors are independent."""
    return int(np.random.SeedSequence([seed, rank, batch]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def gather(value: T) -> list[T]:
    """Return every rank's value, in rank order, on every rank."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [value]
    values = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
