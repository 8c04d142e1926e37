"""Images in files of their own: a list of paths, or all images below a folder. A caption lies beside its image, or is
the name of its folder."""

import os
import re
from pathlib import Path
from typing import Any

from ldm_lab.config import PositiveInt, register
from ldm_lab.data.order import Order
from ldm_lab.data.samples import RawSample, Sample, SkippedSample
from ldm_lab.data.source import ImageSource
from ldm_lab.data.strings import Strings
from ldm_lab.errors import UserError
from ldm_lab.io.decoding import IMAGE_ENDINGS
from ldm_lab.io.json_files import parse_json


class FileSource(ImageSource):
    """Base class: image files, named relative to `root`.

    `photo.txt` beside `photo.jpg` holds its caption, or else `photo.json` does, under `caption` (img2dataset's *files*
    layout has both).

    Args:
        limit: use this many images only, evenly spread over the sorted list; null uses all.
    """

    unit = "images"
    root: Path

    def __init__(self, *, limit: PositiveInt | None = None, **common: Any):
        super().__init__(**common)
        self.limit = limit

    def names(self) -> list[str]:
        """Return the image paths, absolute or relative to `root`. Raises UserError where there are none."""
        raise NotImplementedError

    def open(self) -> None:
        names = self.names()
        if self.limit is not None and self.limit < len(names):
            names = [names[i * len(names) // self.limit] for i in range(self.limit)]
        if self.require_text and not any(map(self.may_have_caption, names)):
            raise UserError(
                f"data.path: none of the {len(names):,} images has a caption: no photo.txt (or photo.json) lies beside "
                "a photo.jpg, and data.require_text asks for captions"
            )
        self._names = Strings.pack(names)
        self.count = len(self._names)

    def may_have_caption(self, name: str) -> bool:
        """Return whether there is a file that an image's caption could be in."""
        path = self.root / name
        return path.with_suffix(".txt").is_file() or path.with_suffix(".json").is_file()

    def read(self, index: int) -> RawSample:
        """Return the file of an index and its caption. Raises SkippedSample."""
        name = self._names[index]
        path = self.root / name
        self.note(str(path))
        try:
            return RawSample(name, path.read_bytes(), self.text_of(path))
        except FileNotFoundError:
            raise SkippedSample("missing file", name) from None
        except OSError:
            raise SkippedSample("unreadable file", name) from None

    def text_of(self, path: Path) -> bytes | None:
        """Return the caption of an image, UTF-8: the text beside it or, where there is none, what the JSON says."""
        text, metadata = path.with_suffix(".txt"), path.with_suffix(".json")
        if text.is_file():
            return text.read_bytes()
        return _caption_in(metadata.read_bytes()) if metadata.is_file() else None

    def decode(self, item: int, order: Order) -> Sample:
        return super().decode(self.read(item), order)


def _caption_in(metadata: bytes) -> bytes | None:
    """Return the `caption` of an image's JSON, UTF-8; None if it has none."""
    caption = parse_json(metadata).get("caption")
    return caption.encode(errors="replace") if isinstance(caption, str) else None


@register("data", "image_list")
class ImageList(FileSource):
    """A text file with one image path per line; relative ones are relative to the list's own folder.

    Args:
        path: the list. Blank lines are left out.
    """

    def __init__(self, *, path: str, **common: Any):
        super().__init__(**common)
        self.path = Path(path).expanduser()
        self.root = self.path.parent

    def names(self) -> list[str]:
        try:
            text = self.path.read_text(encoding="utf-8-sig", errors="surrogateescape")
        except OSError as error:
            raise UserError(f"data.path: {self.path}: {error.strerror}; a text file of image paths is needed") from None
        names = [line.strip() for line in text.split("\n") if line.strip(" ./\r\t")]
        if "\0" in text:
            raise UserError(f"data.path: {self.path} is no text file; one image path per line is needed")
        if not names:
            raise UserError(f"data.path: {self.path} holds no image path; one per line is needed")
        return names


@register("data", "folder")
class Folder(FileSource):
    """All images below a folder, in any depth; hidden files and folders are left out.

    Args:
        path: the folder.
    """

    def __init__(self, *, path: str, **common: Any):
        super().__init__(**common)
        self.root = Path(path).expanduser()

    def names(self) -> list[str]:
        if not self.root.is_dir():
            raise UserError(f"data.path: {self.root}: no such folder")
        names, shards = [], 0
        for folder, folders, files in os.walk(self.root):
            folders[:] = [f for f in folders if not f.startswith(".")]
            for file in files:
                extension = file.rpartition(".")[2].lower()
                shards += extension == "tar"
                if extension in IMAGE_ENDINGS and not file.startswith("."):
                    names.append(os.path.relpath(os.path.join(folder, file), self.root))
        if not names:
            hint = f", but {shards} .tar files: name: webdataset reads those" if shards else ""
            raise UserError(f"data.path: no image below {self.root}{hint}; looked for {', '.join(IMAGE_ENDINGS)}")
        return sorted(names)  # whatever order the file system has


@register("data", "class_folders")
class ClassFolders(Folder):
    """Images sorted into one folder per class, whose name is their caption, as in Stanford Dogs.

    `n02085620-Chihuahua/n02085620_199.jpg` has the caption "Chihuahua", `n02105412-flat-coated_retriever/...`
    "flat-coated retriever": a WordNet number in front goes, underscores are spaces. The class is the folder directly
    below `path`.

    Args:
        caption: the caption with `{}` in the place of the class, such as "a photo of a {}".
    """

    def __init__(self, *, caption: str = "{}", **common: Any):
        super().__init__(**common)
        self.caption = caption

    @staticmethod
    def check(*, caption: str) -> list[str]:
        """Return what is wrong with the caption."""
        if caption.count("{}") != 1:
            return [f"caption: one {{}} is needed, where the class goes, not {caption!r}"]
        return []

    def names(self) -> list[str]:
        names = [name for name in super().names() if os.sep in name]
        if not names:
            raise UserError(f"data.path: no class folder with images below {self.root}; a class is a folder of its own")
        return names

    def may_have_caption(self, name: str) -> bool:
        return True

    def text_of(self, path: Path) -> bytes | None:
        folder = path.relative_to(self.root).parts[0]
        return self.caption.replace("{}", class_name(folder)).encode(errors="surrogateescape")


def class_name(folder: str) -> str:
    """Return the class in a folder's name: "n02105412-flat-coated_retriever" -> "flat-coated retriever"."""
    return re.sub(r"^n\d{8}[-_]", "", folder).replace("_", " ").strip()
