"""Images in files of their own: a list of paths, or all images below a folder. A caption lies beside its image, in a
table, or is the name of its folder."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ldm_lab.config import PositiveInt, register
from ldm_lab.data.beside import CaptionFiles, lines_about, path_beside, read_beside, read_regular
from ldm_lab.data.caption_tables import CaptionTable
from ldm_lab.data.captions import NONE, Caption, class_name
from ldm_lab.data.contents import contents_of, file_entries, names_within
from ldm_lab.data.folders import Listing, ending_of, is_image, need_plugins, walk
from ldm_lab.data.image_lists import read_list
from ldm_lab.data.order import Order
from ldm_lab.data.samples import Captioned, RawSample, Sample, SkippedSample
from ldm_lab.data.source import ImageSource
from ldm_lab.data.strings import Strings
from ldm_lab.data.text import spellings
from ldm_lab.errors import UserError
from ldm_lab.io.decoding import IMAGE_ENDINGS
from ldm_lab.io.near import meant, near_paths

LOOKED_AT = 200  # captions that are read at the start of a run
NO_TEXT = "\0"  # stands for no caption among packed ones


class ListedImage(NamedTuple):
    """An image that a source has listed.

    Attributes:
        name: its path, absolute or relative to the source's root.
        place: where its caption may be.
        text: the caption that the list itself has; `NO_TEXT` without one.
    """

    name: str
    place: str
    text: str = NO_TEXT


class FileSource(ImageSource):
    """Base class: image files, named relative to `root`.

    `photo.txt` beside `photo.jpg` holds its caption, or else `photo.json` does, under `caption` (img2dataset's *files*
    layout has both); `captions` names other places.

    Args:
        path: of the list or the folder.
        limit: use this many images only, evenly spread over the sorted list; null uses all.
    """

    unit = "images"
    fallback: str | None = "caption"  # key of an image's json that is looked at last

    def __init__(self, *, path: str, limit: PositiveInt | None = None, **common: Any):
        super().__init__(**common)
        self.path, self.limit = Path(path).expanduser(), limit
        self.beside = CaptionFiles(self.captions, fallback=self.fallback is not None)
        self._tables: list[Path] = []

    @property
    def root(self) -> Path:
        """The folder that names are relative to."""
        return self.path

    @property
    def names(self) -> list[str]:
        """The image paths, absolute or relative to `root`."""
        return [self._names[index] for index in range(len(self._names))]

    def listed(self) -> list[ListedImage]:
        """Return the images in a fixed order. Raises UserError where there is none."""
        raise NotImplementedError

    def open(self) -> None:
        self.beside = CaptionFiles(self.captions, fallback=self.fallback is not None)
        images = self.listed()
        self.in_all = len(images)
        if self.limit is not None and self.limit < len(images):
            images = [images[i * len(images) // self.limit] for i in range(self.limit)]
        places = [image.place for image in images]
        if self.captions.metadata is not None:
            table = self.captions.table = self.read_table(images)
            places = [table.name if table.captions(i.name) else i.place for i in images]
        self.places = Counter(places)
        self._is_captioned = np.array([place != NONE for place in places])  # [count]
        self._names = Strings.pack([image.name for image in images])
        self._texts = Strings.pack([i.text for i in images] if any(i.text != NO_TEXT for i in images) else [])
        self.count = len(self._names)
        if self.require_text and self.places[NONE] == self.count:
            raise UserError(
                f"data.path: none of the {self.count:,} images has a caption: no photo.txt (or photo.json) lies beside "
                f"a photo.jpg, and data.require_text asks for captions{self.hint()}"
            )

    def hint(self) -> str:
        """Return where captions might be that are not read, in words; "" if nothing is seen."""
        hints = self.beside.hints(without=self.places[NONE])
        return f"; {'; '.join(hints)}" if hints else ""

    def read_table(self, images: list[ListedImage]) -> CaptionTable:
        """Return the table that `captions.metadata` names. Raises UserError if it is not there."""
        name = str(self.captions.metadata)
        path = Path(name).expanduser()
        folders = sorted({os.path.dirname(image.name) for image in images} | {""}) if not path.is_absolute() else [""]
        files = [(folder, self.root / folder / path) for folder in folders if (self.root / folder / path).is_file()]
        if not files and path.is_file():
            files = [("", path)]
        if not files:
            raise UserError(f"data.captions.metadata: no {name} in {self.root}, nor in a folder of images below it")
        self._tables = [path for _, path in files]
        return CaptionTable.read(files, self.captions.column, self.captions.encoding, os.path.abspath(self.root))

    def found(self) -> list[str]:
        count = self.count or 0
        of = f" (data.limit: of {self.in_all:,})" if self.in_all > count else ""
        kinds = [f"{number:,} {place}" for place, number in self.places.most_common() if place != NONE]
        without = f"{self.places[NONE]:,} images without" if self.places[NONE] else "no image without"
        lines = [f"{count:,} images{of}; captions: {', '.join([*kinds, without]) if kinds else 'none'}"]
        lines += super().found()
        plugins = need_plugins(self.names)
        lines += [plugins] if plugins else []
        if (table := self.captions.table) is not None:
            lines += table.lines(self.names if count == self.in_all else None)
        lines += lines_about(self.looked_at())
        return lines + self.beside.hints(without=self.places[NONE])

    def looked_at(self) -> list[tuple[str, Caption]]:
        """Return (image, caption) of some images that should have one, evenly spread."""
        captioned = np.flatnonzero(self._is_captioned)  # [images that should have one]
        captions = []
        for index in captioned[:: -(-len(captioned) // LOOKED_AT) or 1]:
            try:
                captions.append((self._names[int(index)], self.caption_of(int(index))))
            except OSError:
                continue
        return captions

    def read(self, index: int) -> RawSample:
        """Return the file of an index and its caption. Raises SkippedSample."""
        name = self._names[index]
        path = self.root / name
        self.note(str(path))
        try:
            return RawSample(name, read_regular(path), caption=self.caption_of(index))
        except FileNotFoundError:
            raise SkippedSample("missing file", name) from None
        except OSError:
            raise SkippedSample("unreadable file", name) from None

    def caption_of(self, index: int) -> Caption:
        """Return the caption of an image. Raises OSError."""
        name = self._names[index]
        return self.captions.find(name, lambda ending: read_beside(self.root / name, ending), self.fallback)

    def files(self) -> list[tuple[str, Path | None]]:
        found: list[tuple[str, Path | None]] = []
        for name in self.names:
            found.append((name, self.root / name))
            found += [
                (os.path.join(os.path.dirname(name), path.name), path)
                for ending in self.beside.endings
                if (path := path_beside(self.root / name, ending)) is not None
            ]
        return found + [(os.path.relpath(path, self.root), path) for path in self._tables]

    def contents(self) -> str:
        names = self.names
        if all(map(os.path.isabs, names)):
            names = names_within(names)
        return contents_of(
            self.unit, file_entries([(n, os.path.join(self.root, o)) for n, o in zip(names, self.names)])
        )

    def decode(self, item: int, order: Order) -> Sample:
        return super().decode(self.read(item), order)

    def captions_of(self, item: int) -> Captioned:
        """Return what is said of an image, which is not read."""
        try:
            return super().captions_of(RawSample(self._names[item], b"", caption=self.caption_of(item)))
        except OSError:
            raise SkippedSample("unreadable file", self._names[item]) from None


@register("data", "image_list")
class ImageList(FileSource):
    """A text file with one image path per line; relative ones are relative to the list's own folder.

    Blank lines and those that begin with # are left out. A path may stand in quotes, begin with ~ or file://, and a
    tab with its caption may follow.

    Args:
        path: the list.
    """

    @property
    def root(self) -> Path:
        return self.path.parent

    def listed(self) -> list[ListedImage]:
        listed = read_list(self.path)
        self.list_lines = listed.lines()
        names = [self.on_disk(name) for name in listed.names]
        by_folder: defaultdict[str, list[int]] = defaultdict(list)
        for index, name in enumerate(names):
            by_folder[os.path.dirname(name)].append(index)
        places, missing = [NONE] * len(names), list[str]()
        for folder, indices in by_folder.items():
            try:
                files = {entry.name for entry in os.scandir(self.root / folder) if not entry.is_dir()}
            except OSError:
                files = set[str]()
            images = [os.path.basename(names[index]) for index in indices]
            missing += [os.path.join(folder, image) for image in images if image not in files]
            for index, place in zip(indices, self.beside.places(folder, images, files)[0]):
                places[index] = place
        if missing:
            where = "" if os.path.isabs(missing[0]) else f" in {self.path.parent}, the list's folder"
            self.list_lines.insert(0, f"{len(missing):,} files of the list are missing (e.g. {missing[0]}{where})")
        return [
            ListedImage(name, place) if text is None else ListedImage(name, "list", text)
            for name, place, text in zip(names, places, listed.captions)
        ]

    def files(self) -> list[tuple[str, Path | None]]:
        return super().files() + ([(self.path.name, self.path)] if len(self._texts) else [])  # with its captions

    def on_disk(self, name: str) -> str:
        """Return a path of the list as it is spelled on the disk, with letters and accents together or apart."""
        forms = spellings(name)
        return next((form for form in forms if (self.root / form).exists()), name) if len(forms) > 1 else name

    def caption_of(self, index: int) -> Caption:
        text = self._texts[index] if len(self._texts) else NO_TEXT
        if text == NO_TEXT:
            return super().caption_of(index)
        return self.captions.in_text(os.fsencode(text), "list")

    def found(self) -> list[str]:
        return super().found() + self.list_lines


@register("data", "folder")
class Folder(FileSource):
    """All images below a folder, in any depth; hidden files and folders are left out.

    Symbolic links to folders are followed, each folder once.

    Args:
        path: the folder.

    Attributes:
        leaves_out: whether a picture in it is none of its images, by its path; None takes all.
    """

    leaves_out: Callable[[Path], bool] | None = None

    def listed(self) -> list[ListedImage]:
        if not self.path.is_dir():
            raise UserError(f"data.path: {self.path}: no such folder{meant(near_paths(self.path))}")
        self.listing = Listing()
        found = []
        for folder, files in walk(self.path, self.listing):
            images = [file for file in files if is_image(file)]
            if self.leaves_out is not None:
                images = [image for image in images if not self.leaves_out(self.path / folder / image)]
            places, strange = self.beside.places(folder, images, set(files))
            self.listing.left_out.update(map(ending_of, strange))
            self.listing.folders += bool(images)
            found += [ListedImage(os.path.join(folder, image), place) for image, place in zip(images, places)]
        if not found:
            shards = self.listing.left_out["tar"]
            hint = f", but {shards} .tar files: name: webdataset reads those" if shards else ""
            left = "".join(f"; {line}" for line in self.listing.lines())
            raise UserError(f"data.path: no image below {self.path}{hint}; looked for {', '.join(IMAGE_ENDINGS)}{left}")
        return sorted(found)  # whatever order the file system has

    def found(self) -> list[str]:
        first, *lines = super().found()
        return [f"{self.path}: {first}", *lines, *self.listing.lines()]


@register("data", "class_folders")
class ClassFolders(Folder):
    """Images sorted into one folder per class, whose name is their caption, as in Stanford Dogs.

    `n02085620-Chihuahua/n02085620_199.jpg` has the caption "Chihuahua", `n02105412-flat-coated_retriever/...`
    "flat-coated retriever": a WordNet number in front goes, underscores are spaces.

    Args:
        caption: the caption with `{}` in the place of the class, such as "a photo of a {}".
        level: which folder is the class: the first below `path`, or the last, which an image lies in. null is the
            first, but refuses a path that seems to be one level too high.
    """

    fallback = None

    def __init__(self, *, caption: str = "{}", level: Literal["first", "last"] | None = None, **common: Any):
        super().__init__(**common)
        self.caption, self.level = caption, level
        if not self.captions.is_default:
            raise UserError("data.captions: captions are the names of the folders here; name: folder reads others")

    @staticmethod
    def check(*, caption: str) -> list[str]:
        """Return what is wrong with the caption."""
        if caption.count("{}") != 1:
            return [f"caption: one {{}} is needed, where the class goes, not {caption!r}"]
        return []

    def listed(self) -> list[ListedImage]:
        names = [image.name for image in super().listed() if os.sep in image.name]
        if not names:
            raise UserError(f"data.path: no class folder with images below {self.path}; a class is a folder of its own")
        if self.level is None:
            self.check_level(names)
        self.classes = Counter(self.class_of(name) for name in names)
        return [ListedImage(name, "folder") for name in names]

    def check_level(self, names: list[str]) -> None:
        """Raise UserError if the classes seem to be one level deeper."""
        folders = {os.path.dirname(name) for name in names}
        first, second = ({tuple(f.split(os.sep)[:depth]) for f in folders} for depth in (1, 2))
        if all(os.sep in folder for folder in folders) and len(second) > len(first):
            shallow, deep = (sorted({class_name(path[-1]) for path in paths}) for paths in (first, second))
            raise UserError(
                f"data.path: no image lies directly in a class folder: {names[0]}. data.level=last takes as classes "
                f"the folders that images lie in ({', '.join(deep[:3])}, ...: {len(deep)}); data.level=first those "
                f"directly below {self.path} ({', '.join(shallow[:3])})"
            )

    def class_of(self, name: str) -> str:
        """Return the class of an image, named relative to `root`."""
        folders = name.split(os.sep)
        return class_name(folders[-2] if self.level == "last" else folders[0])

    def caption_of(self, index: int) -> Caption:
        text = self.caption.replace("{}", self.class_of(self._names[index]))
        return self.captions.in_text(text.encode(errors="surrogateescape"), "folder")

    def found(self) -> list[str]:
        first, *lines = super().found()
        most = ", ".join(f"{name} {count:,}" for name, count in self.classes.most_common(3))
        return [first, f"{len(self.classes):,} classes: {most}{', ...' if len(self.classes) > 3 else ''}", *lines]
