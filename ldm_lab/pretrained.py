"""Released weights by name: where they are, whether what came is what was meant, and where they lie on this machine.

`locate` turns whatever a `weights:`, `init_from` or `--checkpoint` says into a path: a name of `RELEASED`, a path, or
`hf://OWNER/REPOSITORY/FILE[@REVISION]` on the Hugging Face Hub, which huggingface_hub fetches and caches itself.

The released files lie on plain web servers. requests fetches them; what is done here is what no library at hand does
together: huggingface_hub resumes, but only from the Hub; torch.hub and pooch begin again after a break. Redirects are
followed to http and https only (requests knows no others), and no credentials are sent, not even those of a .netrc.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ldm_lab.errors import UserError, unknown

REPOSITORY = Path(__file__).resolve().parents[1]
HUB = "hf://"
TRIES = 4  # of one mirror, after breaks; each goes on where the one before ended
PAUSE = 1.0  # seconds before the second try, twice as long before each further one
TIMEOUT = (15, 60)  # seconds to connect, and to wait for the next bytes
CHUNK = 1 << 20  # bytes
LIMIT = 64 << 30  # bytes; nothing released is larger, and a server could send without end
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
        mirrors: http(s) or file addresses, tried in this order; none if no trustworthy one is known.
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
_GLIDE = "https://openaipublic.blob.core.windows.net/diffusion/dec-2021/"
_GLIDE_PAGE = "https://github.com/openai/glide-text2im"
_LAIONIDE = "https://github.com/afiaka87/laionide/releases/download/Checkpoints/"
_MINI_PAGE = "https://github.com/Aaronlozhkin/miniGLIDE-and-dogGLIDE"

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
    **{
        f"glide/{name.replace('_', '-')}": Released(
            role=role,
            what=f"GLIDE (filtered), {what}",
            file=f"{name}.pt",
            mirrors=(f"{_GLIDE}{name}.pt",),
            licence="MIT",
            page=_GLIDE_PAGE,
        )
        for name, role, what in (
            ("base", "model", "text to 64 px, 385,030,726 parameters"),
            ("upsample", "model", "64 to 256 px, 398,361,286 parameters"),
            ("base_inpaint", "model", "inpainting at 64 px, 385,037,638 parameters"),
            ("upsample_inpaint", "model", "inpainting, 64 to 256 px, 398,368,198 parameters"),
            ("clip_image_enc", "guide", "noised CLIP, image tower, for CLIP guidance"),
            ("clip_text_enc", "guide", "noised CLIP, text tower, for CLIP guidance"),
        )
    },
    **{
        f"laionide/{name}": Released(
            role="model",
            what=what,
            file=f"laionide-{name}.pt",
            mirrors=(f"{_LAIONIDE}laionide-{name}.pt",),
            page="https://github.com/LAION-AI/laionide",
        )
        for name, what in (
            ("v2-base", "GLIDE's base, fine-tuned on LAION"),
            ("v2-sr", "GLIDE's upsampler, fine-tuned on LAION"),
            ("v3-base", "laionide v2-base, fine-tuned on CC12M, COCO and others"),
        )
    },
    **{
        name.lower(): Released(
            role="model",
            what=f"{what}; 156,947,494 parameters",
            file=f"{name}.pt",
            page=_MINI_PAGE,  # on a drive that wants a browser
        )
        for name, what in (
            ("miniGLIDE", "a small GLIDE of 100 timesteps, SBU captions"),
            ("miniGLIDEsimple", "the same without the bound on the variance"),
            ("dogGLIDE", "a small GLIDE of 1000 timesteps, Stanford Dogs"),
        )
    },
    "gpt2/vocab.bpe": Released(
        role="conditioner",
        what="GPT-2's byte-pair encoding, for GLIDE's texts",
        file="vocab.bpe",
        mirrors=("https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",),
        sha256="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        size=456_318,
        licence="MIT (modified)",
        page="https://github.com/openai/gpt-2",
    ),
}


# ---------------------------------------------------------------------------------------------------- what is meant


def locate(text: str | Path, what: str) -> Path:
    """Return the path of weights, downloaded first if they are named and not in the cache yet.

    Args:
        text: a name of `RELEASED`, `hf://OWNER/REPOSITORY/FILE[@REVISION]` (a folder with a slash at its end), or a
            path, looked for here and then in the repository's folder. `./NAME` is a path for sure.
        what: what the weights are for, in error messages.

    Returns:
        A file, or the folder of a diffusers model (it has a `config.json`).

    Raises:
        UserError: nothing there, the download failed, or what came is not what was meant.
    """
    text = str(text)
    if text in RELEASED:
        return fetch(text)
    if text.startswith(HUB):
        return _from_hub(text, what)
    if "://" in text:
        raise UserError(f"{what}: {text!r} is neither a path nor a name of released weights; download it yourself")
    for folder in (Path(), REPOSITORY):
        path = folder / Path(text).expanduser()
        if path.is_file() or (path / "config.json").is_file():
            return path
    path = Path(text).expanduser()
    if path.exists():
        raise UserError(f"{path}: not a file ({what})")
    raise UserError(f"{path}: no such file ({what}), and {unknown('released weights', text, RELEASED)}")


def check_foreign(text: Any, where: str) -> None:
    """Refuse weights that a config out of a checkpoint may not name: only released names and paths are let in.

    Whoever made the checkpoint would choose what is downloaded, and from where.

    Raises:
        UserError: an address.
    """
    if text is not None and (not isinstance(text, str) or "://" in text):
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
        raise UserError(
            f"{path}: cannot be written: {error.strerror or error} (LDM_LAB_CACHE=FOLDER moves it)"
        ) from None
    return path


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _record(path: Path) -> dict[str, Any]:
    """Return what was written down about a file when it came: sha256, size, modified, source."""
    try:
        record = json.loads(_record_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")
    os.replace(temporary, path)


def _write_record(path: Path, checksum: str, source: str) -> None:
    stat = path.stat()
    facts = {"sha256": checksum, "size": stat.st_size, "modified": stat.st_mtime_ns, "source": source}
    _write_json(_record_path(path), facts)


def _is_unchanged(path: Path, entry: Released) -> bool:
    """Return whether a file is there and is the one that was checked: hashing gigabytes at every start is too slow."""
    if not path.is_file():
        return False
    record, stat = _record(path), path.stat()
    same = (record.get("size"), record.get("modified")) == (stat.st_size, stat.st_mtime_ns)
    return same and entry.sha256 in (None, record.get("sha256"))


def _check_found(name: str, entry: Released, path: Path) -> None:
    """Check a file that the user has put into the cache, or that has changed there."""
    checksum = _sha256(path)
    expected = entry.sha256 or _record(path).get("sha256")
    if expected not in (None, checksum):
        known = "published" if entry.sha256 else "seen first"
        raise UserError(
            f"{path}: not {name}: its sha256 is {checksum}, the one {known} {expected}; "
            "remove the file to download it again"
        )
    _write_record(path, checksum, "found in the cache")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------------- downloading


class _Failed(Exception):
    """A mirror does not give the file; the next one may."""


class _Broken(Exception):
    """A download broke off; the same mirror may go on."""


def offline() -> bool:
    """Return whether the environment forbids downloads (LDM_LAB_OFFLINE, HF_HUB_OFFLINE)."""
    return any(
        os.environ.get(key, "").lower() in ("1", "true", "yes", "on") for key in ("LDM_LAB_OFFLINE", "HF_HUB_OFFLINE")
    )


def _by_hand(entry: Released, path: Path) -> str:
    sources = " or ".join((*entry.mirrors, entry.page) if entry.mirrors else (entry.page or "its publisher",))
    return f"put {entry.file} (from {sources}) at {path}"


def _download(name: str, entry: Released, path: Path) -> None:
    """Get a file from the first mirror that gives the right one."""
    if offline():
        raise UserError(f"{name}: not in the cache, and downloads are switched off: {_by_hand(entry, path)}")
    if not entry.mirrors:
        raise UserError(f"{name}: no address is known to download it from: {_by_hand(entry, path)}")
    expected = entry.sha256 or _record(path).get("sha256")
    reasons = []
    for url in entry.mirrors:
        try:
            checksum = _checked(name, entry, url, _Part(path), expected)
        except _Failed as error:
            reasons.append(f"{url}: {error}")
            continue
        _Part(path).move(path)
        _write_record(path, checksum, url)
        if expected is None:
            _say(f"{name}: its publisher gave no checksum; {checksum} is the one it has to have from now on")
        return
    changed = "" if entry.sha256 or expected is None else f"; if the change is right, remove {_record_path(path)}"
    raise UserError(
        f"{name}: cannot be downloaded: {'; '.join(reasons)}{changed}. {_by_hand(entry, path).capitalize()}"
    )


def _say(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)  # standard output is for what a program was asked for


class _Part:
    """A file on its way, and beside it where it comes from and the server's mark of its version."""

    def __init__(self, path: Path) -> None:
        self.file, self.facts_file = (path.with_name(f".{path.name}.{end}") for end in ("part", "part.json"))

    def size(self) -> int:
        return self.file.stat().st_size if self.file.exists() else 0

    def facts(self) -> dict[str, Any]:
        try:
            facts = json.loads(self.facts_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return facts if isinstance(facts, dict) else {}

    def begin(self, facts: dict[str, Any]) -> None:
        self.remove()
        _write_json(self.facts_file, facts)

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)
        self.facts_file.unlink(missing_ok=True)

    def move(self, path: Path) -> None:
        os.replace(self.file, path)
        self.facts_file.unlink(missing_ok=True)


def _checked(name: str, entry: Released, url: str, part: _Part, expected: str | None) -> str:
    """Complete the part from one mirror and return its checksum; remove it if that is wrong."""
    continued = part.size() > 0
    if urlsplit(url).scheme == "file":
        continued = False
        _copy(url, part, entry)
    else:
        _get_in_tries(name, entry, url, part, expected)
    checksum = _sha256(part.file)
    if expected in (None, checksum):
        return checksum
    _say(f"{name}: {url} gave a file with sha256 {checksum}, not {expected}; it is removed")
    part.remove()
    if continued:  # the beginning may have been of another version, or another mirror's
        return _checked(name, entry, url, part, expected)
    raise _Failed(f"wrong checksum {checksum}, not {expected}")


def _copy(url: str, part: _Part, entry: Released) -> None:
    source = Path(unquote(urlsplit(url).path))
    if not source.is_file():
        raise _Failed("no such file")
    _check_size(entry, source.stat().st_size, part.file, 0)
    part.begin({"url": url})
    shutil.copyfile(source, part.file)


def _get_in_tries(name: str, entry: Released, url: str, part: _Part, expected: str | None) -> None:
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            return _get(name, entry, url, part, expected)
        except _Broken as error:
            reason = str(error)
    raise _Failed(f"{reason} ({TRIES} tries; what came is kept)")


def _resume_headers(url: str, part: _Part, expected: str | None) -> dict[str, str]:
    """Return the headers that ask for the rest of a part: none if it is not sure to be of the same file."""
    have, facts = part.size(), part.facts()
    if not have:
        return {}
    ask = {"Range": f"bytes={have}-"}
    if facts.get("url") == url and facts.get("validator"):
        return {**ask, "If-Range": facts["validator"]}
    # Without a mark of its version, or from another mirror: only if a checksum tells whether the pieces fit together.
    return ask if expected else {}


@contextmanager
def _response(url: str, headers: dict[str, str]) -> Iterator[Any]:
    import requests

    if urlsplit(url).scheme not in ("http", "https"):
        raise _Failed("only http, https and file addresses are taken")
    try:
        with requests.Session() as session:
            session.auth = lambda request: request  # otherwise requests sends what ~/.netrc has for the host,
            session.rebuild_auth = lambda request, answer: None  # and does so again after a redirect
            with session.get(
                url, headers={"Accept-Encoding": "identity", **headers}, stream=True, timeout=TIMEOUT
            ) as answer:
                yield answer
    except (requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL, requests.TooManyRedirects) as error:
        raise _Failed(_line(error)) from None
    except requests.exceptions.ChunkedEncodingError:
        raise _Broken("the connection broke off") from None
    except requests.ConnectTimeout:
        raise _Failed("no connection in time") from None
    except requests.Timeout:
        raise _Broken("no answer in time") from None
    except requests.ConnectionError as error:
        if "timed out" in str(error):
            raise _Broken("no answer in time") from None
        if "Connection aborted" in str(error):
            raise _Broken("the connection broke off") from None
        raise _Failed(f"no connection ({_cause(error)})") from None
    except requests.RequestException as error:
        raise _Failed(_line(error)) from None


def _get(name: str, entry: Released, url: str, part: _Part, expected: str | None) -> None:
    """Ask a server for the rest of a part, or all of it, and append what comes."""
    from tqdm import tqdm

    with _response(url, _resume_headers(url, part, expected)) as answer:
        have = part.size()
        if answer.status_code == 416:  # the part is as long as the file, or longer
            total = _total(answer)
            if have and total == have and expected and _sha256(part.file) == expected:
                return
            part.remove()
            raise _Broken("the part that was there did not fit")
        if answer.status_code not in (200, 206):
            raise _Failed(f"HTTP {answer.status_code} {answer.reason}")
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise _Failed("it sends the file compressed")
        total = _total(answer)
        if answer.status_code == 206:
            facts = part.facts()
            begins = re.match(rf"bytes {have}-", answer.headers.get("Content-Range", ""))
            if not begins or facts.get("total") not in (None, total):
                part.remove()
                raise _Broken("it answered with another piece, or of another file")
        else:
            have = 0
            etag = answer.headers.get("ETag", "")
            strong = (
                etag if etag.startswith('"') else None
            )  # a weak one does not vouch for every byte (RFC 9110, 8.8.1)
            validator = strong or answer.headers.get("Last-Modified")
            part.begin({"url": url, "validator": validator, "total": total})
        _check_size(entry, total, part.file, have)
        bar = tqdm(desc=name, total=total, initial=have, unit="B", unit_scale=True, unit_divisor=1024)
        with bar, open(part.file, "ab") as file:
            for chunk in answer.iter_content(CHUNK):
                have += len(chunk)
                if have > (total or LIMIT):
                    raise _Failed("it sends more than it announced")
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and have < total:
        raise _Broken("the connection broke off")


def _total(answer: Any) -> int | None:
    """Return the size of the whole file as an answer tells it, or None."""
    if answer.status_code in (206, 416):
        told = answer.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        told = answer.headers.get("Content-Length", "")
    return int(told) if told.isascii() and told.isdigit() else None


def _check_size(entry: Released, total: int | None, file: Path, have: int) -> None:
    """Refuse a file of a wrong size, and one that there is no room for."""
    if total is None:
        return
    if entry.size not in (None, total) or total > LIMIT:
        raise _Failed(f"a file of {total:,} bytes, not {entry.size or 'a sensible size'}")
    free = shutil.disk_usage(file.parent).free
    if total - have > free:
        raise UserError(
            f"{file.parent}: {(total - have) / 2**30:.1f} GiB are to come and only {free / 2**30:.1f} GiB are free; "
            "free some space, or set LDM_LAB_CACHE to a folder elsewhere"
        )


def _line(error: Exception) -> str:
    """Return an exception's first line, not too long."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _cause(error: BaseException) -> str:
    """Return why there was no connection, in a few words."""
    return str(error).rpartition("] ")[2].rstrip("')\" ")[:100] or type(error).__name__


# ------------------------------------------------------------------------------------------------ Hugging Face Hub


def _from_hub(text: str, what: str) -> Path:
    """Return a file, or the folder of a diffusers model, out of the cache of huggingface_hub, which fetches it."""
    match = HUB_ADDRESS.fullmatch(text)
    if match is None or ".." in text:
        raise UserError(
            f"{what}: {text!r} should be hf://OWNER/REPOSITORY/FILE[@REVISION], or end in a slash for a folder"
        )
    import huggingface_hub

    repository, path, revision = match["repository"], match["path"], match["revision"]
    local = offline()
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
        raise UserError(f"{what}: {text} cannot be downloaded ({type(error).__name__}: {_line(error)})") from None
    if not (Path(folder) / path / "config.json").is_file():
        raise UserError(f"{what}: {text} has no config.json; a folder has to be that of a diffusers model")
    return Path(folder) / path
