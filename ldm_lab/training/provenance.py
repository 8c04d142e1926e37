"""How a model came about, as its file tells those who get it: data, batch, hardware, the day. No paths, no names.

A run that was interrupted may have gone on elsewhere: each session tells its own, and the file all of them.
"""

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from typing import TypedDict

import torch
from pytorch_lightning import Trainer

from ldm_lab.checkpoints.native import BEGUN_WITH, OF_SESSIONS
from ldm_lab.config import RunConfig
from ldm_lab.data.source import Source
from ldm_lab.sampling.names import public_name

UNKNOWN = "not recorded"
NOTHING = "nothing"


class Session(TypedDict):
    """A training without an interruption.

    Attributes:
        began: optimizer steps that were done before.
        told: what is told of it, texts by name.
    """

    began: int
    told: dict[str, str]


@dataclass
class History:
    """The sessions of a run.

    Attributes:
        before: those before this one.
        began: optimizer steps that were done before this one.
    """

    before: list[Session] = field(default_factory=list)
    began: int = 0

    def load(self, sessions: Sequence[Session] | None, step: int) -> None:
        """Go on behind what a checkpoint at a step has; of one without it nothing is known."""
        unknown = [Session(began=0, told={})] if step else []
        sound = isinstance(sessions, Sequence) and all(map(_is_sound, sessions))
        self.before, self.began = list(sessions) if sessions and sound else unknown, step

    def sessions(self, trainer: Trainer, config: RunConfig) -> list[Session]:
        """Return all sessions, this one last; one that was like the one before it is not told anew."""
        now = _told(trainer, config)
        if not self.before:
            begun = {BEGUN_WITH: NOTHING if config.init_from is None else public_name(config.init_from)}
            return [Session(began=self.began, told={**now, **begun})]
        last = {key: text for key, text in self.before[-1]["told"].items() if key != BEGUN_WITH}
        return self.before if last == now else [*self.before, Session(began=self.began, told=now)]

    def facts(self, trainer: Trainer, config: RunConfig, images: int) -> dict[str, str]:
        """Return what is told of the run so far, which has trained on so many images (`provenance`)."""
        return provenance(self.sessions(trainer, config), images)


def provenance(sessions: Sequence[Session], images: int) -> dict[str, str]:
    """Return what is told of a training beside its step.

    Args:
        sessions: of the run.
        images: that all of them have trained on, repeats counted.
    """
    told = {key: text for key in OF_SESSIONS if (text := _in_order(sessions, key))}
    if begun := sessions[0]["told"].get(BEGUN_WITH):
        told[BEGUN_WITH] = begun
    return told | {"images": str(images), "date": datetime.now(UTC).date().isoformat()}


def _told(trainer: Trainer, config: RunConfig) -> dict[str, str]:
    source: Source = trainer.datamodule.source
    batch = source.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    told = {
        "data": str(config["data"].name),
        "batch": str(batch),
        "precision": str(trainer.precision),
        "hardware": f"{trainer.world_size} x {device_name(trainer.strategy.root_device)}",
    }
    return told | ({} if source.count is None else {"data_count": f"{source.count:,} {source.unit}"})


def _in_order(sessions: Sequence[Session], key: str) -> str:
    """Return a text of all sessions that took a step, with the steps at which it changed; "" if none has it."""
    last = [session for session, after in pairwise(sessions) if session["began"] < after["began"]]
    told: list[tuple[int, str]] = []
    for session in (*last, sessions[-1]):
        text = session["told"].get(key, UNKNOWN)
        if not told or told[-1][1] != text:
            told.append((session["began"], text))
    if all(text == UNKNOWN for _, text in told):
        return ""
    until = [f"{text} to step {after:,}" for (_, text), (after, _) in pairwise(told)]
    return ", then ".join([*until, told[-1][1]])


def _is_sound(session: Session) -> bool:
    """Return whether a checkpoint's session has the values that it should have."""
    if not isinstance(session, dict) or type(session.get("began")) is not int:
        return False
    told = session.get("told")
    return isinstance(told, dict) and all(isinstance(its, str) for pair in told.items() for its in pair)


def device_name(device: torch.device) -> str:
    """Return what a device is called by its maker."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)" if device.type == "cpu" else device.type
