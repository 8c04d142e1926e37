"""Files beside an image that say something of it: how they may be called, and what they are at the start of a run."""

import errno
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ldm_lab.data.captions import NONE, Caption, Captions, json_place
from ldm_lab.data.text import composed, spellings

TEXT_ENDINGS = (".txt", ".caption", ".cap", ".tags", ".text", ".json")  # of files that are likely to hold captions
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "captions.csv", "captions.jsonl")
REPEATS = re.compile(r"\d+_.+")  # kohya's folders: how often an epoch repeats their images, and a name
ABSENT = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)


def names_beside(image: str, ending: str) -> Iterator[str]:
    """Yield the names that a file beside an image may have on the disk.

    Args:
        image: the image's name, without a folder.
        ending: what takes the place of its ending, with * for the ending itself: .txt, .*.txt.
    """
    stem, own = os.path.splitext(image)
    for written in dict.fromkeys((ending, ending.upper(), ending.title())):
        yield from spellings(stem + written.replace("*", own[1:]))


def read_beside(image: Path, ending: str) -> bytes | None:
    """Return the content of the file beside an image; None if there is none. Raises OSError for all else."""
    for name in names_beside(image.name, ending):
        try:
            return read_regular(image.parent / name)
        except OSError as error:
            if error.errno not in ABSENT:
                raise
    return None


def read_regular(path: Path) -> bytes:
    """Return the content of a file. Raises OSError, also for a pipe or a device: they would keep the reader waiting."""
    kind = path.stat().st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # reading a folder is an error of its own
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.read_bytes()


def path_beside(image: Path, ending: str) -> Path | None:
    """Return the path of the file beside an image; None if there is none."""
    paths = (image.parent / name for name in names_beside(image.name, ending))
    return next((path for path in paths if os.path.isfile(path)), None)


class CaptionFiles:
    """Counts what lies beside images, folder by folder, without opening it.

    Args:
        captions: where they should be.
        fallback: whether an image's json is looked at where it has no other file.

    Attributes:
        unused: ending of a file beside an image that is not asked for -> how many.
        tables: files that are called like tables of captions.
        repeats: folders that are called as kohya's are.
    """

    def __init__(self, captions: Captions, fallback: bool) -> None:
        self.captions = captions
        named = [*([".json"] if captions.json_key else []), *captions.endings]
        self.endings = [] if captions.source else [*named, *([".json"] if fallback and captions.is_default else [])]
        self.labels = {".json": json_place(captions.json_key or "caption")}
        self.unused: Counter[str] = Counter()
        self.tables: list[str] = []
        self.repeats: list[str] = []

    def places(self, folder: str, images: list[str], files: set[str]) -> tuple[list[str], list[str]]:
        """Return where the caption of each image may be, and the files that have to do with none.

        Args:
            folder: whose files these are.
            images: names of the images in it that are wanted.
            files: names of all files in it.
        """
        places, used = [], set()
        for image in images:
            place = NONE
            for ending in self.endings:
                name = next((name for name in names_beside(image, ending) if name in files), None)
                if name is not None:
                    place = self.labels.get(ending, ending)
                    used.add(name)
                    break
            places.append(self.captions.source.replace("_", " ") if self.captions.source else place)
        others = files.difference(images, used)
        stems = {composed(os.path.splitext(image)[0]) for image in images}
        whole = {composed(image) for image in images}
        strange = []
        for name in sorted(others):
            stem, ending = os.path.splitext(composed(name))
            ending = ending.lower()
            if ending in TEXT_ENDINGS and stem in stems:
                self.unused[ending] += 1
            elif ending in TEXT_ENDINGS and stem in whole:
                self.unused[f".*{ending}"] += 1
            else:
                strange.append(name)
                if name in TABLES:
                    self.tables.append(os.path.join(folder, name))
        if images and REPEATS.fullmatch(os.path.basename(folder)):
            self.repeats.append(os.path.basename(folder))
        return places, strange

    def hints(self, without: int) -> list[str]:
        """Return what is not used and may be meant, a line each.

        Args:
            without: images that have no caption.
        """
        lines = []
        for ending, count in self.unused.most_common():
            if without and ending not in self.endings and ending != ".json":
                example = f"photo{ending.replace('*', 'jpg')}"
                lines.append(
                    f"{count:,} files {example} beside images are not read: data.captions.endings={ending} reads them"
                )
        if self.tables and self.captions.metadata is None and without:
            name = os.path.basename(self.tables[0])
            lines.append(f"{self.tables[0]} is not read: data.captions.metadata={name} takes the captions from it")
        if self.repeats:
            lines.append(
                f"folders such as {self.repeats[0]}: the number is no repeat here, an epoch has each image once"
            )
        return lines


def lines_about(captions: list[tuple[str, Caption]]) -> list[str]:
    """Return what some captions that have been read tell of all, a line each.

    Args:
        captions: (image, caption) of some images.
    """
    lines = []
    lacking = [key for key, caption in captions if not caption.exists and not caption.problem]
    if lacking:
        lines.append(f"{len(lacking)} of {len(captions)} captions looked at are not there (e.g. of {lacking[0]})")
    several = [(key, caption) for key, caption in captions if len(caption.texts) > 1]
    if several:
        key, caption = several[0]
        lines.append(
            f"{len(several)} of {len(captions)} captions looked at are several ({key} has {len(caption.texts)}, "
            f"such as {caption.first[:60]!r}): every epoch draws one; data.captions.lines=one takes lines as one text"
        )
    problems = Counter(caption.problem for _, caption in captions if caption.problem)
    for problem, count in problems.items():
        key = next(key for key, caption in captions if caption.problem == problem)
        lines.append(f"{count} of {len(captions)} captions looked at: {problem} (e.g. {key})")
    return lines
