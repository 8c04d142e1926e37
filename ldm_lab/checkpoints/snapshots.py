"""Snapshots of a run's power-function averages, and the average of another width that is put together of them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm_lab.checkpoints.files import damaged_safetensors, read_safetensors, write_safetensors
from ldm_lab.ema import PowerAverage
from ldm_lab.errors import UserError

FOLDER = "ema_snapshots"
WIDTH, UPDATES = "ema_width", "ema_updates"  # of a snapshot, in its metadata


def found_snapshots(run: Path) -> dict[Path, PowerAverage]:
    """Return the snapshots in a run's folder, by path. Raises UserError where there are none, or for a damaged one."""
    found = {}
    for path in sorted((run / FOLDER).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            found[path] = PowerAverage(float(metadata[WIDTH]), int(metadata[UPDATES]))
        except (SafetensorError, ValueError, KeyError, OSError) as error:
            raise damaged_safetensors(path, error) from None
    if not found:
        raise UserError(f"{run}: has no snapshots of averages; a section `ema_snapshots` in its YAML makes them")
    return found


def put_together(factors: Mapping[Path, float], wanted: PowerAverage, out: Path) -> None:
    """Write the sum of snapshots, each multiplied by its factor, as a model; numbers that all share stay as they are.

    Raises:
        UserError: a damaged snapshot, or one of another network.
    """
    total: dict[str, Tensor] = {}
    shared: dict[str, Tensor] = {}
    newest: dict[str, str] = {}
    for path, factor in factors.items():
        state, newest = read_safetensors(path)
        shared = shared or dict(state)
        if {name: value.shape for name, value in state.items()} != {n: v.shape for n, v in (total or state).items()}:
            raise UserError(f"{path}: is of another network than the snapshots before it")
        shared = {name: value for name, value in shared.items() if torch.equal(value, state[name])}
        for name, value in state.items():
            added = value.double() * factor
            total[name] = total[name] + added if name in total else added
    state = {name: shared.get(name, value).float() for name, value in total.items()}
    facts = {**newest, WIDTH: str(wanted.width), UPDATES: str(wanted.updates), "step": str(wanted.updates)}
    write_safetensors(out, state, facts)
