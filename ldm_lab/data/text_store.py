"""The states of texts, stored once: a cache whose samples are texts, each under a hash of it, and which grows.

`cache_files.py` says what the files are. `meta.json` says which text encoder made the states. A shard counts as soon as
it is there, and is called by the hashes of its texts: any number of processes may add some at any time, and none ever
replaces other texts. Images stay where they are.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ldm_lab.data.cache_files import (
    ENDING,
    META,
    CacheMeta,
    CacheShard,
    Column,
    Rows,
    ShardFacts,
    read_meta,
    write_shard,
)
from ldm_lab.data.jobs import Fingerprint
from ldm_lab.data.samples import Sample, SkippedSample
from ldm_lab.errors import UserError
from ldm_lab.io.atomic import PARTIAL

STATES = "token_states"
KIND, OF_TEXTS = "kind", '"texts"'  # in a description
ENCODER = "conditioner."  # what the description's other names begin with
SHA256 = f"{ENCODER}sha256"
LACKING = "caption that conditioner.store lacks"
SHARD = "texts-"  # what the names of shards begin with
FULL = 1 << 26  # bytes of states that wait to be written
MOST_OPENED = 1000  # shards
KEY_BYTES = 16  # of a text's hash

log = logging.getLogger(__name__)


def text_key(text: str) -> str:
    """Return what a text is stored under, 32 hexadecimal digits."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).hexdigest()


def store_columns(dtype: str, length: int, width: int) -> dict[str, Column]:
    """Return the columns of a store: rows of at most `length` states of a width."""
    return {STATES: Column(dtype, (length, width), ragged=True)}


def packed_rows(texts: Sequence[str], states: Sequence[Tensor]) -> Rows:
    """Return texts and their states, [l, D] each, as the rows of a shard."""
    lengths = torch.tensor([len(its) for its in states], dtype=torch.int64)  # [R]
    shown = [text.encode(errors="replace").decode() for text in texts]
    return Rows({STATES: torch.cat(list(states)).cpu()}, {STATES: lengths}, [text_key(its) for its in texts], shown)


class KnownTexts:
    """Which texts a store has; small enough for every loader process."""

    def __init__(self, hashes: np.ndarray) -> None:
        """Take the beginnings of their hashes, uint64 [N], in order."""
        self.hashes = hashes

    def __contains__(self, text: str) -> bool:
        wanted = np.uint64(int(text_key(text)[:16], 16))
        place = int(np.searchsorted(self.hashes, wanted))
        return place < len(self.hashes) and bool(self.hashes[place] == wanted)

    def check(self, sample: Sample) -> None:
        """Raise SkippedSample for a sample whose caption is not among them."""
        if sample.text not in self:
            raise SkippedSample(LACKING, sample.key)


class TextStore:
    """The states of texts in a folder.

    Attributes:
        folder: where they lie.
        description: what made them, name -> value as JSON.
        columns: of its shards.
        tokens: in the shards, of all texts together.
        added: texts that this process has added.
        damaged: shards that cannot be read.
        writes: whether it may write what is added.
    """

    def __init__(self, folder: Path, description: dict[str, str], columns: dict[str, Column]) -> None:
        """Open a store, or one that begins with the first text that is added.

        Raises:
            UserError: something else lies there, or states of another text encoder.
        """
        self.folder, self.description, self.columns = folder, description, columns
        self.added, self.tokens, self.writes = 0, 0, True
        self._shards: list[Path] = []  # by their numbers
        self._seen: set[Path] = set()  # shards, those that are damaged, too
        self.damaged: set[Path] = set()
        self._opened: dict[int, CacheShard] = {}
        self._hashes = np.empty(0, np.uint64)  # [N], in order
        self._places = np.empty((0, 2), np.int64)  # [N, 2]: shard and row of each
        self._waiting: dict[str, Tensor] = {}  # text -> [l, D]
        self._waiting_bytes = 0
        check_store(folder, description, columns)
        if (folder / META).is_file():
            self.description = described(folder)  # it may know the model by another name
        self.refresh()

    def __deepcopy__(self, memo: dict[int, Self]) -> Self:
        """Return the store itself: copies of a task share it."""
        return self

    def __len__(self) -> int:
        return len(self._hashes) + len(self._waiting)

    def __contains__(self, text: str) -> bool:
        return text in self._waiting or text in self.known

    @property
    def known(self) -> KnownTexts:
        """Which texts are there."""
        return KnownTexts(self._hashes)

    def refresh(self, rewritten: Path | None = None) -> None:
        """Look for shards that have been written since; damaged ones are said and left out.

        Args:
            rewritten: a shard that has been made again.
        """
        if rewritten in self.damaged:
            self._seen.discard(rewritten)
            self.damaged.discard(rewritten)
        hashes, places = [self._hashes], [self._places]
        for path in sorted(set(self.folder.glob(f"{SHARD}*{ENDING}")) - self._seen):
            self._seen.add(path)
            number = len(self._shards)
            try:
                shard = CacheShard(path, self.columns, 1)
                its = hashes_of(shard)  # [S]
            except SkippedSample as problem:
                log.warning("%s: left out: %s; embed-text makes it again", path, problem.reason)
                self.damaged.add(path)
                continue
            self._shards.append(path)
            self.tokens += int(shard.ends[STATES][-1:].sum())
            hashes.append(its)
            places.append(np.stack([np.full(len(its), number), np.arange(len(its))], 1))
        if len(hashes) > 1:
            joined = np.concatenate(hashes)  # [N]
            order = np.argsort(joined, kind="stable")  # [N]
            self._hashes, self._places = joined[order], np.concatenate(places)[order]

    def read(self, texts: Sequence[str]) -> list[Tensor | None]:
        """Return the states of texts, [l, D] each, on the CPU; None for those that are not there.

        Raises:
            UserError: a shard that was there cannot be read any more.
        """
        return [self._waiting[text] if text in self._waiting else self._find(text) for text in texts]

    def _find(self, text: str) -> Tensor | None:
        key = text_key(text)
        place = int(np.searchsorted(self._hashes, wanted := np.uint64(int(key[:16], 16))))
        while place < len(self._hashes) and self._hashes[place] == wanted:
            number, row = self._places[place].tolist()
            shard = self._open(number, self._shards[number])
            if shard.key[row] == key:
                return shard.ragged_row(STATES, row)  # [l, D]
            place += 1
        return None

    def _open(self, number: int, path: Path) -> CacheShard:
        if number not in self._opened:
            while len(self._opened) >= MOST_OPENED:
                del self._opened[next(iter(self._opened))]
            try:
                self._opened[number] = CacheShard(path, self.columns, 1)
            except SkippedSample as problem:
                raise UserError(
                    f"conditioner.store: {path}: {problem.reason}, and it was there; embed-text makes it again"
                ) from None
        return self._opened[number]

    def add(self, texts: Sequence[str], states: Sequence[Tensor]) -> None:
        """Keep the states of texts, [l, D] each; they are written when there are many, or by `flush`."""
        self._waiting |= dict(zip(texts, (its.to("cpu", copy=True) for its in states), strict=True))
        self._waiting_bytes += sum(its.nbytes for its in states)
        self.added += len(texts)
        if self._waiting_bytes >= FULL:
            self.flush()

    def flush(self) -> None:
        """Write what was added. Raises UserError if that cannot be done."""
        if self._waiting and self.writes:
            self.write(list(self._waiting), list(self._waiting.values()))
            self._waiting, self._waiting_bytes = {}, 0

    def write(self, texts: Sequence[str], states: Sequence[Tensor]) -> ShardFacts:
        """Write texts and their states as a shard, and look what others have written. Raises UserError."""
        rows = packed_rows(texts, states)
        name = hashlib.blake2b("".join(rows.keys).encode(), digest_size=KEY_BYTES).hexdigest()
        self.begin()
        path = self.folder / f"{SHARD}{name}{ENDING}"
        facts = write_shard(path, rows, self.columns)
        self.refresh(rewritten=path)
        return facts

    def begin(self) -> None:
        """Write what the states are made by, where nothing is yet; several processes write the same.

        Raises:
            UserError: it cannot be written, or another text encoder's store has begun there since this one was opened.
        """
        if not (self.folder / META).is_file():
            CacheMeta(self.description, columns=self.columns).write(self.folder)
        check_store(self.folder, self.description, self.columns)

    @property
    def fingerprint(self) -> Fingerprint:
        """What makes its results what they are."""
        return {"description": json.dumps(self.description, sort_keys=True)}


def hashes_of(shard: CacheShard) -> np.ndarray:
    """Return the beginnings of the keys of a shard, uint64 [S]. Raises SkippedSample if they are no hashes."""
    try:
        keys = np.frombuffer(bytes.fromhex(shard.key.blob.tobytes().decode("ascii")), ">u8")  # [2 * S]
        return keys.reshape(shard.samples, 2)[:, 0].astype(np.uint64)  # [S]
    except ValueError:
        raise SkippedSample("not a shard of texts", shard.name) from None


def check_store(folder: Path, description: dict[str, str], columns: dict[str, Column]) -> None:
    """Raise UserError unless a folder is empty, or has states of the text encoder that a description names.

    Checksums are compared where both are known, otherwise the model's names are.
    """
    if not (folder / META).is_file():
        if folder.exists() and (not folder.is_dir() or any(path.suffix != PARTIAL for path in folder.iterdir())):
            raise UserError(f"conditioner.store: {folder}: neither empty nor a store of text states")
        return
    there = described(folder)
    known = there.get(SHA256) not in (None, "null") and description.get(SHA256) not in (None, "null")
    passed_over = f"{ENCODER}model" if known else SHA256
    names = [name for name in sorted({**there, **description}) if name != passed_over]
    for name in names:
        if there.get(name) != description.get(name):
            raise UserError(
                f"conditioner.store: {folder}: its states were made with another {name}: {there.get(name)}, and this "
                f"is {description.get(name)}; take another folder, or embed-text anew"
            )
    if read_meta(folder).columns != columns:
        raise UserError(f"conditioner.store: {folder}: its states are of another shape; take another folder")


def described(folder: Path) -> dict[str, str]:
    """Return what a store says that its states were made by. Raises UserError if it is none."""
    description = read_meta(folder).description
    if description.get(KIND) != OF_TEXTS:
        raise UserError(f"conditioner.store: {folder}: a cache of images, no store of text states")
    return description


def store_weights(folder: Path) -> str | None:
    """Return the checksum of the weights that a store's states were made by; None if nobody knows, or there is none."""
    value = json.loads(described(folder).get(SHA256, "null")) if (folder / META).is_file() else None
    return value if isinstance(value, str) else None


def store_width(folder: Path) -> int | None:
    """Return the width of a store's states; None without a store."""
    column = read_meta(folder).columns.get(STATES) if (folder / META).is_file() else None
    return column.shape[-1] if column is not None and len(column.shape) == 2 else None
