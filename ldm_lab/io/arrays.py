"""NumPy's arrays in files of their own (`.npy`), read without unpickling."""

from pathlib import Path

import numpy as np

from ldm_lab.errors import UserError, first_line

MAGIC = b"\x93NUMPY"


def is_npy(path: Path) -> bool:
    """Return whether a file begins as an array does."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def open_npy(path: str | Path) -> np.ndarray:
    """Return the array of a `.npy`, mapped: its values are read when they are used.

    Raises:
        UserError: missing, damaged, no `.npy`, or an array of objects, which would be unpickled.
    """
    try:
        array = np.load(path, allow_pickle=False, mmap_mode="r")  # a header that lies is found before memory is taken
    except Exception as error:  # whatever a broken header makes NumPy raise: it is parsed as Python's literals
        raise UserError(f"{path}: not a readable .npy file ({first_line(error)})") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: not a readable .npy file (it holds several arrays)")
    return array


def native(array: np.ndarray) -> np.ndarray:
    """Return a copy in memory, in this machine's byte order, which torch needs."""
    return np.array(array, dtype=array.dtype.newbyteorder("="))
