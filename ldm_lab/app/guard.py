"""What no request may do.

Come by another name than the page's, pass the login, have the server fetch an address or open a file of its own, use
what the page does not, send more than is taken, or find a page that frames it.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from http.cookies import CookieError, SimpleCookie
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ldm_lab.app.door import caller
from ldm_lab.app.hosts import Hosts
from ldm_lab.app.limits import MOST_UPLOADS, MULTIPART
from ldm_lab.app.line import Line
from ldm_lab.app.store import Store, named_files
from ldm_lab.errors import unknown
from ldm_lab.io.json_files import Json

JSON_LIMIT = 4 * 2**20  # bytes of a request that uploads nothing
CANVAS_LIMIT = 16 * 2**20  # bytes of a painted mask
LOGIN_LIMIT = 2**16  # bytes of what those may send who are not in
UPLOAD_SECONDS, BODY_SECONDS, STALLED_SECONDS = 600, 60, 30  # of an upload, another body, a listener that takes nothing
NO_FETCHING = (
    "/proxy=",
    "/file=http",
    "/file/http",
    "/file=//",
    "/deep_link",
)  # of paths: what they ask the server for
# The page needs nothing of other machines; should it ask for something, the browser does not send it.
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'; base-uri 'self'"
API = "/gradio_api/"
# What the login page needs; all else below API, and all that is sent, is for those who are in.
OPEN = ("startup-events", "theme.css", "login_check", "user", "token", "app_id")
# What the page and programs use; the library has more, which nobody needs here. Those that end in / or = go on.
USED = (
    *OPEN, "info", "openapi.json", "call/", "run/", "queue/join", "queue/data", "queue/status", "cancel", "reset",
    "heartbeat/", "upload", "upload_progress", "file=", "component_server",
)  # fmt: skip
UPLOAD, CANVAS = f"{API}upload", f"{API}component_server"
BY_NAME = f"{API}call/v2/"  # before the name of an endpoint
HEADERS = {
    "content-security-policy": POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
}  # fmt: skip


class Guard:
    """Stands before the page."""

    def __init__(
        self,
        app: ASGIApp,
        upload: int,
        endpoints: Mapping[str, Sequence[str]],
        store: Store,
        line: Line,
        hosts: Hosts,
        is_locked: bool = False,
    ) -> None:
        """Stand before an application.

        Args:
            app: the application.
            upload: the most bytes of an uploaded file.
            endpoints: that are called by the names of their parameters.
            store: of uploaded files.
            line: of those who wait.
            hosts: the names that the page answers to.
            is_locked: whether there is a password.
        """
        self.app, self.upload, self.endpoints = app, upload, endpoints
        self.store, self.line, self.hosts, self.is_locked = store, line, hosts, is_locked
        self.coming: list[int] = []  # bytes of each upload that is under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if refused := self._refusal(scope):
            await refused(scope, receive, send)
            return
        send = _with_headers(send)
        caller.set(scope["client"][0] if scope.get("client") else "")
        limit, is_upload = self._limit(scope)
        length = Headers(scope=scope).get("content-length")
        if length is not None and not (length.isdigit() and int(length) <= limit):
            await _too_long(limit)(scope, receive, send)
        elif is_upload:
            await self._take_upload(scope, receive, send, limit if length is None else int(length))
        elif scope["method"] == "POST":
            await self._take_body(scope, receive, send, limit)
        else:
            await self._follow(scope, receive, send)

    def _limit(self, scope: Scope) -> tuple[int, bool]:
        """Return how many bytes a request may send, and whether they are files.

        Files are taken where the page sends them, of those who are in; a form of any kind is a short body elsewhere.
        """
        path = scope["path"].rstrip("/")
        if Headers(scope=scope).get("content-type", "").strip().lower().startswith("multipart/"):
            if path == UPLOAD:
                return self.upload + MULTIPART, True
            if path == CANVAS:
                return CANVAS_LIMIT, True
        return (JSON_LIMIT, False) if path.startswith(API) else (LOGIN_LIMIT, False)

    async def _take_upload(self, scope: Scope, receive: Receive, send: Send, length: int) -> None:
        """Let an upload through, once there is room for it and all others that are under way."""
        if len(self.coming) >= MOST_UPLOADS:
            await _refused("too many uploads at once; try again later", 429)(scope, receive, send)
            return
        self.coming.append(length)
        try:
            await run_in_threadpool(self.store.make_room, sum(self.coming))
            async with asyncio.timeout(UPLOAD_SECONDS):
                await self.app(scope, _counted(receive, length), send)
        except TimeoutError:
            await _refused(f"an upload may take {UPLOAD_SECONDS} seconds", 408)(scope, receive, send)
        finally:
            self.coming.remove(length)

    async def _take_body(self, scope: Scope, receive: Receive, send: Send, limit: int) -> None:
        """Let a request with a short body through, or refuse what it asks for."""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _body(receive, limit)
        except TimeoutError:
            await _refused(f"a request may take {BODY_SECONDS} seconds", 408)(scope, receive, send)
            return
        if body is None:
            await _too_long(limit)(scope, receive, send)
            return
        reason = self._wrong(body, scope["path"])
        full = "" if reason else await self.line.refusal(scope["path"], _function(body))
        if reason or full:
            await _refused(reason or full, 400 if reason else 429)(scope, receive, send)
            return
        await self.app(scope, _again(body, receive), send)

    async def _follow(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request without a body through; a stream of events counts while it is open and taken."""
        key = _followed(scope)
        if key is None:
            await self.app(scope, receive, send)
            return
        with self.line.followers.following(key):
            try:
                await self.app(scope, receive, _with_patience(send))
            except TimeoutError:  # nobody takes what is sent
                return

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        """Return what is said to a request that is refused whatever it sends; None lets it through."""
        headers, path = Headers(scope=scope), scope["path"]
        if reason := self.hosts.refusal(headers.get("host", ""), headers.get("origin")):
            return _refused(reason, 403)
        if any(part in path.lower() for part in NO_FETCHING):
            return _refused("addresses are not fetched here", 403)
        if not _is_used(path):
            return _refused("nothing here", 404)
        if self.is_locked and not _is_open(path, scope["method"]) and not _is_logged_in(scope):
            return _refused("the password is needed: log in first", 401)
        return None

    def _wrong(self, body: bytes, path: str) -> str:
        """Return why a JSON body is not taken; "" if nothing is wrong with it."""
        endpoint = _called(path)
        try:
            content = json.loads(body or b"null")
        except ValueError:  # no JSON: a form, or something that the application refuses
            return "JSON is needed" if endpoint else ""
        except RecursionError:
            return "nested too deeply"
        if reason := self._wrong_file(content):
            return reason
        if not endpoint:
            return ""
        if endpoint not in self.endpoints:
            return unknown("endpoint", endpoint[:100], self.endpoints)
        if not isinstance(content, dict):
            return "an object with the names of parameters is needed"
        known = self.endpoints[endpoint]
        return next((unknown("parameter", name[:100], known) for name in content if name not in known), "")

    def _wrong_file(self, content: Json) -> str:
        """Return what is wrong with the first file named in a request that is not an uploaded one; "" without one."""
        for name, path in named_files(content):
            if reason := self._wrong_path(path):
                return f"{name[:100]}: {reason}" if name else reason
        return ""

    def _wrong_path(self, path: str) -> str:
        if "://" in path or path.strip().startswith("//"):
            return "addresses are not fetched here; upload the file"
        try:
            file = Path(path).resolve()
            if not file.is_relative_to(self.store.folder.resolve()):
                return "an uploaded file is needed; paths and addresses are not opened here"
            return "" if file.is_file() else f"{file.name[:100]}: is not there any more; upload it again"
        except (OSError, ValueError, RuntimeError):  # too long, a zero byte, a loop of links
            return "an uploaded file is needed; this is no path of one"


def _called(path: str) -> str:
    """Return the endpoint that is called by the names of its parameters; "" if none is."""
    _, _, endpoint = path.rstrip("/").rpartition(BY_NAME)
    return endpoint if BY_NAME in path else ""


def _function(body: bytes) -> int | None:
    """Return the number of the function that a body names, as the application reads it: "3" and 3.0 are 3."""
    try:
        return int(float(json.loads(body or b"null")["fn_index"]))
    except (ValueError, TypeError, KeyError, IndexError, OverflowError):
        return None


def _followed(scope: Scope) -> str | None:
    """Return the event or the session whose stream of events is asked for; None if something else is."""
    path = scope["path"].rstrip("/")
    if path == f"{API}queue/data":
        return QueryParams(scope["query_string"]).get("session_hash")
    if path.startswith(f"{API}call/"):
        return str(path.rpartition("/")[2])
    return None


def _is_used(path: str) -> bool:
    """Return whether the page, or a program, has a use for something below API."""
    if not path.startswith(API):
        return not path.startswith("/monitoring")
    name = path.removeprefix(API)
    return any(name.startswith(used) if used.endswith(("/", "=")) else name.rstrip("/") == used for used in USED)


def _refused(reason: str, code: int) -> JSONResponse:
    """Return what is said to a request that is not let through, as the application says such things."""
    return JSONResponse({"detail": reason}, code)


def _too_long(limit: int) -> JSONResponse:
    return _refused(f"{limit} bytes at most are taken", 413)


def _is_open(path: str, method: str) -> bool:
    """Return whether something is for those, too, who are not logged in: the login page and what it needs."""
    if path.startswith(API):
        return method in ("GET", "HEAD") and path.removeprefix(API).rstrip("/") in OPEN
    return method in ("GET", "HEAD") or path.rstrip("/") == "/login"


def _is_logged_in(scope: Scope) -> bool:
    """Return whether a request has the cookie that a login has given."""
    app = scope["app"]
    cookies = SimpleCookie()
    try:
        cookies.load(Headers(scope=scope).get("cookie", ""))
    except CookieError:
        return False
    names = (f"access-token-{app.cookie_id}", f"access-token-unsecure-{app.cookie_id}")
    return any(name in cookies and cookies[name].value in app.tokens for name in names)


async def _body(receive: Receive, limit: int) -> bytes | None:
    """Return the body of a request; None if it is longer than the limit."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > limit:
            return None
        if not message.get("more_body") or message["type"] == "http.disconnect":
            return body


def _again(body: bytes, receive: Receive) -> Receive:
    """Return what gives a body that was read once more, and then what comes after it."""
    given = False

    async def call() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return call


def _counted(receive: Receive, limit: int) -> Receive:
    """Return what breaks off a body that is longer than the limit."""
    seen = 0

    async def call() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        return {"type": "http.disconnect"} if seen > limit else message

    return call


def _with_patience(send: Send) -> Send:
    """Return what gives up on a listener that takes nothing. Raises TimeoutError."""

    async def call(message: Message) -> None:
        async with asyncio.timeout(STALLED_SECONDS):
            await send(message)

    return call


def _with_headers(send: Send) -> Send:
    async def call(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return call
