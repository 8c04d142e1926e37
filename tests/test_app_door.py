"""What the app takes of those who are not in, and what one of those who are can do to the others."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from ldm_lab.app import door as doors
from ldm_lab.app.door import Door, caller, network
from ldm_lab.app.guard import Guard
from ldm_lab.app.hosts import Hosts
from ldm_lab.app.limits import Limits
from ldm_lab.errors import UserError

PLACE = b"127.0.0.1"


class Room:
    """Stands for the store: keeps what room was asked for."""

    folder = Path("uploads")

    def __init__(self):
        self.asked = []

    def make_room(self, coming):
        self.asked.append(coming)


def knock(path, length, body=b"--x", cookie="", others=()):
    """Send a multipart request to a guard with a password; returns its answer's status (200: let through), the room."""
    room, said = Room(), []

    async def app(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        said.append(message)

    guard = Guard(app, 2**20, {"sample": ["prompts"]}, room, SimpleNamespace(refusal=_fits), Hosts(), is_locked=True)
    guard.coming += others
    headers = {b"host": PLACE, b"content-type": b"multipart/form-data; boundary=x", b"cookie": cookie.encode()}
    if length is not None:
        headers[b"content-length"] = str(length).encode()
    scope = {
        "type": "http", "path": path, "method": "POST", "headers": list(headers.items()), "client": ("10.0.0.1", 9),
        "app": SimpleNamespace(cookie_id="c", tokens={"t"}),
    }  # fmt: skip
    asyncio.run(guard(scope, receive, send))
    return next(message["status"] for message in said if "status" in message), room.asked


async def _fits(path, number):
    return ""


IN = "access-token-unsecure-c=t"


@pytest.mark.parametrize(("path", "length", "cookie", "status", "room"), [
    ("/login", 60_000, "", 200, []), ("/login", 500_000, "", 413, []), ("/gradio_api/upload", 500_000, "", 401, []),
    ("/gradio_api/upload", 500_000, IN, 200, [500_000 + 7]),
    ("/gradio_api/upload/", None, IN, 200, [2**20 + 2**16 + 7]),
    ("/gradio_api/upload", 2**21, IN, 413, []), ("/gradio_api/component_server", 2**21, IN, 200, [2**21 + 7]),
    ("/gradio_api/queue/join", 2**20, IN, 200, []),
], ids=["login", "long-login", "out", "in", "unknown-length", "too-long", "canvas", "elsewhere"])  # fmt: skip
def test_only_uploads_of_those_who_are_in_make_room(path, length, cookie, status, room):
    """As many bytes as they say, or as they may be, and those of the others that are under way."""
    assert knock(path, length, cookie=cookie, others=[7]) == (status, room)


def test_a_form_is_looked_at_as_any_body():
    body = b'{"prompts": [], "init_image": {"path": "/etc/passwd"}}'
    assert knock("/gradio_api/call/v2/sample", len(body), body, IN)[0] == 400


def test_wrong_passwords_of_one_address_do_not_lock_out_another(monkeypatch, caplog):
    monkeypatch.setattr(doors, "FIRST_DELAY", 0.05)

    async def many():
        door = Door("geheim")

        async def come(place, password):
            caller.set(place)
            try:
                return await door.is_right("me", password)
            except Exception as error:
                return error.status_code

        wrong = [asyncio.create_task(come("10.0.0.1", f"{number}")) for number in range(20)]
        await asyncio.sleep(0)
        found = await asyncio.wait_for(asyncio.create_task(come("10.0.0.2", "geheim")), 0.5)
        same = await asyncio.create_task(come("::ffff:10.0.0.1", "geheim"))
        first = await wrong[0]
        refused = [task.result() for task in wrong if task.done()]
        for task in wrong:
            task.cancel()
        return found, same, first, refused.count(429)

    assert asyncio.run(many()) == (True, 429, False, 4)
    assert "a wrong password from 10.0.0.1, the 1. in a row" in caplog.text


def test_so_many_addresses_are_remembered(monkeypatch):
    monkeypatch.setattr(doors, "MOST_ADDRESSES", 3)

    async def many():
        door = Door("geheim")
        for number in range(9):
            caller.set(f"10.0.0.{number}")
            assert await door.is_right("me", "geheim")
        return list(door._addresses)

    assert asyncio.run(many()) == ["10.0.0.6", "10.0.0.7", "10.0.0.8"]


@pytest.mark.parametrize(("address", "counts_as"), [
    ("10.0.0.1", "10.0.0.1"), ("::ffff:10.0.0.1", "10.0.0.1"), ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
    ("fe80::1%eth0", "fe80::/64"), ("", ""), ("x" * 999, "x" * 100),
], ids=["v4", "mapped", "v6", "zone", "none", "odd"])  # fmt: skip
def test_what_an_address_counts_as(address, counts_as):
    assert network(address) == counts_as


@pytest.mark.parametrize(("upload", "stored", "fits"), [(32, 32, False), (32, 512, False), (32, 513, True)], ids=str)
def test_uploads_that_come_at_once_fit(upload, stored, fits):
    if fits:
        assert Limits(upload=upload, stored=stored).stored == stored
    else:
        with pytest.raises(UserError, match=f"--max-stored: {stored} MiB are too few: 16 files of 32 .*takes 513"):
            Limits(upload=upload, stored=stored)
