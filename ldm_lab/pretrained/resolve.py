"""From what names weights to a file on this machine: a released name, a path, or an address on the Hugging Face Hub.

`resolve_weights` takes whatever a `weights:`, `init_from` or `--checkpoint` says. Released files are downloaded into a
cache and checked; those of `hf://OWNER/REPOSITORY/FILE[@REVISION]` huggingface_hub fetches and caches itself.
"""

import difflib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from ldm_lab.downloads import Download, announcement, raise_refusals, refusals
from ldm_lab.errors import UserError, first_line
from ldm_lab.io.atomic import sha256
from ldm_lab.io.download import Wanted, download
from ldm_lab.io.http import ConnectionBroken, size_of
from ldm_lab.io.json_files import Json, read_json, write_json
from ldm_lab.io.near import meant, near_paths
from ldm_lab.pretrained.catalogue import SAFE_PART, Released, catalogue
from ldm_lab.pretrained.hub_folder import NAME as SHARED_CONFIG
from ldm_lab.pretrained.hub_folder import HubFolder

REPOSITORY = Path(__file__).resolve().parents[2]
HUB = "hf://"
HUB_ADDRESS = re.compile(
    rf"hf://(?P<repository>{SAFE_PART}/{SAFE_PART})(?:/(?P<path>(?:{SAFE_PART}/)*(?:{SAFE_PART})?))?(?:@(?P<revision>[\w./-]+))?"
)


# ---------------------------------------------------------------------------------------------------- what is meant


def resolve_weights(text: str | Path, what: str) -> Path:
    """Return the path of weights, downloaded first if they are named and not in the cache yet.

    Args:
        text: a name of the catalogue, `hf://OWNER/REPOSITORY/FILE[@REVISION]` (a folder with a slash at its end, or the
            repository alone, is a diffusers model's), or a path, looked for here and then in the repository's folder.
            `./NAME` and a `Path` are paths for sure.
        what: what the weights are for, in error messages.

    Returns:
        A file or folder that is there.

    Raises:
        UserError: nothing there, the download failed, or what came is not what was meant.
    """
    if isinstance(text, str):
        if text in catalogue():
            return fetch(text)
        if text.startswith(HUB):
            return _from_hub(text, what, offline())
        if "://" in text:
            raise UserError(f"{what}: {text!r} is neither a path nor a name of released weights; download it yourself")
    path = Path(text).expanduser()
    for found in (path, REPOSITORY / path):
        if found.is_file() or found.is_dir():
            return found
    if path.is_symlink():  # as in a cache of the Hub's that was copied or downloaded in part
        raise UserError(f"{path}: a link to {os.readlink(path)[:200]}, which is not there ({what})")
    if path.exists():  # reading a pipe or a device would never end
        raise UserError(f"{path}: not a file ({what})")
    raise UserError(f"{path}: no such file ({what}){_nearest(path, str(text))}")


def _nearest(path: Path, text: str) -> str:
    """Return a hint at what may have been meant: files and released weights whose names are nearly the same."""
    if near := near_paths(path) + released_like(text):
        return meant(near)
    folder = next((parent for parent in path.parents if parent.is_dir()), Path())
    gone = "" if folder == path.parent else f"; {folder.absolute()} has no {path.relative_to(folder).parts[0]}"
    return f"{gone}, and no released weights have that name (python -m ldm_lab pretrained list)"


def released_like(text: str) -> list[str]:
    """Return the few names of released weights that are nearest to a text, whatever its case."""
    folded = {name.lower(): name for name in catalogue()}
    near = difflib.get_close_matches(text.lower(), folded, n=2, cutoff=0.6)
    last = text.lower().rpartition("/")[2]
    near += [name for name in folded if last and last in (name.rpartition("/")[2], name.replace("_", "-"))][:2]
    return [folded[name] for name in dict.fromkeys(near)]


def to_download(text: str | Path, where: str) -> Download | None:
    """Return what has to be downloaded before weights can be read; None if they are here.

    Args:
        text: as for `resolve_weights`.
        where: the key path or flag that names them.

    Raises:
        UserError: a path with nothing there, or an address that is none.
    """
    if isinstance(text, str) and text in catalogue():
        path, entry = cached_path(text), catalogue()[text]
        return None if path.exists() else Download(where, text, path, entry.size, entry.mirrors, entry.page)
    if not (isinstance(text, str) and text.startswith(HUB)):
        resolve_weights(text, where)
        return None
    match = _hub_address(text, where)
    try:
        _from_hub(text, where, local=True)
    except UserError:
        from huggingface_hub.constants import HF_HUB_CACHE

        page = f"https://huggingface.co/{match['repository']}"
        return Download(where, text, Path(HF_HUB_CACHE), None, (page,))
    return None


def announce(downloads: Sequence[Download]) -> None:
    """Say which files are going to be downloaded. Raises UserError, with all of them, if they cannot be."""
    if not offline():
        downloads = _sized(downloads)
    raise_refusals(refusals(downloads, offline()))
    if downloads:
        print(announcement(downloads), file=sys.stderr)  # standard output is for what a program was asked for


def _sized(downloads: Sequence[Download]) -> list[Download]:
    """Return downloads with the sizes that the catalogue does not know, as their servers tell them."""
    sized, silent = [], set()  # servers: no need to wait for one again; the download will tell the reason
    for wanted in downloads:
        for url in wanted.mirrors if wanted.name in catalogue() else ():
            if wanted.size is None and (server := urlsplit(url).netloc) not in silent:
                try:
                    wanted = replace(wanted, size=size_of(url))
                except ConnectionBroken:
                    silent.add(server)
        sized.append(wanted)
    return sized


def check_untrusted(text: Json, where: str) -> None:
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
    if name not in catalogue():
        near = " or ".join(released_like(name))
        hint = f"did you mean {near}?" if near else "`python -m ldm_lab pretrained list` has their names"
        raise UserError(f"no such released weights: {name!r}; {hint}")
    parts = [*name.split("/"), catalogue()[name].file]
    assert all(re.fullmatch(SAFE_PART, part) for part in parts), f"{name}: unsafe as a path"
    return cache_folder().joinpath(*parts)


def fetch(name: str, folder: Path | None = None) -> Path:
    """Return the file of a released name, downloaded if it is not in the cache, and checked.

    Processes that need the same file at once wait for the one that downloads it.

    Args:
        name: of the catalogue.
        folder: where it may lie as well: that of the model which needs it.

    Raises:
        UserError: an unknown name; offline; every mirror failed; no room; the file in the cache is another one.
    """
    from filelock import FileLock

    path, entry = cached_path(name), catalogue()[name]
    if _is_unchanged(path, entry):
        return path
    if not path.exists() and folder is not None and (beside := lying(name, folder)) is not None:
        return beside
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


def lying(name: str, folder: Path) -> Path | None:
    """Return the file of a released name that lies in a folder; None unless it is there with the published checksum."""
    entry = catalogue()[name]
    file = folder / entry.file
    if entry.sha256 is None or not file.is_file() or entry.size not in (None, file.stat().st_size):
        return None
    return file if sha256(file) == entry.sha256 else None


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _write_record(path: Path, checksum: str, source: str) -> None:
    """Write down which file has come: its checksum, and by what an unchanged one is known."""
    stat = path.stat()
    record = {"sha256": checksum, "size": stat.st_size, "modified": stat.st_mtime_ns, "source": source}
    write_json(_record_path(path), record)


def _is_unchanged(path: Path, entry: Released) -> bool:
    """Return whether a file is there and is the one that was checked: hashing gigabytes at every start is too slow."""
    if not path.is_file():
        return False
    record, stat = read_json(_record_path(path)), path.stat()
    same = (record.get("size"), record.get("modified")) == (stat.st_size, stat.st_mtime_ns)
    return same and entry.sha256 in (None, record.get("sha256"))


def _expected(entry: Released, path: Path) -> str | None:
    """Return the checksum that a file has to have: the published one, else the one seen first."""
    seen = read_json(_record_path(path)).get("sha256")
    return entry.sha256 or (seen if isinstance(seen, str) else None)


def _check_found(name: str, entry: Released, path: Path) -> None:
    """Check a file that the user has put into the cache, or that has changed there."""
    checksum, expected = sha256(path), _expected(entry, path)
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
        checksum, source = download(entry.mirrors, path, Wanted(name, expected, entry.size))
    except UserError as error:
        changed = "" if entry.sha256 or expected is None else f"; if the change is right, remove {_record_path(path)}"
        raise UserError(f"{error}{changed}; to do it by hand, {by_hand}{other_route(entry)}") from None
    _write_record(path, checksum, source)
    print(f"{name}: from {source}", file=sys.stderr)  # standard output is for what a program was asked for
    if expected is None:
        line = f"{name}: its publisher gave no checksum; {checksum} is the one it has to have from now on"
        print(line, file=sys.stderr)


def other_route(entry: Released) -> str:
    """Return how a new training does without a file that cannot be had; "" if that is not known."""
    return f"; a new training can do without it, with {entry.instead}" if entry.instead else ""


# ------------------------------------------------------------------------------------------------ Hugging Face Hub

NETWORK = re.compile(r"model\.safetensors|upsampler_\d{1,2}\.safetensors")  # of a shared model


def _hub_address(text: str, what: str) -> re.Match[str]:
    """Return the pieces of an address of the Hub. Raises UserError."""
    match = HUB_ADDRESS.fullmatch(text)
    if match is None or ".." in text:
        raise UserError(
            f"{what}: {text!r} should be hf://OWNER/REPOSITORY[/FILE][@REVISION], or end in a slash for a folder"
        )
    return match


@dataclass(frozen=True)
class _Repository:
    """A repository of the Hub, as it was asked for.

    Attributes:
        name: OWNER/REPOSITORY.
        revision: of it; None is the newest.
        local: only what is in the Hub's cache.
        text, what: the address and its use, for messages.
    """

    name: str
    revision: str | None
    local: bool
    text: str
    what: str

    def file(self, path: str) -> Path:
        """Return a file. Raises UserError."""
        import huggingface_hub

        try:
            file = huggingface_hub.hf_hub_download(self.name, path, revision=self.revision, local_files_only=self.local)
        except Exception as error:  # whatever the Hub, its client or the connection has to complain about
            raise self.refused(error) from None
        return Path(file)

    def folder(self, allowed: list[str], ignored: list[str]) -> Path:
        """Return the folder with the files of some patterns. Raises UserError."""
        import huggingface_hub

        try:
            folder = huggingface_hub.snapshot_download(
                self.name, revision=self.revision, allow_patterns=allowed, ignore_patterns=ignored,
                local_files_only=self.local,
            )  # fmt: skip
        except Exception as error:  # likewise
            raise self.refused(error) from None
        return Path(folder)

    def refused(self, error: Exception) -> UserError:
        """Return what is said of an answer that is no file."""
        if self.local:
            return UserError(f"{self.what}: {self.text} is not in the Hub's cache, and downloads are switched off")
        reason = f"{type(error).__name__}: {first_line(error)}"
        return UserError(f"{self.what}: {self.text} cannot be downloaded ({reason})")

    def shared(self, folder: Path) -> Path:
        """Return the folder of a shared model with all files that it names. Raises UserError."""
        if (model := HubFolder.read(folder)) is not None:
            if missing := [name for name in model.files if not (folder / name).is_file()]:
                self.folder(missing, [])
            model.check()
        return folder


def _from_hub(text: str, what: str, local: bool) -> Path:
    """Return a file or a folder from huggingface_hub's cache; unless `local` it fetches what is not there.

    A folder is that of a diffusers model, or a shared model's (`HubFolder`), of which all files come that it needs,
    also where one of its networks is asked for alone.
    """
    match = _hub_address(text, what)
    path = match["path"] or ""
    repository = _Repository(match["repository"], match["revision"], local, text, what)
    if path and not path.endswith("/"):
        file = repository.file(path)
        if NETWORK.fullmatch(path):
            try:
                config = repository.file(SHARED_CONFIG)
            except UserError:  # it is not a shared model's
                return file
            repository.shared(config.parent)
        return file
    folder = repository.folder([f"{path}*.json", f"{path}*.safetensors"], [f"{path}*/*", "*.fp16.safetensors"])
    if not (folder / path / SHARED_CONFIG).is_file():
        raise UserError(
            f"{what}: {text} has no config.json; a folder has to be a shared model's, or that of a diffusers model"
        )
    return folder / path if path else repository.shared(folder)
