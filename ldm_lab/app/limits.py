"""What one request may ask for: whoever reaches the page must not be able to fill memory, disk or the day."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ldm_lab.errors import UserError
from ldm_lab.io.color import BadImage
from ldm_lab.io.decoding import decode_image
from ldm_lab.sampling.options import SamplingOptions, parse_size
from ldm_lab.sampling.recorded import LONGEST_PROMPT

MEBI, MEGA = 2**20, 1_000_000
MOST_PROMPTS = 32  # of a picture
MOST_LORAS, MOST_UPSAMPLERS = 16, 4  # of a request: each is read, or loaded, for it
MOST_UPLOADS = 16  # at once
MULTIPART = 2**16  # bytes around an uploaded file
IMAGES = 4  # of the largest size that all images of a request may have together


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for.

    Attributes:
        pictures: made for one request, those that `rerank` drops included.
        side: of a picture, pixels; of the last of several stages.
        steps: of a sampler.
        work: of a request, all stages together: pictures x steps x megapixels of a picture x prompts that are mixed.
        megapixels: of an image that is uploaded, once it is decoded.
        upload: of a file, MiB.
        stored: uploads and pictures of all users, MiB; the oldest are deleted.
        waiting: requests in the queue.
    """

    pictures: int = 64
    side: int = 2048
    steps: int = 1000
    work: int = 1000
    megapixels: int = 40
    upload: int = 32
    stored: int = 2048
    waiting: int = 32

    def __post_init__(self) -> None:
        least = math.ceil(MOST_UPLOADS * (self.upload + MULTIPART / MEBI))
        if self.stored < least:
            raise UserError(
                f"--max-stored: {self.stored} MiB are too few: {MOST_UPLOADS} files of {self.upload} (--max-upload) "
                f"may come at once, which takes {least}"
            )

    def check_count(self, count: int, rerank: int) -> None:
        """Raise UserError for too many pictures."""
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise UserError(f"count: a whole number from 1 on is needed, not {count!r}")
        if count * rerank > self.pictures:
            made = f"{count} pictures" if rerank == 1 else f"{count} pictures, each the best of {rerank},"
            raise UserError(f"count: {made} are too many for one request; {self.pictures} at most are made here")

    def check_options(self, options: SamplingOptions) -> None:
        """Raise UserError for too many steps, or too large a picture, before anything is made of them."""
        if isinstance(options.sampler, dict) and isinstance(asked := options.sampler.get("steps"), int | str):
            from ldm_lab.schedules import num_steps  # not before: it imports torch, which takes seconds

            steps = num_steps(asked)
            if steps > self.steps:
                raise UserError(f"steps: {steps} are too many; {self.steps} at most here")
        if (size := parse_size(options.size)) is not None:
            self.check_size(*size)

    def check_size(self, height: int, width: int) -> None:
        """Raise UserError for too large a picture."""
        if max(height, width) > self.side:
            raise UserError(f"size: {width}x{height} pixels are too many; a side has {self.side} at most here")

    def check_work(self, work: float) -> None:
        """Raise UserError for more work than one request may ask for, though each number by itself is within bounds."""
        if work > self.work:
            raise UserError(
                f"work: {math.ceil(work)} (pictures x steps x megapixels x prompts) is too much for one request; "
                f"{self.work} at most is done here: take fewer pictures or steps, or a smaller size"
            )

    def check_texts(self, texts: Sequence[str]) -> None:
        """Raise UserError for too many prompts, or one that is too long."""
        if len(texts) > MOST_PROMPTS:
            raise UserError(f"prompts: {MOST_PROMPTS} at most are mixed in a picture here, not {len(texts)}")
        if (longest := max(map(len, texts), default=0)) > LONGEST_PROMPT:
            raise UserError(f"prompts: {LONGEST_PROMPT} characters at most are read here, not {longest}")

    def check_files(self, loras: Sequence[str], upsamplers: Sequence[str]) -> None:
        """Raise UserError for too many files of weights."""
        for what, names, most in (("loras", loras, MOST_LORAS), ("upsamplers", upsamplers, MOST_UPSAMPLERS)):
            if len(names) > most:
                raise UserError(f"{what}: {most} at most are taken for one request, not {len(names)}")

    def open_uploads(self, paths: Sequence[Path]) -> list[Image.Image]:
        """Return the images in uploaded files. Raises UserError as `open_upload`, and for too many pixels together."""
        opened: list[Image.Image] = []
        for path in paths:
            opened.append(self.open_upload(path))
            total = sum(image.width * image.height for image in opened) / MEGA
            if total > IMAGES * self.megapixels:
                raise UserError(f"image_prompts: {IMAGES * self.megapixels} megapixels together are taken here at most")
        return opened

    def open_upload(self, path: Path, name: str = "") -> Image.Image:
        """Return the image in an uploaded file.

        Args:
            path: of the file.
            name: what the user knows it by.

        Raises:
            UserError: too large a file, too many pixels (told from the header, before they are decoded), no image, a
                file that was cleared away meanwhile.
        """
        name = name or path.name
        try:
            size = path.stat().st_size
            if size > self.upload * MEBI:
                raise UserError(f"{name}: {size / MEBI:.0f} MiB; files of {self.upload} at most are taken")
            data = path.read_bytes()
        except OSError:  # uploads are cleared away after a while
            raise UserError(f"{name}: is not there any more; upload it again") from None
        return self.decode(data, name)

    def decode(self, data: bytes, name: str) -> Image.Image:
        """Return an uploaded image. Raises UserError: too many pixels, no image."""
        try:
            return decode_image(data, max_pixels=self.megapixels * MEGA)
        except BadImage as error:
            if "too many pixels" in str(error):
                most = f"too many pixels; images of {self.megapixels} megapixels at most are taken here"
                raise UserError(f"{name}: {most}; make it smaller") from None
            raise UserError(f"{name}: not an image that can be read ({error})") from None
