"""What lies in a folder, before anything is trained on it: images, their sizes and captions, files that are no use."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path

from PIL import Image

from ldm_lab.config import build
from ldm_lab.data.beside import TABLES, read_beside, read_regular
from ldm_lab.data.captions import NONE
from ldm_lab.data.files import Folder
from ldm_lab.data.folders import Listing, ending_of, is_image, walk
from ldm_lab.data.samples import RawSample, caption_of
from ldm_lab.data.shards_found import KEYS, describe_shards
from ldm_lab.data.source import LEAST_SIDE
from ldm_lab.data.tar import read_shard
from ldm_lab.data.webdataset import WebDataset
from ldm_lab.errors import UserError
from ldm_lab.io.color import BadImage
from ldm_lab.io.decoding import decode_image
from ldm_lab.io.json_files import parse_json
from ldm_lab.io.near import meant, near_paths
from ldm_lab.progress import Bar

DECODED = 200  # images that are decoded as a whole; of the others the header is read
SURE = 20  # of these, all damaged, are enough to say that no image of the folder can be used
OF_A_SHARD = 200  # samples of shards that are looked at
HASHED = 2**28  # bytes of files of the same size that are compared, at most
THREADS = 8
LIST_ENDINGS = ("txt", "tar", "json", "jsonl", "csv", "tsv", "parquet")  # of files that are given in a folder's place


@dataclass(frozen=True)
class Header:
    """What the beginning of an image file says, or why it is no use.

    Attributes:
        name: of the file.
        short: length of the short side, pixels; 0 if the file is no use.
        problem: why it is none; "" if it can be used.
        is_decoded: whether its header is fine, and the whole image was decoded as well.
    """

    name: str
    short: int = 0
    problem: str = ""
    is_decoded: bool = False


@dataclass(frozen=True)
class Captioned:
    """Where captions are.

    Attributes:
        settings: options of `data.captions` that read them: key -> value; none where the default does.
        images: about how many images have one.
    """

    settings: dict[str, str] = field(default_factory=dict)
    images: int = 0


@dataclass(frozen=True)
class FolderFacts:
    """What lies in a folder.

    Attributes:
        path: of the folder, absolute.
        shards: patterns of tar files that the images are in; none where they are files of their own.
        names: of the images that can be used, relative to the folder; of shards none.
        images: how many there are about, those that cannot be used included.
        shorts: lengths of short sides of images that were looked at, sorted, pixels.
        unusable: why images cannot be used -> names of those looked at.
        damaged: of those problems what decoding alone tells, the header being fine -> how many of the decoded images.
        examined: images that were looked at.
        decoded: those of them that were decoded as a whole, the header being fine.
        captions: where captions are.
        lines: more to be said, a line each.
        copies: name of an image -> that of an earlier one with the same content, as far as they were compared.
    """

    path: Path
    shards: tuple[str, ...]
    names: tuple[str, ...]
    images: int
    shorts: tuple[int, ...]
    unusable: dict[str, list[str]]
    damaged: dict[str, int]
    examined: int
    decoded: int
    captions: Captioned
    lines: tuple[str, ...]
    copies: dict[str, str] = field(default_factory=dict)

    @cached_property
    def unusable_share(self) -> float:
        """The share of images that cannot be used: by their headers, and of the others as many as of those decoded."""
        damaged = sum(self.damaged.values())
        by_header = (sum(map(len, self.unusable.values())) - damaged) / max(self.examined, 1)
        return 1 - max(1 - by_header, 0) * (1 - damaged / max(self.decoded, 1))

    @property
    def usable(self) -> int:
        """About how many images can be used."""
        return max(round(self.images * (1 - self.unusable_share)), 1)

    def as_large_as(self, side: int) -> float:
        """Return the share of images whose short side has so many pixels or more."""
        return sum(short >= side for short in self.shorts) / len(self.shorts)

    def in_words(self) -> list[str]:
        """Return what was found, a line each."""
        unit = "images in shards" if self.shards else "images"
        shares = f"captions of {self.captions.images:,} of them" if self.captions.images else "no captions"
        lines = [f"{self.path}: {self.images:,} {unit}, {shares}"]
        low, middle, high = self.shorts[0], self.shorts[len(self.shorts) // 2], self.shorts[-1]
        lines.append(f"sizes: short sides of {low:,} to {high:,} pixels, half of them {middle:,} and more")
        for problem, names in self.unusable.items():
            damaged = self.damaged.get(problem, 0)
            counts = ((len(names) - damaged, self.examined, "looked at"), (damaged, self.decoded, "decoded"))
            told = " and ".join(f"{count:,} of {of:,} {how}" for count, of, how in counts if count)
            lines.append(f"cannot be used: {told}, {problem} (e.g. {names[0]})")
        return lines + list(self.lines)


def look(path: Path) -> FolderFacts:
    """Return what lies in a folder. Raises UserError for one without images, and for what is no folder."""
    path = path.expanduser()
    if not path.exists():
        raise UserError(f"{path}: no such folder{meant(near_paths(path))}")
    if not path.is_dir():
        other = f"; its folder, {path.parent}, may be meant" if ending_of(path.name) in LIST_ENDINGS else ""
        raise UserError(f"{path}: not a folder of images, but a file{other}")
    try:
        is_empty = next(os.scandir(path), None) is None
    except OSError as error:
        raise UserError(f"{path}: the folder cannot be listed: {error.strerror}") from None
    if is_empty:
        raise UserError(f"{path}: the folder is empty; images are needed in it, or in folders below it")
    path = Path(os.path.abspath(path))
    listing = Listing()
    files = [(folder, name) for folder, names in walk(path, listing) for name in names]
    if not any(is_image(name) for _, name in files):
        folders = sorted({folder for folder, name in files if ending_of(name) == "tar"})
        if folders:
            return look_at_shards(path, [str(path / folder / "*.tar") for folder in folders])
    return look_at_files(path)


# ------------------------------------------------------------------------------------------------- files of their own


def look_at_files(path: Path) -> FolderFacts:
    """Return what the image files below a folder are. Raises UserError where none can be used."""
    source = opened(path, {})
    names = source.names
    headers = list(read_headers(source.root, names))
    problems: defaultdict[str, list[str]] = defaultdict(list)
    for header in headers:
        if header.problem:
            problems[header.problem].append(header.name)
    good = [header for header in headers if not header.problem]
    decoded = [header for header in headers if header.is_decoded]
    damaged = Counter(header.problem for header in decoded if header.problem)
    if len(decoded) >= SURE and damaged.total() == len(decoded):
        told = "; ".join(f"{count:,} {problem}" for problem, count in damaged.items())
        raise UserError(f"{path}: none of the {len(decoded):,} of its images that were decoded can be used: {told}")
    if not good:
        told = "; ".join(f"{len(names):,} {problem} (e.g. {names[0]})" for problem, names in problems.items())
        raise UserError(f"{path}: none of its {len(headers):,} images can be used: {told}")
    settings = caption_settings(source)
    source = opened(path, settings) if settings else source
    copies, said = duplicates(source.root, [header.name for header in good])
    lines = [*source.found()[1:], *said]
    if tars := source.listing.left_out["tar"]:
        lines.append(f"{tars:,} .tar files: shards are not read beside images; a folder that has them alone is")
    return FolderFacts(
        path=path, shards=(), names=tuple(header.name for header in good), images=len(headers),
        shorts=tuple(sorted(header.short for header in good)), unusable=dict(problems), damaged=dict(damaged),
        examined=len(headers), decoded=len(decoded), captions=Captioned(settings, captioned(source)),
        lines=tuple(lines), copies=copies,
    )  # fmt: skip


def opened(path: Path, captions: dict[str, str]) -> Folder:
    """Return the data source of a folder, its images listed. Raises UserError where there is none."""
    section = {"name": "folder", "path": str(path), "image_size": 64, "batch_size": 1, "captions": captions or None}
    source: Folder = build("data", section)
    try:
        source.open()
    except UserError as error:
        raise UserError(str(error).removeprefix("data.path: ").removeprefix("data.")) from None
    return source


def read_headers(root: Path, names: Sequence[str]) -> Iterator[Header]:
    """Yield what each image's header says; `DECODED` of them, evenly spread, are decoded as a whole."""
    step = -(-len(names) // DECODED)
    jobs = [(root, name, number % step == 0) for number, name in enumerate(names)]
    with ThreadPoolExecutor(THREADS) as pool, Bar("look", "image", len(jobs)) as bar:
        for header in pool.map(lambda job: read_header(*job), jobs):
            bar.update()
            yield header


def read_header(root: Path, name: str, whole: bool) -> Header:
    """Return what an image file's header says, or all of it if that is asked for."""
    path, is_decoded = root / name, False
    try:
        if size := _size_in_header(path):
            if not whole or min(size) < LEAST_SIDE:
                return Header(name, min(size), "" if min(size) >= LEAST_SIDE else "too small")
            is_decoded = True
        return Header(name, min(decode_image(read_regular(path), LEAST_SIDE).size), is_decoded=is_decoded)
    except BadImage as error:
        return Header(name, problem=str(error), is_decoded=is_decoded)
    except OSError as error:
        return Header(name, problem=f"unreadable file ({error.strerror or 'no image'})", is_decoded=is_decoded)


def _size_in_header(path: Path) -> tuple[int, int] | None:
    """Return an image's width and height; None if that takes more than its header. Raises OSError."""
    if not path.is_file():
        return None  # a pipe would keep the reader waiting
    try:
        with Image.open(path) as image:
            return image.size
    except FileNotFoundError:
        raise
    except Exception:  # whatever Pillow raises on bytes that are no image; decoding says what is wrong
        return None


def duplicates(root: Path, names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Return which files are the same as an earlier one, and that in words. Only files of the same size are read."""
    by_size: defaultdict[int, list[str]] = defaultdict(list)
    for name in names:
        with suppress(OSError):  # gone since it was looked at
            by_size[os.stat(root / name).st_size].append(name)
    alike = [(size, name) for size, its in by_size.items() if len(its) > 1 for name in its]
    compared = list(islice(alike, next((i for i, total in _totals(alike) if total > HASHED), len(alike))))
    first: dict[tuple[int, bytes], str] = {}
    same: dict[str, str] = {}
    for size, name in compared:
        try:
            key = (size, hashlib.blake2b((root / name).read_bytes(), digest_size=16).digest())
        except OSError:
            continue
        if key in first:
            same[name] = first[key]
        first.setdefault(key, name)
    lines = []
    if same:
        name, other = next(iter(same.items()))
        example = f"(e.g. {name} and {other})"
        lines.append(f"duplicates: {len(same):,} files are the same as another one {example}")
    if left := len(alike) - len(compared):
        lines.append(f"duplicates: {left:,} more files of the same size as another one were not compared")
    return same, lines


def _totals(alike: Iterable[tuple[int, str]]) -> Iterator[tuple[int, int]]:
    total = 0
    for number, (size, _) in enumerate(alike):
        total += size
        yield number, total


# --------------------------------------------------------------------------------------------------------- captions


def caption_settings(source: Folder) -> dict[str, str]:
    """Return the options of `data.captions` that find captions where the default finds none; {} if nothing does."""
    if captioned(source):
        return {}
    unused = [ending for ending, _ in source.beside.unused.most_common() if ending != ".json"]
    if unused:
        return {"endings": unused[0]}
    if source.beside.tables:
        name = os.path.basename(source.beside.tables[0])
        assert name in TABLES
        return {"metadata": name}
    keys: Counter[str] = Counter()
    for name in source.names[:: -(-len(source.names) // DECODED)]:
        try:
            content = parse_json(read_beside(source.root / name, ".json") or b"")
        except OSError:
            continue
        keys.update(key for key in KEYS if isinstance(content.get(key), str))
    return {"json_key": keys.most_common(1)[0][0]} if keys else {}


def captioned(source: Folder) -> int:
    """Return about how many images have a caption with a word in it, judged by those that are looked at."""
    should = sum(count for place, count in source.places.items() if place != NONE)
    seen = source.looked_at()
    return round(should * sum(bool(caption.texts) for _, caption in seen) / len(seen)) if seen else 0


# ----------------------------------------------------------------------------------------------------------- shards


def look_at_shards(path: Path, patterns: Sequence[str]) -> FolderFacts:
    """Return what the shards of some patterns hold, judged by the first. Raises UserError where it has no image."""
    section = {"name": "webdataset", "shards": list(patterns), "image_size": 64, "batch_size": 1}
    source: WebDataset = build("data", section)
    source.open()
    addresses = list(source.addresses)
    problems: defaultdict[str, list[str]] = defaultdict(list)
    shorts: list[int] = []
    damaged: Counter[str] = Counter()
    texts = decoded = 0
    keys: Counter[str] = Counter()
    in_first = 0
    for item in read_shard(addresses[0]):
        if not isinstance(item, RawSample):
            problems[item.reason].append(item.key)
            continue
        in_first += item.image is not None
        if item.image is None or decoded >= OF_A_SHARD:
            continue
        decoded += 1
        texts += bool(caption_of(item, source.captions).texts)
        keys.update(key for key in KEYS if parse_json(item.json).get(key))
        try:
            shorts.append(min(decode_image(item.image, LEAST_SIDE).size))
        except BadImage as error:
            problems[str(error)].append(item.key)
            damaged[str(error)] += 1
    if not shorts:
        told = "; ".join(f"{len(names):,} {problem}" for problem, names in problems.items()) or "no image in it"
        raise UserError(f"{addresses[0]}: no image of the first shard can be used: {told}")
    settings = {"json_key": keys.most_common(1)[0][0]} if keys and not texts else {}
    share = (texts or (keys.most_common(1)[0][1] if keys else 0)) / decoded
    examined = in_first + sum(map(len, problems.values())) - damaged.total()
    images = examined * len(addresses)
    return FolderFacts(
        path=path, shards=tuple(patterns), names=(), images=images, shorts=tuple(sorted(shorts)),
        unusable=dict(problems), damaged=dict(damaged), examined=examined, decoded=decoded,
        captions=Captioned(settings, round(share * images)),
        lines=tuple(describe_shards(addresses, source.captions, source.key_until)),
    )  # fmt: skip
