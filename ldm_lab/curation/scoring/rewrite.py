"""Copies of shards whose json has the scores."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ldm_lab.curation.scoring.files import ScoreRows
from ldm_lab.data.samples import SkippedSample, as_utf8
from ldm_lab.data.tar import SampleFiles, read_files, write_shard
from ldm_lab.errors import UserError
from ldm_lab.io.json_files import parse_json


def rewrite_shard(address: str, path: Path, rows: ScoreRows) -> None:
    """Write a copy of a shard in which each sample's json has its scores too; samples without scores are left out.

    Raises:
        UserError: the folder cannot be written.
    """
    places = {key: i for i, key in enumerate(rows.key)}

    def samples() -> Iterator[SampleFiles]:
        for item in read_files(address):
            if isinstance(item, SkippedSample) or (place := places.pop(as_utf8(item[0]), None)) is None:
                continue
            key, files = item
            scores = {name: float(values[place]) for name, values in rows.scores.items() if not np.isnan(values[place])}
            yield key, {**files, "json": json.dumps({**parse_json(files.get("json")), **scores}).encode()}

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_shard(path, samples())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
