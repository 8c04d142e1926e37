"""Hash -> score on disk: the files that LAION released beside its collections (`laion5B-aesthetic-tags-kv`).

No header, no footer; per entry an int64 key and one half float per score, little endian and packed: 10 bytes with the
aesthetic score, 12 with pwatermark and punsafe. Entries ascend by signed key. The key is a MurmurHash3 of url and text
(`hash_of`), not of the image. The format is that of static_ondisk_kv 1.1.2.

A half float has steps of 1/256 between 4 and 8 and of 1/128 from 8 to 16: 7.001 comes back as 7.0, so a threshold on
scores from a store is not quite one on those that went in.
"""

import mmap
import operator
import os
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ldm_lab.errors import UserError
from ldm_lab.io.atomic import atomic_write, existing_file

FENCES = 2**16  # keys kept in memory at most, evenly spaced: where a batch begins to search
PROBES = 256  # entries of a large store whose order is checked when it is opened
CHECK_WHOLE = 2**20  # entries; the order of a store up to this size is checked entirely
BLOCK = 2**16  # keys of a batch that are searched together, entries that are read together
HALF_MAX = 65504.0


def hash_of(url: str | None, text: str | None) -> int:
    """Return the key of a url and its text: the first 64 bits, signed, of MurmurHash3 x64-128 with seed 0.

    Over the UTF-8 of both, with nothing between them; None counts as "". Raises UserError for text that has no UTF-8.
    """
    return int(hashes_of([url], [text])[0])


def signed(key: int) -> int:
    """Return a hash as stores have it: one without a sign is the signed one of the same bits."""
    return key - 2**64 if 2**63 <= key < 2**64 else key


def hashes_of(urls: Iterable[str | None], texts: Iterable[str | None]) -> NDArray[np.int64]:
    """Return the keys of many urls and texts, int64 [N]."""
    from mmh3 import hash64

    try:  # mmh3 takes texts, too, and crashes on those without UTF-8
        keys = [hash64(((url or "") + (text or "")).encode())[0] for url, text in zip(urls, texts)]
    except UnicodeEncodeError as error:
        raise UserError(f"{error.object[:80]!r}: holds half of a surrogate pair, so it has no UTF-8 to hash") from None
    return np.array(keys, dtype=np.int64)


def entry_type(scores: int) -> np.dtype:
    """Return the type of an entry with so many scores, packed."""
    return np.dtype([("key", "<i8"), ("scores", "<f2", (scores,))])


class ScoreStore:
    """A store, mapped into memory rather than read: it may be much larger than that.

    Looked up by key, `store[key]` and `key in store`, or by many keys at once, `store.get(keys)`. Of repeated keys the
    first entry answers. Pickles (and so goes to loader processes) by its path.

    Args:
        path: the file.
        scores: half floats per entry: 1 in aesthetic stores, 2 in the ones of pwatermark and punsafe.

    Raises:
        UserError: no such file, its size is no multiple of an entry's (it is cut off), or its keys do not ascend.
    """

    def __init__(self, path: str | Path, scores: int = 1):
        if scores < 1:
            raise UserError(f"scores: an entry has at least 1, not {scores}")
        self.path, self.scores = existing_file(path, "a score store"), scores
        self._type = entry_type(scores)
        size = os.path.getsize(self.path)
        width = self._type.itemsize
        if size % width:
            raise UserError(
                f"{self.path}: {size:,} bytes are not a whole number of entries of {width} bytes: the file is cut off, "
                f"or its entries do not hold {scores} score{'s' * (scores > 1)}"
            )
        self._buffer = b""
        if size:  # nothing cannot be mapped
            with open(self.path, "rb") as file:
                self._buffer = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
            if sys.platform != "win32":  # else the kernel reads a whole neighborhood for every entry
                self._buffer.madvise(mmap.MADV_RANDOM)
        self._entries = np.frombuffer(self._buffer, self._type)  # [N], a view
        self._keys = self._entries["key"]
        self._key_at = struct.Struct("<q").unpack_from
        self._scores_at = struct.Struct(f"<{scores}e").unpack_from
        self._fences: NDArray[np.int64] | None = None
        self._asked = 0
        count = len(self)
        probes = np.arange(count) if count <= CHECK_WHOLE else np.linspace(0, count - 1, PROBES).astype(np.int64)
        self._check_order(self._keys[probes], probes)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def entry_bytes(self) -> int:
        """Bytes of an entry."""
        return self._type.itemsize

    def __reduce__(self) -> tuple[type["ScoreStore"], tuple[Path, int]]:
        return type(self), (self.path, self.scores)

    def __getitem__(self, key: int) -> float | tuple[float, ...]:
        """Return the score of a key, or the tuple of its scores. Raises KeyError if the key is absent."""
        place = self._place(key)
        if place is None:
            raise KeyError(key)
        scores = self._scores_at(self._buffer, place + 8)
        return scores[0] if self.scores == 1 else scores

    def __contains__(self, key: int) -> bool:
        return self._place(key) is not None

    def get(self, keys: ArrayLike) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Look many keys up, in any order, with repeats.

        Args:
            keys: integers [N].

        Returns:
            (scores, found): float32 [N], or [N, V] with V > 1 scores per entry, NaN where the key is absent; and
            bool [N], because a stored score may be NaN.

        Raises:
            ValueError: keys that are not integers of 64 bits; floats cannot hold a hash exactly.
        """
        keys = _as_keys(keys)
        order = np.argsort(keys)
        wanted = keys[order]  # [N], ascending: neighbors in a batch are neighbors in the file
        self._asked += len(keys)
        scores = np.full((len(keys), self.scores), np.nan, dtype=np.float32)  # [N, V]
        found = np.zeros(len(keys), dtype=bool)  # [N]
        if len(self):
            for begin in range(0, len(keys), BLOCK):
                block, origin = wanted[begin : begin + BLOCK], order[begin : begin + BLOCK]
                places = np.minimum(self._places(block), len(self) - 1)  # [n]
                hit = self._keys[places] == block
                found[origin] = hit
                scores[origin[hit]] = self._entries["scores"][places[hit]]
        return (scores[:, 0] if self.scores == 1 else scores), found

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Yield all entries in order, as keys int64 [n] and scores float32 [n, V]; read, not mapped.

        Raises UserError where the keys do not ascend.
        """
        last = None
        with open(self.path, "rb") as file:
            for begin in range(0, len(self), size):
                entries = np.fromfile(file, self._type, min(size, len(self) - begin))
                keys = entries["key"]
                joined = keys if last is None else np.concatenate([last, keys])
                self._check_order(joined, np.arange(begin - (last is not None), begin + len(keys)))
                yield keys.copy(), entries["scores"].astype(np.float32)
                last = keys[-1:]

    def _place(self, key: int) -> int | None:
        """Return the byte where the first entry with a key begins, by binary search; None if there is none."""
        key = operator.index(key)
        buffer, key_at, width = self._buffer, self._key_at, self._type.itemsize
        low, high = 0, len(buffer) // width
        while low < high:
            middle = (low + high) >> 1
            if key_at(buffer, middle * width)[0] < key:
                low = middle + 1
            else:
                high = middle
        place = low * width
        return place if place < len(buffer) and key_at(buffer, place)[0] == key else None

    def _places(self, wanted: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return for each of some ascending keys the first entry whose key is not less, [n]; len(self) past the end."""
        count = len(self)
        if self._fences is None and self._asked * 4 >= min(count, FENCES):  # a few look-ups do not pay for them
            places = np.arange(0, count, -(-count // FENCES))
            fences = self._keys[places]
            self._check_order(fences, places)
            self._fences = fences
        if self._fences is None:
            base, length = np.zeros(len(wanted), dtype=np.int64), count  # [n]
        else:
            length = -(-count // FENCES)
            # The entry lies behind the last fence that is less, up to the next one.
            base = np.maximum((np.searchsorted(self._fences, wanted) - 1) * length, 0)  # [n]
        while length > 0:  # the entry is one of base ... base + length
            half = (length + 1) // 2
            ahead = np.minimum(base + (half - 1), count - 1)  # [n]
            base += half * (self._keys[ahead] < wanted)
            length -= half
        return np.minimum(base, count)

    def _check_order(self, keys: NDArray[np.int64], places: NDArray[np.int64]) -> None:
        """Raise UserError unless these keys, at these places of the file, ascend."""
        falls = keys[1:] < keys[:-1]
        if falls.any():
            at = int(np.argmax(falls))
            others = [n for n in range(1, 5) if n != self.scores and not os.path.getsize(self.path) % (8 + 2 * n)]
            hint = f", or one with {' or '.join(map(str, others))} scores per entry" if others else ""
            raise UserError(
                f"{self.path}: its keys do not ascend (entry {places[at]:,} has {keys[at]}, entry {places[at + 1]:,} "
                f"has {keys[at + 1]}): not a score store{hint}"
            )


def _as_keys(keys: ArrayLike) -> NDArray[np.int64]:
    """Return keys as int64 [N]. Raises ValueError where that would change them."""
    keys = np.asarray(keys)
    if keys.ndim != 1:
        raise ValueError(f"keys are a list of integers [N], these have shape {list(keys.shape)}")
    if not len(keys):
        return np.empty(0, dtype=np.int64)
    if keys.dtype.kind not in "iu" or (keys.dtype == np.uint64 and keys.max() >= 2**63):
        raise ValueError(f"keys are signed integers of 64 bits, these are {keys.dtype}")
    return keys.astype(np.int64, copy=False)


class StoreWriter:
    """Write a store, whole or not at all: `with StoreWriter(path) as writer: writer.add(keys, scores)`.

    Args:
        path: the file, replaced when all is written.
        scores: half floats per entry.
        unique: of repeated keys keep the first; else all, as the published writer does.

    Attributes:
        count: entries written.
        repeated: entries whose key had been written already, kept or not.
        nan: scores written that are NaN.
    """

    def __init__(self, path: str | Path, scores: int = 1, unique: bool = False):
        self.path, self.scores, self.unique, self._type = Path(path), scores, unique, entry_type(scores)
        self.count = self.repeated = self.nan = 0
        self._last: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __enter__(self) -> "StoreWriter":
        self._open = atomic_write(self.path)
        self._file = self._open.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._open.__exit__(kind, error, trace)

    def add(self, keys: ArrayLike, scores: ArrayLike) -> None:
        """Write entries: keys [n], ascending and not less than those before, and float scores [n] or [n, V].

        Raises:
            ValueError: the keys do not ascend.
            UserError: a score beyond what a half float holds; the disk is full.
        """
        keys, scores = _as_keys(keys), np.asarray(scores)
        if not len(keys):
            return
        scores = scores.reshape(len(keys), *self._type["scores"].shape)  # [n, V]
        before = np.concatenate([self._last, keys])
        if (before[1:] < before[:-1]).any():
            raise ValueError("the keys of a store are written in ascending order")
        with np.errstate(over="ignore"):
            halves = scores.astype("<f2")  # rounded to nearest even
        if (lost := np.isinf(halves) & np.isfinite(scores)).any():
            raise UserError(f"{self.path}: a half float holds up to {HALF_MAX:,.0f}, not the score {scores[lost][0]:g}")
        fresh = np.ones(len(keys), dtype=bool)  # [n]
        fresh[len(keys) - len(before) + 1 :] = before[1:] != before[:-1]
        self.repeated += int((~fresh).sum())
        self._last = keys[-1:].copy()
        entries = np.empty(len(keys), self._type)
        entries["key"], entries["scores"] = keys, halves
        if self.unique:
            entries = entries[fresh]
        self.count += len(entries)
        self.nan += int(np.isnan(entries["scores"]).sum())
        self._file.write(entries.tobytes())
