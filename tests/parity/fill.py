"""The weights of the recorded cases: a function of each parameter's name, shape and the case's seed alone."""

import math
import zlib

import numpy as np
import torch
from torch import Tensor

GAINS = ("weight", "gamma", "scale")


def fill(name: str, shape: list[int], seed: int) -> Tensor:
    """Return the float32 values of one parameter, drawn by PCG64 from (seed, CRC-32 of the name).

    Matrices and kernels: standard deviation 1 / sqrt(fan-in), which is the product of all sizes but the first.
    Vectors: 0.1, around 1 if they are gains by their name ("...weight", "...gamma", "...scale" or a last part "g"),
    else around 0. Single numbers: 1 + 0.1 * |normal|.
    """
    normal = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())])).standard_normal(tuple(shape))
    if not shape:
        values = 1 + 0.1 * np.abs(normal)
    elif len(shape) == 1:
        is_gain = name.endswith(GAINS) or name.rpartition(".")[2] == "g"
        values = 0.1 * normal + (1.0 if is_gain else 0.0)
    else:
        values = normal / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(np.asarray(values, dtype=np.float32))  # shape
