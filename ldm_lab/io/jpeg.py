"""Plain JPEG files by torchvision's decoder: Pillow's very pixels, as a tensor, for what torch resizes.

Plain is a file of which nothing has to be known but its pixels: 8 bits, grey or color, upright, in sRGB. For all
others, and for what the decoder refuses, there is `decoding.decode_image`, which also says what is
wrong with them. torchvision's decoder is on its way out; torchcodec's, which takes its place, is as fast and gives the
same pixels.
"""

import io
import os
import sys
import tempfile
import threading
import warnings
from types import TracebackType
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm_lab.io.color import is_srgb
from ldm_lab.io.decoding import check_pixels
from ldm_lab.io.metadata import JPEG, orientation_of
from ldm_lab.io.profiles import stated_profile

FORMATS = ("JPEG", "MPO")  # several JPEGs in one file; the first is the picture
MODES = ("L", "RGB")
# How libjpeg's warnings of damaged data begin (jerror.h).
LIBJPEG = (
    *(b"Corrupt JPEG data", b"Premature end of JPEG", b"Inconsistent progression", b"Invalid SOS parameters"),
    *(b"Warning: unknown JFIF", b"Unknown Adobe color transform", b"Application transferred", b"Bogus marker length"),
)
STANDARD_ERROR = threading.Lock()


def plain_jpeg(data: bytes, min_size: int = 1, max_pixels: int | None = None) -> Tensor | None:
    """Return the pixels of a plain JPEG, uint8 [3, H, W]; None for another file, or one beyond the limits.

    Args:
        data: of the file.
        min_size: least length of the short side, pixels.
        max_pixels: most pixels.
    """
    if not data.startswith(JPEG):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # Pillow's, of odd metadata; torchvision's, that its decoder is on its way out
            image = Image.open(io.BytesIO(data))  # reads the header alone
            check_pixels(image.size, min_size, max_pixels)
            return _decoded(data, image) if _is_plain(image) else None
    except Exception:  # on malformed bytes Pillow raises nearly anything; torchvision a RuntimeError
        return None


def _decoded(data: bytes, image: Image.Image) -> Tensor:
    """Return the pixels of a file that Pillow has opened, uint8 [3, H, W]."""
    try:
        from torchvision.io import decode_jpeg
    except ImportError:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)  # [3, H, W]
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # [bytes]
    with WithoutComplaints():
        pixels = decode_jpeg(encoded)  # [1 or 3, H, W]
    return pixels.expand(3, -1, -1)  # [3, H, W]


class WithoutComplaints:
    """Keeps libjpeg's complaints from the standard error: Pillow makes none of the same files, whose pixels it gives.

    libjpeg writes them there itself, by the file descriptor, and nobody could tell which file they are about. What
    others write at the same time is handed on.
    """

    def __enter__(self) -> Self:
        STANDARD_ERROR.acquire()
        try:
            self.before = os.dup(2)
        except OSError:  # it is closed
            self.before = -1
            return self
        self.held = os.memfd_create("stderr") if sys.platform == "linux" else _temporary_file()
        os.dup2(self.held, 2)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.before < 0:
                return
            os.dup2(self.before, 2)
            size = os.fstat(self.held).st_size
            if size:
                os.lseek(self.held, 0, os.SEEK_SET)
                lines = os.read(self.held, size).splitlines(keepends=True)
                os.write(2, b"".join(line for line in lines if not line.startswith(LIBJPEG)))
            os.close(self.before)
            os.close(self.held)
        finally:
            STANDARD_ERROR.release()


def _temporary_file() -> int:
    """Return the descriptor of a file that is gone when it is closed."""
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _is_plain(image: Image.Image) -> bool:
    """Return whether nothing has to be done to the pixels of an opened file."""
    if image.format not in FORMATS or image.mode not in MODES or orientation_of(image) != 1:
        return False
    profile = image.info.get("icc_profile") or stated_profile(image)
    return not profile or is_srgb(profile, image.mode)
