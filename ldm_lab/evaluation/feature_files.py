"""Files of features: parts of a set, as a pass writes them, and whole sets of real images that know what they are of.

safetensors: what there is of each picture as tensors [N, ...], "features.inception", "features.embedding",
"values.psnr", ...; captions as `text` and `text_ends` (`data.strings`); under `features` in the metadata, as JSON, what
they were made of.
"""

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save
from torch import Tensor

from ldm_lab.checkpoints.files import FORMAT, read_safetensors
from ldm_lab.data.counts import Counts
from ldm_lab.data.jobs import Finished
from ldm_lab.data.strings import Strings
from ldm_lab.errors import UserError
from ldm_lab.io.atomic import atomic_write
from ldm_lab.io.json_files import Fields, parse_json
from ldm_lab.progress import print_line

ROLE = "features"
TEXT, TEXT_ENDS = "text", "text_ends"
FEATURES, VALUES, SUMS = "features.", "values.", "sums."  # prefixes of tensors


@dataclass
class PictureRows:
    """What is known of N pictures.

    Attributes:
        tensors: name -> [N, ...]; of those that begin with "sums.", [n, ...] to be added up.
        texts: their captions or prompts; "" where there is none.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def joined(cls, parts: "Sequence[PictureRows]") -> "PictureRows":
        """Return the rows of parts, in their order; all of them have the same tensors, or no rows.

        Raises:
            UserError: they do not.
        """
        filled = [part for part in parts if part.tensors]
        kinds = [{name: its.shape[1:] for name, its in part.tensors.items()} for part in filled]
        if any(its != kinds[0] for its in kinds):
            raise UserError("features: parts of different kinds; delete the folder `parts` of --out")
        names = filled[0].tensors if filled else {}
        tensors = {name: torch.cat([part.tensors[name] for part in filled]) for name in names}
        return cls(tensors, [text for part in parts for text in part.texts])

    def features(self, space: str) -> Tensor:
        """Return the features of a space, [N, D]."""
        return self.tensors[FEATURES + space]

    def taken(self, rows: Tensor) -> "PictureRows":
        """Return the rows of these numbers, int64 [n]; sums are left out."""
        tensors = {name: value[rows] for name, value in self.tensors.items() if not name.startswith(SUMS)}
        return PictureRows(tensors, [self.texts[row] for row in rows.tolist()])


def write_rows(path: Path, rows: PictureRows, facts: dict[str, str]) -> None:
    """Write rows, with what they were made of, whole or not at all. Raises UserError if that cannot be."""
    packed = Strings.pack(rows.texts)
    tensors = {name: value.contiguous() for name, value in rows.tensors.items()}
    tensors |= {TEXT: torch.from_numpy(packed.blob.copy()), TEXT_ENDS: torch.from_numpy(packed.ends)}  # [bytes], [N]
    with atomic_write(path) as file:
        file.write(save(tensors, {"format": FORMAT, "role": ROLE, ROLE: json.dumps(facts)}))


def read_rows(path: Path) -> tuple[PictureRows, dict[str, str]]:
    """Return the rows in a file, and what they were made of. Raises UserError for a damaged or foreign one.

    Rows that are read have as many of everything as there are captions, numbers alone, and features as float32 [N, D].
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file (features)")
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT or metadata.get("role") != ROLE:
        raise UserError(f"{path}: no features of ldm_lab's, as `evaluate` writes them")
    try:
        texts = _unpacked(tensors.pop(TEXT), tensors.pop(TEXT_ENDS))
    except (KeyError, ValueError):
        raise UserError(f"{path}: features without their captions, damaged") from None
    for name, value in tensors.items():
        kind = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        if not value.ndim or (len(value) != len(texts) and not name.startswith(SUMS)):
            raise UserError(f"{path}: {name} and captions are of different numbers of pictures, damaged")
        if name.startswith(FEATURES) and (value.dtype != torch.float32 or value.ndim != 2):
            raise UserError(f"{path}: {name} is {kind}, not float32 [pictures, width], damaged")
        if value.dtype not in (torch.float32, torch.float64):
            raise UserError(f"{path}: {name} is {kind}, no floating-point numbers, damaged")
    facts = Fields({ROLE: {**parse_json(metadata.get(ROLE, "").encode())}}).words(ROLE)
    return PictureRows(tensors, texts), dict(facts)


def check_tensors(path: Path, rows: PictureRows, wanted: Mapping[str, Sequence[int]]) -> None:
    """Raise UserError if a file's rows lack a tensor, or have one of another shape.

    Args:
        path: of the file.
        rows: in it.
        wanted: name -> shape of one row.
    """
    for name, shape in wanted.items():
        value = rows.tensors.get(name)
        if value is None:
            raise UserError(f"{path}: there is no {name} in it, damaged")
        if list(value.shape[1:]) != [*shape]:
            raise UserError(f"{path}: {name} has rows of {list(value.shape[1:])}, not {[*shape]}, damaged")


def _unpacked(blob: Tensor, ends: Tensor) -> list[str]:
    """Return packed texts: bytes [n], and where each one ends, int64 [N]. Raises ValueError for anything else."""
    if blob.dtype != torch.uint8 or ends.dtype != torch.int64 or blob.ndim != 1 or ends.ndim != 1:
        raise ValueError("not as they are packed")
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), ends])  # [N + 1]
    if (bounds[1:] < bounds[:-1]).any() or int(bounds[-1]) != len(blob):
        raise ValueError("ends that do not rise, or are not those of these bytes")
    data, places = blob.numpy().tobytes(), bounds.tolist()
    return [data[a:b].decode() for a, b in itertools.pairwise(places)]


# ------------------------------------------------------------------------------------------------- parts of a pass


def write_part(path: Path, rows: PictureRows, done: Finished) -> None:
    """Write the rows of a finished work item."""
    facts = {"fingerprint": json.dumps(done.fingerprint), "content": json.dumps(done.content)}
    write_rows(path, rows, {**facts, "counts": json.dumps(asdict(done.counts))})


def read_part(path: Path, wanted: Mapping[str, Sequence[int]] = MappingProxyType({})) -> Finished | None:
    """Return what a part says of itself; None if it is not there, damaged or another program's.

    Args:
        path: of the file.
        wanted: what it has to have of pictures (`check_tensors`).
    """
    try:
        rows, facts = read_rows(path)
        if len(rows):
            check_tensors(path, rows, wanted)
    except UserError as error:
        if path.exists():
            _tell_damage(str(error))
        return None
    fingerprint = Fields({"its": {**parse_json(facts.get("fingerprint", "").encode())}}).words("its")
    counts = Fields({**parse_json(facts.get("counts", "").encode())})
    try:
        content = json.loads(facts.get("content", ""))
    except ValueError:
        return None
    if not isinstance(content, str | int | None):
        return None
    read = Counts(
        counts.count("read") or 0,
        counts.numbers("skipped"),
        counts.texts("examples"),
        counts.numbers("filtered"),
        captions=counts.numbers("captions"),
    )
    return Finished(dict(fingerprint), content, read)


@functools.cache
def _tell_damage(what: str) -> None:
    """Say, once, that a part is damaged."""
    print_line(f"{what}; made anew")


# ------------------------------------------------------------------------------------------------ sets of real images


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """Return which facts of a file are others than those that are wanted, a few words each."""
    names = [name for name in here if there.get(name) != here[name]]
    return [f"{name} ({_shown(there.get(name, 'nothing'))} there, {_shown(here[name])} here)" for name in names]


def _shown(fact: str) -> str:
    """Return a fact as it is printed: the beginning, in one line."""
    return " ".join(fact.split())[:60]
