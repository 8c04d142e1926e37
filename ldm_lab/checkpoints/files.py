"""Files of tensors: written atomically, checked, read without executing anything."""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from ldm_lab.checkpoints.lookalikes import check_is_weights
from ldm_lab.errors import UserError, first_line
from ldm_lab.io.atomic import atomic_write

GAP_PREFIX: Final = "conditioner.gap."  # of what stands beside a model's weights (`gap_files`)
LARGEST_HEADER: Final = 100_000_000  # bytes of a safetensors header, which the library allows
FORMAT: Final = "ldm_lab"  # key of our own entries in checkpoints, and value of `format` in a safetensors file of ours

# What torch.load raises, apart from UnpicklingError, for files that are no checkpoints or only parts of one.
UNREADABLE = (
    SafetensorError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, OSError,
)  # fmt: skip


def write_safetensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and text metadata atomically."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as file:
        file.write(safetensors_bytes(on_cpu, metadata))


def is_safetensors(path: str | Path) -> bool:
    """Return whether a file is, or should be, a safetensors file: the length of a header, then a JSON object.

    One that was cut off, or whose length is a lie, is one, too, as far as can be told: the library says what is wrong.
    """
    with open(path, "rb") as file:
        head = file.read(9)
    named = Path(path).suffix == ".safetensors" and head[:1] != b"\x80" and not zipfile.is_zipfile(path)
    return named or (head[8:9] == b"{" and int.from_bytes(head[:8], "little") < LARGEST_HEADER)


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return `(tensors, metadata)` of a safetensors file, on the CPU. Raises UserError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        raise damaged_safetensors(path, error) from None


def file_metadata(path: str | Path) -> dict[str, str]:
    """Return the text metadata of a safetensors file, of which the header alone is read. Raises UserError: damaged."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, ValueError, OSError) as error:
        raise damaged_safetensors(path, error) from None


def damaged_safetensors(path: str | Path, error: Exception) -> UserError:
    """Return what is said of a safetensors file that the library does not read."""
    return UserError(f"{path}: not a readable safetensors file, truncated or damaged ({first_line(error)})")


def read_pickled(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Return the dict in a `.ckpt`/`.pt` file, on the CPU; only tensors and plain containers are let in.

    Raises:
        UserError: not such a file, damaged, or it holds objects whose loading could execute code.
    """
    check_is_weights(Path(path))
    try:
        _refuse_compressed(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        reason = str(error)
        if "Weights only load failed" in reason and ("GLOBAL" in reason or _is_pickle(path)):
            found = re.search(r"GLOBAL ([\w.]+)", reason)
            whole = "torch.nn" in reason or "__main__" in reason
            raise UserError(
                f"{path}: refused, it holds more than tensors, and loading that could run code"
                f"{f' (GLOBAL {found[1][:100]})' if found else ''}"
                f"{'; save the state_dict of the module, not the module' if whole else ''}"
            ) from None
        raise UserError(f"{path}: not a readable checkpoint, truncated or damaged") from None
    except UserError:
        raise
    except (*UNREADABLE, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a readable checkpoint, truncated or damaged ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a checkpoint is a dict, this is a {type(content).__name__}")
    return content


def _is_pickle(path: str | Path) -> bool:
    """Return whether a file, or the pickle in a checkpoint's zip, begins as a pickle does."""
    with open(path, "rb") as file:
        return zipfile.is_zipfile(path) or file.read(1) == b"\x80"


def _refuse_compressed(path: str | Path) -> None:
    """Raise UserError for a zip with compressed entries: torch never compresses, and these could be of any size."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        compressed = [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
    if compressed:
        raise UserError(f"{path}: refused: {compressed[0][:100]!r} in it is compressed, which no checkpoint is")
