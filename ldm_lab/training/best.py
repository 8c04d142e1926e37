"""The best weights of a run by one of the metrics that it measures: `checkpoint.best`, kept as `best.safetensors`.

The file itself says what it is the best of, so that a run that goes on believes it and not its own memory: the file may
be newer than the checkpoint, older, of another training, damaged, or not there.
"""

import json
import math
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypedDict

import torch
from pytorch_lightning import Trainer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ldm_lab.config import RunConfig
from ldm_lab.errors import UserError, unknown
from ldm_lab.io.json_files import Fields, parse_json
from ldm_lab.sharded import whole_state
from ldm_lab.training.logs import print_rank_zero

BEST = "best.safetensors"
LOSS = "held_out/loss"
NO_BEST = "none"
FACT = "best"  # what the file's metadata has under this name: `BestState` and `KeptBest.training` as JSON


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
    """The metric, its best value so far and the step of that, and what was measured on."""

    metric: str
    value: float
    step: int
    measured_on: str


class KeptBest(TypedDict):
    """What a checkpoint keeps: the best so far, and what stands for the training with all that goes on from it."""

    best: BestState | None
    training: str


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
        self.training = ""

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

    def kept(self) -> KeptBest:
        """Return what a checkpoint keeps."""
        return KeptBest(best=self.state, training=self.training)

    def take_over(self, kept: KeptBest) -> None:
        """Go on with what a checkpoint has kept."""
        self.state, self.training = kept["best"], kept["training"]

    def begin(self, trainer: Trainer) -> None:
        """Find out what lies in the run's folder, and let nothing else be the best so far; say what has changed."""
        if not self.metric:
            return
        self.training = self.training or trainer.strategy.broadcast(secrets.token_hex(8))  # of a fresh run
        before = self.state
        self.state, said = trainer.strategy.broadcast(self.found() if trainer.is_global_zero else (None, ""))
        if said and before is not None and before["step"]:
            said = f"{told(before)} does not count any more: {said}"
        if said:
            print_rank_zero(f"checkpoint.best: {said}")

    def found(self) -> tuple[BestState | None, str]:
        """Return the best so far by the file in the run's folder, and what has to be said of it; "" for nothing."""
        before = self.state if self.state is None or not self.state["step"] else None  # measured before the first step
        if not self.path.exists():
            return before, f"its weights, {self.path}, are not there" if self.state is not before else ""
        try:
            state, training = read_best(self.path)
        except UserError as error:
            return before, f"{error}, and will be replaced"
        if training != self.training:
            return before, f"{self.path} is of another training, and will be replaced"
        said = f"{self.path} is of step {state['step']}: {told(state)} is the best so far"
        return state, "" if state == self.state else said

    def offer(self, trainer: Trainer, task: Measured, measured: Measurement) -> None:
        """Write the weights as they are now if the measurement is the best so far; before the first step none are."""
        if measured.metric != self.metric or not math.isfinite(measured.value):
            return
        before, step = self.state, trainer.global_step
        if before is not None and (before["metric"], before["measured_on"]) != (self.metric, measured.measured_on):
            print_rank_zero(
                f"checkpoint.best: {told(before)} does not count any more: another metric, other images or captions"
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
                facts = {self.metric: str(measured.value), FACT: json.dumps({**self.state, "training": self.training})}
                task.write_model(self.path, weights, torch.float32, facts)


def told(state: BestState) -> str:
    """Return a best measurement in words."""
    return f"{state['metric']} {state['value']:.5g} at step {state['step']}"


def read_best(path: Path) -> tuple[BestState, str]:
    """Return what a file of best weights is the best of, and the training that it is of.

    Raises:
        UserError: missing, damaged or foreign file.
    """
    try:
        with safe_open(path, "pt") as file:
            fact = (file.metadata() or {}).get(FACT, "{}")
    except (OSError, SafetensorError):
        raise UserError(f"{path} cannot be read") from None
    fields = Fields(parse_json(fact.encode()))
    metric, value, step = fields.text("metric"), fields.number("value"), fields.count("step")
    measured_on, training = fields.text("measured_on"), fields.text("training")
    if metric is None or value is None or not math.isfinite(value) or not step or measured_on is None or not training:
        raise UserError(f"{path} does not say what it is the best of")
    return BestState(metric=metric, value=value, step=step, measured_on=measured_on), training


def measured_metrics(config: RunConfig) -> list[str]:
    """Return the columns of the metrics that a run measures, the loss first."""
    found = [LOSS] if "held_out" in config else []
    if "evaluate" in config:
        found += [f"evaluate/{name}" for name in config["evaluate"].option("metrics")]
    return found
