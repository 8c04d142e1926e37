"""Zips in which weights are released: one checkpoint, perhaps its YAML and a text. Unpacked with distrust."""

import contextlib
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ldm_lab.errors import UserError, first_line

WEIGHTS = (".ckpt", ".pt", ".pth", ".safetensors")
TEXTS = (".yaml", ".yml", ".txt", ".md", "")  # the last are LICENSE and README
OTHERS = {  # endings of names that only such a zip has in it -> what it is
    "model.weights.h5": "a Keras 3 archive, whose weights are HDF5; of a head Keras's SavedModel, a folder, is read",
    ".npy": "an archive of NumPy's arrays (.npz); save them as safetensors",
    "_weights_config.json": "a program of torch.export's; save the module's state_dict instead",
    "[Content_Types].xml": "a document of an office program",
    "index.html": "a saved web site; take the link that downloads the file",
}
MOST_MEMBERS = 100
LARGEST = 32 << 30  # bytes unpacked; a latent diffusion model of its time has 16 GB
DENSEST = 20  # bytes out of one byte; weights are hardly compressible
SMALL = 16 << 20  # below that, density is of no concern
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError)


def is_release(path: Path) -> bool:
    """Return whether a file is a zip that is not itself a checkpoint: torch's have a `data.pkl` in a folder."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return not any(PurePosixPath(name).parts[1:] == ("data.pkl",) for name in archive.namelist())
    except (*DAMAGE, OSError):
        return False


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Unpack the checkpoint of a release into a temporary folder that goes away again, and hand out its path.

    A YAML lies beside it under the same name. What the members are called has no influence on where they are written.

    Raises:
        UserError: a damaged zip, or one with anything else in it than a checkpoint and texts.
    """
    try:
        with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory(prefix="ldm_lab.") as folder:
            weights, config = _members(path, archive)
            target = Path(folder) / f"weights{PurePosixPath(weights.filename).suffix.lower()}"
            _unpack(archive, weights, target)
            if config is not None:
                _unpack(archive, config, target.with_suffix(".yaml"))
            yield target
    except UserError:
        raise
    except DAMAGE as error:
        raise UserError(f"{path}: not a readable zip, truncated or damaged ({first_line(error)})") from None


def _members(path: Path, archive: zipfile.ZipFile) -> tuple[zipfile.ZipInfo, zipfile.ZipInfo | None]:
    """Return the entries of the checkpoint and of its YAML; anything surprising among all of them is refused."""
    found: dict[str, list[zipfile.ZipInfo]] = {"weights": [], "yaml": []}
    entries = archive.infolist()
    for ending, what in OTHERS.items():
        if any(info.filename.endswith(ending) for info in entries):
            raise UserError(f"{path}: no weights that are read here: it is {what}")
    if len(entries) > MOST_MEMBERS:
        raise UserError(f"{path}: refused: {len(entries)} members, a release has a checkpoint and a few texts")
    for info in entries:
        name, pure = info.filename[:100], PurePosixPath(info.filename)
        if pure.is_absolute() or ".." in pure.parts or "\\" in info.filename or ":" in info.filename:
            raise UserError(f"{path}: refused: its member {name!r} leads out of the folder it would be unpacked into")
        mode = info.external_attr >> 16
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise UserError(f"{path}: refused: its member {name!r} is a link or a device, not a file")
        if info.flag_bits & 1:
            raise UserError(f"{path}: its member {name!r} is encrypted")
        if info.is_dir():
            continue
        if info.file_size > LARGEST or info.file_size > max(SMALL, DENSEST * info.compress_size):
            raise UserError(
                f"{path}: refused: its member {name!r} would unpack {info.compress_size:,} bytes to "
                f"{info.file_size:,}, which weights do not do"
            )
        suffix = pure.suffix.lower()
        if suffix not in (*WEIGHTS, *TEXTS):
            raise UserError(f"{path}: refused: {name!r} in it; a release has a checkpoint, its .yaml and texts")
        if suffix in WEIGHTS:
            found["weights"].append(info)
        elif suffix in (".yaml", ".yml"):
            found["yaml"].append(info)
    if len(found["weights"]) != 1:
        raise UserError(
            f"{path}: {len(found['weights'])} checkpoints in this zip ({', '.join(WEIGHTS)}), one is needed"
        )
    return found["weights"][0], found["yaml"][0] if len(found["yaml"]) == 1 else None


def _unpack(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    """Write a member to a file. zipfile gives no more bytes than declared and compares the checksum."""
    with archive.open(info) as source, open(target, "xb") as file:
        while chunk := source.read(1 << 24):
            file.write(chunk)
