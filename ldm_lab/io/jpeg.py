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
from collections.abc import Callable
from functools import cache
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
SOS, APP0, DQT, DHT, DRI, COMMENT = 0xDA, 0xE0, 0xDB, 0xC4, 0xDD, 0xFE  # markers of segments
FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
PASSED_OVER = (DHT, DRI, COMMENT)
UNCHANGED = 0  # torchvision's ImageReadMode: the components that there are


def plain_jpeg(data: bytes, min_size: int = 1, max_pixels: int | None = None) -> Tensor | None:
    """Return the pixels of a plain JPEG, uint8 [3, H, W]; None for another file, or one beyond the limits.

    Args:
        data: of the file.
        min_size: least length of the short side, pixels.
        max_pixels: most pixels.
    """
    if not data.startswith(JPEG):
        return None
    if size := simple_size(data):
        try:
            check_pixels(size, min_size, max_pixels)
            return _decoded(data, None)
        except Exception:  # the other road says what is wrong
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


def simple_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height of a JPEG whose header holds nothing but what its pixels need, a tenth of a millisecond
    sooner than Pillow does; None of any other, which may be plain all the same.

    Such a header (ITU-T T.81, annex B) has JFIF's segment, comments, tables, and one frame of 8 bits and one or three
    components, each segment right behind the one before: no Exif, no profile, no color transform of Adobe's.
    """
    place, size = 2, None
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4])
        first, end = place + 4, place + 2 + length
        if length < 3 or end > len(data):
            return None
        if marker == SOS:
            return size
        if marker in FRAMES:
            if size is not None or length not in (11, 17) or data[first] != 8 or 8 + 3 * data[first + 5] != length:
                return None
            size = int.from_bytes(data[first + 3 : first + 5]), int.from_bytes(data[first + 1 : first + 3])
            if not min(size):
                return None
        elif marker == APP0:
            if length < 16 or data[first : first + 5] != b"JFIF\0":
                return None
        elif marker == DQT:  # each table begins with its number, and 0 for 8 bits
            if (length - 2) % 65 or any(data[table] > 3 for table in range(first, end, 65)):
                return None
        elif marker not in PASSED_OVER:
            return None
        place = end
    return None


@cache
def _decoder() -> Callable[[Tensor], Tensor] | None:
    """Return torchvision's decoder, the operator below its function, which warns each time; None without it."""
    try:
        from torchvision.io import decode_jpeg  # noqa: F401 -- brings the operator
    except ImportError:
        return None
    return lambda encoded: torch.ops.image.decode_jpeg.default(encoded, UNCHANGED)


def _decoded(data: bytes, image: Image.Image | None) -> Tensor:
    """Return the pixels of a file, uint8 [3, H, W].

    Args:
        data: of it.
        image: as Pillow has opened it, if it has.
    """
    decode = _decoder()
    if decode is None:
        image = image or Image.open(io.BytesIO(data))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)  # [3, H, W]
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # [bytes]
    with WithoutComplaints():
        pixels = decode(encoded)  # [1 or 3, H, W]
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
