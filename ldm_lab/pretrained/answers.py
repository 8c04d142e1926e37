"""Which addresses of released weights answer: asked for their first bytes, nothing is downloaded."""

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from ldm_lab.io.http import ANSWER, BUSY, BadStatus, HTTPError, NoAnswer, Response
from ldm_lab.pretrained.catalogue import Released

AT_ONCE = 8  # addresses that are asked at the same time
BEGINNING = 512  # bytes of a file that are asked for
PATIENCE = 2.0 * sum(ANSWER)  # seconds in all for one address: redirects included, and servers that drip
REFUSALS = (401, 402, 403, 407, 451)  # HTTP codes of what is there, but not for everyone
GONE = (404, 410)

Kind = Literal["answers", "refuses", "not there", "hangs", "fails", "another file"]


@dataclass(frozen=True)
class Answer:
    """What an address said.

    Attributes:
        name: of the weights.
        url: the address.
        kind: whether the file is to be had there, and if not in which way.
        words: the same for the user, with the reason.
    """

    name: str
    url: str
    kind: Kind
    words: str


def ask_all(entries: Iterable[tuple[str, Released]]) -> list[Answer]:
    """Return the answers of all addresses of released files, in their order."""
    addresses = [(name, entry, url) for name, entry in entries for url in entry.mirrors]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda address: ask(*address), addresses))


def ask(name: str, entry: Released, url: str) -> Answer:
    """Return what one address says: whether a file of the known size is there, and no page in its place.

    A socket's time limit begins anew with each byte, so a server could make one wait as long as it likes: the asking is
    left to a thread of its own, which is given up after `PATIENCE` seconds.
    """
    said: list[tuple[Kind, str]] = []
    thread = threading.Thread(target=lambda: said.append(_asked(entry, url)), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    kind, words = said[0] if said else _hangs(f"no whole answer within {PATIENCE:g} s")
    return Answer(name, url, kind, words)


def _hangs(reason: str) -> tuple[Kind, str]:
    return "hangs", f"hangs: {reason}"


def _asked(entry: Released, url: str) -> tuple[Kind, str]:
    """Ask an address for the beginning of its file."""
    try:
        with Response(url, beginning=BEGINNING) as response:
            head = b"" if response.status == 416 else response.read(BEGINNING)  # 416: not even a first byte
            total, place = response.total, response.url
    except NoAnswer as error:
        return _hangs(str(error))
    except BadStatus as error:
        return _refused(error)
    except HTTPError as error:
        kind: Kind = "refuses" if "refused" in str(error) else "fails"
        return kind, f"{kind}: {error}"
    moved = "" if place == url else f"; redirected to {place.partition('?')[0][:200]}"  # what follows may be a secret
    wrong = ""
    if not head:
        wrong = "the file there is empty"
    elif head.lstrip()[:1] == b"<":
        wrong = "a web page is there instead of the file"
    elif total is not None and entry.size not in (None, total):
        wrong = f"another file is there: {total:,} bytes, not {entry.size:,}"
    if wrong:
        return "another file", wrong + moved
    size = "it does not say how many bytes" if total is None else f"{total:,} bytes"
    return "answers", f"answers, {size}{moved}"


def _refused(error: BadStatus) -> tuple[Kind, str]:
    """Return the kind of an HTTP code."""
    if error.status in GONE:
        return "not there", f"not there: {error}"
    if error.status in REFUSALS:
        return "refuses", f"refuses: {error}"
    return "fails", f"fails: {error}" + (", perhaps for now" if error.status in BUSY else "")
