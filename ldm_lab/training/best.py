"""The best weights of a run by one of the metrics that it measures: `checkpoint.best`, kept as `best.safetensors`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypedDict

import torch
from pytorch_lightning import Trainer
from torch import Tensor, nn

from ldm_lab.config import RunConfig
from ldm_lab.errors import UserError, unknown
from ldm_lab.sharded import whole_state
from ldm_lab.training.logs import print_rank_zero

BEST = "best.safetensors"
LOSS = "held_out/loss"
NO_BEST = "none"


class Measured(Protocol):
    """A task whose network is measured.

    Attributes:
        best_model: the network, the averaged one if there is one.
    """

    @property
    def best_model(self) -> nn.Module: ...

    def write_model(self, path: Path, state: dict[str, Tensor], dtype: torch.dtype, facts: dict[str, str]) -> None:
        """Write weights with what is needed to use them, and further facts."""


class BestState(TypedDict):
    """What a checkpoint keeps: the metric, its best value so far and the step of that, and what was measured on."""

    metric: str
    value: float
    step: int
    measured_on: str


@dataclass(frozen=True)
class Measurement:
    """A value of a metric.

    Attributes:
        metric: its column in the log, such as "evaluate/cmmd".
        value: finite.
        higher_is_better: which way is better.
        measured_on: what stands for the images that it was measured on; on others the best so far does not count.
    """

    metric: str
    value: float
    higher_is_better: bool
    measured_on: str


class Best:
    """The best measurement so far; whoever measures hands each one in (`offer`), on all ranks alike."""

    def __init__(self, folder: Path, asked: str | None) -> None:
        """Set where the weights are written, and by what: `checkpoint.best`."""
        self.path, self.asked = folder / BEST, asked
        self.metric = ""  # a column; "" keeps none
        self.state: BestState | None = None

    def choose(self, config: RunConfig) -> None:
        """Find out by which metric the best is kept. Raises UserError for one that the run does not measure."""
        measured = measured_metrics(config)
        if self.asked is None:
            self.metric = next(iter(measured), "")
        elif self.asked != NO_BEST:
            columns = {column.partition("/")[2]: column for column in measured}
            if self.asked not in columns:
                known = unknown("metric of this run", self.asked, [*columns, NO_BEST])
                where = "" if columns else "; `held_out` measures the loss, `evaluate` pictures"
                raise UserError(f"checkpoint.best: {known}{where}")
            self.metric = columns[self.asked]

    def begin(self, trainer: Trainer) -> None:
        """Forget the best so far of a run that goes on where its weights are not there, and say so."""
        before = self.state
        if before is None or not before["step"] or not self.metric or trainer.strategy.broadcast(self.path.exists()):
            return
        print_rank_zero(
            f"checkpoint.best: {before['metric']} {before['value']:.5g} at step {before['step']} does not count any "
            f"more: its weights, {self.path}, are not there"
        )
        self.state = None

    def offer(self, trainer: Trainer, task: Measured, measured: Measurement) -> None:
        """Write the weights as they are now if the measurement is the best so far; before the first step none are."""
        if measured.metric != self.metric or not math.isfinite(measured.value):
            return
        before, step = self.state, trainer.global_step
        if before is not None and (before["metric"], before["measured_on"]) != (self.metric, measured.measured_on):
            print_rank_zero(
                f"checkpoint.best: {before['metric']} {before['value']:.5g} at step {before['step']} does not count "
                "any more: another metric, or other images"
            )
            before = None
        better = before is None or (
            measured.value > before["value"] if measured.higher_is_better else measured.value < before["value"]
        )
        if not better:
            return
        self.state = BestState(
            metric=self.metric, value=measured.value, step=step, measured_on=measured.measured_on
        )  # fmt: skip
        if step:
            weights = whole_state(task.best_model)  # where the ranks share the network, all have to take part in this
            if trainer.is_global_zero:
                task.write_model(self.path, weights, torch.float32, {self.metric: str(measured.value)})


def measured_metrics(config: RunConfig) -> list[str]:
    """Return the columns of the metrics that a run measures, the loss first."""
    found = [LOSS] if "held_out" in config else []
    if "evaluate" in config:
        found += [f"evaluate/{name}" for name in config["evaluate"].option("metrics")]
    return found
