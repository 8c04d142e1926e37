"""One file from one of several web servers: continued after a break, checked, with a progress bar.

No library does all of it for plain web servers: huggingface_hub continues downloads, but only from the Hub; pooch and
torch.hub begin again after a break; pypdl continues and has mirrors, but does not go to the next one after a wrong
checksum. Redirects are followed to http and https only (requests knows no others), and no credentials are sent, not
even those of a .netrc.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm_lab.errors import UserError

TRIES = 4  # of one mirror, after breaks; each goes on where the one before ended
PAUSE = 1.0  # seconds before the second try, twice as long before each further one
TIMEOUT = (15, 60)  # seconds to connect, and to wait for the next bytes
CHUNK = 1 << 20  # bytes
LIMIT = 64 << 30  # bytes; nothing released is larger, and a server could send without end
BUSY = (429, 500, 502, 503, 504)  # HTTP codes after which the same server is asked again


class MirrorFailed(Exception):
    """A mirror does not give the file; the next one may."""


class BrokenOff(Exception):
    """A download broke off; the same mirror may go on."""


def download(
    urls: Sequence[str], path: Path, *, name: str, sha256: str | None = None, size: int | None = None
) -> tuple[str, str]:
    """Get a file from the first mirror that gives the right one; it appears at `path` when all of it is there.

    What came before a break lies beside it (`.NAME.part`) and is gone on with, also by the next process; one process
    at a time may do this.

    Args:
        urls: the mirrors, tried in this order.
        path: in a folder that exists.
        name: what is downloaded, for the user.
        sha256: of the right file, or None if it is not known.
        size: in bytes, or None if it is not known.

    Returns:
        The file's sha256, and the mirror that it came from.

    Raises:
        UserError: no mirror gives the right file; with each one's reason.
        OSError: it cannot be written, or there is no room for it.
    """
    part, reasons = Part(path), []
    for url in urls:
        try:
            checksum = _checked(url, part, name, sha256, size)
        except MirrorFailed as error:
            reasons.append(f"{url}: {error}")
            continue
        part.move(path)
        return checksum, url
    raise UserError(f"{name}: cannot be downloaded: {'; '.join(reasons)}")


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Return the facts in a file; none if it is not there or is not readable."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def write_json(path: Path, facts: dict[str, Any]) -> None:
    """Write facts to a file that appears whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(facts, indent=2), encoding="utf-8")
    os.replace(temporary, path)


class Part:
    """A file on its way, and beside it where it comes from and the server's mark of its version."""

    def __init__(self, path: Path) -> None:
        self.file, self.facts_file = (path.with_name(f".{path.name}.{end}") for end in ("part", "part.json"))

    def size(self) -> int:
        return self.file.stat().st_size if self.file.exists() else 0

    def facts(self) -> dict[str, Any]:
        return read_json(self.facts_file)

    def begin(self, facts: dict[str, Any]) -> None:
        self.remove()
        write_json(self.facts_file, facts)

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)
        self.facts_file.unlink(missing_ok=True)

    def move(self, path: Path) -> None:
        os.replace(self.file, path)
        self.facts_file.unlink(missing_ok=True)


def _checked(url: str, part: Part, name: str, sha256: str | None, size: int | None) -> str:
    """Complete the part from one mirror and return its checksum; remove it if that is wrong."""
    continued = part.size() > 0
    _complete(url, part, name, sha256, size)
    checksum = sha256_of(part.file)
    if sha256 in (None, checksum):
        return checksum
    part.remove()
    if continued:  # the beginning may have been of another version, or another mirror's
        return _checked(url, part, name, sha256, size)
    from tqdm import tqdm

    tqdm.write(f"{name}: {url} gave a file with sha256 {checksum}, not {sha256}; it is removed", file=sys.stderr)
    raise MirrorFailed(f"wrong checksum {checksum}, not {sha256}")


def _complete(url: str, part: Part, name: str, sha256: str | None, size: int | None) -> None:
    """Get all of a file from one mirror, in several tries if need be."""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            return _get(url, part, name, sha256, size)
        except BrokenOff as error:
            reason = str(error)
    raise MirrorFailed(f"{reason} ({TRIES} tries; what came is kept)")


def _get(url: str, part: Part, name: str, sha256: str | None, size: int | None) -> None:
    """Ask a server for the rest of a part, or all of it, and append what comes."""
    from requests import RequestException
    from tqdm import tqdm

    with _answer(url, _resume_headers(url, part, sha256)) as answer:
        have, total = part.size(), _total(answer)
        if answer.status_code == 416:  # the part is as long as the file, or longer
            if have and total == have and sha256 and sha256_of(part.file) == sha256:
                return
            part.remove()
            raise BrokenOff("the part that was there did not fit")
        if answer.status_code not in (200, 206):
            raise MirrorFailed(f"HTTP {answer.status_code} {answer.reason}")
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise MirrorFailed("it sends the file compressed")
        if answer.status_code == 206:
            begins = answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            if not begins or part.facts().get("total") not in (None, total):
                part.remove()
                raise BrokenOff("it answered with another piece, or of another file")
        else:
            have = 0
            part.begin({"url": url, "validator": _validator(answer), "total": total})
        total = total or size
        _check_size(total, size, sha256, part.file, have)
        bar = tqdm(desc=name, total=total, initial=have, unit="B", unit_scale=True, unit_divisor=1024)
        with bar, open(part.file, "ab") as file:
            try:
                for chunk in answer.iter_content(CHUNK):
                    have += len(chunk)
                    if have > (total or LIMIT):
                        break
                    file.write(chunk)
                    bar.update(len(chunk))
            except RequestException:
                raise BrokenOff("the connection broke off") from None
            file.flush()
            os.fsync(file.fileno())
    if have > (total or LIMIT):
        part.remove()
        raise MirrorFailed("it sends more than it announced")
    if total is not None and have < total:
        raise BrokenOff("the connection broke off")


def _resume_headers(url: str, part: Part, sha256: str | None) -> dict[str, str]:
    """Return the headers that ask for the rest of a part: none if it is not sure to be of the same file."""
    have, facts = part.size(), part.facts()
    if not have:
        return {}
    ask = {"Range": f"bytes={have}-"}
    if facts.get("url") == url and facts.get("validator"):
        return {**ask, "If-Range": facts["validator"]}
    # Without a mark of its version, or from another mirror: only if a checksum tells whether the pieces fit together.
    return ask if sha256 else {}


@contextmanager
def _answer(url: str, headers: dict[str, str]) -> Iterator[Any]:
    """Hand out a server's answer, whose body has not been read. A server that is busy or silent is asked again."""
    import requests
    from urllib3.util import Retry

    if not url.startswith(("http://", "https://")):
        raise MirrorFailed("only http and https addresses are taken")
    with requests.Session() as session:
        session.auth = lambda request: request  # otherwise requests sends what ~/.netrc has for the host,
        session.rebuild_auth = lambda request, answer: None  # and does so again after a redirect
        again = Retry(TRIES - 1, connect=1, backoff_factor=PAUSE, status_forcelist=BUSY, raise_on_status=False)
        for scheme in ("http://", "https://"):
            session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=again))
        headers = {"Accept-Encoding": "identity", **headers}
        try:
            answer = session.get(url, headers=headers, stream=True, timeout=TIMEOUT)
        except requests.RequestException as error:
            raise MirrorFailed(_reason(error)) from None
        with answer:
            yield answer


def _reason(error: Exception) -> str:
    """Return why there was no answer, in a few words: the cause in the heart of what requests and urllib3 raise."""
    inner = error.args[0] if error.args else error
    text = str(getattr(inner, "reason", None) or inner).strip() or type(error).__name__
    return re.sub(r"^<?HTTPS?Connection(Pool)?\(.*?\)[:,>]* ?", "", text.splitlines()[0])[:200]


def _validator(answer: Any) -> str | None:
    """Return the server's mark of a file's version, if it vouches for every byte (RFC 9110, 8.8.1)."""
    etag = answer.headers.get("ETag", "")
    return etag if etag.startswith('"') else answer.headers.get("Last-Modified")


def _total(answer: Any) -> int | None:
    """Return the size of the whole file as an answer tells it, or None."""
    if answer.status_code in (206, 416):
        told = answer.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        told = answer.headers.get("Content-Length", "")
    return int(told) if told.isascii() and told.isdigit() else None


def _check_size(total: int | None, size: int | None, sha256: str | None, file: Path, have: int) -> None:
    """Refuse a file of a wrong or unknown size, and one that there is no room for."""
    if total is None:
        if sha256 is None:
            raise MirrorFailed("it does not say how large the file is, and no checksum would show that some is missing")
        return
    if size not in (None, total) or total > LIMIT:
        raise MirrorFailed(f"a file of {total:,} bytes, not {f'{size:,}' if size else 'a sensible size'}")
    free = shutil.disk_usage(file.parent).free
    if total - have > free:
        lack = f"{(total - have) / 2**30:.1f} GiB are to come and only {free / 2**30:.1f} GiB are free"
        raise OSError(errno.ENOSPC, lack)
