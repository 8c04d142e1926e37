"""TensorBoard's files of a run: scalars, grids of pictures, the config as text."""

import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from ldm_lab.errors import install
from ldm_lab.progress import print_line

FOLDER = "tensorboard"  # below the run's
WITHOUT_TENSORBOARD = f"logging.tensorboard: needs tensorboard, which is not installed: {install('tensorboard')}"
QUEUE = 1000  # events that may wait for the thread that writes them


def has_tensorboard() -> bool:
    """Return whether the package is installed."""
    return importlib.util.find_spec("tensorboard") is not None


class TensorBoard(TensorBoardLogger):
    """Lightning's TensorBoardLogger for a run that goes on, and on a disk that may be full.

    What cannot be written ends these files, which is said once; the run goes on, and `metrics.csv` has the numbers.

    Attributes:
        is_broken: whether nothing is written any more.
    """

    def __init__(self, folder: Path, resumed_step: int | None = None) -> None:
        """Set where to write; the files are begun with the first thing that is logged.

        Args:
            folder: the run's.
            resumed_step: what was logged from this step on, by a run that went past its last checkpoint, counts no
                more; None for a fresh run.
        """
        super().__init__(folder, name=FOLDER, version="", purge_step=resumed_step, max_queue=QUEUE, flush_secs=10)
        self.is_broken = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write scalars; as in `metrics.csv` steps count from 0."""
        for name, value in metrics.items():
            if name != "epoch":
                self._write(partial(self._add_scalar, name, float(value), step))

    def _add_scalar(self, name: str, value: float, step: int | None) -> None:
        self.experiment.add_scalar(name, value, step)

    @rank_zero_only
    def log_picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Write a picture."""
        pixels = np.asarray(picture.convert("RGB"))  # [H, W, 3]
        self._write(lambda: self.experiment.add_image(name, pixels, step, dataformats="HWC"))

    @rank_zero_only
    def log_yaml(self, name: str, text: str, step: int) -> None:
        """Write a YAML, as the Markdown that TensorBoard shows."""
        code = "\n".join(f"    {line}" for line in text.splitlines())
        self._write(lambda: self.experiment.add_text(name, code, step))

    @rank_zero_only
    def save(self) -> None:
        """Nothing to do: the writing thread flushes every few seconds, and at the end."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left, and close the files."""
        if self._experiment is not None:
            self._write(self._experiment.close)

    def _write(self, write: Callable[[], None]) -> None:
        if self.is_broken:
            return
        try:
            write()
        except OSError as error:
            self.is_broken = True
            print_line(
                f"logging.tensorboard: {self.log_dir}: cannot be written: {error.strerror or error}; "
                "nothing more is written there, metrics.csv has the numbers"
            )
