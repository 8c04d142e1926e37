"""Devices: the one that a name means, or the one to take where none is named; and what memory they have left."""

from pathlib import Path

import torch

from ldm_lab.errors import UserError, first_line

MEMORY = Path("/proc/meminfo")  # of Linux
LIMIT, USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.stat")  # of a container there


def pick_device(name: str | None) -> torch.device:
    """Return the device of a name, or the accelerator if there is one. Raises UserError for one that is not here."""
    if name is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name}: {first_line(error)}") from None


def free_memory(device: torch.device) -> int | None:
    """Return how much memory a device has left, bytes; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        lines = dict(line.split(":", 1) for line in MEMORY.read_text().splitlines() if ":" in line)
        free = int(lines["MemAvailable"].split()[0]) * 1024  # it is in kB
    except (OSError, ValueError, KeyError):
        return None
    try:
        used = dict(line.split() for line in USED.read_text().splitlines())
        return min(free, int(LIMIT.read_text()) - int(used["anon"]))  # what else is used may be given up
    except (OSError, ValueError, KeyError):  # no container, or one without a limit
        return free
