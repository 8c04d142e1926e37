"""Where a run reports: a local CSV always, wandb and TensorBoard if wanted, a progress bar."""

import csv
import io
from argparse import Namespace
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from ldm_lab.config import PositiveFloat, PositiveInt, RunConfig, register, to_yaml
from ldm_lab.errors import UserError, first_line
from ldm_lab.io.atomic import atomic_write
from ldm_lab.progress import print_line
from ldm_lab.training.tensorboard import TensorBoard

TAIL = 2**14  # bytes of the end of a CSV that are looked at first


@register("logging")
class Logging:
    """Logging to `metrics.csv` in the run's folder always, and to Weights & Biases and TensorBoard if asked to."""

    def __init__(
        self,
        *,
        every: PositiveInt = 50,
        wandb: Literal["none", "offline", "online"] = "none",
        project: str = "ldm_lab",
        entity: str | None = None,
        tensorboard: bool = False,
        page: PositiveFloat | None = 60.0,
    ) -> None:
        """Set where to log.

        Args:
            every: optimizer steps between log lines; each costs a wait for the device.
            wandb: "offline" writes wandb's files without network or account; `wandb sync` uploads them later.
            project: wandb project.
            entity: wandb team or user; null is the account's default.
            tensorboard: write TensorBoard's files, too, below `tensorboard/` in the run's folder.
            page: seconds at least between renewals of the page `index.html` in the run's folder; null writes none.
        """
        self.every, self.wandb, self.project, self.entity = every, wandb, project, entity
        self.tensorboard, self.page = tensorboard, page

    @staticmethod
    def unused(*, wandb: str) -> dict[str, str]:
        """Return which options have no effect, and why."""
        return dict.fromkeys(("project", "entity"), "logging.wandb is none") if wandb == "none" else {}

    def loggers(self, folder: Path, run: str, resumed_step: int | None, wandb_id: str | None) -> list[Logger]:
        """Return the loggers of a run that starts at step 0 or goes on from `resumed_step`."""
        loggers: list[Logger] = [CSVLog(folder / "metrics.csv", resumed_step)]
        if self.wandb != "none":
            folder.mkdir(parents=True, exist_ok=True)
            loggers.append(self._wandb_logger(folder, run, wandb_id))
        if self.tensorboard:
            loggers.append(TensorBoard(folder, resumed_step))
        return loggers

    def _wandb_logger(self, folder: Path, run: str, wandb_id: str | None) -> WandbLogger:
        import wandb

        logger = WandbLogger(
            name=run, save_dir=folder, project=self.project, entity=self.entity, id=wandb_id,
            offline=self.wandb == "offline", resume="allow", log_model=False,
        )  # fmt: skip
        try:
            _ = logger.experiment  # starts the run now (on rank 0), so that a missing login shows before training
        except wandb.errors.Error as error:
            raise UserError(
                f"logging.wandb: {self.wandb} did not start: {first_line(error)} "
                "('wandb login' first; 'offline' and 'none' work without network and account)"
            ) from None
        return logger


class CSVLog(Logger):
    """Metrics as rows of a CSV, one per logged step; a resumed run goes on in the same file.

    What is measured when a step's row is in the file already gets a second row of that step, with nothing else in it.
    """

    def __init__(self, path: Path, resumed_step: int | None = None) -> None:
        """Open the log.

        Args:
            path: the CSV.
            resumed_step: rows of earlier steps are kept, those of a run that went on past its last checkpoint are
                dropped; None starts afresh.
        """
        super().__init__()
        self.path, self.resumed_step = path, resumed_step
        self.columns: list[str] | None = None
        self.waiting: dict[str, float] = {}
        self.written: dict[str, float] = {}  # what the file has of the last row's step

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the config is written beside the CSV by the run itself."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add one row; metrics of the same step that come separately share it, until it is in the file."""
        there = self.written if self.written.get("step") == step else {}
        new = {name: value for name, value in metrics.items() if name != "epoch" and name not in there}
        if not new:
            return
        if self.waiting and self.waiting["step"] != step:
            self.save()
        self.waiting.update({"step": step, **new})

    @rank_zero_only
    def save(self) -> None:
        """Write the waiting row. Raises UserError where it cannot be written."""
        if not self.waiting:
            return
        row, self.waiting = self.waiting, {}
        try:
            if self.columns is None and self.resumed_step is not None:
                self.columns = cut_rows(self.path, self.resumed_step)
            if self.columns is None:
                rows = read_rows(self.path, self.resumed_step) if self.resumed_step is not None else []
                self._rewrite(rows, list(dict.fromkeys(k for r in [*rows, row] for k in r)))
            elif new := [key for key in row if key not in self.columns]:
                self._rewrite(read_rows(self.path, None), self.columns + new)
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None
        self.written = {**self.written, **row} if self.written.get("step") == row["step"] else row

    def _rewrite(self, rows: list[dict[str, str]], columns: list[str]) -> None:
        self.columns = columns
        with atomic_write(self.path) as file:
            text = io.TextIOWrapper(file, newline="", write_through=True)
            writer = csv.DictWriter(text, columns)
            writer.writeheader()
            writer.writerows(rows)
            text.detach()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left."""
        self.save()


def cut_rows(path: Path, before: int) -> list[str] | None:
    """Cut off the rows of a `metrics.csv` from step `before` on, and torn ones among them, which is said.

    Only the end of the file is read, however long the run has been.

    Returns:
        The columns; None if there is no such file, or its first line does not tell.
    """
    if not path.exists():
        return None
    with open(path, "r+b") as file:
        head = file.readline()
        columns = next(csv.reader([head.decode("utf-8", "replace")]), [])
        if not head.endswith(b"\n") or "step" not in columns:
            return None
        first, size, length = len(head), file.seek(0, io.SEEK_END), TAIL
        while True:
            begin = max(first, size - length)
            file.seek(begin)
            lines = file.read().splitlines(keepends=True)
            end, torn, kept = size, 0, False
            for line in reversed(lines[begin > first :]):  # the first one may be half a line
                step = step_of(line, columns)
                kept = step is not None and step < before
                if kept:
                    break
                torn += step is None
                end -= len(line)
            if kept or begin == first:
                break
            length *= 8
        if torn:
            print_rank_zero(torn_rows(path, torn))
        file.truncate(end)
    return columns


def step_of(line: bytes, columns: list[str]) -> int | None:
    """Return the step of a row; None of one that a full disk or a power failure has cut off."""
    fields = next(csv.reader([line.decode("utf-8", "replace")]), [])
    if not line.endswith(b"\n") or len(fields) != len(columns):
        return None
    step = fields[columns.index("step")]
    return int(step) if step.isdecimal() else None


def torn_rows(path: Path, count: int) -> str:
    """Return the line that says that rows are left out."""
    return f"{path}: {count} torn row{'s' * (count > 1)}, of a run that broke off, left out"


def read_rows(path: Path, before: int | None) -> list[dict[str, str]]:
    """Return the rows of a `metrics.csv`, of steps before `before`; what is torn is left out, which is said.

    A row that a full disk or a power failure has cut off lacks fields, or the end of its line.
    """
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        lines = file.readlines()
    columns, *records = csv.reader(lines) if lines else [[]]
    step = columns.index("step") if "step" in columns else None
    whole = [r for r in records if step is not None and len(r) == len(columns) and r[step].isdecimal()]
    if whole and not lines[-1].endswith("\n") and whole[-1] is records[-1]:
        whole.pop()
    if torn := len(records) - len(whole):
        print_rank_zero(torn_rows(path, torn))
    rows = [dict(zip(columns, record)) for record in whole]
    return rows if before is None else [row for row in rows if int(row["step"]) < before]


def log_before_saving(trainer: Trainer) -> None:
    """Write the row of the step that is about to be saved: Lightning logs it afterwards, and may never come to it."""
    if trainer.global_step % trainer.log_every_n_steps:
        return
    for logger in trainer.loggers:
        if isinstance(logger, CSVLog):
            values = {name: float(value) for name, value in trainer.logged_metrics.items()}
            logger.log_metrics(values, trainer.global_step - 1)  # steps are counted from 0 there
            logger.save()


@rank_zero_only
def print_rank_zero(text: str) -> None:
    """Print a line, once for all ranks, without breaking a progress bar."""
    print_line(text)


def log_values(trainer: Trainer, values: dict[str, float]) -> None:
    """Log numbers of the step just done, whether or not it is one that is logged."""
    for logger in trainer.loggers:
        logger.log_metrics(values, max(trainer.global_step - 1, 0))  # steps are counted from 0 there


def log_images(trainer: Trainer, name: str, images: list[Image.Image], captions: list[str]) -> None:
    """Send images to wandb, and a grid to TensorBoard, if the run has them; files are the caller's business."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, images, step=trainer.global_step, caption=captions)
        elif isinstance(logger, TensorBoard) and len(images) == 1:  # it has no captions, and grids have all pictures
            logger.log_picture(name, images[0], max(trainer.global_step - 1, 0))  # with the numbers of this step


@rank_zero_only
def log_config(trainer: Trainer, config: RunConfig, step: int) -> None:
    """Send a run's config to wandb and TensorBoard, if the run has them.

    Args:
        trainer: of the run.
        config: as it is merged.
        step: that the run begins at.
    """
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_hyperparams(config.to_dict())
        elif isinstance(logger, TensorBoard):
            logger.log_yaml("config", to_yaml(config.to_dict()), step)
