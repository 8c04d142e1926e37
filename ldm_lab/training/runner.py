"""From a config to a run: the task, the data, Lightning's Trainer with its callbacks, the run's folder."""

import gc
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.strategies.launchers.launcher import _Launcher
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from ldm_lab.checkpoints.files import FORMAT, read_pickled
from ldm_lab.checkpoints.parts import load_fitting
from ldm_lab.config import RunConfig, to_yaml
from ldm_lab.data.datamodule import DataModule
from ldm_lab.data.waiting import ReadingError
from ldm_lab.errors import UserError, told_in_one_line
from ldm_lab.estimate import in_short, in_units
from ldm_lab.pages.run_folder import PAGE
from ldm_lab.processes import fail_together, keep_freed_memory, leave_process_group, quiet_lightning
from ldm_lab.training.caching import training_data
from ldm_lab.training.callbacks import Bookkeeping, RunCallbacks
from ldm_lab.training.checkpointing import LAST
from ldm_lab.training.compiling import compiler_told_in_one_line
from ldm_lab.training.cost import RunCost
from ldm_lab.training.disk import check_space
from ldm_lab.training.gap_runs import prepare_means, with_own_means
from ldm_lab.training.going_on import gone_on, in_changed_precision
from ldm_lab.training.guard import Guard
from ldm_lab.training.interrupt import STOPPED, Interrupt
from ldm_lab.training.lock import RunLock
from ldm_lab.training.logs import Logging, log_config, print_rank_zero
from ldm_lab.training.resume import Resume
from ldm_lab.training.sharding import FSDP2
from ldm_lab.training.speed import Speed, StepProgress
from ldm_lab.training.start import check_start
from ldm_lab.training.task import Task
from ldm_lab.training.trainer import TrainerOptions
from ldm_lab.training.watching import Watching

RUNS = Path("runs")


def build_task(config: RunConfig, resumes: bool = False) -> Task:
    """Return the task that a checked config describes, with the weights of `init_from` if it names any.

    Args:
        config: of the run.
        resumes: a checkpoint's weights are read behind this.
    """
    torch.manual_seed(config.seed)  # the initial weights
    from_file = config.init_from is not None and "lora" not in config  # whose additions are drawn behind the network
    task = config.task_class()(config, weights_follow=resumes or from_file)
    if config.init_from:
        state, what = task.initial_weights(config.init_from)
        left = load_fitting(task.model, state, config.init_from, None if resumes else task.drawn)
        if task.model_ema is not None:
            task.model_ema.load_state_dict(task.model.state_dict())
        print_rank_zero(f"init_from: {what}, fresh optimizer")
        for line in left:
            print_rank_zero(f"init_from: {line}")
        if left and task.lora is not None:
            raise UserError(f"lora: needs all of the network from init_from: {left[0]}")
        task.add_lora(config.init_from)
    return task


def run(config: RunConfig) -> int:
    """Train as a checked config says. Returns the exit code: 0, or 75 if the run was told to stop, and has saved.

    Raises:
        UserError: rules across keys that the config breaks, before data or weights are read; what the parts raise.
    """
    config.check_across_keys()
    config = config.with_part("data", config["data"].said("resize"))  # of checkpoints, whatever the default becomes
    quiet_lightning()
    for line in config.unused_options():
        print_rank_zero(line)
    folder = RUNS / config.run
    config = with_own_means(config, folder)
    with RunLock(folder) as lock, ExitStack() as processes:
        done = _run(config, folder, lock, None)
        processes.enter_context(fail_together(done.launcher))  # another Trainer goes on in the same ones
        while done.goes_on is not None:
            gc.collect()  # the network, its average and the optimizer, before they are built again
            torch.cuda.empty_cache()
            done = _run(done.goes_on, folder, lock, done.began)
    leave_process_group()
    return done.code


class Done(NamedTuple):
    """What became of a Trainer.

    Attributes:
        code: exit code.
        goes_on: the run that another Trainer goes on with, None for none.
        began: when training began, on the monotonic clock.
        launcher: of the processes of the run, None for this one alone.
    """

    code: int
    goes_on: RunConfig | None
    began: float | None
    launcher: _Launcher | None = None


def _run(config: RunConfig, folder: Path, lock: RunLock, began: float | None) -> Done:
    resume: Resume = config.part("resume").build(folder)
    config = in_changed_precision(config, resume)
    logging: Logging = config.part("logging").build()
    changes = resume.differences(config, config.task_class().NETWORK) if resume.path else []
    source = check_start(config, folder)
    data = DataModule(source or training_data(config).build(), seed=config.seed)
    prepare_means(config, folder, resume.path)
    task = build_task(config, resumes=resume.path is not None)
    options: TrainerOptions = config.part("trainer").build()
    guard: Guard = config.part("guard").build(folder, logging.every)
    speed = Speed(RunCost(task), options.tf32)
    callbacks = RunCallbacks(
        Bookkeeping(folder, lock),
        resume,
        speed,
        guard,
        task.callbacks(folder),
        config.part("checkpoint").build(folder, guard),
        Interrupt(options.max_seconds, began),
        Watching(folder, logging.page, resume.path, changes, is_same_run=began is not None),
        StepProgress(speed),
    )
    before = read_pickled(resume.path, mmap=True) if resume.path else {}
    loggers = logging.loggers(folder, config.run, before.get("global_step"), before.get(FORMAT, {}).get("wandb_id"))
    trainer = options.trainer(callbacks.in_order(), loggers, logging.every, folder)
    keep_freed_memory(trainer.strategy.root_device)
    if options.channels_last:
        task.to(memory_format=torch.channels_last)
    if options.compile != "none":
        print_rank_zero(task.compile_network(options.compile))
    check_space(folder, task, callbacks.checkpoint, trainer.max_steps)
    announce(config, folder, resume.path, changes, task)
    log_config(trainer, config, before.get("global_step", 0))
    with compiler_told_in_one_line(options.compile):
        stopped = fit(trainer, task, data, callbacks)
    is_done = 0 <= trainer.max_steps <= trainer.global_step
    if guard.leaves_for is not None and not stopped and not is_done:
        return Done(0, gone_on(config, guard.leaves_for), callbacks.interrupt.began, trainer.strategy.launcher)
    summary = [data.summary(callbacks.bookkeeping.data_states), *guard.summary(), *task.summary()]
    callbacks.watching.finish(trainer, stopped, summary)
    report(trainer, folder, summary, stopped, before.get("global_step", 0), callbacks.checkpoint.saved_at)
    # Only the first rank tells: Lightning kills it, perhaps while it saves, when another one leaves with a code.
    return Done(STOPPED if stopped and trainer.is_global_zero else 0, None, None)


def fit(trainer: Trainer, task: Task, data: DataModule, callbacks: RunCallbacks) -> str | None:
    """Train. Returns why the run was stopped early and should go on later, in words; None if it is done.

    Raises:
        UserError: the data ended, or memory did; what was trained before the data ended is saved.
        KeyboardInterrupt: Ctrl-C for the second time.
    """
    interrupt, resume = callbacks.interrupt, callbacks.resume
    doing = partial(training_now, trainer, callbacks.speed.cost)
    try:
        with fail_together(trainer.strategy.launcher), told_in_one_line(doing, less_memory(task)):
            trainer.fit(task, datamodule=data, ckpt_path=resume.path, weights_only=True)
    except ReadingError as error:
        alone = trainer.world_size == 1 or trainer.is_global_zero  # another rank is heard by its error alone
        if not alone or not (interrupt.told_to_stop() or (error.may_pass and callbacks.checkpoint.saved_here)):
            raise
        why = interrupt.why() if interrupt.told_to_stop() else "the data"
        return f"{why} ({error})"
    except SystemExit:  # Lightning's, in place of Ctrl-C
        raise KeyboardInterrupt from None
    finally:
        interrupt.restore()
    return interrupt.why() if interrupt.stopping else None


def training_now(trainer: Trainer, cost: RunCost) -> str:
    """Return what a Trainer is doing, and what memory it needs, in words."""
    batch = trainer.datamodule.source.batch_size
    doing = f"training at step {trainer.global_step + 1} with batches of {batch}"
    cost.image_size = trainer.datamodule.source.image_size
    if cost.step is None:
        return doing
    doing += f", which take {cost.step.in_words()}"
    device = trainer.strategy.root_device
    if device.type != "cuda":
        return doing
    room = torch.cuda.get_device_properties(device).total_memory
    fit = min(cost.step.batch_that_fits(room), batch)
    return f"{doing}; into the {in_units(room)} of this device go {f'batches of about {fit}' if fit else 'none'}"


def less_memory(task: Task) -> str:
    """Return which options of a run would need less memory than they do now."""
    config = task.run_config
    trainer = config.part("trainer")
    ways = ["a smaller data.batch_size with more trainer.accumulate_grad_batches"]
    if not str(trainer.option("precision")).startswith(("16", "bf16")):
        ways.append("trainer.precision=bf16-mixed")
    begins, shared = config.part("resume").option("checkpoint") is None, trainer.option("strategy") == FSDP2
    if task.optim.state == "32bit" and begins and not shared:  # it cannot change on resume
        ways.append("optim.state=8bit")
    if "denoiser" in config and config["denoiser"].option("gradient_checkpointing") is False:
        ways.append("denoiser.gradient_checkpointing=true")
    *others, last = ways
    return f"{', '.join(others)} or {last} need less" if others else f"{last} needs less"


def parameters(module: torch.nn.Module) -> int:
    """Return how many parameters a module has."""
    return sum(p.numel() for p in module.parameters())


@rank_zero_only
def announce(config: RunConfig, folder: Path, resumed: Path | None, changes: list[str], task: Task) -> None:
    """Print the config, the size of the networks, and what was overridden on resume."""
    print(to_yaml(config.to_dict()))
    trained = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
    left = parameters(task.model) - trained
    parts = {"of the network itself": left, **{role: parameters(part) for role, part in task.frozen.items()}}
    frozen = ", ".join(f"{in_short(count)} {of}" for of, count in parts.items() if count >= 1000)
    print(f"{trained:,} trained parameters, frozen ones: {frozen or 'none'}")
    print(f"everything this run writes goes under {folder}/")
    if resumed:
        print(f"resuming from {resumed}" + (", with these changes:" if changes else ", nothing changed"))
        for change in changes:
            print(f"  {change}")


@rank_zero_only
def report(
    trainer: Trainer, folder: Path, lines: list[str], stopped: str | None, resumed_step: int, saved_step: int
) -> None:
    """Say what was read, skipped and left out (`lines`), where the run ended, and where the results are."""
    print(*lines, sep="\n")
    step, max_steps = trainer.global_step, trainer.max_steps
    if stopped:
        saved = "and saved" if saved_step == step else f"where it could not save; {LAST} is of step {saved_step}"
        saved = "before anything new was trained" if step == resumed_step else saved
        print(f"stopped by {stopped} at step {step} {saved}: resume.checkpoint=last goes on")
    elif step == resumed_step:
        reached = "is reached" if step == max_steps else "is less"
        ended = max_steps < 0 or step < max_steps  # by held_out.patience, which has said so
        print(
            f"step {step}: nothing was left to do"
            if ended
            else f"step {step}: nothing was left to do, trainer.max_steps={max_steps} {reached}"
        )
    if step != resumed_step:
        page = f", to look at in {folder / PAGE}" if (folder / PAGE).exists() else ""
        print(f"step {step}: {folder / LAST}, logs in {folder / 'metrics.csv'}{page}")
