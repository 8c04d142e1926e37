"""Room on the disk for what a run will write, estimated before it starts."""

import shutil
from pathlib import Path

import torch

from ldm_lab.errors import UserError
from ldm_lab.estimate import in_units, optimizer_bytes
from ldm_lab.training.checkpointing import Checkpointing
from ldm_lab.training.task import Task


def check_space(folder: Path, task: Task, checkpointing: Checkpointing, max_steps: int) -> None:
    """Raise UserError if the checkpoints that a run keeps, and the one being written, will not fit on the disk.

    Args:
        folder: the run's; what it holds already counts as room, as it will be replaced.
        task: built.
        checkpointing: which checkpoints are kept.
        max_steps: of the run; -1 is without end.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    usage = shutil.disk_usage(there)
    if not usage.total:  # a file system that does not tell
        return
    size, exported = checkpoint_bytes(task), export_bytes(task, checkpointing.export_dtype)
    kept = checkpointing.most_kept(max_steps)
    free = usage.free + replaceable_bytes(folder)
    best = best_bytes(task, checkpointing)
    need = (kept + 1) * size + 2 * exported + best
    if need <= free:
        return
    fit = (free - 2 * exported - best) // size - 1 - (checkpointing.most_kept(max_steps) - checkpointing.keep)
    weights = "the best weights and the exported model" if best else "the exported model"
    cure = f"checkpoint.keep={fit} fits, or free some space" if fit >= 0 else "free some space"
    raise UserError(
        f"{folder}: the disk has {in_units(free)} of room, and this run needs about {in_units(need)}: "
        f"{kept} checkpoints of {in_units(size)}, one more while it is written, and {weights} twice; {cure}"
    )


def check_room(folder: Path, need: int, what: str) -> None:
    """Raise UserError if the disk of a folder has less room than is needed, bytes, for what is named."""
    usage = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists()))
    if usage.total and need > usage.free:
        raise UserError(
            f"{folder}: the disk has {in_units(usage.free)} of room, and {what} needs about {in_units(need)} more; "
            "free some space, or take another folder"
        )


def checkpoint_bytes(task: Task) -> int:
    """Return about how large a checkpoint is: weights, their average and what the optimizer will keep."""
    weights = sum(tensor.nbytes for tensor in task.state_dict().values())
    return weights + optimizer_bytes(task.parameters(), task.optim.state != "32bit")


def export_bytes(task: Task, dtype: torch.dtype) -> int:
    """Return about how large the exported model is."""
    return sum(tensor.numel() for tensor in task.exported_weights().values()) * dtype.itemsize


def best_bytes(task: Task, checkpointing: Checkpointing) -> int:
    """Return about how large `best.safetensors` is, which is always of float32; 0 where the run keeps none.

    Raises:
        UserError: `checkpoint.best` names what the run does not measure.
    """
    checkpointing.best.choose(task.run_config)
    return export_bytes(task, torch.float32) if checkpointing.best.metric else 0


def replaceable_bytes(folder: Path) -> int:
    """Return what the checkpoints and exports in a folder take; names of one file count once."""
    files = [path.stat() for pattern in ("*.ckpt", "*.safetensors") for path in folder.glob(pattern)]
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in files}.values())
