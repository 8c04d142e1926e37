"""The files that scoring writes beside a shard NAME.tar: `NAME.scores.parquet` and `NAME.embeddings.safetensors`.

Parquet: a row for each image that was scored, in the shard's order: `key`, `url` (text) and `hash` (64-bit integer)
where the sample's json has them, or the hash follows from its url and caption, then a float32 column for each score.
The file's metadata has under `ldm_lab` as JSON what made the scores and what was read and skipped. The file is written
last, and whole: it marks the shard as done.

Embeddings: `embed` float16 [N, D], unit rows as LAION stores them, with `key` and `key_ends` (`data.strings`), and the
embedder in the metadata.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from ldm_lab.checkpoints import embedders
from ldm_lab.checkpoints.files import FORMAT, is_safetensors, read_safetensors
from ldm_lab.data.strings import Strings
from ldm_lab.data.work_items import Content
from ldm_lab.errors import UserError, first_line, unknown
from ldm_lab.io.arrays import native, open_npy
from ldm_lab.io.atomic import atomic_write
from ldm_lab.io.json_files import Json, parse_json

SCORES = ".scores.parquet"
EMBEDDINGS = ".embeddings.safetensors"
VERSION = "ldm_lab scores 1"
ROLE = "embeddings"


@dataclass(frozen=True)
class HeadFacts:
    """A head as a Parquet names it: what it was asked by, its kind, what its file says of its training."""

    source: str
    kind: str
    trained: dict[str, Json]


KEYS = {field.name for field in fields(HeadFacts)}


@dataclass(frozen=True)
class ScoreFacts:
    """What a Parquet says of itself.

    Attributes:
        embedder: whose embeddings were scored (`ldm_lab.checkpoints.embedders`).
        precision: of its arithmetic.
        predictors: column -> sha256 of the head.
        similarity: whether there is a column of cosines.
        heads: column -> where the head came from.
        content: `WorkItem.content` of what was scored.
        read, skipped, examples, captions: `ldm_lab.data.counts.Counts`.
    """

    embedder: dict[str, str]
    precision: str
    predictors: dict[str, str]
    similarity: bool
    heads: dict[str, HeadFacts]
    content: Content
    read: int
    skipped: dict[str, int]
    examples: dict[str, list[str]]
    captions: dict[str, int]

    def to_json(self) -> str:
        """Return the text for the file's metadata."""
        return json.dumps({"format": VERSION, **asdict(self)})

    @classmethod
    def of(cls, data: bytes | None) -> "ScoreFacts | None":
        """Return the facts in a file's metadata, None if they are damaged or of another program."""
        content = parse_json(data)
        names = [field.name for field in fields(cls)]
        if content.get("format") != VERSION or not all(name in content for name in names):
            return None
        facts = {name: content[name] for name in names}
        heads = content["heads"]
        counts = (content["skipped"], content["examples"], content["captions"])
        mappings = (heads, content["embedder"], content["predictors"], *counts)
        if not isinstance(content["read"], int) or not all(isinstance(mapping, dict) for mapping in mappings):
            return None
        if not all(isinstance(head, dict) and head.keys() == KEYS for head in heads.values()):
            return None
        facts["heads"] = {column: HeadFacts(**head) for column, head in heads.items()}
        return cls(**facts)


@dataclass(frozen=True)
class ScoreRows:
    """The scored images of a work item, N of them.

    Attributes:
        key: of each.
        url, hash: of each, None where the sample's json has none.
        scores: column -> float32 [N]; NaN where there is none.
    """

    key: list[str]
    url: list[str | None]
    hash: list[int | None]
    scores: dict[str, NDArray[np.float32]]


def write_scores(path: Path, rows: ScoreRows, facts: ScoreFacts) -> None:
    """Write a shard's scores, NaN as null, whole or not at all; `facts` go into the metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "key": pa.array(rows.key, pa.string()),
        "url": pa.array(rows.url, pa.string()),
        "hash": pa.array(rows.hash, pa.int64()),
        **{name: pa.array(values, pa.float32(), from_pandas=True) for name, values in rows.scores.items()},
    }
    table = pa.table(columns).replace_schema_metadata({FORMAT: facts.to_json()})
    with atomic_write(path) as file:
        pq.write_table(table, file)


def read_facts(path: Path) -> ScoreFacts | None:
    """Return what a Parquet of ours says of itself, None if it is not there, damaged or of another program."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path).metadata or {}
    except (OSError, pa.ArrowException):
        return None
    return ScoreFacts.of(metadata.get(FORMAT.encode()))


def write_embeddings(path: Path, embeds: Tensor, keys: list[str], embedder: dict[str, str]) -> None:
    """Write embeddings [N, D] as float16, whole or not at all."""
    packed = Strings.pack(keys)
    tensors = {
        "embed": embeds.half().contiguous(),  # [N, D]
        "key": torch.from_numpy(packed.blob.copy()),  # [bytes]
        "key_ends": torch.from_numpy(packed.ends),  # [N]
    }
    with atomic_write(path) as file:
        file.write(save(tensors, {"format": FORMAT, "role": ROLE, "embedder": json.dumps(embedder)}))


def read_embeddings(path: Path) -> tuple[Tensor, list[str] | None, dict[str, str] | None]:
    """Return `(embeddings [N, D], their keys, their embedder)` of a file of ours, or of a .npy, which says neither.

    Raises:
        UserError: missing, damaged or foreign file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file (embeddings)")
    if not is_safetensors(path):
        array = open_npy(path)
        if array.ndim != 2 or array.dtype.kind != "f":
            raise UserError(f"{path}: embeddings are [N, D] floating-point numbers")
        array = array if array.dtype in (np.float16, np.float32) else array.astype(np.float32)
        return torch.from_numpy(native(array)), None, None  # [N, D]
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT or metadata.get("role") != ROLE:
        raise UserError(f"{path}: no embeddings of ldm_lab's: it holds {str(metadata.get('role'))[:50]}")
    try:
        embedder = json.loads(metadata["embedder"])
        strings = Strings(tensors["key"].numpy(), tensors["key_ends"].numpy())
        keys, embeds = [strings[i] for i in range(len(strings))], tensors["embed"]
    except (KeyError, ValueError):
        raise UserError(f"{path}: embeddings without keys or embedder") from None
    problems = embedders.problems(embedder)
    if problems or embeds.ndim != 2 or len(keys) != len(embeds):
        raise UserError(f"{path}: {problems[0] if problems else 'keys and embeddings do not fit together'}")
    return embeds, keys, embedder


def read_column(path: Path, column: str) -> tuple[list[str], np.ndarray]:
    """Return `(keys, scores float32 [N])` of a Parquet of ours; a missing score is NaN.

    Raises:
        UserError: missing, damaged or foreign file, no such column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise UserError(f"{path}: no such file (scores)")
    if read_facts(path) is None:
        raise UserError(f"{path}: no scores of ldm_lab's, or damaged")
    names = pq.read_schema(path).names
    if column not in names:
        raise UserError(f"{path}: {unknown('column', column, names)}")
    try:
        table = pq.read_table(path, columns=["key", column])
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: damaged ({first_line(error)})") from None
    return table["key"].to_pylist(), table[column].to_numpy().astype(np.float32)  # [N]
