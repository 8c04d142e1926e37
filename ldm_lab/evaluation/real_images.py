"""Features of real images, kept in a file that knows what they are of."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ldm_lab.config import PartConfig
from ldm_lab.data.file_facts import digest, facts_of
from ldm_lab.data.files import Folder
from ldm_lab.data.jobs import PassOptions, PassReport
from ldm_lab.data.passes import run_pass
from ldm_lab.data.source import Source
from ldm_lab.data.work_items import SourceItem, SourceItems
from ldm_lab.errors import UserError
from ldm_lab.evaluation.feature_files import FEATURES, PictureRows, check_tensors, differences, read_rows, write_rows
from ldm_lab.evaluation.features import Features
from ldm_lab.evaluation.jobs import SourceJob, rows_of_items
from ldm_lab.evaluation.own_files import is_plot
from ldm_lab.progress import print_line

FILE = "real.safetensors"  # in the folder of an evaluation
UNUSABLE = "unusable"  # name of the fact that says what was skipped
TIMES = "times"  # name of the fact that tells files of the same names and sizes apart where they lie
NO_MATTER = ("workers", "timeout", "batch_size", "max_skipped", "path", "shards", "folder", "local", "shuffle_buffer")


@dataclass(frozen=True)
class RealImages:
    """Real images, opened.

    Attributes:
        config: their section.
        source: opened.
        limit: as many are taken, evenly spread; None takes all.
    """

    config: PartConfig
    source: Source
    limit: int | None

    @classmethod
    def open(cls, config: PartConfig, limit: int | None) -> "RealImages":
        """Find the images; plots of evaluations are none. Raises UserError where there is no image."""
        source: Source = config.build()
        if isinstance(source, Folder):
            source.leaves_out = is_plot
        source.prepare()
        try:
            source.open()
        except UserError as error:
            raise UserError(f"--data: {str(error).removeprefix('data.')}") from None
        return cls(config, source, limit)

    def facts(self, networks: Sequence[Features]) -> dict[str, str]:
        """Return what features of these images are made of: files, how they are read, the networks."""
        options = {key: its for key, its in sorted(self.config.to_dict().items()) if key not in NO_MATTER}
        files = facts_of(self.source.files())
        return {
            "data": f"{self.source.contents()} {digest(files)}",
            TIMES: digest(files, times=True),
            "options": json.dumps(options, default=str),
            "images": "all" if self.limit is None else str(self.limit),
            **{its.space: json.dumps(its.identity, sort_keys=True) for its in networks},
        }

    def key(self, networks: Sequence[Features]) -> str:
        """Return a few characters that stand for the facts, as part of a folder's name."""
        return hashlib.sha256(json.dumps(self.facts(networks)).encode()).hexdigest()[:12]

    def items(self, folder: Path) -> SourceItems:
        """Return the work items, with results in a folder."""
        return SourceItems(self.source, folder, self.limit)


def real_rows(
    real: RealImages | None, networks: Sequence[Features], path: Path, is_own: bool, options: PassOptions
) -> tuple[PictureRows, str | None]:
    """Return the features of real images, read from a file, or made and kept there, and what was skipped of them, in
    words, or None; in every process.

    Args:
        real: the images; None where the file has to do.
        networks: whose features are needed.
        path: of the file.
        is_own: whether it is the evaluation's own, which is made anew where it is of something else; one that the user
            names is refused.
        options: of the pass.

    Raises:
        UserError: no images and no file, a file of other images or networks, no usable image, or shards that cannot be
            reached: what was read of the others is kept, but for no whole.
    """
    why = "of something else"
    if path.exists():
        try:
            return kept_rows(real, networks, path, is_own)
        except OtherFeatures as error:
            if real is None or not is_own:
                raise UserError(f"{path}: features of something else: {error}") from None
        except UserError as error:
            if real is None or not is_own:
                raise
            why = str(error).removeprefix(f"{path}: ")
    elif real is None:
        raise UserError(f"{path}: no such file, and no --data to make it of")
    facts = real.facts(networks)
    folder = path.parent / "parts" / f"real-{real.key(networks)}"

    def join(items: Sequence[SourceItem], report: PassReport) -> None:
        if not report.counts.used:
            raise UserError(f"--data: no usable image: {report.counts}")
        if path.exists():
            print_line(f"{path}: {why}, made anew")
        unusable = {UNUSABLE: str(report.counts)} if report.counts.skipped else {}
        write_rows(path, rows_of_items(items), facts | unusable)

    options = replace(options, max_skipped=real.source.max_skipped)
    report = run_pass(SourceJob(networks, real.source, join), real.items(folder), options)
    if report is not None:
        shutil.rmtree(folder, ignore_errors=True)
    rows, there = read_rows(path)
    return rows, there.get(UNUSABLE)


class OtherFeatures(Exception):
    """A file has features of other images, or of another network: in which facts they differ, in words."""


def kept_rows(
    real: RealImages | None, networks: Sequence[Features], path: Path, is_own: bool
) -> tuple[PictureRows, str | None]:
    """Return the features that a file has of these images, and what was skipped of them.

    Of a file that the user names the images may be copies, which were written at another time; that is said.

    Raises:
        OtherFeatures: they are of something else.
        UserError: the file is damaged.
    """
    rows, there = read_rows(path)
    wanted = {its.space: json.dumps(its.identity, sort_keys=True) for its in networks}
    wanted = wanted if real is None else real.facts(networks)
    times = wanted.pop(TIMES, "") if not is_own else ""
    if other := differences(there, wanted):
        raise OtherFeatures("; ".join(other))
    if times and there.get(TIMES) != times:
        print_line(f"{path}: of files of the same names and sizes that were written at another time; taken as they are")
    if not len(rows):
        raise UserError(f"{path}: there is no picture in it, damaged")
    check_tensors(path, rows, {FEATURES + its.space: (its.width,) for its in networks})
    if endless := next((its.space for its in networks if not rows.features(its.space).isfinite().all()), None):
        raise UserError(f"{path}: {FEATURES}{endless} has numbers that are not finite, damaged")
    return rows, there.get(UNUSABLE)
