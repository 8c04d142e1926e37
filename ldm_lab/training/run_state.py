"""What a run's checkpoint holds, by name: Lightning's entries that are read here, and ours under `FORMAT`."""

from typing import TypedDict

from torch import Tensor

from ldm_lab.data.rank_state import RankState
from ldm_lab.io.json_files import JsonObject


class RunState(TypedDict, total=False):
    """Our entry.

    Attributes:
        config: the run's, as a YAML has it.
        model: of a diffusion model, the config that rebuilds it, with what the run's left open.
        frozen: role -> sha256 of the frozen parts' weights.
        batches_seen: on the first rank, since the run's very first batch.
        data: where each rank stands in the data.
        wandb_id: of the run at wandb, None without.
    """

    config: JsonObject
    model: JsonObject
    frozen: dict[str, str]
    batches_seen: int
    data: list[RankState]
    wandb_id: str | None


BatchCounts = dict[str, int]  # ready, started, processed, completed -> batches


class BatchProgress(TypedDict):
    total: BatchCounts
    current: BatchCounts


FitLoop = TypedDict("FitLoop", {"epoch_loop.batch_progress": BatchProgress})


class Loops(TypedDict):
    fit_loop: FitLoop


class Checkpoint(TypedDict, total=False):
    """The whole file.

    Attributes:
        state_dict: name -> weights of the task.
        global_step: optimizer steps done.
        loops: what Lightning counts.
        ldm_lab: our entry.
    """

    state_dict: dict[str, Tensor]
    global_step: int
    loops: Loops
    ldm_lab: RunState


def take_back(checkpoint: Checkpoint, batches: int) -> None:
    """Uncount the last batches: those of an optimizer step that was not completed are trained on again."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        for name in counts:
            counts[name] -= batches
