"""Data that a run is measured on, and does not train on."""

import hashlib
from collections.abc import Sequence

from pytorch_lightning import Trainer

from ldm_lab.data.samples import as_utf8
from ldm_lab.data.source import Source
from ldm_lab.errors import UserError
from ldm_lab.training.logs import print_rank_zero


def opened(trainer: Trainer, source: Source, section: str) -> str:
    """Open a source before training, say what is found, and return what stands for its contents and their order.

    All ranks return the same.

    Args:
        trainer: of the run.
        source: described by `data` of the section.
        section: whose it is.

    Raises:
        UserError: nothing to read.
    """
    if trainer.is_global_zero:
        source.prepare()
    trainer.strategy.barrier()
    try:
        source.open()
    except UserError as error:
        raise UserError(f"{section}.{error}") from None
    for line in source.found():
        print_rank_zero(f"{section}.data: {as_utf8(line)}")
    contents: str = trainer.strategy.broadcast(source.contents() if trainer.is_global_zero else "")
    return f"{source.items_key} {contents}"


def digest(*told: str | int | Sequence[str]) -> str:
    """Return some 32 characters that stand for what is told."""
    return hashlib.blake2b(repr(told).encode(errors="surrogateescape"), digest_size=16).hexdigest()
