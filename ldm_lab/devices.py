"""Devices: the one that a name means, or the one to take where none is named."""

import torch

from ldm_lab.errors import UserError, first_line


def pick_device(name: str | None) -> torch.device:
    """Return the device of a name, or the accelerator if there is one. Raises UserError for one that is not here."""
    if name is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name}: {first_line(error)}") from None
