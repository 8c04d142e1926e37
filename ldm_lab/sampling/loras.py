"""LoRAs in the weights of a loaded model: as files with a strength, added, and taken out again.

They are added to the weights before sampling, so that a picture costs what it costs without them.
"""

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from ldm_lab.checkpoints.lora import WeightedLora, add_all, read_lora
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Denoiser, Objective
from ldm_lab.sampling.model import Model

log = logging.getLogger(__name__)


def split_weight(written: str | Path) -> tuple[str, float]:
    """Return the file and the strength in `FILE` (1) or `FILE:0.8`: what follows the last colon, if it is a number.

    Raises:
        UserError: a strength that is not finite, or no file.
    """
    file, colon, tail = str(written).rpartition(":")
    try:
        weight = float(tail) if colon else 1.0
    except ValueError:
        return str(written), 1.0  # a drive's letter, an address
    if not math.isfinite(weight):
        raise UserError(f"lora: {written}: a finite number is needed after the last colon")
    file = file if colon else tail
    if not file:
        raise UserError(f"lora: {str(written)!r} names no file; write FILE or FILE:0.8")
    return file, weight


def read_loras(written: Sequence[str | Path]) -> list[WeightedLora]:
    """Return LoRAs as they are written. Raises UserError for a missing, damaged or foreign file."""
    return [WeightedLora(read_lora(file), weight) for file, weight in map(split_weight, written)]


def add_loras(denoiser: Denoiser, objective: Objective, loras: Sequence[WeightedLora]) -> None:
    """Add LoRAs to a model's weights for good; say which were trained on others. Raises UserError for a misfit."""
    weights = {name: value.detach() for name, value in denoiser.state_dict().items()}
    names = {"denoiser": denoiser.part_name, "objective": objective.part_name}
    for line in add_all(weights, loras, names):
        log.warning("lora: %s", line)


@contextlib.contextmanager
def applied_loras(model: Model, written: Sequence[str | Path]) -> Iterator[None]:
    """Have LoRAs in a model's weights for a while; what was there before is kept, and put back bit for bit.

    Args:
        model: loaded, without `compile` if its graph keeps copies of weights.
        written: as `ModelOptions.lora` takes them.

    Raises:
        UserError: a missing, damaged or foreign file, one that does not fit; then nothing was changed.
    """
    loras = read_loras(written)
    own = model.denoiser.state_dict()
    changed = {f"{layer}.weight" for lora, weight in loras if weight for layer in lora.layers}
    kept = {name: own[name].detach().clone() for name in changed if name in own}
    try:
        add_loras(model.denoiser, model.objective, loras)
        yield
    finally:
        for name, value in kept.items():
            own[name].detach().copy_(value)
