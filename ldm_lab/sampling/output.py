"""A folder of numbered pictures, the list of their settings, grids and films; what is there already stays."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ldm_lab.errors import UserError
from ldm_lab.io.atomic import atomic_write
from ldm_lab.io.images import grid, save_png
from ldm_lab.sampling.parameters import Parameters
from ldm_lab.sampling.recorded import SETTINGS, Entry

GRID_LIMIT = 400  # pictures; of more the grid shows the first ones
SOFTWARE = "ldm_lab"


class SampleFolder:
    """Where pictures are written: 00000.png, 00001.png, ..., samples.json, grid.png.

    In a folder that has pictures already, numbers and list go on, and the grid is named after its first picture.
    """

    def __init__(self, path: Path) -> None:
        """Look for what is there; nothing is written yet. Raises UserError for a list that is none of ours."""
        self.path, self.list_path = path, path / "samples.json"
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {path}: this is a file, not a folder")
        self.entries = self._read_list()
        taken = [
            match for file in path.glob("*.*") if (match := re.fullmatch(r"(?:grid_)?(\d+)\.(?:png|txt)", file.name))
        ]
        self.first = max((int(match[1]) + 1 for match in taken), default=0)
        self.images: list[Image.Image] = []  # of this run
        self.captions: list[str] = []

    def _read_list(self) -> list[Entry]:
        if not self.list_path.exists():
            return []
        try:
            entries = json.loads(self.list_path.read_text(encoding="utf-8"))
        except (ValueError, OSError):
            entries = None
        if not isinstance(entries, list):
            raise UserError(f"{self.list_path}: not a list of samples; move it away, or choose another --out")
        return entries

    def name(self, i: int) -> str:
        """Return the file name of this run's picture i."""
        return f"{self.first + i:05d}.png"

    def add(
        self,
        images: Sequence[Image.Image],
        caption: str,
        settings: Entry,
        parameters: Parameters | None = None,
        only_last: bool = False,
        text: str | None = None,
    ) -> None:
        """Write the next picture with its settings as metadata, and remember them for the list.

        Args:
            images: the picture; of several stages all their pictures, small to large: the last one is the picture, the
                first one is written beside it as NUMBER_base.png, those between as NUMBER_stage1.png, ...
            caption: its prompts.
            settings: what it was made with.
            parameters: the same as other programs read it; None writes nothing of the kind.
            only_last: write the last one alone; the list still tells the sizes of the others.
            text: a caption as of training data, for a .txt beside each file; None or an empty one writes none.
        """
        name = self.name(len(self.images))
        *smaller, image = images
        entry = Entry({"file": name, **settings, "width": image.width, "height": image.height})
        files = [name.replace(".png", f"_stage{i}.png" if i else "_base.png") for i in range(len(smaller))]
        steps = [
            Entry({**({} if only_last else {"file": file}), "width": small.width, "height": small.height})
            for file, small in zip(files, smaller, strict=True)
        ]
        if steps:
            entry["base"] = steps[0]
        if len(steps) > 1:
            entry["stages"] = [*steps[1:]]
        for file, picture in list(zip([*files, name], images, strict=True))[len(smaller) if only_last else 0 :]:
            write_picture(self.path / file, picture, caption, entry, parameters)
            if text:
                with atomic_write((self.path / file).with_suffix(".txt")) as beside:
                    beside.write(text.encode())
        self.entries.append(entry)
        self.images.append(image)
        self.captions.append(caption)

    def write_list(self) -> None:
        """Write samples.json."""
        with atomic_write(self.list_path) as file:
            file.write(json.dumps(self.entries, indent=2, ensure_ascii=False).encode())

    @property
    def grids(self) -> list[str]:
        """Names of grids, strips and films in the folder, which whoever reads all its images takes for pictures."""
        files = [file.name for ending in ("png", "gif") for file in self.path.glob(f"*.{ending}")]
        return sorted(name for name in files if re.fullmatch(r"(?:grid|strip|film)(?:_\d+)?\.(?:png|gif)", name))

    def add_grid(self, columns: int | None = None) -> Path:
        """Write a grid of this run's pictures and return its path."""
        free = self.first == 0 and not (self.path / "grid.png").exists()
        path = self.path / ("grid.png" if free else f"grid_{self.first:05d}.png")
        shown = slice(GRID_LIMIT)
        self._save_page(path, grid(self.images[shown], columns, self.captions[shown]))
        return path

    def add_film(self) -> tuple[Path, Path]:
        """Write this run's pictures side by side, and as a film; return both paths."""
        number = "" if self.first == 0 else f"_{self.first:05d}"
        strip, gif = self.path / f"strip{number}.png", self.path / f"film{number}.gif"
        self._save_page(strip, grid(self.images, columns=len(self.images)))
        save_gif(gif, self.images)
        return strip, gif

    def _save_page(self, path: Path, page: Image.Image) -> None:
        """Write a page of this run's pictures, with their files' names."""
        names = [self.name(i) for i in range(min(len(self.images), GRID_LIMIT))]
        save_png(path, page, {"Software": SOFTWARE, SETTINGS: json.dumps({"files": names})})


def write_picture(
    path: Path, picture: Image.Image, caption: str, entry: Entry, parameters: Parameters | None = None
) -> None:
    """Write a picture with its settings as metadata.

    Args:
        path: the PNG.
        picture: its pixels.
        caption: its prompts.
        entry: what it was made with.
        parameters: the same as other programs read it, which is first of all, as some read the first text alone.

    Raises:
        UserError: the folder cannot be written to, or is full.
    """
    known = {"parameters": str(parameters.sized(*picture.size))} if parameters else {}
    save_png(path, picture, {**known, "Description": caption, "Software": SOFTWARE, SETTINGS: json.dumps(entry)})


def save_gif(path: str | Path, images: Sequence[Image.Image], seconds: float = 3.0) -> None:
    """Write a film of equally large images that runs there and back, `seconds` one way, for ever.

    Raises:
        UserError: the folder cannot be written to, or is full.
    """
    frames = [*images, *images[-2:0:-1]]
    step = max(20, round(1000 * seconds / len(images)))  # milliseconds; viewers slow down anything below 20
    with atomic_write(path) as file:
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=step, loop=0)
