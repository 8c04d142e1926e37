"""The HTTP client: one answer (`Response`), and a file that is read on after a break (`open_url`).

Redirects are followed to http and https only (requests knows no others), and no credentials are sent, not even those of
a .netrc.
"""

import re
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ldm_lab.errors import first_line

if TYPE_CHECKING:
    import requests
    from urllib3 import BaseHTTPResponse

TRIES = 4  # of one server, after breaks; each goes on where the one before ended
PAUSE = 1.0  # seconds before the second try, twice as long before each further one
LONGEST_PAUSE = 30.0  # seconds, whatever a busy server asks for
TIMEOUT = (15, 60)  # seconds to connect, and to wait for the next bytes
ANSWER = (5, 10)  # the same for what is only nice to know
CHUNK = 1 << 20  # bytes
BUSY = (429, 500, 502, 503, 504)  # HTTP codes after which the same server is asked again


class HTTPError(OSError):
    """A server does not give a file; asking it again would not help."""


class BadStatus(HTTPError):
    """A server answers that it does not give a file. Attribute status: its HTTP code."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"HTTP {status} {reason}".rstrip())
        self.status = status


class ConnectionBroken(HTTPError):
    """A transfer broke off, or did not begin; asking again may help."""


class NoAnswer(ConnectionBroken):
    """A server was waited for, and said nothing."""


# ------------------------------------------------------------------------------------------------------ one answer


class Response:
    """A server's answer, whose body has not been read.

    Attributes:
        status: 200 (the whole file), 206 (a piece of it) or 416 (there is nothing from this byte on).
        start: the byte of the file at which the body begins; None if a piece does not say.
        total: bytes of the whole file, or None if it is not said.
        validator: the server's mark of the file's version, if it vouches for every byte (RFC 9110, 8.8.1).
        url: the address that answered, another one after a redirect.
    """

    def __init__(self, url: str, start: int = 0, validator: str | None = None, *, beginning: int | None = None) -> None:
        """Ask for a file from a byte on. A busy server is asked again.

        Args:
            url: http or https.
            start: the first byte that is wanted.
            validator: of the version that the bytes before are of; of another one the whole file is sent.
            beginning: only so many first bytes are wanted, and only once, with little patience.

        Raises:
            NoAnswer: it was waited for in vain.
            ConnectionBroken: no connection, or one that broke off.
            BadStatus: an answer that is no file.
            HTTPError: another address, or an answer that cannot be read.
        """
        if not url.lower().startswith(("http://", "https://")):
            raise HTTPError("only http and https addresses are taken")
        headers = {"User-Agent": "ldm_lab", "Accept-Encoding": "identity"}
        headers |= {"Range": f"bytes={start}-"} if start else {}
        headers |= {"Range": f"bytes=0-{beginning - 1}"} if beginning else {}
        headers |= {"If-Range": validator} if start and validator else {}
        self._session = _session(TRIES if beginning is None else 1)
        try:
            self._answer = _get(self._session, url, headers, TIMEOUT if beginning is None else ANSWER)
            self.status, self.url = self._answer.status_code, self._answer.url
            if self.status not in (200, 206, 416):
                raise BadStatus(self.status, self._answer.reason)
            if self._answer.headers.get("Content-Encoding", "identity") != "identity":
                raise HTTPError("it sends the file compressed")
        except HTTPError:
            self._session.close()
            raise
        piece = re.match(r"bytes (\d+)-", self._answer.headers.get("Content-Range", ""))
        self.start: int | None = 0 if self.status == 200 else int(piece[1]) if piece else None
        self.total = _total(self._answer)
        etag = self._answer.headers.get("ETag", "")
        self.validator: str | None = etag if etag.startswith('"') else self._answer.headers.get("Last-Modified")

    def read(self, size: int) -> bytes:
        """Return the next bytes, at most `size`; none at the end. Raises ConnectionBroken."""
        from urllib3.exceptions import HTTPError as LibraryError

        try:
            return self._answer.raw.read(size, decode_content=False)
        except (LibraryError, OSError):
            raise ConnectionBroken("the connection broke off") from None

    def close(self) -> None:
        """Drop the connection."""
        self._answer.close()
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _session(tries: int = TRIES) -> "requests.Session":
    import requests
    from urllib3.util import Retry

    class _Patience(Retry):
        """Retries that a server cannot make wait for as long as it likes."""

        def get_retry_after(self, response: "BaseHTTPResponse") -> float | None:
            wish = super().get_retry_after(response)
            return None if wish is None else min(wish, LONGEST_PAUSE)

    session = requests.Session()
    session.auth = lambda request: request  # otherwise requests sends what ~/.netrc has for the host,
    session.rebuild_auth = lambda request, answer: None  # and does so again after a redirect
    again = _Patience(
        tries - 1, connect=min(1, tries - 1), backoff_factor=PAUSE, status_forcelist=BUSY, raise_on_status=False
    )
    for scheme in ("http://", "https://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=again))
    return session


def _get(
    session: "requests.Session", url: str, headers: dict[str, str], timeout: tuple[float, float]
) -> "requests.Response":
    import requests
    from urllib3.exceptions import NewConnectionError  # a kind of timeout to urllib3, when a connection is refused
    from urllib3.exceptions import TimeoutError as Waited

    try:
        return session.get(url, headers=headers, stream=True, timeout=timeout)
    except requests.ConnectionError as error:
        cause = _cause(error)
        in_vain = isinstance(cause, Waited) and not isinstance(cause, NewConnectionError)
        raise (NoAnswer if in_vain else ConnectionBroken)(_reason(error)) from None
    except (requests.RequestException, ValueError) as error:  # the latter of addresses that redirects lead to
        raise HTTPError(_reason(error)) from None


def _cause(error: Exception) -> Exception:
    """Return the cause in the heart of what requests and urllib3 raise."""
    from urllib3.exceptions import MaxRetryError

    inner = error.args[0] if error.args and isinstance(error.args[0], Exception) else error
    return inner.reason if isinstance(inner, MaxRetryError) and inner.reason is not None else inner


def _reason(error: Exception) -> str:
    """Return why there was no answer, in a few words."""
    return re.sub(r"^<?HTTPS?Connection(Pool)?\(.*?\)[:,>]* ?", "", first_line(_cause(error), 1000))[:200]


def _total(answer: "requests.Response") -> int | None:
    """Return the size of the whole file as an answer tells it, or None."""
    if answer.status_code in (206, 416):
        text = answer.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        text = answer.headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdigit() else None


# ------------------------------------------------------------------------------------------------------ a stream


class RemoteFile:
    """A file over HTTP, read from front to back; after a break it goes on at the byte where it was."""

    def __init__(self, url: str, start: int = 0, tries: int = TRIES, first_tries: int | None = None) -> None:
        """Open it. See `open_url`."""
        self.url, self.place, self.tries = url, start, first_tries or tries
        self.size: int | None = None
        self._response: Response | None = None
        self._retry(0)
        self.tries = tries

    def read(self, size: int) -> bytes:
        """Return the next bytes, at most `size`; none at the end.

        Raises:
            ConnectionBroken: it broke off so many times in a row, without a byte in between.
            HTTPError: the server does not give the rest.
        """
        data = self._retry(size)
        self.place += len(data)
        return data

    def close(self) -> None:
        """Drop the connection."""
        if self._response is not None:
            self._response.close()
            self._response = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _retry(self, size: int) -> bytes:
        for attempt in range(self.tries):
            try:
                if self._response is None:
                    self._response = self._connect()
                return self._next(self._response, size) if size else b""
            except ConnectionBroken:
                self.close()
                if attempt == self.tries - 1:
                    raise
                time.sleep(PAUSE * 2**attempt)
        raise AssertionError("the last try returns or raises")

    def _connect(self) -> Response:
        response = Response(self.url, self.place)
        if response.status == 416:
            response.close()
            raise HTTPError(f"the file ends before byte {self.place}")
        if response.status == 206 and response.start not in (None, self.place):
            response.close()
            raise HTTPError(f"it answered with another piece than from byte {self.place} on")
        if self.size is None:
            self.size = response.total
        left = self.place if response.status == 200 else 0  # the server knows no ranges: read up to the place again
        while left and (data := response.read(min(left, CHUNK))):
            left -= len(data)
        return response

    def _next(self, response: Response, size: int) -> bytes:
        data = response.read(size)
        if not data and self.size is not None and self.place < self.size:
            raise ConnectionBroken(f"closed at byte {self.place} of {self.size}")
        return data


def open_url(url: str, start: int = 0, tries: int = TRIES, first_tries: int | None = None) -> RemoteFile:
    """Return a file over HTTP as a stream.

    Args:
        url: http or https.
        start: the first byte that is read.
        tries: how often in a row it may break off.
        first_tries: how often it is asked at first, if not as often: one that never answers is soon given up.

    Raises:
        ConnectionBroken: no answer, in so many tries.
        HTTPError: another address, or an answer that is no file.
    """
    return RemoteFile(url, start, tries, first_tries)


def size_of(url: str) -> int | None:
    """Return how many bytes a server says a file has, None if it does not say. Raises ConnectionBroken."""
    import requests

    session = _session()
    try:
        answer = session.head(url, headers={"Accept-Encoding": "identity"}, timeout=ANSWER, allow_redirects=True)
    except requests.RequestException as error:
        raise ConnectionBroken(_reason(error)) from None
    finally:
        session.close()
    return _total(answer) if answer.status_code == 200 else None


def read_url(url: str, limit: int) -> bytes:
    """Return a small file. Raises HTTPError if it cannot be fetched, or has more than `limit` bytes."""
    data = b""
    with open_url(url, tries=1) as file:
        while len(data) <= limit and (chunk := file.read(min(CHUNK, limit + 1 - len(data)))):
            data += chunk
    if len(data) > limit:
        raise HTTPError(f"more than {limit / 2**20:g} MiB")
    return data
