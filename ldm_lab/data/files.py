"""Images in files of their own: a list of paths, or all images below a folder. A caption lies beside its image."""

import os
from pathlib import Path
from typing import Any

from ldm_lab.config import register
from ldm_lab.data.order import Order
from ldm_lab.data.source import IMAGE_EXTENSIONS, ImageSource, Raw, Skip
from ldm_lab.data.strings import Strings
from ldm_lab.errors import UserError


class FileSource(ImageSource):
    """Base class: image files, named relative to `root`; `photo.txt` beside `photo.jpg` holds its caption."""

    unit = "images"
    root: Path

    def names(self) -> list[str]:
        """Return the image paths, absolute or relative to `root`. Raises UserError where there are none."""
        raise NotImplementedError

    def open(self) -> None:
        self._names = Strings.pack(self.names())
        self.count = len(self._names)

    def read(self, index: int) -> Raw:
        """Return the file of an index and its caption. Raises Skip."""
        name = self._names[index]
        path = self.root / name
        caption = path.with_suffix(".txt")
        try:
            return Raw(name, path.read_bytes(), caption.read_bytes() if caption.is_file() else None)
        except FileNotFoundError:
            raise Skip("missing file", name) from None
        except OSError:
            raise Skip("unreadable file", name) from None

    def decode(self, item: int, order: Order) -> dict[str, Any]:
        return super().decode(self.read(item), order)


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
                if extension in IMAGE_EXTENSIONS and not file.startswith("."):
                    names.append(os.path.relpath(os.path.join(folder, file), self.root))
        if not names:
            hint = f", but {shards} .tar files: name: webdataset reads those" if shards else ""
            raise UserError(f"data.path: no image below {self.root}{hint}; looked for {', '.join(IMAGE_EXTENSIONS)}")
        return sorted(names)  # whatever order the file system has
