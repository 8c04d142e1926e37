"""Released weights by name: where they are, whether what came is what was meant, and where they lie on this machine.

`locate` turns whatever a `weights:`, `init_from` or `--checkpoint` says into a path: a name of `RELEASED`, a path, or
`hf://OWNER/REPOSITORY/FILE[@REVISION]` on the Hugging Face Hub, which huggingface_hub fetches and caches itself.
"""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_lab.download import download, read_json, sha256_of, write_json
from ldm_lab.errors import UserError, unknown

REPOSITORY = Path(__file__).resolve().parents[1]
HUB = "hf://"
SAFE_PART = r"[A-Za-z0-9_][\w.+-]*"  # of a name or path: no "..", nothing hidden
HUB_ADDRESS = re.compile(
    rf"hf://(?P<repository>{SAFE_PART}/{SAFE_PART})/(?P<path>(?:{SAFE_PART}/)*(?:{SAFE_PART})?)(?:@(?P<revision>[\w./-]+))?"
)


@dataclass(frozen=True)
class Released:
    """A released file.

    Attributes:
        role: the role of the part that it holds; "model" for a whole denoiser.
        what: one line for the user.
        file: its name in the cache.
        mirrors: http(s) addresses, tried in this order; none if no trustworthy one is known.
        sha256: its checksum; None if its publisher gave none. Then the one seen first holds from there on.
        size: bytes, or None if not known.
        licence: as the page says.
        page: where it is described.
    """

    role: str
    what: str
    file: str
    mirrors: tuple[str, ...] = ()
    sha256: str | None = None
    size: int | None = None
    licence: str = "not stated"
    page: str = ""


_CLOOB = "https://the-eye.eu/public/AI/models/cloob/"
_CLOOB_16 = "cloob_laion_400m_vit_b_16_16_epochs-405a3c31572e0a38f8632fa0db704d0e4521ad663555479f86babd3d178b1892.pkl"
_CLOOB_32 = "cloob_laion_400m_vit_b_16_32_epochs-646f61628eb4bc03a01ce5c23b727a348105f0405b6037a329da062739a06441.pkl"
_LDM = "https://ommer-lab.com/files/latent-diffusion/"
_LDM_PAGE = "https://github.com/CompVis/latent-diffusion"
_CCLD_FILE = "yfcc-latent-diffusion-f8-e2-s250k.ckpt"

RELEASED: dict[str, Released] = {
    "cloob/vit_b_16_laion400m_16e": Released(
        role="conditioner",
        what="CLOOB ViT-B/16, 16 epochs of LAION-400M; that of ccld/yfcc_cfg",
        file=_CLOOB_16,
        mirrors=(_CLOOB + _CLOOB_16,),
        sha256="405a3c31572e0a38f8632fa0db704d0e4521ad663555479f86babd3d178b1892",
        licence="MIT",
        page="https://github.com/crowsonkb/cloob-training",
    ),
    "cloob/vit_b_16_laion400m_32e": Released(
        role="conditioner",
        what="CLOOB ViT-B/16, 32 epochs of LAION-400M",
        file=_CLOOB_32,
        mirrors=(_CLOOB + _CLOOB_32,),
        sha256="646f61628eb4bc03a01ce5c23b727a348105f0405b6037a329da062739a06441",
        licence="MIT",
        page="https://github.com/crowsonkb/cloob-training",
    ),
    "ccld/yfcc_cfg": Released(
        role="model",
        what="CCLD, 1.2 billion parameters, YFCC100M, 250,000 steps",
        file=_CCLD_FILE,
        mirrors=(
            f"https://the-eye.eu/public/AI/models/{_CCLD_FILE}",
            f"https://mystic.the-eye.eu/public/AI/models/{_CCLD_FILE}",
        ),
        licence="MIT",
        page="https://github.com/JD-P/cloob-latent-diffusion",
    ),
    **{
        f"kl-f{f}": Released(
            role="autoencoder",
            what=f"CompVis KL autoencoder, {channels} channels at 1/{f} of the size",
            file=f"kl-f{f}.zip",
            mirrors=(f"{_LDM}kl-f{f}.zip",),
            licence="MIT",
            page=_LDM_PAGE,
        )
        for f, channels in ((4, 3), (8, 4), (16, 16), (32, 64))
    },
}


# ---------------------------------------------------------------------------------------------------- what is meant


def locate(text: str | Path, what: str) -> Path:
    """Return the path of weights, downloaded first if they are named and not in the cache yet.

    Args:
        text: a name of `RELEASED`, `hf://OWNER/REPOSITORY/FILE[@REVISION]` (a folder with a slash at its end), or a
            path, looked for here and then in the repository's folder. `./NAME` and a `Path` are paths for sure.
        what: what the weights are for, in error messages.

    Returns:
        A file or folder that is there.

    Raises:
        UserError: nothing there, the download failed, or what came is not what was meant.
    """
    if isinstance(text, str):
        if text in RELEASED:
            return fetch(text)
        if text.startswith(HUB):
            return _from_hub(text, what, offline())
        if "://" in text:
            raise UserError(f"{what}: {text!r} is neither a path nor a name of released weights; download it yourself")
    path = Path(text).expanduser()
    for found in (path, REPOSITORY / path):
        if found.is_file() or found.is_dir():
            return found
    if path.exists():  # reading a pipe or a device would never end
        raise UserError(f"{path}: not a file ({what})")
    raise UserError(f"{path}: no such file ({what}), and {unknown('released weights', text, RELEASED)}")


def check_foreign(text: Any, where: str) -> None:
    """Refuse weights that a config out of a checkpoint may not name: whoever made it would choose what is downloaded.

    Released names and paths are let in, and of the Hub what is in this machine's cache, as after a training with it.

    Raises:
        UserError: another address, or nothing of the kind.
    """
    if isinstance(text, str) and text.startswith(HUB):
        try:
            _from_hub(text, where, local=True)
        except UserError:
            raise UserError(
                f"{where}: refused, a checkpoint must not have {text!r} downloaded; "
                "`python -m ldm_lab pretrained get` does if you trust it"
            ) from None
    elif text is not None and (not isinstance(text, str) or "://" in text):
        raise UserError(f"{where}: refused, a checkpoint's config names released weights or paths, not {text!r}")


# ------------------------------------------------------------------------------------------------------- the cache


def cache_folder() -> Path:
    """Return the folder of downloaded weights: $LDM_LAB_CACHE, else ldm_lab in the user's cache folder."""
    if os.environ.get("LDM_LAB_CACHE"):
        return Path(os.environ["LDM_LAB_CACHE"]).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "ldm_lab"


def cached_path(name: str) -> Path:
    """Return where the file of a released name lies, or has to be put. Raises UserError for an unknown name."""
    if name not in RELEASED:
        raise UserError(unknown("released weights", name, RELEASED))
    parts = [*name.split("/"), RELEASED[name].file]
    assert all(re.fullmatch(SAFE_PART, part) for part in parts), f"{name}: unsafe as a path"
    return cache_folder().joinpath(*parts)


def fetch(name: str) -> Path:
    """Return the file of a released name, downloaded if it is not in the cache, and checked.

    Processes that need the same file at once wait for the one that downloads it.

    Raises:
        UserError: an unknown name; offline; every mirror failed; no room; the file in the cache is another one.
    """
    from filelock import FileLock

    path, entry = cached_path(name), RELEASED[name]
    if _is_unchanged(path, entry):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / ".lock"):
            if not path.exists():
                _download(name, entry, path)
            elif not _is_unchanged(path, entry):
                _check_found(name, entry, path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be written: {reason} (LDM_LAB_CACHE=FOLDER moves it)") from None
    return path


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _write_record(path: Path, checksum: str, source: str) -> None:
    """Write down which file has come: its checksum, and by what an unchanged one is known."""
    stat = path.stat()
    facts = {"sha256": checksum, "size": stat.st_size, "modified": stat.st_mtime_ns, "source": source}
    write_json(_record_path(path), facts)


def _is_unchanged(path: Path, entry: Released) -> bool:
    """Return whether a file is there and is the one that was checked: hashing gigabytes at every start is too slow."""
    if not path.is_file():
        return False
    record, stat = read_json(_record_path(path)), path.stat()
    same = (record.get("size"), record.get("modified")) == (stat.st_size, stat.st_mtime_ns)
    return same and entry.sha256 in (None, record.get("sha256"))


def _expected(entry: Released, path: Path) -> str | None:
    """Return the checksum that a file has to have: the published one, else the one seen first."""
    return entry.sha256 or read_json(_record_path(path)).get("sha256")


def _check_found(name: str, entry: Released, path: Path) -> None:
    """Check a file that the user has put into the cache, or that has changed there."""
    checksum, expected = sha256_of(path), _expected(entry, path)
    if expected not in (None, checksum):
        known = "published" if entry.sha256 else "seen first"
        raise UserError(
            f"{path}: not {name}: its sha256 is {checksum}, the one {known} {expected}; "
            "remove the file to download it again"
        )
    _write_record(path, checksum, "found in the cache")


def offline() -> bool:
    """Return whether the environment forbids downloads (LDM_LAB_OFFLINE, HF_HUB_OFFLINE)."""
    switches = (os.environ.get(key, "").lower() for key in ("LDM_LAB_OFFLINE", "HF_HUB_OFFLINE"))
    return any(switch in ("1", "true", "yes", "on") for switch in switches)


def _download(name: str, entry: Released, path: Path) -> None:
    """Bring a file into the cache, from the first mirror that gives the right one."""
    sources = " or ".join((*entry.mirrors, entry.page) if entry.mirrors else (entry.page or "its publisher",))
    by_hand = f"put {entry.file} (from {sources}) at {path}"
    if offline():
        raise UserError(f"{name}: not in the cache, and downloads are switched off: {by_hand}")
    if not entry.mirrors:
        raise UserError(f"{name}: no address is known to download it from: {by_hand}")
    expected = _expected(entry, path)
    try:
        checksum, source = download(entry.mirrors, path, name=name, sha256=expected, size=entry.size)
    except UserError as error:
        changed = "" if entry.sha256 or expected is None else f"; if the change is right, remove {_record_path(path)}"
        raise UserError(f"{error}{changed}; to do it by hand, {by_hand}") from None
    _write_record(path, checksum, source)
    if expected is None:
        told = f"{name}: its publisher gave no checksum; {checksum} is the one it has to have from now on"
        print(told, file=sys.stderr)  # standard output is for what a program was asked for


# ------------------------------------------------------------------------------------------------ Hugging Face Hub


def _from_hub(text: str, what: str, local: bool) -> Path:
    """Return a file, or the folder of a diffusers model, from huggingface_hub's cache; unless `local` it fetches it."""
    match = HUB_ADDRESS.fullmatch(text)
    if match is None or ".." in text:
        raise UserError(
            f"{what}: {text!r} should be hf://OWNER/REPOSITORY/FILE[@REVISION], or end in a slash for a folder"
        )
    import huggingface_hub

    repository, path, revision = match["repository"], match["path"], match["revision"]
    try:
        if path and not path.endswith("/"):
            return Path(huggingface_hub.hf_hub_download(repository, path, revision=revision, local_files_only=local))
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            allow_patterns=[f"{path}*.json", f"{path}*.safetensors"],
            ignore_patterns=[f"{path}*/*", "*.fp16.safetensors"],
            local_files_only=local,
        )
    except Exception as error:  # whatever the Hub, its client or the connection has to complain about
        if local:
            raise UserError(f"{what}: {text} is not in the Hub's cache, and downloads are switched off") from None
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(f"{what}: {text} cannot be downloaded ({type(error).__name__}: {reason})") from None
    if not (Path(folder) / path / "config.json").is_file():
        raise UserError(f"{what}: {text} has no config.json; a folder has to be that of a diffusers model")
    return Path(folder) / path
