"""Going on from a checkpoint, and what may change on the way: the learning rate, the precision, the devices."""

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, TypedDict

from pytorch_lightning import Callback, LightningModule, Trainer

from ldm_lab.checkpoints.files import FORMAT, read_pickled
from ldm_lab.config import NonNegativeFloat, Plain, RunConfig, register
from ldm_lab.errors import UserError, first_line
from ldm_lab.io.atomic import existing_file
from ldm_lab.training.checkpointing import LAST
from ldm_lab.training.logs import print_rank_zero
from ldm_lab.training.optim import Began, Optim
from ldm_lab.training.run_state import Checkpoint

# Sections whose keys may differ from those of the checkpoint without a word: where and how the run reports.
QUIET = ("run", "logging", "resume", "init_from", "imports")
# Keys outside the network's sections that have to stay: what the optimizer has a state for, and of which kind.
FIXED = ("optim.freeze", "optim.state", "optim.decay_on", "lora.rank", "lora.alpha", "lora.targets")
# Laid out in memory as the weights are, in blocks that have a scale each: such averages can't be laid out anew.
IN_BLOCKS = ("8bit", "paged_8bit")
CHANNELS_LAST = "trainer.channels_last"
# Keys inside the network's sections that may change: they say how it is trained, not what it is.
FREE = ("denoiser.dropout", "denoiser.gradient_checkpointing")


class ResumeState(TypedDict):
    """What a checkpoint keeps: the last `resume.lr` that its run has taken; None for none."""

    lr: float | None


@register("resume")
class Resume(Callback):
    """Go on with a run: weights, EMA, optimizer, scaler, step, data position come from its checkpoint."""

    def __init__(
        self,
        folder: Path,
        *,
        checkpoint: str | None = None,
        lr: NonNegativeFloat | None = None,
        schedule: Literal["continue", "restart"] = "continue",
    ) -> None:
        """Set what to go on with.

        Args:
            folder: the run's folder.
            checkpoint: a `.ckpt`; "last" is the run's own `last.ckpt`, or a fresh start if there is none.
            lr: peak learning rate from here on, in every parameter group and below the schedule; null keeps the
                checkpoint's. It is taken once: the same command, started again, goes on with what the rate has become.
            schedule: what a learning rate's schedule does that has become another one, such as a longer one. "continue"
                goes on from where it is, without a jump, to its new end; "restart" begins anew, with its warm-up.
        """
        self.lr, self.schedule = lr, schedule
        self.taken: float | None = None  # the last `lr` that this run has taken
        self.path: Path | None = None
        self.stored: RunConfig | None = None  # the checkpoint's
        last = folder / LAST
        if checkpoint == "last":
            self.path = last if last.exists() else None
            if self.path is None:
                unused = "" if lr is None else f"; resume.lr={lr:g} is not used, optim.lr holds"
                print_rank_zero(f"resume.checkpoint=last: there is no {last}: a fresh start{unused}")
        elif checkpoint is not None:
            self.path = existing_file(checkpoint, "resume.checkpoint")
        elif last.exists():
            raise UserError(
                f"{folder} already holds a run: resume.checkpoint=last goes on with it, run=NAME starts another one"
            )
        if lr is not None and self.path is None and checkpoint != "last":
            raise UserError("resume.lr: needs resume.checkpoint; a fresh run takes optim.lr")

    @staticmethod
    def unused(*, checkpoint: str | None) -> dict[str, str]:
        """Return which options have no effect, and why."""
        return {"schedule": "a fresh run has no schedule to go on with"} if checkpoint is None else {}

    def differences(self, config: RunConfig, network: tuple[str, ...]) -> list[str]:
        """Return the lines "key: checkpoint's value -> new value" between the checkpoint's config and this one.

        Args:
            config: of the run that goes on.
            network: the sections that make the trained network what it is; they have to be the same.

        Raises:
            UserError: the checkpoint is of another architecture or task, or not readable.
        """
        content = read_whole(self.path)
        if FORMAT not in content:
            raise UserError(f"{self.path}: not a checkpoint of a run of ldm_lab; for other weights use init_from")
        stored = self.stored = RunConfig.from_checkpoint(content[FORMAT]["config"])
        old, new = (dict(_flat({k: v for k, v in c.to_dict().items() if k not in QUIET})) for c in (stored, config))
        changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        parts = ("task", *network)
        fixed = [key for key in changed if (key.split(".")[0] in parts and key not in FREE) or key in FIXED]
        if fixed:
            key = fixed[0]
            raise UserError(
                f"{self.path}: {key} was {old.get(key)!r}, the config says {new.get(key)!r}; "
                "another architecture cannot be resumed (init_from takes over weights)"
            )
        order = bool(old.get(CHANNELS_LAST)), bool(new.get(CHANNELS_LAST))
        if order[0] != order[1] and old.get("optim.state") in IN_BLOCKS:
            raise UserError(
                f"{CHANNELS_LAST}: was {str(order[0]).lower()}, and has to stay: the optimizer's averages in 8 bits "
                "are stored in the order that the weights have in memory"
            )
        return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in changed]

    def state_dict(self) -> ResumeState:
        return ResumeState(lr=self.taken)

    def load_state_dict(self, state: ResumeState) -> None:
        self.taken = state["lr"]

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        """Set what Lightning has restored from the checkpoint, and the config has otherwise."""
        if self.path is None:
            return
        taken_before = self.lr is not None and self.lr == self.taken
        lr = None if taken_before else self.lr
        self.taken = self.taken if self.lr is None else self.lr
        for optimizer, scheduler in zip(trainer.optimizers, trainer.lr_scheduler_configs):
            task.optim.set_options(optimizer)
            scheduler = scheduler.scheduler
            before = scheduler.base_lrs[0]
            if taken_before and before != self.lr:
                print_rank_zero(
                    f"resume.lr: {self.lr:g} was taken when this run went on with it first; the rate has become "
                    f"{before:g} since then (guard.lr_factor), which holds; another number changes it"
                )
            if self.lr is None and before != task.optim.lr:
                print_rank_zero(
                    f"optim.lr: {task.optim.lr:g} is not used, the checkpoint's {before:g} holds "
                    f"(resume.lr={task.optim.lr:g} changes it)"
                )
            peak = task.optim.peak = before if lr is None else lr
            bent = self.bend_schedule(task.optim, scheduler.last_epoch, trainer.max_steps, before)
            factor = task.optim.factor(scheduler.last_epoch, trainer.max_steps)
            if lr is None and bent is None:
                continue
            scheduler.base_lrs = [peak] * len(scheduler.base_lrs)
            for group in optimizer.param_groups:
                group["initial_lr"], group["lr"] = peak, peak * factor
            scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
            if lr is not None:
                print_rank_zero(f"learning rate: {before:g} -> {lr:g} (resume.lr)")
            if bent:
                print_rank_zero(bent)

    def bend_schedule(self, optim: Optim, step: int, max_steps: int, peak: float) -> str | None:
        """Let the schedule go on from here as `schedule` says, if it is another one than the checkpoint's.

        A run that has begun its schedule anew does so once, however often the same command resumes it.

        Args:
            optim: of the run that goes on, with the peak that it goes on with.
            step: optimizer steps done.
            max_steps: of the run that goes on.
            peak: learning rate that the checkpoint's schedule is a factor on.

        Returns:
            What was done, in words; None if nothing was.
        """
        if self.stored is None:
            return None
        old: Optim = self.stored.part("optim").build()
        old.began, old.peak = optim.began, peak
        old_steps = int(self.stored["trainer"].get("max_steps", -1)) if "trainer" in self.stored else -1
        was, now = old.course(old_steps), optim.course(max_steps)
        done = self.stored["resume"].get("schedule") if "resume" in self.stored else None
        begins_anew = self.schedule == "restart" and (was != now or done != "restart")
        if was == now and not begins_anew:
            return None
        if begins_anew:
            optim.began = Began(step, step)
        else:
            progress = 0.0 if optim.schedule == "constant" else optim.progress_at(old.decay(step, old_steps))
            optim.began = Began(optim.began.origin, step, progress)
        rates = old.factor(step, old_steps) * peak, optim.factor(step, max_steps) * optim.peak
        before, after = (f"{round(rate, 12):.3g}" for rate in rates)  # a cosine ends near 0
        line = f"learning rate: {was} -> {now}" if was != now else f"learning rate: {now}"
        if begins_anew:
            return f"{line}, begun at step {step:,}: it goes from {before} to {after} (resume.schedule=restart)"
        if before != after:
            return f"{line}: at step {step:,} it goes from {before} to {after}"
        ended = optim.schedule != "constant" and optim.progress(step, max_steps) >= 1
        how = (
            f"it had ended, and stays at {after}"
            if ended
            else f"it goes on from {after} at step {step:,}, without a jump"
        )
        return f"{line}: {how} (resume.schedule=restart begins it anew)"


def read_whole(path: Path) -> Checkpoint:
    """Return a checkpoint's content, lazily, after all of it has been read once.

    Raises:
        UserError: it is damaged; the intact ones beside it are named.
    """
    try:
        content = read_pickled(path, mmap=True)
        check_sums(path)
    except UserError as error:
        others = [p for p in sorted(path.parent.glob("step=*.ckpt"), reverse=True) if p != path and is_whole(p)]
        if not others:
            raise UserError(f"{error}; no intact checkpoint lies beside it") from None
        more = f" ({len(others) - 1} older ones are intact, too)" if others[1:] else ""
        raise UserError(f"{error}; resume.checkpoint={others[0]} goes on with the newest intact one{more}") from None
    return content


def is_whole(path: Path) -> bool:
    """Return whether a checkpoint can be read to its end."""
    try:
        read_pickled(path, mmap=True)
        check_sums(path)
    except UserError:
        return False
    return True


def check_sums(path: Path) -> None:
    """Raise UserError if the bytes of a checkpoint are not those that were written; torch does not look."""
    if not zipfile.is_zipfile(path):  # of an old torch
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError) as error:
        damaged = first_line(error)
    if damaged is not None:
        raise UserError(f"{path}: damaged: {damaged} is not what was written")


def _flat(tree: Mapping[str, Plain], prefix: str = "") -> Iterator[tuple[str, Plain]]:
    """Yield (key path, value) of all that is no mapping."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
