"""The files of a cache: shards of columns, what stands beside each, and `meta.json`, which lists them.

A cache is a folder. A shard `NAME.safetensors` holds S samples, each in V variants (crops, mirrored or not), so S * V
rows, those of a sample one behind the other:

    the latents' moments, "mean" and "logvar", or pixels, "image"             [S * V, ...]
    a tensor of the conditioner's spec, "embed", "token_ids", ...             [S * V, ...]
    "text" with "text.ends", "key" with "key.ends": packed strings            uint8 [bytes], int64 [S * V] and [S]

A *ragged* column, whose rows differ in length, is "NAME" [sum of the lengths, ...], one row after the other, with
"NAME.ends" int64 [S * V], where each ends in it. `meta.json` says what the cache was made with, what its columns are,
and lists the shards with size and checksum.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ldm_lab.data.samples import DAMAGED, UNREACHABLE, SkippedSample
from ldm_lab.data.strings import Strings
from ldm_lab.errors import UserError
from ldm_lab.io.atomic import atomic_write, sha256
from ldm_lab.io.json_files import Fields, parse_json, write_json

FORMAT = "ldm_lab cache 2"
META = "meta.json"
ENDING = ".safetensors"
NAME = re.compile(rf"\w[\w.-]*{re.escape(ENDING)}", re.ASCII)
ENDS = ".ends"  # beside the name of a column of packed strings, or a ragged one
STRINGS = ("key", "text")
DTYPES = {
    "bool": torch.bool, "uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32, "int64": torch.int64,
    "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64,
}  # fmt: skip
LARGEST_META = 1 << 28  # bytes
LARGEST_RAGGED = 1 << 26  # bytes of the longest row: 4,096 states of 8,192 numbers in half precision
AGAIN = "delete the cache and make it anew"


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype as a cache writes it. Raises UserError for one that no cache has."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"a cache holds no numbers of the type {name}; {', '.join(DTYPES)} are known")
    return name


@dataclass(frozen=True)
class Column:
    """What a column holds.

    Attributes:
        dtype: of its numbers: a key of `DTYPES`.
        shape: of a row; of a ragged column that of the longest one.
        ragged: whether rows are as long as they need along the first axis of `shape`; the rest of it is zeros.
    """

    dtype: str
    shape: tuple[int, ...]
    ragged: bool = False

    @classmethod
    def of(cls, fields: Fields) -> "Column | None":
        """Return the column that a JSON object describes; None if it describes none."""
        dtype, shape, ragged = fields.text("dtype"), fields.counts("shape"), fields.flag("ragged")
        if dtype not in DTYPES or dtype is None or shape is None or ragged is None or (ragged and not shape):
            return None
        return cls(dtype, shape, ragged)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, of the longest one where they differ."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {'up to ' if self.ragged else ''}{list(self.shape)}"


Columns = Mapping[str, Column]


def read_columns(described: dict[str, Fields] | None) -> dict[str, Column] | None:
    """Return the columns that JSON objects describe; None if some are not readable."""
    found = {name: Column.of(fields) for name, fields in (described or {}).items()}
    columns = {name: column for name, column in found.items() if column is not None}
    reserved = any(name in STRINGS or name.endswith(ENDS) for name in found)  # what stands beside the columns
    return columns if described is not None and len(columns) == len(found) and not reserved else None


@dataclass
class Rows:
    """Encoded rows on their way into a shard: R rows of S samples.

    Attributes:
        tensors: column -> [R, ...]; of a ragged column [sum of the lengths, ...].
        lengths: ragged column -> int64 [R].
        keys: of the samples, S.
        texts: of the rows, R.
    """

    tensors: dict[str, Tensor]
    lengths: dict[str, Tensor] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    @classmethod
    def joined(cls, parts: Sequence["Rows"]) -> "Rows":
        """Return all rows, one part behind the other; at least one part is needed."""
        return cls(
            {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors},  # [R, ...] each
            {name: torch.cat([part.lengths[name] for part in parts]) for name in parts[0].lengths},  # [R] each
            [key for part in parts for key in part.keys],
            [text for part in parts for text in part.texts],
        )


# ------------------------------------------------------------------------------------------------------------- shards


@dataclass(frozen=True)
class ShardFacts:
    """What is known of a shard without opening it.

    Attributes:
        name: of its file.
        samples: in it.
        bytes: its size.
        sha256: of the file.
    """

    name: str
    samples: int
    bytes: int
    sha256: str

    @classmethod
    def of(cls, fields: Fields) -> "ShardFacts | None":
        """Return the facts in a JSON object; None if it has none, or the name leads out of the folder."""
        name, checksum = fields.text("name") or "", fields.text("sha256") or ""
        samples, size = fields.count("samples"), fields.count("bytes")
        if not re.fullmatch(rf"\w[\w.-]*{re.escape(ENDING)}", name, re.ASCII) or not re.fullmatch(
            "[0-9a-f]{64}", checksum
        ):
            return None
        return None if samples is None or size is None else cls(name, samples, size, checksum)


def size_of(path: Path) -> int | None:
    """Return the size of a file, bytes; None if it is not there."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def write_shard(path: Path, rows: Rows, columns: Columns) -> ShardFacts:
    """Write a shard, whole or not at all; the same rows give the same bytes. Raises UserError if it cannot."""
    tensors = {name: values.contiguous() for name, values in rows.tensors.items()}  # [R, ...] each
    for name, lengths in rows.lengths.items():
        tensors[name + ENDS] = lengths.cumsum(0)  # [R]
    for name, strings in zip(STRINGS, (rows.keys, rows.texts)):
        packed = Strings.pack(strings)
        tensors[name] = torch.from_numpy(packed.blob.copy())  # [bytes]
        tensors[name + ENDS] = torch.from_numpy(packed.ends)  # [S] or [R]
    with atomic_write(path) as file:
        file.write(save(tensors, {"format": FORMAT}))
    return ShardFacts(path.name, len(rows.keys), path.stat().st_size, sha256(path))


class CacheShard:
    """A shard's columns; they are mapped, so only the rows that are asked for come from the disk.

    Attributes:
        samples: in it.

    Raises:
        SkippedSample: it is not there, or not what the cache's `meta.json` says.
    """

    def __init__(self, path: Path, columns: Columns, variants: int, name: str = "") -> None:
        """Open a shard.

        Args:
            path: of the file.
            columns, variants: of the cache.
            name: of the shard for messages, if not its path.
        """
        self.columns, self.name = columns, name or str(path)
        try:
            with safe_open(path, "pt") as file:
                format_ = (file.metadata() or {}).get("format")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # [R, ...] each
        except OSError:
            raise SkippedSample(UNREACHABLE, self.name) from None
        except SafetensorError:
            raise SkippedSample(DAMAGED, self.name) from None
        ragged = [name for name, column in columns.items() if column.ragged]
        ends = [name + ENDS for name in (*STRINGS, *ragged)]
        if format_ != FORMAT or tensors.keys() != {*columns, *STRINGS, *ends}:
            raise SkippedSample(DAMAGED, self.name)
        kinds = {**dict.fromkeys(ends, torch.int64), **dict.fromkeys(STRINGS, torch.uint8)}
        if any(tensors[name].dtype != kind or tensors[name].ndim != 1 for name, kind in kinds.items()):
            raise SkippedSample(DAMAGED, self.name)
        self.ends = {name.removesuffix(ENDS): tensors.pop(name).numpy() for name in ends}  # [R] each
        self.samples = len(self.ends["key"])
        self.key, self.text = (Strings(tensors.pop(its).numpy(), self.ends[its]) for its in STRINGS)
        self.tensors = tensors  # [R, ...] each
        if not self._fits(self.samples * variants):
            raise SkippedSample(DAMAGED, self.name)

    def _fits(self, rows: int) -> bool:
        """Return whether all columns are of the cache's shapes and types, and all ends in their places."""
        for name, column in self.columns.items():
            values = self.tensors[name]  # [R, ...]
            shape = column.shape[1:] if column.ragged else column.shape
            if not values.ndim or values.dtype != DTYPES[column.dtype] or tuple(values.shape[1:]) != shape:
                return False
            if (len(self.ends[name]) if column.ragged else len(values)) != rows:
                return False
        sizes = {name: len(values) for name, values in self.tensors.items()}
        sizes |= {"key": len(self.key.blob), "text": len(self.text.blob)}
        for name, ends in self.ends.items():
            lengths = np.diff(ends, prepend=0)  # [R]
            longest = self.columns[name].shape[0] if name in self.columns else Fields.MOST
            if (lengths < 0).any() or (lengths > longest).any() or (ends[-1] if len(ends) else 0) != sizes[name]:
                return False
        return len(self.ends["text"]) == rows

    def rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Return rows of a column, [len(rows), *shape]; what a ragged one leaves out is zeros."""
        values, column = self.tensors[name], self.columns[name]
        if not column.ragged:
            return values.index_select(0, torch.tensor(rows))  # [len(rows), ...]
        filled = values.new_zeros(len(rows), *column.shape)  # [len(rows), L, ...]
        ends = self.ends[name]
        for place, row in enumerate(rows):
            start = int(ends[row - 1]) if row else 0
            filled[place, : int(ends[row]) - start] = values[start : int(ends[row])]  # [length, ...]
        return filled

    def ragged_row(self, name: str, row: int) -> Tensor:
        """Return a row of a ragged column, [length, ...]."""
        ends = self.ends[name]
        return self.tensors[name][int(ends[row - 1]) if row else 0 : int(ends[row])]  # [length, ...]


# ---------------------------------------------------------------------------------------------------------- meta.json


@dataclass(frozen=True)
class CacheMeta:
    """What `meta.json` says.

    Attributes:
        description: what the cache is made with: name -> value as JSON.
        complete: whether all samples are there; the rest is known then alone.
        variants: V, of each sample.
        columns: what they hold.
        shards: in the order in which samples are counted.
    """

    description: dict[str, str]
    complete: bool = False
    variants: int = 1
    columns: dict[str, Column] = field(default_factory=dict)
    shards: tuple[ShardFacts, ...] = ()

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return sum(shard.samples for shard in self.shards)

    def write(self, folder: Path) -> None:
        """Write it."""
        write_json(
            folder / META,
            {
                "format": FORMAT,
                "complete": self.complete,
                "samples": self.samples,
                "variants": self.variants,
                "description": {name: json.loads(its) for name, its in self.description.items()},
                "columns": {name: asdict(column) for name, column in self.columns.items()},
                "shards": [asdict(shard) for shard in self.shards],
            },
        )

    @classmethod
    def of(cls, data: bytes, where: str) -> "CacheMeta":
        """Return what the bytes of a `meta.json` say. Raises UserError, "where: ...", if they say nothing."""
        try:
            json.loads(data)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not readable: {error}") from None
        fields = Fields(parse_json(data))
        if (format_ := fields.text("format")) != FORMAT:
            older = f", but {format_!r}: {AGAIN}" if (format_ or "").startswith("ldm_lab cache") else ""
            raise UserError(f"{where}: not of the format {FORMAT!r}{older}")
        description, complete, variants = (
            fields.written("description"),
            fields.flag("complete"),
            fields.count("variants"),
        )
        columns, listed = read_columns(fields.named("columns")), fields.listed("shards")
        shards = tuple(shard for its in listed or [] if (shard := ShardFacts.of(its)) is not None)
        right = {
            "description": description is not None,
            "complete": complete is not None,
            "variants": bool(variants),
            "columns": columns is not None and fit_into(columns, shards),
            "shards": listed is not None and len(listed) == len(shards) == len({shard.name for shard in shards}),
            "samples": fields.count("samples") == sum(shard.samples for shard in shards),
        }
        for key, is_right in right.items():
            if not is_right:
                raise UserError(f"{where}: {key} is missing or damaged; {AGAIN}")
        return cls(description or {}, complete is True, variants or 1, columns or {}, shards)


def fit_into(columns: Columns, shards: Sequence[ShardFacts]) -> bool:
    """Return whether a row of each column fits into some shard: what is not there must not take memory in batches.

    Of ragged columns short rows alone may be there; theirs are bounded.
    """
    largest = max((shard.bytes for shard in shards if shard.samples), default=LARGEST_RAGGED)
    sizes = {
        its: math.prod(max(length, 1) for length in its.shape) * DTYPES[its.dtype].itemsize for its in columns.values()
    }
    return all(size <= (max(largest, LARGEST_RAGGED) if its.ragged else largest) for its, size in sizes.items())


def read_meta(folder: Path) -> CacheMeta:
    """Return what a cache says of itself. Raises UserError if it is none."""
    try:
        return CacheMeta.of((folder / META).read_bytes(), str(folder / META))
    except FileNotFoundError:
        raise UserError(f"{folder}: no cache here ({META} is missing)") from None
    except OSError as error:
        raise UserError(f"{folder / META}: not readable: {error.strerror or error}") from None
