"""A table with pictures at Weights & Biases, of a command that is no training run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ldm_lab.errors import UserError, first_line

TableValue = str | int | float | Path | None  # a path is an image's


@dataclass(frozen=True)
class PictureTable:
    """A table: its name, its columns' names, and its rows, whose first value says in words what they are about."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[TableValue]]


def send_table(
    table: PictureTable,
    *,
    mode: Literal["offline", "online"],
    folder: Path,
    run: str,
    project: str,
    entity: str | None = None,
) -> None:
    """Send a table, and its pictures column by column, as a run of its own.

    Args:
        table: what is sent.
        mode: "offline" writes wandb's files below the folder, for `wandb sync`.
        folder: where wandb's files go.
        run: the run's name.
        project, entity: at wandb.

    Raises:
        UserError: wandb does not start.
    """
    import wandb

    try:
        started = wandb.init(
            project=project, entity=entity, name=run, dir=folder, mode=mode, job_type=table.name,
            settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
    except wandb.errors.Error as error:
        raise UserError(
            f"--wandb {mode}: did not start: {first_line(error)} ('wandb login' first; 'offline' works without)"
        ) from None
    rows = [[wandb.Image(str(value)) if isinstance(value, Path) else value for value in row] for row in table.rows]
    started.log({table.name: wandb.Table(columns=list(table.columns), data=rows)})
    for place, column in enumerate(table.columns):  # of a table that waits for `wandb sync` they lie elsewhere
        captioned = [(row[place], str(row[0])) for row in table.rows]
        images = [wandb.Image(str(path), caption=caption) for path, caption in captioned if isinstance(path, Path)]
        if images:
            started.log({f"{table.name}/{column}": images})
    started.finish()
