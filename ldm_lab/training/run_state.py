"""What a run's checkpoint holds, by name: Lightning's entries that are read here, and ours under `FORMAT`."""

from collections.abc import Mapping
from typing import TypedDict

from torch import Tensor

from ldm_lab.config import Plain
from ldm_lab.data.rank_state import RankState
from ldm_lab.errors import UserError
from ldm_lab.io.json_files import JsonObject
from ldm_lab.training.optim import CourseState
from ldm_lab.training.provenance import Session


class RunState(TypedDict, total=False):
    """Our entry.

    Attributes:
        config: the run's, as a YAML has it.
        model: of a diffusion model, the config that rebuilds it, with what the run's left open.
        image_size: side of the pictures that a diffusion model makes, pixels; None if it is any.
        frozen: role -> sha256 of the frozen parts' weights.
        batches_seen: on the first rank, since the run's very first batch.
        samples_seen: on all ranks together, since then.
        course: where the learning rate's schedule began, or was bent.
        data: where each rank stands in the data.
        sessions: of the run so far, and what is told of each.
        wandb_id: of the run at wandb, None without.
        base: of LoRA, the fingerprint of the base model, whose weights are left out.
    """

    config: JsonObject
    model: JsonObject
    image_size: int | None
    frozen: dict[str, str]
    batches_seen: int
    samples_seen: int
    course: CourseState
    data: list[RankState]
    sessions: list[Session]
    wandb_id: str | None
    base: str


BatchCounts = dict[str, int]  # ready, started, processed, completed -> batches


class BatchProgress(TypedDict):
    total: BatchCounts
    current: BatchCounts


class OptimizerState(TypedDict):
    """What the state dict of an optimizer holds.

    Attributes:
        state: place of a parameter among all that are trained -> name -> tensor.
        param_groups: options, and the places of the parameters that they are for.
    """

    state: dict[int, dict[str, Tensor]]
    param_groups: list[Mapping[str, Plain]]


FitLoop = TypedDict("FitLoop", {"epoch_loop.batch_progress": BatchProgress})


class Loops(TypedDict):
    fit_loop: FitLoop


class Checkpoint(TypedDict, total=False):
    """The whole file.

    Attributes:
        state_dict: name -> weights of the task.
        optimizer_states: of the one optimizer.
        global_step: optimizer steps done.
        loops: what Lightning counts.
        ldm_lab: our entry.
    """

    state_dict: dict[str, Tensor]
    optimizer_states: list[OptimizerState]
    global_step: int
    loops: Loops
    ldm_lab: RunState


def take_back(checkpoint: Checkpoint, batches: int) -> None:
    """Uncount the last batches: those of an optimizer step that was not completed are trained on again."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        for name in counts:
            counts[name] -= batches


def align(checkpoint: Checkpoint, accumulate: int) -> None:
    """Let the next batch be the first one of an optimizer step, if a step has another number of batches than before."""
    counts = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    missing = -counts["ready"] % accumulate
    for name in counts:
        counts[name] += missing


def checked(run: RunState) -> RunState:
    """Return our entry of a checkpoint. Raises UserError if something is missing that a run needs to go on."""
    missing = [name for name in ("batches_seen", "samples_seen", "course", "data") if name not in run]
    if missing:
        raise UserError(
            f"resume.checkpoint: has no {missing[0]}: damaged, or of another version; init_from takes over the weights"
        )
    counts = run["batches_seen"], run["samples_seen"]
    if not all(type(count) is int and 0 <= count < 2**62 for count in counts) or not isinstance(run["course"], dict):
        raise UserError("resume.checkpoint: damaged: its counts are none; init_from takes over the weights")
    return run
