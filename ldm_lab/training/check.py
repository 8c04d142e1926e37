"""`train.py --check`: all that a run begins with, one batch, one step, one picture; nothing of it stays."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from pytorch_lightning import Trainer

from ldm_lab.checkpoints.files import read_pickled
from ldm_lab.checkpoints.importer import Section
from ldm_lab.config import PartConfig, RunConfig
from ldm_lab.data.datamodule import DataModule
from ldm_lab.data.source import Source
from ldm_lab.errors import told_in_one_line
from ldm_lab.estimate import in_units
from ldm_lab.metrics import METRICS
from ldm_lab.processes import fail_together, quiet_lightning
from ldm_lab.training.caching import cache_options, is_complete, training_data
from ldm_lab.training.compiling import compiler_told_in_one_line
from ldm_lab.training.cost import RunCost
from ldm_lab.training.demo import prompts_of
from ldm_lab.training.disk import check_space
from ldm_lab.training.gap_runs import few_means, needs_means, prepare_means, with_own_means
from ldm_lab.training.going_on import in_changed_precision, with_options
from ldm_lab.training.guard import Guard
from ldm_lab.training.held_out import HeldOut
from ldm_lab.training.resume import Resume
from ldm_lab.training.runner import RUNS, announce, build_task, less_memory, training_now
from ldm_lab.training.sharding import FSDP2
from ldm_lab.training.start import check_start
from ldm_lab.training.task import Task
from ldm_lab.training.texts import StoredTexts
from ldm_lab.training.trainer import TrainerOptions

PICTURES = ("demo", "enlargements", "inpaintings", "reconstructions")  # sections that draw every now and then


def check(config: RunConfig) -> int:
    """Try a checked config out on one device, and say what it did and what it took. Returns the exit code, 0.

    Raises:
        UserError: all that the run itself would raise until its first step, and for its first picture.
    """
    config.check_across_keys()
    config = config.with_part("data", config["data"].said("resize"))
    quiet_lightning()
    for line in config.unused_options():
        print(line)
    folder = RUNS / config.run
    config = with_own_means(config, folder)
    resume: Resume = config.part("resume").build(folder)
    config = in_changed_precision(config, resume)
    changes = resume.differences(config, config.task_class().NETWORK) if resume.path else []
    before = read_pickled(resume.path, mmap=True).get("global_step", 0) if resume.path else 0
    check_start(config, folder)
    max_steps = config.part("trainer").option("max_steps")
    with TemporaryDirectory(prefix="ldm_lab-check-") as scratch:
        tried = trial(config, Path(scratch), before, resume.path)
        data = DataModule(training_data(tried).build(), seed=config.seed)
        prepare_means(tried, Path(scratch), resume.path)
        task = build_task(tried)
        options: TrainerOptions = tried.part("trainer").build()
        options.options["enable_progress_bar"] = False
        guard = Guard(Path(scratch), 1)
        drawing = task.callbacks(Path(scratch))
        for callback in drawing:
            if isinstance(callback, HeldOut):
                callback.goes_on = False
            if isinstance(callback, StoredTexts):
                callback.store.writes = False
        trainer = options.trainer([resume, guard, *drawing], [], 1, Path(scratch))
        if options.channels_last:
            task.to(memory_format=torch.channels_last)
        if options.compile != "none":
            print(task.compile_network(options.compile))
        check_space(folder, task, config.part("checkpoint").build(folder, guard), max_steps)
        announce(config, folder, resume.path, changes, task)
        cost = RunCost(task)
        with compiler_told_in_one_line(options.compile):
            step(trainer, task, data, resume, cost)
        report(trainer, task, cost)
    return 0


def trial(config: RunConfig, scratch: Path, before: int, resumed: Path | None = None) -> RunConfig:
    """Return a run of one step and one picture that is like another one.

    Args:
        config: of the run.
        scratch: a folder that is deleted afterwards, for all that is drawn.
        before: optimizer steps that the run has made.
        resumed: the checkpoint that it goes on with; None begins anew.
    """
    strategy = config.part("trainer").option("strategy")
    options = Section({"max_steps": before + 1, "max_time": None, "devices": 1, "num_nodes": 1})
    options |= {"accumulate_grad_batches": 1, "strategy": FSDP2 if strategy == FSDP2 else "auto"}
    tried = with_options(config, "trainer", options)
    for section in PICTURES:
        if section in config:
            tried = with_options(tried, section, {"every": 1, **({} if section == "demo" else {"images": 1})})
    if "held_out" in config:
        tried = with_options(tried, "held_out", {"every": 1, "samples": 1, "levels": 1, "patience": None})
    if "evaluate" in config:
        few = max(METRICS[name].least for name in config["evaluate"].option("metrics"))
        tried = with_options(tried, "evaluate", {"every": 1, "images": few, "pictures": few})
    if "demo" in config:
        tried = with_options(tried, "demo", one_prompt(config["demo"], scratch))
    if "cache" in config and not is_complete(folder := cache_options(config).folder, config):
        print(f"check: the run would encode its data first, into {folder}/; this step encodes its batch itself")
        tried = replace(tried, sections={name: part for name, part in tried.sections.items() if name != "cache"})
    if source := needs_means(tried, RUNS / config.run, resumed):
        if source == "measured":
            print("check: the run would measure conditioner.gap's means first; this step measures them on a few images")
        tried = with_own_means(few_means(tried, config["data"].option("batch_size")), scratch)
    if "cache" not in tried and type(data := config["data"].build()).prepare is not Source.prepare:
        tried = drawn_elsewhere(tried, data, scratch)
    return tried


def one_prompt(demo: PartConfig, scratch: Path) -> Section:
    """Return the option of `demo` that names its first prompt alone, in a file in a folder that is deleted."""
    first = prompts_of(demo.option("prompts"), demo.option("images"))[0]
    key, line = ("prompts", first) if isinstance(first, str) else ("images", os.path.abspath(first.text))
    (scratch / f"{key}.txt").write_bytes(os.fsencode(f"{line}\n"))
    return Section({key: str(scratch / f"{key}.txt")})


def drawn_elsewhere(config: RunConfig, source: Source, scratch: Path) -> RunConfig:
    """Return a run whose data, which are made at first use, are made in a scratch folder, and few of them."""
    data = config["data"]
    if data.option("folder") is None or Path(data["folder"]).expanduser().exists():
        return config
    readers = max(source.workers, 1)
    few = Section({"folder": str(scratch / "data"), "shards": readers, "count": readers * source.batch_size})
    print(f"check: the run would draw its data first, into {data['folder']}/; this step draws a few of them")
    return with_options(config, "data", {key: value for key, value in few.items() if data.option(key) is not None})


def step(trainer: Trainer, task: Task, data: DataModule, resume: Resume, cost: RunCost) -> None:
    """Make the step. Raises UserError: memory ran out; what the parts raise."""
    with (
        fail_together(trainer.strategy.launcher),
        told_in_one_line(lambda: training_now(trainer, cost), less_memory(task)),
    ):
        trainer.fit(task, datamodule=data, ckpt_path=resume.path, weights_only=True)


def report(trainer: Trainer, task: Task, cost: RunCost) -> None:
    """Say what was done, and what the run needs."""
    data = trainer.datamodule.source
    cost.image_size = data.image_size
    drawn = [section for section in PICTURES if section in task.run_config]
    picture = f", one picture of {' and '.join(drawn)} drawn" if drawn else ""
    print(f"check: one batch of {data.batch_size} was read, step {trainer.global_step} made{picture}; nothing is kept")
    print(f"check: {memory_taken(task.device)} were taken at most")
    if cost.step is not None:
        print(f"check: counted, a step takes {cost.step.in_words()}")
    else:
        print(f"check: what a step takes cannot be counted: {cost.why_not}")


def memory_taken(device: torch.device) -> str:
    """Return how much memory this process has had at most, in words."""
    if device.type == "cuda":
        return f"{in_units(torch.cuda.max_memory_allocated(device))} of {torch.cuda.get_device_name(device)}'s memory"
    if sys.platform == "win32":
        return "an unknown amount of main memory"
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB, and bytes on macOS
    return f"{in_units(most * (1 if sys.platform == 'darwin' else 1024))} of main memory, the program itself included,"
