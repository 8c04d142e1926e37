"""What Lightning's Trainer with all that a run has around a step costs beside a bare loop over the same tensors.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --device cuda --base-channels 128 --batch-size 64

A run of `train.py`'s own (guard, logs, progress, checkpoint, counting) reads batches that lie in memory. Behind each of
its steps a bare loop makes one with a network, an optimizer and an average of its own: loss, backward pass, AdamW,
average. So both see the machine as it is in the same moment. A pair is the sum of some steps, by the clock and, on a
CPU, by the processor time of the process: where other programs run besides, the latter says more.
"""

import argparse
import copy
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from pytorch_lightning import Callback, Trainer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from ldm_lab import ema
from ldm_lab.batch import Batch
from ldm_lab.config import build, register, to_yaml
from ldm_lab.errors import run_program
from ldm_lab.training.diffusion import DiffusionTask

PAIRS, STEPS = "OVERHEAD_PAIRS", "OVERHEAD_STEPS"
WARM_UP = 3  # steps that are not timed
SIDE = 32  # of the images, pixels


class BareLoop:
    """A loop over tensors with nothing around it."""

    def __init__(self, task: DiffusionTask) -> None:
        self.model, self.objective, self.dropout = copy.deepcopy(task.model), task.objective, task.dropout
        self.average = ema.averaged_copy(self.model)
        self.pairs = ema.Pairs(self.average, self.model)
        self.optimizer = build("optim", {}).optimizer(self.model)

    def step(self, batch: Batch, embed: Tensor) -> None:
        """Train on images [B, 3, H, W] and embeddings [B, D]."""
        x0 = batch.image
        keep = torch.rand(len(x0), 1, device=x0.device) > self.dropout  # [B, 1]
        t, noise = torch.rand(len(x0), device=x0.device), torch.randn_like(x0)  # [B], [B, 3, H, W]
        loss = self.objective.loss_terms(self.model, x0, {"embed": embed * keep}, t, noise)["loss"].mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.pairs.update(0.999)


@dataclass
class Endless:
    """A loader that gives one batch for ever."""

    batch: Batch

    def __iter__(self) -> Iterator[Batch]:
        return itertools.repeat(self.batch)


class Pairs(Callback):
    """Times the run's steps, and the bare loop's between them."""

    def setup(self, trainer: Trainer, task: DiffusionTask, stage: str) -> None:
        """Have batches that lie in memory in place of the data's."""
        data, names = trainer.datamodule, [""] * trainer.datamodule.source.batch_size
        batch = Batch(names, names, image=torch.randn(len(names), 3, SIDE, SIDE))
        data.train_dataloader = lambda: Endless(batch)
        data.consumed = lambda batch: None

    def on_train_start(self, trainer: Trainer, task: DiffusionTask) -> None:
        """Have a network for the bare loop."""
        self.bare, self.seconds, self.end = BareLoop(task), [], (0.0, 0.0)
        batch_size = trainer.datamodule.source.batch_size
        self.batch = Batch([], [], image=torch.randn(batch_size, 3, SIDE, SIDE, device=task.device))
        self.embed = torch.zeros(batch_size, task.conditioner.embed_dim, device=task.device)  # [B, D]

    def on_train_batch_end(
        self, trainer: Trainer, task: DiffusionTask, outputs: dict[str, Tensor], batch: Batch, index: int
    ) -> None:
        """Note how long the run's step took, and make the bare loop's."""
        before, here = self.end, self.now(task)
        self.bare.step(self.batch, self.embed)
        self.end = self.now(task)
        self.seconds.append([(b - a, c - b) for a, b, c in zip(before, here, self.end)])

    def now(self, task: DiffusionTask) -> tuple[float, float]:
        """Return the clock's and the processor's time once the device has done what it was asked for."""
        if task.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def on_train_end(self, trainer: Trainer, task: DiffusionTask) -> None:
        """Print the table."""
        pairs, steps = int(os.environ[PAIRS]), int(os.environ[STEPS])
        timed = self.seconds[WARM_UP:]
        for number, by in enumerate(("by the clock", "by processor time")[: 1 if task.device.type == "cuda" else 2]):
            stretches = [[step[number] for step in timed[i * steps : (i + 1) * steps]] for i in range(pairs)]
            sums = [[sum(s) for s in zip(*stretch)] for stretch in stretches]
            print(f"\n{by}\n{'pair':8}{'run ms':>12}{'bare ms':>12}{'ratio':>9}")
            for i, (run, bare) in enumerate(sums):
                print(f"{i + 1:<8}{run / steps * 1e3:12.1f}{bare / steps * 1e3:12.1f}{run / bare:9.3f}")
            print(f"{'median':8}{'':24}{statistics.median(run / bare for run, bare in sums):9.3f}", flush=True)


@register("task", "paired_diffusion")
class PairedDiffusion(DiffusionTask):
    """`diffusion` beside a bare loop."""

    def callbacks(self, folder: Path) -> list[Callback]:
        return [*super().callbacks(folder), Pairs()]


def main() -> None:
    """Parse the command line, and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--device", default="cpu", metavar="NAME", help="default: %(default)s")
    add("--base-channels", type=int, default=32, metavar="N", help="default: %(default)s")
    add("--batch-size", type=int, default=2, metavar="N", help="default: %(default)s")
    add("--pairs", type=int, default=6, metavar="N", help="default: %(default)s")
    add("--steps", type=int, default=4, metavar="N", help="of a pair; default: %(default)s")
    add("--threads", type=int, default=1, metavar="N", help="of the CPU; default: %(default)s")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    os.environ.update({PAIRS: str(args.pairs), STEPS: str(args.steps)})

    from ldm_lab.config import load
    from ldm_lab.data.shapes import write_shards
    from ldm_lab.training.runner import run

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_shards(Path("shards"), count=args.batch_size * 4, shards=1, size=SIDE, seed=0)
        config = {
            "imports": "overhead", "task": "paired_diffusion", "run": "overhead",
            "data": {"name": "webdataset", "shards": "shards/*.tar", "image_size": SIDE,
                     "batch_size": args.batch_size, "workers": 0},
            "autoencoder": {"name": "identity"}, "conditioner": {"name": "none", "dropout": 0.2},
            "denoiser": {"name": "ccld_unet", "base_channels": args.base_channels,
                         "head_width": min(64, args.base_channels)},
            "objective": {"name": "v_cosine"}, "ema": {}, "checkpoint": {"every": 10**6, "keep": 0},
            "trainer": {"accelerator": args.device, "threads": args.threads,
                        "max_steps": WARM_UP + args.pairs * args.steps},
        }  # fmt: skip
        Path("overhead.yaml").write_text(to_yaml(config))
        run(load("overhead.yaml"))


if __name__ == "__main__":
    run_program(main)
