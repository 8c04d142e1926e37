"""Many strings in one block of memory."""

import os

import numpy as np


class Strings:
    """A list of strings as one array of bytes and one of ends.

    Millions of str objects would cost a hundred bytes each, and again in every loader process, which copies each one
    as soon as it touches its reference count. An array is shared.

    Args:
        blob: uint8, all strings in UTF-8 one after the other.
        ends: int64 [count], where each one ends in it.
    """

    def __init__(self, blob: np.ndarray, ends: np.ndarray):
        self.blob, self.ends = blob, ends

    @classmethod
    def pack(cls, strings: list[str]) -> "Strings":
        """Return these strings; file names that are no UTF-8 keep their bytes."""
        encoded = [os.fsencode(s) for s in strings]
        blob = np.frombuffer(b"".join(encoded), dtype=np.uint8)  # [bytes]
        return cls(blob, np.cumsum([len(e) for e in encoded], dtype=np.int64))  # [count]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.blob[start : self.ends[index]].tobytes())
