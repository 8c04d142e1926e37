"""What the guard has seen and done: in words for people, in `guard.jsonl` for programs."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pytorch_lightning.utilities.rank_zero import rank_zero_only

from ldm_lab.training.task import gather

LOG = "guard.jsonl"
KEYS_SHOWN = 3
Kind = Literal["loss", "gradient", "spike", "scale", "weights"]


@dataclass(frozen=True)
class Event:
    """A step that was not learned from.

    Attributes:
        step: the optimizer step, counted from 1.
        kind: what was not as it should be; "scale" is fp16's, too small to go on.
        loss: mean over batches and ranks.
        limit: above which the loss is a spike.
        norm: of the gradient, before it was clipped.
        keys: of its samples: of batches whose loss is not finite, or else of all, those with the largest loss first.
        name: of the tensor that is not finite, for "weights".
    """

    step: int
    kind: Kind
    loss: float = math.nan
    limit: float = math.inf
    norm: float = math.nan
    keys: tuple[str, ...] = ()
    name: str = ""

    def __str__(self) -> str:
        """Return what happened, in words."""
        if self.kind == "weights":
            return f"{self.name} is not finite after step {self.step}"
        if self.kind == "spike":
            what = f"the loss leaps to {self.loss:.4g} (spikes begin at {self.limit:.4g})"
        elif self.kind == "scale":
            what = "the gradient overflows in fp16, however small its scale is,"
        else:
            what = f"the {self.kind} is not finite"
        shown = ", ".join(self.keys[:KEYS_SHOWN]) + ", ..." * (len(self.keys) > KEYS_SHOWN)
        return f"{what} at step {self.step} (samples {shown})"

    @rank_zero_only
    def log(self, folder: Path, done: str) -> None:
        """Add a line to the log in the run's folder, with what the guard has done."""
        numbers = {key: value if isinstance(value, str) else as_json(value) for key, value in asdict(self).items()}
        with open(folder / LOG, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps({**numbers, "done": done}) + "\n")


def as_json(value: float | Iterable[str]) -> float | str | list[str]:
    """Return a value as JSON has it, which knows no NaN."""
    if isinstance(value, int | float):
        return value if math.isfinite(value) else str(value)
    return [*value]


def worst_keys(batches: list[tuple[float, list[str]]]) -> tuple[str, ...]:
    """Return the keys of a step's samples on all ranks: of batches that are not finite, or of all, the worst first.

    Args:
        batches: this rank's: loss and keys.
    """
    every = [batch for share in gather(batches) for batch in share]
    broken = [(loss, keys) for loss, keys in every if not math.isfinite(loss)]
    chosen = broken or sorted(every, key=lambda batch: -batch[0])
    return tuple(key for _, keys in chosen for key in keys)
