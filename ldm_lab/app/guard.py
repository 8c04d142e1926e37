"""What no request may do: have the server fetch an address, send more than is taken, or find a page that frames it."""

import json
from collections.abc import Mapping, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ldm_lab.errors import unknown
from ldm_lab.io.json_files import JsonObject

JSON_LIMIT = 4 * 2**20  # bytes of a request that uploads nothing
MULTIPART = 2**16  # bytes around an uploaded file
NO_FETCHING = (
    "/proxy=",
    "/file=http",
    "/file/http",
    "/file=//",
    "/deep_link",
)  # of paths: what they ask the server for
# The page needs nothing of other machines; should it ask for something, the browser does not send it.
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'; base-uri 'self'"
BY_NAME = "/gradio_api/call/v2/"  # before the name of an endpoint
HEADERS = {
    "content-security-policy": POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
}  # fmt: skip


class _Named(JsonObject):
    """An object of a request, by name."""


class Guard:
    """Stands before the page."""

    def __init__(self, app: ASGIApp, upload: int, endpoints: Mapping[str, Sequence[str]]) -> None:
        """Stand before an application.

        Args:
            app: the application.
            upload: the most bytes of an uploaded file.
            endpoints: that are called by the names of their parameters.
        """
        self.app, self.upload, self.endpoints = app, upload, endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].lower()
        if any(part in path for part in NO_FETCHING):
            await PlainTextResponse("addresses are not fetched here", 403)(scope, receive, send)
            return
        kind = Headers(scope=scope).get("content-type", "")
        uploads = kind.startswith("multipart/")
        limit = self.upload + MULTIPART if uploads else JSON_LIMIT
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdigit() or int(length) > limit:
            await PlainTextResponse(f"{limit} bytes at most are taken", 413)(scope, receive, send)
            return
        if scope["method"] == "POST" and not uploads:
            body = await _body(receive, limit)
            if body is None or (reason := self._wrong(body, scope["path"])):
                text, code = (f"{limit} bytes at most are taken", 413) if body is None else (reason, 400)
                await PlainTextResponse(text, code)(scope, receive, send)
                return
            receive = _again(body, receive)
        elif uploads:
            receive = _counted(receive, limit)
        await self.app(scope, receive, _with_headers(send))

    def _wrong(self, body: bytes, path: str) -> str:
        """Return why a JSON body is not taken; "" if nothing is wrong with it."""
        addresses: list[str] = []

        def look(entry: _Named) -> _Named:
            if isinstance(path := entry.get("path"), str) and ("://" in path or path.strip().startswith("//")):
                addresses.append(path)
            return entry

        _, called, endpoint = path.rstrip("/").rpartition(BY_NAME)
        try:
            content = json.loads(body or b"null", object_hook=look)
        except ValueError:  # no JSON: a form, or something that the application refuses
            return "JSON is needed" if called else ""
        except RecursionError:
            return "nested too deeply"
        if addresses:
            return "addresses are not fetched here; upload the file"
        if not called:
            return ""
        if endpoint not in self.endpoints:
            return unknown("endpoint", endpoint[:100], self.endpoints)
        if not isinstance(content, dict):
            return "an object with the names of parameters is needed"
        known = self.endpoints[endpoint]
        return next((unknown("parameter", name[:100], known) for name in content if name not in known), "")


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


def _with_headers(send: Send) -> Send:
    async def call(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return call
