"""How a model came about, as its file tells those who get it: data, batch, hardware, the day. No paths, no names."""

import platform
from datetime import UTC, datetime

import torch
from pytorch_lightning import Trainer

from ldm_lab.config import RunConfig
from ldm_lab.data.source import Source


def provenance(trainer: Trainer, config: RunConfig) -> dict[str, str]:
    """Return what is told of a training beside its step.

    Args:
        trainer: of the run.
        config: the run's.
    """
    source: Source = trainer.datamodule.source
    batch = source.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    told = {
        "data": str(config["data"].name),
        "batch": str(batch),
        "precision": str(trainer.precision),
        "hardware": f"{trainer.world_size} x {device_name(trainer.strategy.root_device)}",
        "date": datetime.now(UTC).date().isoformat(),
    }
    return told | ({} if source.count is None else {"data_count": f"{source.count:,} {source.unit}"})


def device_name(device: torch.device) -> str:
    """Return what a device is called by its maker."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)" if device.type == "cpu" else device.type
