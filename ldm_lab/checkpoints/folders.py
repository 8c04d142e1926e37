"""Which file in a folder has the weights, and what is said of folders that have none that could be read."""

from collections.abc import Sequence
from pathlib import Path

from ldm_lab.errors import UserError

# Of transformers', accelerate's and open_clip's folders, whoever's network is in them.
USUAL = (
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
)
ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".pkl")
NOT_WEIGHTS = ("optim", "scheduler", "scaler", "random_states", "rng_state", "training_args")  # beside them
SHOWN = 3
DEEPSPEED, ZERO, LATEST = "mp_rank_00_model_states.pt", "zero_pp_rank_", "latest"
DISTRIBUTED = ".metadata"  # of torch.distributed.checkpoint


def weights_in(folder: Path, known: Sequence[str]) -> tuple[Path, str]:
    """Return the file with the weights in a folder, and a line to say; "" where its name is a usual one.

    Args:
        folder: the folder.
        known: names that formats use, in order of preference.

    Raises:
        UserError: none, several of no usual name, or weights in parts that another program has to put together.
    """
    for name in (*known, *USUAL):
        if (folder / name).is_file():
            return folder / name, ""
    _check_distributed(folder)
    if deepspeed := _deepspeed(folder):
        return deepspeed, f"{folder}: the weights as DeepSpeed trained them are taken ({DEEPSPEED})"
    files = sorted(path for path in folder.iterdir() if path.is_file())
    candidates = [path for path in files if path.suffix in ENDINGS and not _is_beside(path)]
    if len(candidates) == 1:
        return candidates[0], f"{folder}: {candidates[0].name} is taken, the one file of weights in it"
    near = [sub for sub in sorted(folder.iterdir()) if sub.is_dir() and any((sub / name).is_file() for name in known)]
    hint = f"; did you mean {near[0]}?" if near else ""
    if candidates:
        shown = ", ".join(path.name for path in candidates[:SHOWN])
        raise UserError(f"{folder}: {len(candidates)} files of weights in it ({shown}): name one of them{hint}")
    usual = " or ".join((*known[:2], USUAL[0]))
    raise UserError(f"{folder}: a folder of weights has a file such as {usual} in it, this one has none{hint}")


def check_whole(path: Path) -> None:
    """Raise UserError for a part of weights, by its name, that is nothing without the others."""
    if ZERO not in path.name:
        return
    if "optim_states" in path.name:
        beside = path.with_name(DEEPSPEED)
        other = f"; the weights are in {beside}" if beside.is_file() else ""
        raise UserError(f"{path}: the state of DeepSpeed's optimizer alone{other}. {_put_together(path.parent)}")
    raise UserError(f"{path}: one of several parts of DeepSpeed's (ZeRO 3). {_put_together(path.parent)}")


def _put_together(folder: Path) -> str:
    return f"DeepSpeed's own `python zero_to_fp32.py {folder.parent} OUT` puts all together, in float32"


def _is_beside(path: Path) -> bool:
    return any(word in path.name for word in NOT_WEIGHTS)


def _check_distributed(folder: Path) -> None:
    """Raise UserError for what torch.distributed.checkpoint has written (FSDP)."""
    if (folder / DISTRIBUTED).is_file() and (parts := len([*folder.glob("*.distcp")])):
        command = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} OUT.pt"
        raise UserError(
            f"{folder}: weights in {parts} parts of torch.distributed's (FSDP): put together by `{command}`"
        )


def _deepspeed(folder: Path) -> Path | None:
    """Return DeepSpeed's file of weights, of the checkpoint that `latest` names; None if it is no folder of its.

    Raises:
        UserError: weights in parts.
    """
    latest = folder / LATEST
    if latest.is_file() and latest.stat().st_size < 1000:
        name = latest.read_text(encoding="utf-8", errors="replace").strip()
        folder = folder / name if name and Path(name).name == name and (folder / name).is_dir() else folder
    parts = sorted(folder.glob("*_model_states.pt"))
    if any(ZERO in path.name for path in parts):
        check_whole(next(path for path in parts if ZERO in path.name))
    if len(parts) > 1:
        raise UserError(f"{folder}: weights in {len(parts)} parts of DeepSpeed's. {_put_together(folder)}")
    return parts[0] if parts else None
