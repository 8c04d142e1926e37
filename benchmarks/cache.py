"""What caches cost and save, each against its plain counterpart, in one run: creation, training on one, reading one.

    python benchmarks/cache.py
    python benchmarks/cache.py --side 256 --images 64 --batch-size 16 --autoencoder kl-f8 --steps 4

The networks are the quickstart's unless others are named. "Plain" encodes whole batches in fp32 as they come, gives
freed memory back to the system as glibc does by itself, and steps with torch's own AdamW and a loop over the weights
for their average: what this program did at first. Times are seconds of CPU time of this process on one thread, so that
other programs on the machine hardly matter; the ways take turns, and medians are compared.
"""

import argparse
import ctypes
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from ldm_lab import ema
from ldm_lab.batch import Batch
from ldm_lab.checkpoints.parts import load_part
from ldm_lab.conditions import Conditions
from ldm_lab.config import RunConfig, load
from ldm_lab.data.cache import ENCODERS
from ldm_lab.data.datamodule import DataModule
from ldm_lab.data.jobs import PassOptions
from ldm_lab.processes import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, keep_freed_memory
from ldm_lab.training.caching import make_cache, training_data
from ldm_lab.training.diffusion import drop
from ldm_lab.training.runner import build_task

ROOT = Path(__file__).resolve().parents[1]


def seconds(work: Callable[[], None]) -> float:
    """Return the CPU time of a piece of work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def take_turns(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Return the median CPU time of each way; one round before those that count warms up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, work in ways.items():
            spent = seconds(work)
            if number:
                times[name].append(spent)
    return {name: statistics.median(its) for name, its in times.items()}


def batches(config: RunConfig, cached: bool, epochs: int | None = None) -> Iterable[Batch]:
    """Return the batches of the images, or of their cache, read in this process."""
    section = training_data(config) if cached else config["data"]
    data = DataModule(section.build(), seed=config.seed, epochs=epochs)
    data.setup()
    return data.train_dataloader()


# ----------------------------------------------------------------------------------------------------------- creation


def give_memory_back() -> None:
    """Have glibc treat large blocks as it does in a program that says nothing; a pass before has changed that."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 64 << 20)


@torch.no_grad()
def plain_cache(config: RunConfig, folder: Path) -> None:
    """Load the encoders, encode all images as they come, whole batches in fp32, and write what comes of it."""
    autoencoder, conditioner = (load_part(role, config[role]) for role in ENCODERS)
    found: dict[str, list[torch.Tensor]] = {}
    for batch in batches(config, cached=False, epochs=1):
        if not len(batch):
            continue
        mean, logvar = autoencoder.moments(batch.image)  # [B, C, h, w] each
        made = {"mean": mean, "logvar": logvar, **conditioner.from_batch(batch)}
        for name, values in made.items():
            found.setdefault(name, []).append(values.half())
    save_file({name: torch.cat(parts) for name, parts in found.items()}, folder / "plain.safetensors")


def creation(config: RunConfig, folder: Path, batch_size: int, rounds: int) -> dict[str, float]:
    """Return the seconds of the ways to encode everything."""
    counter = iter(range(10**6))

    def new(precision: str) -> None:
        part = config["cache"]
        options = {**part.options, "folder": str(folder / f"cache{next(counter)}"), "precision": precision}
        own = config.with_part("cache", type(part)("cache", "cache", options))
        make_cache(own, PassOptions(batch_size, workers=0, accelerator="cpu"))

    def plain() -> None:
        give_memory_back()
        plain_cache(config, folder)

    ways = {
        "plain": plain,
        "new": lambda: new("32-true"),
        "new, bf16": lambda: new("bf16-mixed"),
    }
    return take_turns(ways, rounds)


# ----------------------------------------------------------------------------------------------------------- training


class Steps:
    """Training steps of a run without a Trainer."""

    def __init__(self, config: RunConfig, plain: bool) -> None:
        torch.manual_seed(config.seed)
        self.task, self.plain = build_task(config), plain
        trained = self.task.model.parameters()
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4) if plain else self.task.optim.optimizer(self.task.model)

    def __call__(self, batch: Batch) -> None:
        """Make a step."""
        task = self.task
        x0, conditions = self.plainly_encoded(batch) if self.plain else task.encode(batch)  # [B, C, h, w], ...
        keep = torch.rand(len(x0)) > task.dropout  # [B]
        conditions = drop(conditions, task.conditioner.null(conditions), keep)
        t, noise = task.objective.times(torch.rand(len(x0))), torch.randn_like(x0)  # [B], [B, C, h, w]
        task.objective.loss_terms(task.model, x0, conditions, t, noise)["loss"].mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.plain:
            averaged(task.model_ema, task.model)
        else:
            ema.update(task.model_ema, task.model, 0.99)

    @torch.no_grad()
    def plainly_encoded(self, batch: Batch) -> tuple[torch.Tensor, Conditions]:
        """Return latents [B, C, h, w] and conditions, name -> [B, ...], of a whole batch as it comes."""
        mean, logvar = self.task.autoencoder.moments(batch.image)  # [B, C, h, w] each
        x0 = self.task.autoencoder.sample(mean, logvar, torch.randn_like(mean))  # [B, C, h, w]
        return x0, self.task.conditioner.from_batch(batch)


@torch.no_grad()
def averaged(average: nn.Module, model: nn.Module) -> None:
    """Average weights one by one."""
    for ours, theirs in zip(average.parameters(), model.parameters()):
        ours.mul_(0.99).add_(theirs, alpha=0.01)


def training(config: RunConfig, steps: int, rounds: int) -> dict[str, float]:
    """Return the seconds of a step on images, on their cache, and on the cache's tensors in memory."""
    plain, own = Steps(config, plain=True), Steps(config, plain=False)
    held = [batch for batch, _ in zip(batches(config, cached=True), range(steps))]

    def over(step: Steps, source: Iterator[Batch]) -> Callable[[], None]:
        def work() -> None:
            give_memory_back() if step.plain else keep_freed_memory(torch.device("cpu"))
            for _ in range(steps):
                step(next(source))

        return work

    ways = {
        "plain online": over(plain, iter(batches(config, cached=False))),
        "online": over(own, iter(batches(config, cached=False))),
        "cached": over(own, iter(batches(config, cached=True))),
        "in memory": over(own, cycle(held)),
    }
    return {name: spent / steps for name, spent in take_turns(ways, rounds).items()}


def reading(config: RunConfig, steps: int, rounds: int) -> float:
    """Return the seconds that reading a batch of a cache takes."""
    source = iter(batches(config, cached=True))
    return take_turns({"read": lambda: [next(source) for _ in range(steps)] and None}, rounds)["read"] / steps


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--images", type=int, default=512)
    add("--side", type=int, default=64)
    add("--batch-size", type=int, default=64)
    add("--steps", type=int, default=8, help="in a turn (%(default)s)")
    add("--rounds", type=int, default=5, help="of turns (%(default)s)")
    add("--only", choices=("creation", "training"), help="one of the two")
    add("--autoencoder", help="weights of another one than the quickstart's, such as kl-f8")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        quickstart = ROOT / "assets" / "quickstart"
        overrides = [
            f"data.folder={folder}/shapes",
            f"data.count={args.images}",
            "data.shards=4",
            f"data.image_size={args.side}",
            f"data.batch_size={args.batch_size}",
            "data.workers=0",
            f"cache.folder={folder}/cache",
            f"autoencoder.weights={args.autoencoder or quickstart / 'autoencoder.safetensors'}",
            f"conditioner.weights={quickstart / 'cloob.safetensors'}",
            "trainer.accelerator=cpu",
            "trainer.threads=1",
        ]
        config = load(ROOT / "configs" / "quickstart.yaml", overrides)
        config["data"].build().prepare()
        if args.only != "training":
            made = creation(config, folder, args.batch_size, max(2, args.rounds // 2))
            print(f"\ncreation, {args.images} images of {args.side} px, batches of {args.batch_size}:")
            for way, spent in made.items():
                print(f"  {way:14} {1e3 * spent / args.images:7.2f} ms an image   {made['plain'] / spent:5.2f}x")
        if args.only == "creation":
            return
        trained = training(config, args.steps, args.rounds)
        print(f"training, batches of {args.batch_size}, a step:")
        for way, spent in trained.items():
            print(f"  {way:14} {1e3 * spent:7.1f} ms   {trained['plain online'] / spent:5.2f}x")
        print(f"cached over in memory: {trained['cached'] / trained['in memory']:.3f}")
        print(f"reading a batch of the cache: {1e3 * reading(config, args.steps, args.rounds):.2f} ms")


if __name__ == "__main__":
    main()
