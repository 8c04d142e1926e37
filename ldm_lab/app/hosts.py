"""The names that the page answers to: a page of elsewhere that is made to lead here (DNS rebinding) has another."""

import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from ldm_lab.errors import UserError

EVERYWHERE = ("0.0.0.0", "::")  # of --host: all addresses of this machine


@dataclass(frozen=True)
class Hosts:
    """What may stand in a request's Host, and in its Origin where it has one.

    Attributes:
        listening: where the program listens; `EVERYWHERE` takes any address in numbers.
        others: further names, such as those of a server in front of this one.
    """

    listening: str = "127.0.0.1"
    others: Sequence[str] = ()

    def refusal(self, host: str, origin: str | None) -> str:
        """Return why a request is not answered; "" if it is."""
        if not self._fits(f"//{host}"):
            return f"Host {host[:100]!r}: this is no name of this page; --allow-host NAME adds one"
        if origin is not None and not self._fits(origin):
            return f"Origin {origin[:100]!r}: pages of elsewhere are not answered; --allow-host NAME adds a name"
        return ""

    def _fits(self, address: str) -> bool:
        try:
            name = (urlsplit(address).hostname or "").rstrip(".")
        except ValueError:
            return False
        if name == "localhost" or name in {_plain(each) for each in (self.listening, *self.others)}:
            return True
        try:
            number = ipaddress.ip_address(name)
        except ValueError:
            return False
        return number.is_loopback or _plain(self.listening) in EVERYWHERE


def check_listening(host: str) -> None:
    """Raise UserError, in a line that names it, for a host that is not this machine."""
    try:
        family, _, _, _, address = socket.getaddrinfo(_plain(host), 0, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise UserError(f"--host {host}: no machine of this name is found; 127.0.0.1 is this one alone") from None
    try:
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.bind(address)
    except OSError:
        raise UserError(f"--host {host}: no address of this machine; 0.0.0.0 listens on all that it has") from None


def _plain(host: str) -> str:
    return host.strip().strip("[]").rstrip(".").lower()
