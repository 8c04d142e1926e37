"""TensorFlow's variables (a "tensor bundle"): an index and files of values, read without TensorFlow.

The index is a sorted table of LevelDB's (its doc/table_format.md): blocks of entries whose keys share their beginnings,
found by a footer. An entry says where in a file of values a tensor lies (tensor_bundle.proto). All lengths are held
against the bytes that are there, all checksums (CRC-32C, masked) are compared.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_lab.checkpoints.wire import Malformed, message, varint

FOOTER = 48  # bytes: two places, padding, a magic number
MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
TEXT = 7  # TensorFlow's number of its type for texts
DTYPES = {
    **{1: torch.float32, 2: torch.float64, 3: torch.int32, 4: torch.uint8, 5: torch.int16, 6: torch.int8},
    **{9: torch.int64, 10: torch.bool, 14: torch.bfloat16, 19: torch.float16},
}  # TensorFlow's numbers of types
VALUES_ENDING = "/.ATTRIBUTES/VARIABLE_VALUE"  # of a variable's name
POLYNOMIAL = 0x82F63B78  # CRC-32C, bits reversed


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies, and what it is.

    Attributes:
        dtype: TensorFlow's number.
        shape: of the tensor.
        shard: which file of values.
        offset, size: bytes in it.
        checksum: of the tensor's bytes, masked; of texts see `Bundle.texts`.
    """

    dtype: int = 0
    shape: tuple[int, ...] = ()
    shard: int = 0
    offset: int = 0
    size: int = 0
    checksum: int = 0

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def values_name(shard: int, count: int) -> str:
    """Return the name of one of so many files of values, from the model's folder."""
    return f"variables/variables.data-{shard:05d}-of-{count:05d}"


def kind_of(entry: Entry) -> str:
    """Return the name of a tensor's type, as torch writes it."""
    return str(DTYPES.get(entry.dtype, f"type {entry.dtype}")).removeprefix("torch.")


class Bundle:
    """The tensors of a bundle, read when they are asked for. All methods raise Malformed for damaged bytes.

    Attributes:
        entries: by name.
    """

    def __init__(self, index: bytes, data: Sequence[bytes]) -> None:
        """Take the index, and the files of values."""
        self.data = data
        raw = dict(_table(index))
        header = dict(message(raw.pop(b"", b"")))
        if header.get(1, 0) != len(data) or header.get(2, 0) != 0:
            raise Malformed(f"not {len(data)} files of values, or another byte order")
        self.entries = {name.decode("utf-8", "replace"): _entry(value) for name, value in raw.items()}

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of numbers. Raises KeyError if there is none of the name."""
        entry, data = self.entries[name], self._bytes(name)
        dtype = DTYPES.get(entry.dtype)
        if dtype is None or len(data) != entry.count * dtype.itemsize:
            raise Malformed(f"{name} has {len(data)} bytes, which its type {entry.dtype} and shape do not fit")
        if masked(crc32c(data)) != entry.checksum:
            raise Malformed(f"{name} has another checksum than the index says")
        if not data:
            return torch.empty(entry.shape, dtype=dtype)  # as the file says
        return torch.frombuffer(bytearray(data), dtype=dtype).reshape(entry.shape)  # as the file says

    def texts(self, name: str) -> list[bytes]:
        """Return a tensor of texts, flat: their lengths, a checksum of these, then all of them in a row."""
        entry, data = self.entries[name], self._bytes(name)
        if entry.dtype != TEXT or entry.count > len(data):
            raise Malformed(f"{name} are no texts")
        lengths, place = [], 0
        for _ in range(entry.count):
            length, place = varint(data, place)
            lengths.append(length)
        sizes = b"".join(n.to_bytes(4 if n < 1 << 32 else 8, "little") for n in lengths)
        checksum = crc32c(sizes)
        rest = data[place + 4 :]
        if data[place : place + 4] != masked(checksum).to_bytes(4, "little") or sum(lengths) != len(rest):
            raise Malformed(f"{name} has other lengths than its checksum says")
        if masked(crc32c(data[place : place + 4] + rest, checksum)) != entry.checksum:
            raise Malformed(f"{name} has another checksum than the index says")
        ends = list(itertools.accumulate(lengths))
        return [rest[end - length : end] for end, length in zip(ends, lengths)]

    def _bytes(self, name: str) -> bytes:
        entry = self.entries[name]
        if entry.shard >= len(self.data) or entry.offset + entry.size > len(self.data[entry.shard]):
            raise Malformed(f"{name} lies beyond the end of its file")
        return self.data[entry.shard][entry.offset : entry.offset + entry.size]


def _entry(value: bytes) -> Entry:
    """Return the entry of a BundleEntryProto. Raises Malformed for a tensor that is stored in slices."""
    fields = list(message(value))
    if any(number == 7 for number, _ in fields):
        raise Malformed("a tensor in slices")
    numbers = {number: value for number, value in fields if isinstance(value, int)}
    shape = next((value for number, value in fields if number == 2 and isinstance(value, bytes)), b"")
    sizes = [
        dict(message(size)).get(1, 0) for number, size in message(shape) if number == 2 and isinstance(size, bytes)
    ]
    return Entry(
        numbers.get(1, 0),
        tuple(int(size) for size in sizes),
        numbers.get(3, 0),
        numbers.get(4, 0),
        numbers.get(5, 0),
        numbers.get(6, 0),
    )


# ------------------------------------------------------------------------------------------------- LevelDB's table


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a table: those of the blocks that its last block, the index, names."""
    if len(data) < FOOTER or data[-8:] != MAGIC:
        raise Malformed("it does not end as an index does")
    place = len(data) - FOOTER
    for _ in range(2):  # the place of a block that describes the others comes first
        _, place = varint(data, place)
    offset, place = varint(data, place)
    size, _ = varint(data, place)
    # The footer is read twice over: its first two numbers are the other block's offset and size.
    for _, handle in _block(data, offset, size):
        inner_offset, after = varint(handle, 0)
        inner_size, _ = varint(handle, after)
        yield from _block(data, inner_offset, inner_size)


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield the entries of a block: a key is as many bytes of the one before it as it says, and the rest."""
    if offset + size + 5 > len(data) or size < 4:
        raise Malformed("a block beyond the end")
    block, kind = data[offset : offset + size], data[offset + size]
    if masked(crc32c(data[offset : offset + size + 1])) != int.from_bytes(data[offset + size + 1 :][:4], "little"):
        raise Malformed("a block has another checksum than it should have")
    if kind != 0:
        raise Malformed("a compressed index")
    restarts = int.from_bytes(block[-4:], "little")
    end, place, key = size - 4 * (restarts + 1), 0, b""
    while place < end:
        shared, place = varint(block, place)
        unshared, place = varint(block, place)
        length, place = varint(block, place)
        if shared > len(key) or place + unshared + length > end:
            raise Malformed("an entry beyond its block")
        key = key[:shared] + block[place : place + unshared]
        place += unshared
        yield key, block[place : place + length]
        place += length


# ------------------------------------------------------------------------------------------------------- checksums


@functools.cache
def _crc_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return tuple(table)


def crc32c(data: bytes, before: int = 0) -> int:
    """Return the CRC-32C of bytes, which may go on from that of those before them."""
    table, crc = _crc_table(), before ^ 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    """Return a checksum as LevelDB and TensorFlow store it."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
