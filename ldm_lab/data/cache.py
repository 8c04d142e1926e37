"""Latents and embeddings computed beforehand: what they are kept in, how they are written and read.

A cache is a folder of safetensors shards with `meta.json`. A shard holds, for its N samples,

    "mean", "logvar"         [N, C, h, w]   the posterior of the autoencoder, unscaled: every epoch draws a fresh latent
    "embed"                  [N, D]         the conditioner's embedding
    "text", "text_ends"      uint8, int64 [N]   the captions, packed (`strings.Strings`); likewise "key", "key_ends"

and in its metadata the loader's state after its last sample, so that writing goes on after an interruption. `meta.json`
says what the cache was made with (sha256 of the weights, image size, data), and whether it is complete.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ldm_lab.batch import Batch
from ldm_lab.config import register
from ldm_lab.data.order import Order
from ldm_lab.data.rank_state import RankState
from ldm_lab.data.samples import UNREACHABLE, Sample, SkippedSample
from ldm_lab.data.source import Source
from ldm_lab.data.strings import Strings
from ldm_lab.errors import UserError
from ldm_lab.io.atomic import atomic_write
from ldm_lab.io.json_files import Json, write_json

FORMAT = "ldm_lab cache 1"
META = "meta.json"
PARTIAL = ".part"  # suffix of a file that is being written
STRINGS = ("text", "key")
ENCODERS = ("autoencoder", "conditioner")  # the roles whose checksums a description has


@register("data", "cache")
class Cache(Source):
    """Latents and embeddings that `python -m ldm_lab cache` wrote.

    Batches have `mean` and `logvar`, float32 [B, C, h, w], and whatever else the cache holds as `conditions`, float32.
    The order is a permutation of all its samples.

    Args:
        path: the cache's folder.

    Attributes:
        description: what the cache was made with, such as the checksums of the encoding parts; set by `open`.
        image_size: pixels, of the images that were encoded, if the description says it; set by `open`.
    """

    def __init__(self, *, path: str, **common: Any):
        super().__init__(**common)
        self.folder = Path(path).expanduser()
        self._opened: dict[int, CacheShard] = {}

    def open(self) -> None:
        meta = read_meta(self.folder)
        if not meta.complete:
            raise UserError(f"data.path: the cache {self.folder} is not complete; the command that began it can end it")
        self.description = meta.description
        size = self.description.get("image_size")
        self.image_size = size if isinstance(size, int) else None
        checksums = {role: self.description.get(role) for role in ENCODERS}
        self.encoded_by = {role: checksum for role, checksum in checksums.items() if isinstance(checksum, str)}
        self._paths = sorted(self.folder.glob("*.safetensors"))
        counts = [read_header(path)[0] for path in self._paths]
        self._ends = np.cumsum(counts, dtype=np.int64)  # [shards]
        self.count = int(sum(counts))
        if self.count != meta.samples:
            missing = f"{self.count} samples are there, {meta.samples} were written"
            raise UserError(f"data.path: files of the cache {self.folder} are missing: {missing}")

    def decode(self, item: int, order: Order) -> Sample:
        """Return the sample, its tensors in the cache's own precision."""
        shard = int(np.searchsorted(self._ends, item, side="right"))
        row = item - (int(self._ends[shard - 1]) if shard else 0)
        if shard not in self._opened:
            self._opened[shard] = CacheShard(self._paths[shard])
        return self._opened[shard].sample(row)

    def to_device_format(self, batch: Batch) -> Batch:
        mean, logvar = (None if value is None else value.float() for value in (batch.mean, batch.logvar))
        conditions = {
            name: value.float() if value.is_floating_point() else value for name, value in batch.conditions.items()
        }
        return replace(batch, mean=mean, logvar=logvar, conditions=conditions)


class CacheShard:
    """A shard's columns; they are mapped, so only the rows that are asked for come from the disk.

    Raises:
        SkippedSample: it is not readable.
    """

    def __init__(self, path: Path):
        try:
            with safe_open(path, "pt") as file:
                columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # [N, ...] each
        except (SafetensorError, OSError):
            raise SkippedSample(UNREACHABLE, str(path)) from None
        self.text, self.key = (
            Strings(columns.pop(name).numpy(), columns.pop(f"{name}_ends").numpy()) for name in STRINGS
        )
        self.mean, self.logvar = columns.pop("mean", None), columns.pop("logvar", None)  # [N, C, h, w] each
        self.conditions = columns  # [N, ...] each

    def sample(self, row: int) -> Sample:
        """Return the sample of a row."""
        return Sample(
            self.key[row],
            self.text[row],
            mean=None if self.mean is None else self.mean[row],  # [C, h, w]
            logvar=None if self.logvar is None else self.logvar[row],  # [C, h, w]
            conditions={name: values[row] for name, values in self.conditions.items()},  # [...] each
        )


class CacheWriter:
    """Writes a cache, shard by shard; begun anew after an interruption, it goes on behind the last whole shard.

    One process, one pass (`DataModule(..., epochs=1)`):

        writer = CacheWriter(folder, description)
        if writer.state:
            data.load_rank_states([writer.state], 0)
        for batch in data.train_dataloader():
            data.consumed(batch)
            writer.add({"mean": ..., "logvar": ..., "embed": ...}, batch.text, batch.key, data.rank_state())
        writer.close()
        complete(folder)

    Args:
        folder: made if it is not there.
        description: what the cache is made with, plain JSON values; nothing of another description is ever mixed in.
            With several processes or loader processes it should tell their numbers, on which the order depends.
        rank: of several processes each writes its own shards; `complete` is for one of them, after all have closed.
        shard_size: a shard is written at the end of the batch that brings it to this many samples.

    Attributes:
        state: the loader state that came with the last sample on disk; None at the beginning.
        written: samples on disk, of this rank.

    Raises:
        UserError: the folder holds a cache of another description, a complete one, or something else.
    """

    def __init__(self, folder: str | Path, description: dict[str, Json], *, rank: int = 0, shard_size: int = 4096):
        self.folder, self.rank, self.shard_size = Path(folder).expanduser(), rank, shard_size
        description = json.loads(json.dumps(description))  # as it will be read back: tuples are lists
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / META).is_file():
            meta = read_meta(self.folder)
            there = meta.description
            differences = sorted(k for k in {**there, **description} if there.get(k) != description.get(k))
            if differences:
                raise UserError(
                    f"{self.folder}: a cache made with another {', '.join(differences)}; take another folder"
                )
            if meta.complete:
                raise UserError(f"{self.folder}: this cache is complete already ({meta.samples:,} samples)")
        elif any(path.suffix != PARTIAL for path in self.folder.iterdir()):
            raise UserError(f"{self.folder}: neither empty nor a cache; take another folder")
        else:
            _write_meta(self.folder, CacheMeta(description))
        self.state: RankState | None = None
        self.written = self._shards = self._held = 0
        self._tensors: list[dict[str, Tensor]] = []
        self._strings: dict[str, list[str]] = {"text": [], "key": []}
        for path in sorted(self.folder.glob(f"{rank:03d}-*.safetensors")):
            count, metadata = read_header(path)
            self.written, self._shards, self.state = (
                self.written + count,
                self._shards + 1,
                json.loads(metadata["state"]),
            )

    def add(self, tensors: dict[str, Tensor], texts: list[str], keys: list[str], state: RankState) -> None:
        """Add a batch.

        Args:
            tensors: [B, ...] each, kept in the precision they come in (float16 halves the cache).
            texts, keys: B each.
            state: `DataModule.rank_state()` after this batch.
        """
        self._tensors.append({name: values.detach().cpu() for name, values in tensors.items()})
        self._strings["text"] += texts
        self._strings["key"] += keys
        self._held += len(keys)
        self._next_state = state
        if self._held >= self.shard_size:
            self._flush()

    def close(self) -> int:
        """Write what is held back. Returns the number of samples on disk, of this rank."""
        if self._held:
            self._flush()
        return self.written

    def _flush(self) -> None:
        tensors = {
            name: torch.cat([batch[name] for batch in self._tensors]).contiguous()  # [N, ...]
            for name in self._tensors[0]
        }
        for name, strings in self._strings.items():
            packed = Strings.pack(strings)
            tensors[name] = torch.from_numpy(packed.blob.copy())  # [bytes]
            tensors[f"{name}_ends"] = torch.from_numpy(packed.ends)  # [N]
        metadata = {"format": FORMAT, "state": json.dumps(self._next_state)}
        with atomic_write(self.folder / f"{self.rank:03d}-{self._shards:05d}.safetensors") as file:
            file.write(save(tensors, metadata))
        self.written += self._held
        self._shards += 1
        self.state = self._next_state
        self._tensors, self._strings, self._held = [], {"text": [], "key": []}, 0


def complete(folder: str | Path) -> int:
    """Mark a cache as complete, once every process has closed its writer. Returns the number of samples."""
    folder = Path(folder).expanduser()
    samples = sum(read_header(path)[0] for path in folder.glob("*.safetensors"))
    _write_meta(folder, CacheMeta(read_meta(folder).description, complete=True, samples=samples))
    return samples


@dataclass(frozen=True)
class CacheMeta:
    """What `meta.json` says.

    Attributes:
        description: what the cache is made with.
        complete: whether all samples are there.
        samples: how many there are, if it is complete.
    """

    description: dict[str, Json]
    complete: bool = False
    samples: int = 0


def read_meta(folder: Path) -> CacheMeta:
    """Return what a cache says of itself. Raises UserError if it is none."""
    try:
        content = json.loads((folder / META).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no cache here ({META} is missing)") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / META}: not readable: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{folder / META}: not of the format {FORMAT!r}")
    meta = {key: content.get(key) for key in ("description", "complete", "samples")}
    kinds = {"description": dict, "complete": bool, "samples": int}
    if strange := [key for key, kind in kinds.items() if not isinstance(meta[key], kind)]:
        raise UserError(f"{folder / META}: {strange[0]} is missing or damaged")
    return CacheMeta(**meta)


def read_header(path: Path) -> tuple[int, dict[str, str]]:
    """Return (number of samples, metadata) of a shard. Raises UserError for a damaged one."""
    try:
        with safe_open(path, "pt") as file:
            return file.get_slice("key_ends").get_shape()[0], file.metadata()
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: a damaged shard of a cache ({error}); delete the cache and make it anew") from None


def _write_meta(folder: Path, meta: CacheMeta) -> None:
    write_json(folder / META, {"format": FORMAT, **asdict(meta)})
