"""Which addresses of released weights answer: asked for their first bytes, nothing is downloaded."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ldm_lab.io.http import HTTPError, Response
from ldm_lab.pretrained.catalogue import Released

AT_ONCE = 8  # addresses that are asked at the same time
HEAD = 512  # bytes of an answer that are looked at


@dataclass(frozen=True)
class Answer:
    """What an address said.

    Attributes:
        name: of the weights.
        url: the address.
        problem: why the file is not to be had there; "" if it is.
        total: bytes of the file there; None if the server does not say.
    """

    name: str
    url: str
    problem: str = ""
    total: int | None = None


def ask_all(entries: Iterable[tuple[str, Released]]) -> list[Answer]:
    """Return the answers of all addresses of released files, in their order."""
    addresses = [(name, entry, url) for name, entry in entries for url in entry.mirrors]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda address: ask(*address), addresses))


def ask(name: str, entry: Released, url: str) -> Answer:
    """Return what one address says: whether a file of the known size is there, and no page in its place."""
    try:
        with Response(url) as response:
            total, head = response.total, response.read(HEAD)
    except HTTPError as error:
        return Answer(name, url, str(error))
    if head.lstrip()[:1] == b"<" or not head:
        return Answer(
            name, url, "a web page is there instead of the file" if head else "the file there is empty", total
        )
    if total is not None and entry.size not in (None, total):
        return Answer(name, url, f"another file is there: {total:,} bytes, not {entry.size:,}", total)
    return Answer(name, url, total=total)
